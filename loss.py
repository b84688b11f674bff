"""Losses for monocular depth: (pred, target, mask) -> scalar, lower is better.

    pred, target    (B, 1, H, W) metres along the optical axis; pred may be 0, negative or half precision
    mask            (B, 1, H, W) bool, true where target is measured; what stands elsewhere never matters
    scalar          float32 (float64 for float64 predictions), 0 if nothing is measured

    loss = make_loss("l1")                            # or any other name in LOSSES, at the end
    loss = make_loss("densedepth", max_depth=80.0)    # some need the range of depth; the others ignore it
    loss(pred, target, (target > 0) & (target <= 80)).backward()

The functions may be called directly too: huber(pred, target, mask, delta=0.5). The file needs nothing but
torch, so it can be copied alone. In the formulas p is the predicted depth, d the ground truth, and mean is
over the valid pixels of the batch.
"""
import inspect
import math

import torch

# ------------------------------------------------------------------------------------------------------------
# What all losses share
# ------------------------------------------------------------------------------------------------------------


def prepare(pred, target, mask):
    """pred and target with at least float32's precision and 1 m in place of every invalid pixel.

    The replacement comes before any logarithm or division: masking their results would leave NaN in the
    gradient.
    """
    if not pred.shape == target.shape == mask.shape:  # (B, H, W) and (B, 1, H, W) would broadcast in silence
        shapes = f"pred {[*pred.shape]}, target {[*target.shape]}, mask {[*mask.shape]}"
        raise ValueError(f"shapes differ: {shapes}")
    dtype = torch.promote_types(pred.dtype, torch.float32)  # autocast's bfloat16 has 2 to 3 digits
    return torch.where(mask, pred.to(dtype), 1), torch.where(mask, target.to(dtype), 1)


def masked_mean(x, mask, dim=None):
    """Mean of x where mask is true, over dim or all of x; 0, with gradient 0, if the mask is empty."""
    return torch.where(mask, x, 0).sum(dim) / mask.sum(dim).clamp(min=1)


def log_depth(depth):
    """log(depth) from 1 mm up, as in evaluation; below that, a line of slope 1 per metre."""
    safe = depth.clamp(min=1e-3)
    return safe.log() + (depth - safe)  # a clamp has no gradient below 1 mm: its pixels would stay there


def inverse_depth(depth, max_depth):
    """max_depth / depth: 1 at max_depth, 100 at a hundredth of it; below, a line of slope -1 per metre."""
    safe = depth.clamp(min=max_depth / 100)  # at 1 mm the slope is -10^7: one pixel would outweigh the batch
    return max_depth / safe - (depth - safe)


# ------------------------------------------------------------------------------------------------------------
# Losses of single pixels
# ------------------------------------------------------------------------------------------------------------


def l1(pred, target, mask):
    """mean |p - d|, in m. The mean absolute error."""
    pred, target = prepare(pred, target, mask)
    return masked_mean((pred - target).abs(), mask)


def l2(pred, target, mask):
    """mean (p - d)^2, in m^2. The mean squared error: far walls, whose errors are large, decide it."""
    pred, target = prepare(pred, target, mask)
    return masked_mean((pred - target)**2, mask)


def huber(pred, target, mask, delta=1.0):
    """mean of e^2 / 2 where e = |p - d| <= delta, else delta (e - delta / 2), in m^2; delta in m.

    A parabola for small errors, a straight line for large ones.
    Huber: Robust Estimation of a Location Parameter, 1964.
    """
    pred, target = prepare(pred, target, mask)
    error = (pred - target).abs()
    return masked_mean(torch.where(error <= delta, error**2 / 2, delta * (error - delta / 2)), mask)


def berhu(pred, target, mask):
    """mean of e where e = |p - d| <= c, else (e^2 + c^2) / (2 c), with c = 0.2 max e over the batch, in m.

    Huber reversed. Laina et al.: Deeper Depth Prediction with Fully Convolutional Residual Networks, 2016.
    """
    pred, target = prepare(pred, target, mask)
    error = (pred - target).abs()  # 0 at invalid pixels, so that they never are the maximum
    c = (0.2 * error.detach().max()).clamp(min=1e-6)  # 0 for a perfect prediction, and then divided by
    return masked_mean(torch.where(error <= c, error, (error**2 + c**2) / (2 * c)), mask)


def log(pred, target, mask):
    """sqrt(mean (log p - log d)^2), no unit: 0.1 means about 10 % off. The RMSE of log depth.

    Not sqrt(log^2 d - log^2 p), as sometimes printed: NaN for p < d < 1, and 0 for p = 0.5, d = 2.
    """
    pred, target = prepare(pred, target, mask)
    mean = masked_mean((log_depth(pred) - log_depth(target))**2, mask)
    # The slope of sqrt at 0, a perfect prediction, is infinite: take the root of 1 there. A NaN stays NaN.
    return torch.where(mean == 0, 1, mean).sqrt() * (mean != 0)


def silog(pred, target, mask, lam=0.5):
    """mean g^2 - lam (mean g)^2 with g = log p - log d, no unit; per image, then the mean of the images.

    The scale-invariant error: lam = 1 forgives a wrong scale of the whole image, lam = 0.5 half of it.
    (Not the metric silog of eval.py, which is KITTI's: 100 times the standard deviation of g.)
    Eigen, Puhrsch, Fergus: Depth Map Prediction from a Single Image using a Multi-Scale Deep Network, 2014.
    """
    pred, target = prepare(pred, target, mask)
    g = log_depth(pred) - log_depth(target)
    dims = (1, 2, 3)  # all but the batch
    errors = masked_mean(g**2, mask, dims) - lam * masked_mean(g, mask, dims)**2  # (B,)
    return masked_mean(errors, mask.any(dims))


# ------------------------------------------------------------------------------------------------------------
# Losses of neighbourhoods
# ------------------------------------------------------------------------------------------------------------


def gradient(pred, target, mask):
    """mean |dx p - dx d| + mean |dy p - dy d|, in m per pixel; dx and dy are differences of neighbours.

    The edge loss: depth must rise and fall where the ground truth does; an offset costs nothing. A pair
    counts if both its pixels are valid. The difference comes before the absolute value:
    mean (|dx p| - |dx d|) is least for flat depth.
    """
    pred, target = prepare(pred, target, mask)
    error = pred - target  # dx p - dx d = dx (p - d)
    dx = masked_mean((error[..., 1:] - error[..., :-1]).abs(), mask[..., 1:] & mask[..., :-1])
    dy = masked_mean((error[..., 1:, :] - error[..., :-1, :]).abs(), mask[..., 1:, :] & mask[..., :-1, :])
    return dx + dy


def gaussian_mean(x, size=11, sigma=1.5):
    """Gaussian mean over every size x size window inside x: (B, C, H, W) -> (B, C, H-size+1, W-size+1).

    A sum of shifted views and no convolution: autocast and TF32, on by default, round what goes into one.
    """
    weights = [math.exp(-(i - size // 2)**2 / (2 * sigma**2)) for i in range(size)]
    for dim in (-2, -1):
        length = x.shape[dim] - size + 1
        x = sum(w / sum(weights) * x.narrow(dim, i, length) for i, w in enumerate(weights))
    return x


def ssim(pred, target, mask, max_depth=10.0):
    """mean (1 - SSIM) / 2 over all 11 x 11 windows without an invalid pixel, no unit: 0 alike, 1 opposite.

        SSIM = (2 mp md + c1) (2 spd + c2) / ((mp^2 + md^2 + c1) (sp^2 + sd^2 + c2))
        c1 = (0.01 R)^2, c2 = (0.03 R)^2

    m are means, s^2 variances, spd the covariance under a Gaussian of sigma 1.5; R = max_depth. Sparse ground
    truth (LiDAR) has no whole window: it costs 0.
    Wang et al.: Image Quality Assessment: From Error Visibility to Structural Similarity, 2004.
    """
    if min(pred.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11x11 pixels, not {pred.shape[-2]}x{pred.shape[-1]}")
    pred, target = prepare(pred, target, mask)
    # Variances do not depend on an offset, but E[x^2] - E[x]^2 loses fewer digits the nearer x is to 0.
    offset_p, offset_d = masked_mean(pred, mask).detach(), masked_mean(target, mask)
    p, d = pred - offset_p, target - offset_d
    mp, md, pp, dd, pd = gaussian_mean(torch.cat([p, d, p * p, d * d, p * d], 1)).split(1, 1)
    whole = gaussian_mean((~mask).to(p.dtype)) == 0  # every weight is above 0, so one invalid pixel shows
    c1, c2 = (0.01 * max_depth)**2, (0.03 * max_depth)**2
    structure = (2 * (pd - mp * md) + c2) / ((pp - mp**2) + (dd - md**2) + c2)
    mp, md = mp + offset_p, md + offset_d
    luminance = (2 * mp * md + c1) / (mp**2 + md**2 + c1)
    return masked_mean((1 - luminance * structure) / 2, whole)


# ------------------------------------------------------------------------------------------------------------
# Sums, and the table of names
# ------------------------------------------------------------------------------------------------------------


def mae_grad_ssim(pred, target, mask, max_depth=10.0):
    """0.6 l1 + 0.2 gradient + 1.0 ssim, of metres.

    The terms of Hafeez, Madden, Sistu, Ullah: Depth Estimation Using Weighted-Loss and Transfer Learning,
    2024 (arXiv:2404.07686), with the weights of a public notebook after it.
    """
    metres = 0.6 * l1(pred, target, mask) + 0.2 * gradient(pred, target, mask)
    return metres + ssim(pred, target, mask, max_depth)


def densedepth(pred, target, mask, max_depth=10.0):
    """0.1 l1 + gradient + ssim, of y = max_depth / depth, no unit: what is near counts most.

    Alhashim, Wonka: High Quality Monocular Depth Estimation via Transfer Learning, 2018 (arXiv:1812.11941).
    """
    pred, target = (inverse_depth(depth, max_depth) for depth in prepare(pred, target, mask))
    pixels = 0.1 * l1(pred, target, mask) + gradient(pred, target, mask)
    return pixels + ssim(pred, target, mask, max_depth=100.0)  # y goes up to 100


LOSSES = {"l1": l1, "l2": l2, "huber": huber, "berhu": berhu, "log": log, "silog": silog,
          "gradient": gradient, "ssim": ssim, "mae+grad+ssim": mae_grad_ssim, "densedepth": densedepth}


def make_loss(name, max_depth=10.0):
    """The loss of that name as (pred, target, mask) -> scalar, for depth of up to max_depth metres."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LOSSES)}")
    loss = LOSSES[name]
    if "max_depth" not in inspect.signature(loss).parameters:
        return loss
    return lambda pred, target, mask: loss(pred, target, mask, max_depth=max_depth)
