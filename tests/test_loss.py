"""Losses against plain numpy and scikit-image, and properties that every loss must have."""
import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from skimage.metrics import structural_similarity

from loss import LOSSES, berhu, huber, make_loss, silog, ssim

every_loss = pytest.mark.parametrize("name", LOSSES)


def scene(batch=3, height=20, width=18, dtype=torch.float64):
    """A prediction about 10 % off, the ground truth, and a mask whose holes differ from image to image."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    target = 2 + 0.15 * x + 0.1 * y + 2 * (x > 11) + torch.rand(batch, 1, height, width)
    pred = target * (1 + 0.1 * torch.randn(target.shape)) + 0.2
    mask = torch.ones_like(target, dtype=torch.bool)
    mask[0, :, :3, :4] = False
    mask[1:, :, 15:, 9] = False
    return pred.to(dtype), target.to(dtype), mask


def loss_and_gradient(loss, pred, target, mask):
    pred = pred.clone().requires_grad_()
    value = loss(pred, target, mask)
    value.backward()
    return value.detach(), pred.grad


# ------------------------------------------------------------------------------------------------------------
# The values: plain numpy, of prediction, ground truth and mask as (B, H, W) arrays, and what each loss is for
# ------------------------------------------------------------------------------------------------------------


def errors(p, d, m):
    return abs(p - d)[m]


def plain_huber(p, d, m, delta=1.0):
    return np.mean([e * e / 2 if e <= delta else delta * e - delta * delta / 2 for e in errors(p, d, m)])


def plain_berhu(p, d, m):
    c = max(errors(p, d, m)) / 5
    return np.mean([e if e <= c else (e * e + c * c) / (2 * c) for e in errors(p, d, m)])


def plain_silog(p, d, m, lam=0.5):
    logs = [np.log(a[v]) - np.log(b[v]) for a, b, v in zip(p, d, m) if v.any()]
    return np.mean([np.mean(g**2) - lam * np.mean(g)**2 for g in logs])


def plain_gradient(p, d, m):
    p = np.where(m, p, np.nan)  # so is a difference with an invalid pixel
    return sum(np.nanmean(abs(np.diff(p, axis=axis) - np.diff(d, axis=axis))) for axis in (1, 2))


def scikit_ssim(p, d, m, max_depth):
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)
    images = [structural_similarity(a, b, data_range=max_depth, **options)[1] for a, b in zip(p, d)]
    whole = sliding_window_view(m, (11, 11), (1, 2)).all((3, 4))  # windows without an invalid pixel
    return np.mean((1 - np.stack(images)[:, 5:-5, 5:-5][whole]) / 2)


def plain_densedepth(p, d, m, max_depth):
    y, z = max_depth / p, max_depth / d
    return 0.1 * errors(y, z, m).mean() + plain_gradient(y, z, m) + scikit_ssim(y, z, m, 100)


PLAIN = {  # of prediction, ground truth, mask and max_depth
    "l1": lambda p, d, m, _: errors(p, d, m).mean(),
    "l2": lambda p, d, m, _: (errors(p, d, m)**2).mean(),
    "huber": lambda p, d, m, _: plain_huber(p, d, m),
    "berhu": lambda p, d, m, _: plain_berhu(p, d, m),
    "log": lambda p, d, m, _: np.sqrt(np.mean((np.log(p[m]) - np.log(d[m]))**2)),
    "silog": lambda p, d, m, _: plain_silog(p, d, m),
    "gradient": lambda p, d, m, _: plain_gradient(p, d, m),
    "ssim": scikit_ssim,
    "mae+grad+ssim": lambda p, d, m, most: (
        0.6 * errors(p, d, m).mean() + 0.2 * plain_gradient(p, d, m) + scikit_ssim(p, d, m, most)),
    "densedepth": plain_densedepth,
}


@every_loss
@pytest.mark.parametrize("max_depth", [10.0, 80.0])
def test_every_loss_equals_plain_numpy_or_scikit_image(name, max_depth):
    pred, target, mask = scene()
    pred[1] = 12 - pred[1]  # near and far exchanged: here the covariance is negative
    mask[2] = False  # an image without ground truth counts for nothing, not as a perfect one
    arrays = [x[:, 0].numpy() for x in (pred, target, mask)]
    value = make_loss(name, max_depth)(pred, target, mask)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(PLAIN[name](*arrays, max_depth), rel=1e-9)


def test_the_parameters_of_huber_and_silog_equal_plain_numpy():
    pred, target, mask = scene()
    arrays = [x[:, 0].numpy() for x in (pred, target, mask)]
    assert huber(pred, target, mask, 0.4).item() == pytest.approx(plain_huber(*arrays, 0.4), rel=1e-9)
    assert silog(pred, target, mask, 0.85).item() == pytest.approx(plain_silog(*arrays, 0.85), rel=1e-9)


DAMAGES = {
    "flipped": lambda d: d.flip(-1),
    "noisy": lambda d: d + 0.1 * torch.randn(d.shape),
    "half the contrast": lambda d: d.mean() + (d - d.mean()) / 2,
    "flat": lambda d: d.mean().expand_as(d),
    "scaled": lambda d: 1.1 * d,
    "0.5 m too far": lambda d: d + 0.5,
    "negative": torch.neg,
}


@every_loss
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_ground_truth_costs_nothing_and_every_damage_to_it_something(name, damage):
    _, target, mask = scene()
    loss = make_loss(name)
    assert abs(loss(target, target, mask).item()) < 1e-12
    cost = loss(DAMAGES[damage](target), target, mask).item()
    if name == "gradient" and damage == "0.5 m too far":
        assert abs(cost) < 1e-12  # it knows depth up to an offset only
    else:
        assert cost > 1e-5


# ------------------------------------------------------------------------------------------------------------
# Invalid pixels and difficult predictions
# ------------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf, 0.0, -1.0, 1e30])
def test_invalid_pixels_change_neither_loss_nor_gradient(name, junk):
    pred, target, mask = scene(dtype=torch.float32)
    value, slope = loss_and_gradient(make_loss(name), pred, target, mask)
    pred, target = torch.where(mask, pred, junk), torch.where(mask, target, junk)
    dirty_value, dirty_slope = loss_and_gradient(make_loss(name), pred, target, mask)
    assert torch.equal(value, dirty_value) and torch.equal(slope, dirty_slope)
    assert slope[~mask].eq(0).all() and slope[mask].ne(0).any()


@every_loss
def test_an_empty_mask_gives_zero_loss_and_zero_gradient(name):
    pred, target, mask = scene(dtype=torch.float32)
    nothing = torch.zeros_like(mask)
    value, slope = loss_and_gradient(make_loss(name), pred, math.nan * target, nothing)
    assert value.item() == 0 and slope.eq(0).all()


@every_loss
def test_perfect_flat_zero_negative_and_huge_predictions_have_finite_loss_and_gradient(name):
    _, target, mask = scene(dtype=torch.float32)
    flat = torch.full_like(target, 3.0)
    for pred in (target, flat, torch.zeros_like(target), -target, 1e5 * target):
        for depth in (target, flat):
            value, slope = loss_and_gradient(make_loss(name), pred, depth, mask)
            assert value.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "gradient"])
@pytest.mark.parametrize("depth", [0.0, -1.0])
def test_gradient_descent_raises_a_prediction_of_zero_or_less(name, depth):
    _, target, mask = scene(dtype=torch.float32)
    _, slope = loss_and_gradient(make_loss(name), torch.full_like(target, depth), target, mask)
    assert slope.sum() < 0


@pytest.mark.parametrize("name, floor", [("log", 0.001), ("silog", 0.001), ("densedepth", 0.1)])
def test_logs_and_reciprocals_are_steep_down_to_their_floor_and_gentle_below(name, floor):
    _, target, mask = scene()
    preds = [torch.full_like(target, depth) for depth in (2 * floor, floor, 0.0, -1.0)]
    above, at, zero, below = [make_loss(name)(pred, target, mask).item() for pred in preds]
    assert 1.05 * above < at < zero < 1.01 * at and zero < below < 1.5 * at


@every_loss
def test_a_nan_prediction_of_a_valid_pixel_is_not_hidden(name):
    pred, target, mask = scene()
    pred[0, 0, 9, 9] = math.nan
    assert make_loss(name)(pred, target, mask).isnan()


@every_loss
def test_shapes_that_would_broadcast_are_refused(name):
    pred, target, mask = scene()
    with pytest.raises(ValueError, match=r"\[3, 1, 20, 18\].*\[3, 20, 18\]"):
        make_loss(name)(pred, target[:, 0], mask)


def test_ssim_says_that_an_image_is_too_small():
    with pytest.raises(ValueError, match="11x11.*10x18"):
        ssim(*scene(height=10))


def test_an_unknown_loss_is_refused_with_the_names_of_all():
    with pytest.raises(ValueError, match="nope.*l1, l2, .*densedepth"):
        make_loss("nope")


# ------------------------------------------------------------------------------------------------------------
# Gradients and precision
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "berhu"])
def test_gradients_agree_with_finite_differences(name):
    pred, target, mask = scene()
    loss, step = make_loss(name), 1e-6 * torch.randn(pred.shape, dtype=pred.dtype)
    _, slope = loss_and_gradient(loss, pred, target, mask)
    difference = loss(pred + step, target, mask) - loss(pred - step, target, mask)
    assert difference.item() == pytest.approx(2 * (slope * step).sum().item(), rel=1e-6)


def test_the_gradient_of_berhu_takes_its_threshold_as_a_constant():
    pred, target, mask = scene()
    pred = target + (pred - target) / 10  # so small that those of invalid pixels must not be the largest
    _, slope = loss_and_gradient(berhu, pred, target, mask)
    error = torch.where(mask, pred - target, 0)
    c = error.abs().max() / 5
    torch.testing.assert_close(slope, torch.where(error.abs() <= c, error.sign(), error / c) / mask.sum())


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_half_precision_prediction_is_compared_in_float32(name, dtype):
    pred, target, mask = scene(dtype=torch.float32)
    pred = pred.to(dtype)
    with torch.autocast("cpu", dtype):
        value, slope = loss_and_gradient(make_loss(name), pred, target, mask)
    expected_value, expected_slope = loss_and_gradient(make_loss(name), pred.float(), target, mask)
    assert value.dtype == torch.float32 and torch.equal(value, expected_value)
    torch.testing.assert_close(slope, expected_slope.to(dtype))


def test_ssim_keeps_its_digits_on_far_walls():
    """In float32, E[x^2] - E[x]^2 at 9 m is 6 % off the variance of 1.4 cm, unless the offset goes first."""
    pred, target = 9 + 0.05 * torch.rand(2, 4, 1, 32, 32)
    exact = ssim(pred.double(), target.double(), target > 0).item()
    assert ssim(pred, target, target > 0).item() == pytest.approx(exact, rel=1e-4)
