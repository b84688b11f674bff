"""Losses against plain loops over pixels, against scikit-image, and properties that every loss must have."""
import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from loss import LOSSES, berhu, huber, log, make_loss, silog, ssim

every_loss = pytest.mark.parametrize("name", LOSSES)


def scene(batch=3, height=20, width=18, dtype=torch.float64):
    """A prediction about 10 % off, the ground truth, and a mask whose holes differ from image to image."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    target = 2 + 0.15 * x + 0.1 * y + 2 * (x > 11) + torch.rand(batch, 1, height, width, generator=generator)
    pred = target * (1 + 0.1 * torch.randn(target.shape, generator=generator)) + 0.2
    mask = torch.ones_like(target, dtype=torch.bool)
    mask[0, :, :3, :4] = False
    mask[1:, :, 15:, 9] = False
    return pred.to(dtype), target.to(dtype), mask


def whole_scene():
    pred, target, mask = scene()
    return pred, target, torch.ones_like(mask)


def loss_and_gradient(loss, pred, target, mask):
    pred = pred.clone().requires_grad_()
    value = loss(pred, target, mask)
    value.backward()
    return value.detach(), pred.grad


# ------------------------------------------------------------------------------------------------------------
# Plain loops: prediction, ground truth and mask as (B, H, W) numpy arrays -> float
# ------------------------------------------------------------------------------------------------------------


def valid_pairs(p, d, m):
    return [(p[i], d[i]) for i in np.ndindex(p.shape) if m[i]]


def errors(p, d, m):
    return np.array([abs(a - b) for a, b in valid_pairs(p, d, m)])


def loop_huber(p, d, m, delta=1.0):
    return np.mean([e * e / 2 if e <= delta else delta * e - delta * delta / 2 for e in errors(p, d, m)])


def loop_berhu(p, d, m):
    c = max(errors(p, d, m)) / 5
    return np.mean([e if e <= c else (e * e + c * c) / (2 * c) for e in errors(p, d, m)])


def loop_log(p, d, m):
    return math.sqrt(np.mean([(math.log(a) - math.log(b))**2 for a, b in valid_pairs(p, d, m)]))


def loop_silog(p, d, m, lam=0.5):
    costs = []
    for image in range(len(p)):
        g = [math.log(a) - math.log(b) for a, b in valid_pairs(p[image], d[image], m[image])]
        if g:
            costs.append(sum(x * x for x in g) / len(g) - lam * (sum(g) / len(g))**2)
    return np.mean(costs)


def loop_gradient(p, d, m):
    costs = {(0, 1): [], (1, 0): []}
    for b, y, x in np.ndindex(p.shape):
        for (dy, dx), found in costs.items():
            i, j = (b, y, x), (b, y + dy, x + dx)
            if j[1] < p.shape[1] and j[2] < p.shape[2] and m[i] and m[j]:
                found.append(abs((p[j] - p[i]) - (d[j] - d[i])))
    return sum(np.mean(found) for found in costs.values())


def loop_ssim(p, d, m, max_depth):
    bell = np.exp(-(np.arange(11) - 5.0)**2 / (2 * 1.5**2))
    weight, costs = np.outer(bell, bell) / bell.sum()**2, []
    c1, c2 = (0.01 * max_depth)**2, (0.03 * max_depth)**2
    for b, y, x in np.ndindex(p.shape[0], p.shape[1] - 10, p.shape[2] - 10):
        window = np.s_[b, y:y + 11, x:x + 11]
        if m[window].all():
            mp, md = (weight * p[window]).sum(), (weight * d[window]).sum()
            ep, ed = p[window] - mp, d[window] - md
            value = (2 * mp * md + c1) * (2 * (weight * ep * ed).sum() + c2)
            value /= (mp**2 + md**2 + c1) * ((weight * ep**2).sum() + (weight * ed**2).sum() + c2)
            costs.append((1 - value) / 2)
    return np.mean(costs)


def loop_densedepth(p, d, m, max_depth):
    y, z = max_depth / p, max_depth / d
    return 0.1 * errors(y, z, m).mean() + loop_gradient(y, z, m) + loop_ssim(y, z, m, 100)


LOOPS = {  # of prediction, ground truth, mask and max_depth
    "l1": lambda p, d, m, _: errors(p, d, m).mean(),
    "l2": lambda p, d, m, _: (errors(p, d, m)**2).mean(),
    "huber": lambda p, d, m, _: loop_huber(p, d, m),
    "berhu": lambda p, d, m, _: loop_berhu(p, d, m),
    "log": lambda p, d, m, _: loop_log(p, d, m),
    "silog": lambda p, d, m, _: loop_silog(p, d, m),
    "gradient": lambda p, d, m, _: loop_gradient(p, d, m),
    "ssim": loop_ssim,
    "mae+grad+ssim": lambda p, d, m, most: (
        0.6 * errors(p, d, m).mean() + 0.2 * loop_gradient(p, d, m) + loop_ssim(p, d, m, most)),
    "densedepth": loop_densedepth,
}


@every_loss
@pytest.mark.parametrize("max_depth", [10.0, 80.0])
def test_every_loss_equals_a_plain_loop(name, max_depth):
    pred, target, mask = scene()
    pred[1] = 12 - pred[1]  # near and far exchanged: here the covariance is negative
    mask[2] = False  # an image without ground truth counts for nothing, not as a perfect one
    arrays = [x[:, 0].numpy() for x in (pred, target, mask)]
    value = make_loss(name, max_depth)(pred, target, mask)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(LOOPS[name](*arrays, max_depth), rel=1e-9)


def test_the_parameters_of_huber_and_silog_equal_a_plain_loop():
    pred, target, mask = scene()
    arrays = [x[:, 0].numpy() for x in (pred, target, mask)]
    for delta in (0.1, 0.4):
        assert huber(pred, target, mask, delta).item() == pytest.approx(loop_huber(*arrays, delta), rel=1e-9)
    assert silog(pred, target, mask, 0.85).item() == pytest.approx(loop_silog(*arrays, 0.85), rel=1e-9)
    assert silog(1.3 * target, target, mask, 1.0).item() == pytest.approx(0, abs=1e-9)  # forgives a scale


@pytest.mark.parametrize("max_depth", [10.0, 80.0])
def test_ssim_agrees_with_scikit_image(max_depth):
    pred, target, mask = whole_scene()
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)
    images = [structural_similarity(p[0].numpy(), d[0].numpy(), data_range=max_depth, **options)[1]
              for p, d in zip(pred, target)]
    expected = np.mean([image[5:-5, 5:-5] for image in images])  # windows that lie wholly inside
    assert 1 - 2 * ssim(pred, target, mask, max_depth).item() == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------------------------------
# The ground truth is best
# ------------------------------------------------------------------------------------------------------------


def generator():
    return torch.Generator().manual_seed(1)


DAMAGES = {
    "flipped": lambda d: d.flip(-1),
    "upside down": lambda d: d.flip(-2),
    "shuffled": lambda d: d.flatten()[torch.randperm(d.numel(), generator=generator())].view_as(d),
    "noisy": lambda d: d + 0.1 * torch.randn(d.shape, generator=generator()),
    "half the contrast": lambda d: d.mean() + (d - d.mean()) / 2,
    "twice the contrast": lambda d: d.mean() + (d - d.mean()) * 2,
    "flat": lambda d: d.mean().expand_as(d),
    "scaled": lambda d: 1.1 * d,
    "0.5 m too far": lambda d: d + 0.5,
    "0.5 m too near": lambda d: d - 0.5,
    "zero": torch.zeros_like,
    "negative": torch.neg,
}


@every_loss
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_ground_truth_costs_nothing_and_every_damage_to_it_something(name, damage):
    _, target, mask = whole_scene()
    loss = make_loss(name)
    assert abs(loss(target, target, mask).item()) < 1e-12
    cost = loss(DAMAGES[damage](target), target, mask).item()
    if name == "gradient" and damage.startswith("0.5 m"):
        assert abs(cost) < 1e-12  # it knows depth up to an offset only
    else:
        assert cost > 1e-5


@pytest.mark.parametrize("p, d, factor", [(0.5, 2.0, 4), (0.3, 0.6, 2)])
def test_the_log_loss_is_not_a_difference_of_squared_logs(p, d, factor):
    """sqrt(log^2 d - log^2 p) makes 0.5 m a perfect prediction of 2 m, and is NaN for p < d < 1."""
    pred, target = torch.full((1, 1, 1, 1), p), torch.full((1, 1, 1, 1), d)
    assert log(pred, target, target > 0).item() == pytest.approx(math.log(factor))


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
@pytest.mark.parametrize("junk", [0.0, math.nan])
def test_an_empty_mask_gives_zero_loss_and_zero_gradient(name, junk):
    pred, target, mask = scene(dtype=torch.float32)
    target, mask = torch.full_like(target, junk), torch.zeros_like(mask)
    value, slope = loss_and_gradient(make_loss(name), pred, target, mask)
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
    pred, target, mask = whole_scene()
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
    pred, target, mask = scene(batch=2, height=12, width=13)
    assert torch.autograd.gradcheck(lambda p: make_loss(name)(p, target, mask), pred.requires_grad_())


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
    pred, target = 9 + 0.05 * torch.rand(2, 4, 1, 32, 32, generator=generator())
    exact = ssim(pred.double(), target.double(), target > 0).item()
    assert ssim(pred, target, target > 0).item() == pytest.approx(exact, rel=1e-4)


def test_a_loss_that_is_added_is_told_the_range_if_it_takes_max_depth(monkeypatch):
    monkeypatch.setitem(LOSSES, "share", lambda pred, target, mask, max_depth=10.0: pred.mean() / max_depth)
    pred = torch.full((1, 1, 2, 2), 8.0)
    assert make_loss("share", 80.0)(pred, pred, pred > 0) == pytest.approx(0.1)
