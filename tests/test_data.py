"""Units, images, geometry, augmentation, splits, mistakes and the command of data.py, on miniatures."""
import argparse
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from unittest.mock import ANY

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF

import data
from data import AUGMENTS, GEOMETRIES, UserError, open_dataset, run_script, sampling_grid, to_metres


def frame(height=24, width=32, seed=0):
    """An image of noise, and depth in whole millimetres, so that every way of storing it is exact."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return image, rng.integers(500, 9000, (height, width)).astype(np.float32) / 1000


def save(file, array):
    """An image (uint8), raw depth (uint16) or depth in metres (float), stored as the file's name demands."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, array)
    elif file.suffix == ".npz":
        np.savez(file, array)
    else:
        if array.dtype == np.float32:
            array = (array * 1000).round().astype(np.uint16)
        Image.fromarray(array).save(file)


def save_pair(folder, name="0", **options):
    """frame(**options) as folder/rgb/NAME.png and folder/depth/NAME.png; returns the folder."""
    image, depth = frame(**options)
    save(folder / f"rgb/{name}.png", image)
    save(folder / f"depth/{name}.png", depth)
    return folder


def save_hdf5(file, image, depth):
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as h5:
        h5["rgb"], h5["depth"] = image.transpose(2, 0, 1), depth


def complains(about):
    """The block raises a UserError whose message is one line and matches `about`."""
    return pytest.raises(UserError, match=rf"\A[^\n]*{about}[^\n]*\Z")


def as_array(image):
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


@pytest.fixture(autouse=True)
def nothing_noted_yet():
    data.note.cache_clear()


# ------------------------------------------------------------------------------------------------------------
# Units
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_depth_is_metres_and_what_is_not_finite_is_not_measured(dtype):
    metres = to_metres(np.array([[1.5, 0, np.nan], [np.inf, -np.inf, 7.25], [-3, 2, 2]], dtype))
    assert metres.dtype == np.float32 and metres.tolist() == [[1.5, 0, 0], [0, 0, 7.25], [0, 2, 2]]


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 2, 3)])
def test_depth_may_have_a_channel_of_its_own(shape):
    depth = np.arange(1, 7, dtype=np.float32)
    assert to_metres(depth.reshape(shape)).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("scale", [1000.0, 5000.0, 256.0])
def test_integer_depth_is_divided_by_its_scale_and_0_and_65535_are_not_measured(dtype, scale):
    metres = to_metres(np.array([[0, 65535], [2000, 20000]], dtype), scale)
    assert metres.dtype == np.float32
    np.testing.assert_allclose(metres, [[0, 0], [2000 / scale, 20000 / scale]], rtol=1e-6)


def test_8_bit_depth_is_tenths_of_255_whatever_the_scale():
    metres = to_metres(np.array([[0, 51, 255]], np.uint8), scale=256)
    assert metres.dtype == np.float32
    np.testing.assert_allclose(metres, [[0, 2, 10]], rtol=1e-6)


@pytest.mark.parametrize("raw, scale, complaint", [
    (np.zeros((4, 4), np.float32), 1000, "no pixel"),
    (np.full((4, 4), np.nan), 1000, "no pixel"),
    (np.full((4, 4), 65535, np.uint16), 1000, "no pixel"),
    (np.zeros((4, 4), np.uint8), 1000, "no pixel"),
    (np.full((4, 4), 1500.0), 1000, "1500 m: floats must be metres"),
    (np.full((4, 4), 0.02), 1000, "0.02 m: floats must be metres"),
    (np.full((4, 4), 1, np.uint8), 1000, "255 = 10 m"),
    (np.full((4, 4), 1500, np.uint16), 1, r"1500 m: --depth-scale 1000 \(NYU, ScanNet\) would make it 1.5 m"),
    (np.full((4, 4), 7500, np.uint16), 1e6, r"0.0075 m: .*--depth-scale 5000 \(TUM\) would make it 1.5 m"),
    (np.full((4, 4), 65000, np.uint16), 1e9, "6.5e-05 m: .*--depth-scale"),
    (np.full((4, 4), 5, np.uint16), 1000, "0.005 m: set --depth-scale"),
    (np.full((4, 4, 3), 9, np.uint8), 1000, r"\(4, 4, 3\)"),
    (np.full((1, 1, 4), 9, np.uint8), 1000, r"\(H, W\)"),
    (np.array([["near", "far"]]), 1000, r"must be \(H, W\) numbers"),
])
def test_depth_that_cannot_be_metres_is_refused_by_name(raw, scale, complaint):
    with complains(f"depth/7.png: .*{complaint}"):
        to_metres(raw, scale, file="depth/7.png")


def test_a_few_measured_pixels_are_enough():
    sparse = np.zeros((40, 50), np.uint16)
    sparse[20, 7] = 1234
    assert to_metres(sparse).max() == np.float32(1.234)


@pytest.mark.parametrize("max_depth", [10.0, 80.0])
def test_the_mask_is_finite_above_0_and_up_to_max_depth(max_depth):
    depth = np.array([np.nan, np.inf, -np.inf, -1, -0.0, 0, 1e-6, 3, 10, 10.001, 80, 81], np.float32)
    mask = data.valid_mask(torch.from_numpy(depth).view(1, 1, 3, 4), max_depth)
    expected = [bool(np.isfinite(d) and 0 < d <= max_depth) for d in depth]
    assert mask.shape == (1, 1, 3, 4) and mask.dtype == torch.bool and mask.flatten().tolist() == expected


MILLIMETRES = np.random.default_rng(0).integers(1500, 4000, (24, 32)).astype(np.uint16)


@pytest.mark.parametrize("raw, scale, max_depth, said", [
    (MILLIMETRES << 3 | MILLIMETRES >> 13, 1000, 10, "--depth-scale 8000 (SUN RGB-D) would make it 2."),
    (MILLIMETRES * 10, 1000, 10, "--depth-scale 10000 (tenths of a millimetre) would make it 2."),
    (MILLIMETRES * 5, 1000, 10, "--depth-scale 5000 (TUM) would make it 2."),
    (MILLIMETRES * 5, 1000, 80, ""),
    (MILLIMETRES, 1000, 10, ""),
    (MILLIMETRES, 256, 80, ""),
])
def test_depth_of_an_unlikely_scale_is_said_once_with_the_likely_one(tmp_path, capsys, raw, scale, max_depth, said):
    save(tmp_path / "rgb/0.png", frame()[0])
    save(tmp_path / "depth/0.png", raw)
    dataset = open_dataset(tmp_path, "all", depth_scale=scale)
    data.check_scale(dataset, max_depth)
    data.check_scale(dataset, max_depth)
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err
    assert printed.err.count("note: ") == printed.err.count("\n") == bool(said)


# ------------------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------------------


def stored(tmp_path, image, name="p.png", **options):
    """A Pillow image as read_image reads it back."""
    image.save(tmp_path / name, **options)
    array = data.read_image(tmp_path / name)
    assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
    return array


@pytest.mark.parametrize("suffix", data.IMAGE_SUFFIXES)
def test_every_kind_of_image_is_read(tmp_path, suffix):
    image = np.full((8, 16, 3), (200, 100, 50), np.uint8)
    assert np.abs(stored(tmp_path, Image.fromarray(image), f"p{suffix}").astype(int) - image).max() < 4


def test_grey_8_and_16_bit_images_become_rgb_of_the_same_brightness(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    for image in (grey, grey.astype(np.uint16) * 257):  # 257 = 65535 / 255
        assert (stored(tmp_path, Image.fromarray(image)) == grey[..., None]).all()


@pytest.mark.parametrize("mode, colour", [("RGBA", [200, 100, 50]), ("LA", [90])])
def test_colours_hidden_under_transparent_pixels_do_not_show(tmp_path, mode, colour):
    images = []
    for hidden in (0, 255):
        array = np.full((8, 8, len(mode)), hidden, np.uint8)
        array[..., -1] = 0
        array[2:5, 2:5] = [*colour, 255]
        images.append(stored(tmp_path, Image.fromarray(array)))
    assert (images[0] == images[1]).all() and (images[0][2:5, 2:5] == colour).all()


def test_a_palette_is_looked_up_and_its_transparent_colour_does_not_show(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([9, 8, 7, 200, 10, 20, 30, 220, 40])
    assert stored(tmp_path, image).tolist() == [[[9, 8, 7], [200, 10, 20]], [[30, 220, 40], [200, 10, 20]]]
    array = stored(tmp_path, image, transparency=0)
    assert array[0, 0].tolist() == [255, 255, 255] and array[1, 0].tolist() == [30, 220, 40]


@pytest.mark.parametrize("orientation, upright", [
    (3, lambda a: a[::-1, ::-1]),
    (6, lambda a: np.rot90(a, -1)),
    (8, np.rot90),
])
def test_a_camera_held_on_its_side_gives_an_upright_image(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x112] = orientation
    image = frame()[0]
    assert (stored(tmp_path, Image.fromarray(image), exif=exif) == upright(image)).all()


def test_an_image_too_large_to_be_honest_and_a_missing_one_are_named(tmp_path, monkeypatch):
    save(tmp_path / "0.png", frame()[0])
    with complains("1.png: no such file"):
        data.read_image(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with complains("0.png: cannot be read as an image"):
        data.read_image(tmp_path / "0.png")


# ------------------------------------------------------------------------------------------------------------
# Geometry: against Pillow, and against the geometry of a turned camera
# ------------------------------------------------------------------------------------------------------------


def seen(array, size, geometry="fastdepth", **move):
    """What sampling_grid shows of an array, and its factor."""
    rows, cols, factor = (t.numpy() for t in sampling_grid(*array.shape[:2], size, geometry, **move))
    return array[rows, cols], factor


def pillow_fastdepth(array, size=(224, 224)):
    """The official transforms: Resize(250 / 480), CenterCrop(228, 304), Resize(224, 224), all nearest."""
    image = Image.fromarray(array).resize((333, 250), Image.NEAREST)
    left = round((333 - 304) / 2)
    top = round((250 - 228) / 2)
    return np.asarray(image.crop((left, top, left + 304, top + 228)).resize(size[::-1], Image.NEAREST))


@pytest.mark.parametrize("size", [(224, 224), (128, 128), (256, 320)])
@pytest.mark.parametrize("height, width, crop", [
    (480, 640, np.s_[:]),
    (240, 320, np.s_[:]),
    (720, 960, np.s_[:]),
    (360, 640, np.s_[:, 80:560]),
    (640, 480, np.s_[140:500]),
    (304, 304, np.s_[38:266]),
    (375, 1240, np.s_[:, 370:870]),
])
def test_the_fastdepth_geometry_is_that_of_the_official_transforms(height, width, crop, size):
    """Other aspects are first cropped to 4:3 about the centre."""
    for array in frame(height, width):
        shown, factor = seen(array, size)
        assert (shown == pillow_fastdepth(array[crop], size)).all() and (factor == 1).all()


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (60, 80), (480, 640)])
@pytest.mark.parametrize("height, width", [(480, 640), (240, 320), (120, 397)])
def test_the_full_geometry_is_one_nearest_resize_of_the_whole_frame(height, width, size):
    """Pillow's, but for 640 -> 224: there its rounding shifts 20 columns whose centres lie between two pixels."""
    for array in frame(height, width):
        shown = seen(array, size, "full")[0]
        rows, cols = (torch.arange(n, dtype=torch.float32)[None, None] for n in (height, width))
        rows, cols = (torch.nn.functional.interpolate(index, size=n, mode="nearest-exact")[0, 0].long()
                      for index, n in zip((rows, cols), size))
        assert (shown == array[rows[:, None], cols]).all()
        if size != (224, 224):
            assert (shown == np.asarray(Image.fromarray(array).resize(size[::-1], Image.NEAREST))).all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_view_of_a_tensor_shows_what_the_data_set_shows(geometry):
    image = frame(48, 64)[0]
    shown = data.view(torch.from_numpy(image).permute(2, 0, 1)[None], [32, 48], geometry)
    assert shown.shape == (1, 3, 32, 48)
    assert (shown[0].permute(1, 2, 0).numpy() == seen(image, (32, 48), geometry)[0]).all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(224, 224), (48, 64)])
def test_a_horizontal_flip_is_exact_to_the_pixel(geometry, size):
    depth = frame(240, 320)[1]
    assert (seen(depth, size, geometry, flip=True)[0] == seen(depth, size, geometry)[0][:, ::-1]).all()


def test_a_zoom_of_2_shows_the_middle_twice_as_large_and_divides_depth_by_2():
    depth = frame(48, 64)[1]
    shown, factor = seen(depth, (48, 64), "full", zoom=2.0)
    assert (shown == depth[12:36, 16:48].repeat(2, 0).repeat(2, 1)).all() and (factor == 0.5).all()


def test_a_roll_of_90_degrees_is_a_quarter_turn():
    depth = frame(64, 64)[1]
    shown, factor = seen(depth, (64, 64), "full", roll=90.0)
    assert (shown == np.rot90(depth)).all() and (factor == 1).all()


def offsets(height, width, size, geometry):
    """x and y of each output pixel's centre from the middle of the frame, in pixels of the frame."""
    shown = (height * 228 / 250, width * 304 / 333) if geometry == "fastdepth" else (height, width)
    y, x = ((np.arange(n) + 0.5) * length / n - length / 2 for n, length in zip(size, shown))
    return np.meshgrid(x, y)


@pytest.mark.parametrize("geometry, rounding", [("full", 0.501), ("fastdepth", 1.5)])
@pytest.mark.parametrize("flip, zoom, roll", [(False, 1.0, 5.0), (True, 1.5, -5.0), (True, 1.2, 30.0)])
def test_roll_zoom_and_flip_act_on_square_pixels_and_never_shear(geometry, rounding, flip, zoom, roll):
    x, y = offsets(240, 320, (48, 64), geometry)
    if flip:
        x = -x
    cos, sin = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    rows, cols, factor = (t.numpy() for t in sampling_grid(240, 320, (48, 64), geometry, flip, zoom, roll))
    inside = factor > 0
    assert np.abs(cols + 0.5 - 160 - (cos * x - sin * y) / zoom)[inside].max() < rounding
    assert np.abs(rows + 0.5 - 120 - (sin * x + cos * y) / zoom)[inside].max() < rounding
    assert np.allclose(factor[inside], 1 / zoom)


def test_what_a_roll_uncovers_is_not_measured_and_nothing_else():
    """It is what a rectangle does not share with itself turned; the margin of FastDepth's crop is used first."""
    full = seen(frame(240, 320)[1], (240, 320), "full", roll=30.0)[1]
    turned = Image.new("L", (320, 240), 255).rotate(30, Image.NEAREST)
    assert ((full > 0) == (np.asarray(turned) > 0)).mean() > 0.995
    crop = seen(frame(480, 640)[1], (228, 304), roll=5.0)[1]
    turned = Image.new("L", (304, 228), 255).rotate(5, Image.NEAREST)
    assert (crop > 0).mean() > (np.asarray(turned) > 0).mean() + 0.01


def turn_matrix(roll=0, yaw=0, pitch=0, **_):
    """Right-handed rotations by degrees about x (right), then y (down), then z (ahead)."""
    (cx, cy, cz), (sx, sy, sz) = (f(np.radians([pitch, yaw, roll])) for f in (np.cos, np.sin))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@pytest.mark.parametrize("geometry, size, tolerance", [
    ("full", (480, 640), 0.002),
    ("full", (96, 64), 0.002),
    ("fastdepth", (224, 224), 0.01),
])
@pytest.mark.parametrize("move", [dict(yaw=6.0), dict(pitch=6.0), dict(roll=5.0), dict(roll=-4.0, yaw=-5.0, pitch=6.0),
                                  dict(flip=True, roll=5.0, yaw=-6.0, pitch=-6.0)], ids=str)
def test_a_turned_camera_sees_a_tilted_plane_at_its_exact_depth(geometry, size, tolerance, move):
    """On the plane normal . p = 2, a ray r with r_z = 1 ends at depth 2 / normal . r. Sampling is by nearest."""
    focal = 0.81 * 640
    normal = np.array([0.3, -0.4, 0.8])

    def plane(x, y, turn):
        rays = np.stack([x / focal, y / focal, np.ones_like(x)], -1) @ turn.T
        return 2 / (rays @ normal), rays

    stored = plane(*offsets(480, 640, (480, 640), "full"), np.eye(3))[0]
    shown, factor = seen(stored, size, geometry, **move)
    x, y = offsets(480, 640, size, geometry)
    exact, rays = plane(-x if "flip" in move else x, y, turn_matrix(**move))
    inside = factor > 0
    assert inside.mean() > 0.75
    assert np.abs(shown * factor / exact - 1)[inside].max() < tolerance
    if geometry == "full":
        ahead = np.abs(rays[..., :2] / rays[..., 2:]) < np.array([320, 240]) / focal
        assert (inside == ahead.all(-1)).mean() > 0.99


def test_an_unknown_geometry_is_refused():
    with complains("'square'.*fastdepth, full"):
        sampling_grid(48, 64, (32, 32), "square")


def config(size, geometry="fastdepth", frame=(480, 640)):
    return dict(size=size, geometry=geometry, frame=frame)


@pytest.mark.parametrize("trained, frame, focal, size, factor", [
    (config((224, 224)), (480, 640), 0.81 * 640, (256, 256), 1.043),  # exactly 246x246
    (config((128, 128)), (480, 640), 0.81 * 640, (128, 128), 0.912),  # exactly 140x140
    (config((224, 224)), (2400, 3200), 0.81 * 3200, (256, 256), 1.043),  # more pixels change nothing
    (config((224, 224)), (480, 640), 2 * 0.81 * 640, (128, 128), 1.043),  # twice the focal length: half the size
    (config((480, 640), "full"), (480, 640), 0.81 * 640, (480, 640), 1.0),
    (config((480, 640), "full"), (480, 640), 0.9 * 0.81 * 640, (544, 704), (544 / 480 * 704 / 640) ** 0.5 * 0.9),
    (config((224, 224)), (20, 20), 9000.0, (32, 32), ANY),
])
def test_whole_images_are_shown_at_the_focal_length_of_training(trained, frame, focal, size, factor):
    assert data.whole_image_size(frame, focal, trained) == size
    assert data.depth_factor(focal, frame, size, "full", trained) == (factor if factor is ANY
                                                                      else pytest.approx(factor, abs=5e-4))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_is_shown_as_in_training_needs_no_factor(geometry):
    trained = config((224, 288), geometry)
    assert data.depth_factor(0.81 * 640, (480, 640), (224, 288), geometry, trained) == pytest.approx(1)
    assert data.depth_factor(0.81 * 640, (480, 640), (448, 576), geometry, trained) == pytest.approx(2)


def test_focal_lengths_are_those_of_the_shown_pixels():
    assert data.focal_lengths(500, (480, 640), (240, 160), "full") == pytest.approx((250, 125))
    fy, fx = data.focal_lengths(500, (480, 640), (224, 224), "fastdepth")
    assert fy == pytest.approx(500 * 250 / 480 * 224 / 228) and fx == pytest.approx(500 * 333 / 640 * 224 / 304)
    assert data.trained_focal(config((224, 224))) == pytest.approx((fy * 1.0368, fx * 1.0368))  # 0.81 x 640 = 518.4
    assert data.visible_size(375, 1242, "full") == (375, 1242)
    assert data.visible_size(375, 1242, "fastdepth") == pytest.approx((375 * 228 / 250, 500 * 304 / 333))


def test_a_smaller_image_is_antialiased_and_a_larger_one_is_never_made():
    checkers = (np.indices((64, 96)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    small = data.shrink(checkers, 0.25)
    assert small.shape == (16, 24, 3) and small.dtype == np.uint8
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() < 3
    assert data.shrink(checkers, 1.0) is checkers and data.shrink(checkers, 2.0) is checkers
    assert data.shrink(checkers, 0.001).shape == (1, 1, 3)


@pytest.mark.parametrize("height, width, geometry, said", [
    (375, 1242, "fastdepth", "shows 91% of the height and 37% of the width of 375x1242 frames: --geometry full --size 128 416"),
    (640, 480, "fastdepth", "51% of the height and 91% of the width"),
    (375, 1242, "full", ""),
    (480, 640, "fastdepth", ""),
    (720, 1280, "fastdepth", ""),
])
def test_a_crop_that_hides_more_than_a_third_is_said_with_a_legal_size(tmp_path, capsys, height, width, geometry, said):
    save_pair(tmp_path, height=height, width=width)
    data.check_crop(open_dataset(tmp_path, "all", geometry=geometry), (224, 224))
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == bool(said)


# ------------------------------------------------------------------------------------------------------------
# The data set and its augmentation
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(12, 16), (48, 64), (30, 40)])
def test_depth_of_another_size_is_taken_by_nearest(tmp_path, height, width):
    depth = frame(height, width)[1]
    save(tmp_path / "rgb/0.png", frame()[0])
    save(tmp_path / "depth/0.npy", depth)
    expected = Image.fromarray(depth).resize((32, 24), Image.NEAREST)
    assert (open_dataset(tmp_path, "all", size=None)[0][1][0].numpy() == np.asarray(expected)).all()


def test_depth_of_another_aspect_is_refused_with_both_sizes(tmp_path):
    save(tmp_path / "rgb/0.png", frame(24, 32)[0])
    save(tmp_path / "depth/0.png", frame(24, 28)[1])
    with complains("0.png.*24x32.*24x28"):
        open_dataset(tmp_path, "all")[0]


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
def test_an_item_is_an_image_in_0_to_1_and_metres_with_0_for_not_measured(tmp_path, size, augment):
    image, depth = frame(48, 64)
    depth[10:30, 20:40] = np.nan
    save(tmp_path / "rgb/0.png", image)
    save(tmp_path / "depth/0.npy", depth)
    image, depth, index = open_dataset(tmp_path, "all", size=size, augment=augment)[0]
    assert image.shape == (3, *size) and depth.shape == (1, *size) and index == 0
    assert image.dtype == depth.dtype == torch.float32
    assert 0 <= image.min() < 0.2 and 0.8 < image.max() <= 1
    assert 0 < depth.eq(0).float().mean() < 0.5 and depth.isfinite().all() and depth[depth > 0].min() >= 0.5 / 1.5


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("augment", AUGMENTS)
def test_an_item_is_its_draw_applied_to_image_and_depth_alike(tmp_path, augment, geometry):
    image, depth = frame(60, 80)
    dataset = open_dataset(save_pair(tmp_path, height=60, width=80), "all", (48, 64), augment, geometry)
    for dataset.epoch in range(8):
        move, colour = dataset.draw(0)
        rows, cols, factor = sampling_grid(60, 80, (48, 64), geometry, **move)
        expected = torch.from_numpy(image[rows, cols]).permute(2, 0, 1) / 255 * (factor > 0)
        if colour is not None:
            expected = data.colour_jitter(expected, *colour)
        shown, metres, _ = dataset[0]
        assert torch.equal(shown, expected) and torch.equal(metres[0], torch.from_numpy(depth[rows, cols]) * factor)


def test_without_a_size_nothing_is_augmented(tmp_path):
    image, depth, _ = open_dataset(save_pair(tmp_path), "all", size=None, augment=True)[0]
    assert (as_array(image) == frame()[0]).all() and (depth[0].numpy() == frame()[1]).all()


COLOURS = dict(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4))
TURN = dict(yaw=(-6, 6), pitch=(-6, 6))


@pytest.mark.parametrize("augment, ranges", [
    ("none", {}),
    ("flip", dict(flip=(0, 1))),
    ("colour", dict(flip=(0, 1), roll=(-5, 5), **COLOURS)),
    ("camera", dict(flip=(0, 1), roll=(-5, 5), **TURN, **COLOURS)),
    ("paper", dict(flip=(0, 1), roll=(-5, 5), zoom=(1, 1.5), **COLOURS)),
])
def test_an_augmentation_draws_its_numbers_evenly_and_apart_from_each_other(tmp_path, augment, ranges):
    dataset = open_dataset(save_pair(tmp_path), "all", augment=augment)
    draws = []
    for dataset.epoch in range(400):
        move, colour = dataset.draw(0)
        draws.append(dict(move, **dict(zip(COLOURS, colour or ()))))
    assert set(draws[0]) == set(ranges)
    for name, (low, high) in ranges.items():
        values = np.array([draw[name] for draw in draws])
        assert low <= values.min() < low + 0.03 * (high - low) and high - 0.03 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.1 * (high - low))
    table = np.array([list(draw.values()) for draw in draws], float)
    if len(ranges) > 1:
        assert np.abs(np.corrcoef(table.T) - np.eye(len(ranges))).max() < 0.2


def test_a_draw_depends_on_seed_epoch_and_index_alone_and_on_each_of_them(tmp_path):
    for name in "01":
        save_hdf5(tmp_path / f"train/scene/{name}.h5", *frame())  # the same frame under two numbers

    def item(seed, epoch, index):
        dataset = open_dataset(tmp_path, "all", size=(32, 32), augment=True, seed=seed)
        dataset.epoch = epoch
        torch.rand(1), dataset[0]  # what was drawn or read before does not matter
        return torch.cat(dataset[index][:2])

    assert torch.equal(item(3, 2, 1), item(3, 2, 1))
    keys = [(0, 2, 0), (1, 1, 0), (2, 0, 0), (1, 11, 0), (11, 1, 0), (1, 1, 1), (-1, 1, 1)]
    assert len({item(*key).numpy().tobytes() for key in keys}) == len(keys)  # no sum of two of them decides


def test_the_jitter_is_that_of_torchvision():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(data.colour_jitter(image, 1, 1, 1), image, atol=1e-6)
    for brightness, contrast, saturation in ((0.6, 1.2, 1.4), (1.4, 1.4, 0.6), (1.1, 0.6, 0.8)):
        expected = TF.adjust_contrast(TF.adjust_brightness(image, brightness), contrast)
        expected = TF.adjust_saturation(expected, saturation)
        jittered = data.colour_jitter(image, brightness, contrast, saturation)
        assert torch.allclose(jittered, expected, atol=2e-3)  # torchvision rounds 0.299 to 0.2989


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    for seed in range(6):
        save_pair(tmp_path, str(seed), seed=seed)
    dataset = open_dataset(tmp_path, "all", size=(32, 32), augment="camera")
    for dataset.epoch in (0, 1):
        alone, together = (list(DataLoader(dataset, batch_size=3, num_workers=n)) for n in (0, 2))
        assert len(alone) == 2 and alone[0][0].shape == (3, 3, 32, 32)
        assert all(torch.equal(a, b) for one, two in zip(alone, together) for a, b in zip(one, two))


@pytest.mark.parametrize("layout", ["pairs", "hdf5"])
def test_a_data_set_pickles_even_after_it_was_read(tmp_path, layout):
    if layout == "pairs":
        save_pair(tmp_path)
    else:
        save_hdf5(tmp_path / "train/scene/0.h5", *frame())
    dataset = open_dataset(tmp_path, "all", size=(32, 32), augment=True)
    before, copy = dataset[0], pickle.loads(pickle.dumps(dataset))
    assert copy.files == dataset.files and all(torch.equal(a, b) for a, b in zip(before[:2], copy[0][:2]))


def test_data_is_opened_and_loaded_off_the_main_thread(tmp_path):
    save_pair(tmp_path)
    batches = []

    def load():
        dataset = open_dataset(tmp_path, "all", (32, 32), augment=True)
        batches.extend(DataLoader(dataset, num_workers=1, worker_init_fn=data.worker_init))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join(60)
    assert len(batches) == 1


# ------------------------------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------------------------------


def split_names(root):
    """The names of the frames of each split that is not empty."""
    names = {}
    for split in ("train", "val", "test", "all"):
        try:
            dataset = open_dataset(root, split)
        except UserError as error:
            assert str(root) in str(error) and split in str(error) and "\n" not in str(error)
        else:
            assert len(dataset) == len(dataset.files) > 0
            names[split] = [Path(file).stem for file in dataset.files]
    parts = [name for split in ("train", "val", "test") for name in names.get(split, [])]
    assert sorted(parts) == sorted(names["all"])  # none twice, none lost
    return names


def held_out(scene):
    return zlib.crc32(scene.encode()) % 5 == 0


SCENES = [f"kitchen_{i:04d}" for i in range(12)]


@pytest.mark.parametrize("layout", ["scenes.csv", "folders", "hdf5"])
def test_whole_scenes_are_held_out_by_their_checksum(tmp_path, layout):
    scene_of = {f"{i:03d}": SCENES[i // 2] for i in range(24)}
    for name, scene in scene_of.items():
        if layout == "hdf5":
            save_hdf5(tmp_path / "train" / scene / f"{name}.h5", *frame())
        else:
            save_pair(tmp_path / (scene if layout == "folders" else ""), name)
    if layout == "scenes.csv":
        rows = "".join(f"{name},{scene}\n" for name, scene in scene_of.items())
        (tmp_path / "scenes.csv").write_text("frame,scene\n" + rows)
    names = split_names(tmp_path)
    assert set(names["val"]) == {name for name, scene in scene_of.items() if held_out(scene)}
    assert set(names) == {"train", "val", "all"}


def test_of_two_scenes_one_is_held_out_whole_though_the_checksum_holds_out_none_or_both(tmp_path):
    chosen = [name for name in map("scene{:04d}".format, range(40)) if held_out(name)][:2]
    others = [name for name in map("scene{:04d}".format, range(40)) if not held_out(name)][:2]
    for case, scenes in (("none", others), ("both", chosen)):
        for scene in scenes:
            save_pair(tmp_path / case / scene, f"{scene}-1")
            save_pair(tmp_path / case / scene, f"{scene}-2")
        assert split_names(tmp_path / case)["val"] == [f"{scenes[1]}-1", f"{scenes[1]}-2"]


def test_without_scenes_the_last_fifth_of_the_names_is_held_out(tmp_path):
    for name in "jihgfedcbak":
        save_pair(tmp_path, name)
    names = split_names(tmp_path)
    assert names["train"] == list("abcdefghi") and names["val"] == list("jk")


@pytest.mark.parametrize("layout", ["pairs", "hdf5"])
@pytest.mark.parametrize("parts", [("train", "val"), ("train", "val", "test")])
def test_a_folder_with_its_own_parts_keeps_them(tmp_path, layout, parts):
    for part in parts:
        for i in range(4):
            if layout == "pairs":
                save_pair(tmp_path / part / "rooms", f"{part}-{i}")
            else:
                save_hdf5(tmp_path / part / "rooms" / f"{part}-{i}.h5", *frame())
    assert split_names(tmp_path) == {part: [f"{part}-{i}" for i in range(4)] for part in parts} | {"all": ANY}


def test_an_official_test_part_is_only_ever_test(tmp_path):
    for scene in SCENES:
        save_hdf5(tmp_path / "fastdepth/train" / scene / f"{scene}.h5", *frame())
        save_pair(tmp_path / "pairs/train" / scene, scene)
    save_hdf5(tmp_path / "fastdepth/val/official/x.h5", *frame())  # FastDepth's name for NYU's test frames
    save_pair(tmp_path / "pairs/test/cellar", "x")
    for root in ("fastdepth", "pairs"):
        names = split_names(tmp_path / root)
        assert names["test"] == ["x"]
        assert names["val"] and set(names["val"]) == {scene for scene in SCENES if held_out(scene)}


@pytest.mark.parametrize("choice, options", [
    ("'validation'.*train, val, test, all", dict(split="validation")),
    ("'flips'.*none, flip, colour, camera, paper", dict(augment="flips")),
    ("'square'.*fastdepth, full", dict(geometry="square")),
])
def test_an_unknown_choice_is_refused_with_the_known_ones(tmp_path, choice, options):
    with complains(choice):
        open_dataset(save_pair(tmp_path), **{"split": "all", **options})


@pytest.mark.parametrize("split, complaint", [
    ("val", r"its val split is empty \(paired folders: 4 train\): at least 5 pairs are needed to hold some out"),
    ("test", r"its test split is empty \(paired folders: 4 train\)"),
])
def test_an_empty_split_says_what_there_is_and_that_fewer_than_5_pairs_are_too_few(tmp_path, split, complaint):
    for name in "abcd":
        save_pair(tmp_path, name)
    with complains(f"{tmp_path}: {complaint}$"):
        open_dataset(tmp_path, split)


@pytest.mark.parametrize("limit", [1, 4, 8, 12, 99])
def test_a_limit_chooses_evenly_over_the_whole_split(tmp_path, limit):
    for i in range(12):
        save_pair(tmp_path, f"{i:02d}")
    chosen = [int(Path(file).stem) for file in open_dataset(tmp_path, "all", limit=limit).files]
    assert chosen[0] == 0 and len(chosen) == min(limit, 12) and chosen == sorted(set(chosen))
    assert abs(sum(i < 6 for i in chosen) - sum(i >= 6 for i in chosen)) <= 1


# ------------------------------------------------------------------------------------------------------------
# Images for people
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_near_is_bright_far_is_dark_and_not_measured_is_grey():
    colours = data.colourise(np.array([[1, 2, 3, 4, 5, 99], [0, np.nan, np.inf, -1, 0, 0]]), near=1, far=5)
    assert colours.shape == (2, 6, 3) and colours.dtype == np.uint8
    assert (np.diff(colours[0].astype(int).sum(1))[:4] < 0).all() and (colours[0, 5] == colours[0, 4]).all()
    assert (colours[1] == colours[1, 0, 0]).all() and 50 < colours[1, 0, 0] < 200  # grey ...
    assert np.ptp(colours[0, 1:4], axis=1).min() > 0  # ... as nothing that was measured is
    assert data.colourise(np.full((2, 2), 3.0), near=3, far=3).shape == (2, 2, 3)  # flat depth has no range
    backwards = data.colourise([[1, 2, 5]], near=5, far=1)  # 5 is bright, 1 is dark
    assert (backwards[0, ::2] == data.colourise([[5, 2, 1]], near=1, far=5)[0, ::2]).all()


def test_a_colour_bar_runs_from_near_to_far_beside_its_labels():
    bar = data.colour_bar(0, 8, 240)
    assert bar.shape[0] == 240 and bar.shape[2] == 3 and bar.dtype == np.uint8
    column = bar[:, 8].astype(int).sum(1)
    assert (np.diff(column) <= 0).all() and column[0] > 500 and column[-1] < 60
    labels = bar[:, 3 * bar.shape[1] // 8:].min(axis=(1, 2)) < 128
    assert (np.diff(labels.astype(int)) == 1).sum() + labels[0] == 5


def test_a_sheet_shows_every_image_in_its_place():
    rows = [[np.full((10, 20, 3), 40 * r + 10 * c, np.uint8) for c in range(3)] for r in range(2)]
    sheet = np.asarray(data.tile(rows, gap=4))
    assert sheet.shape == (24, 68, 3) and (sheet[10:14] == 255).all()
    for r, c in np.ndindex(2, 3):
        assert (sheet[14 * r:14 * r + 10, 24 * c:24 * c + 20] == 40 * r + 10 * c).all()
    labelled = np.asarray(data.tile(rows, ["a", "b", "c"], gap=4))
    assert (labelled[-24:] == sheet).all() and (labelled[:-24] < 128).any()
    assert data.tile([rows[0][:1], rows[1]]).size == (68, 24)  # rows may differ in length


def test_a_tensor_becomes_an_image_of_8_bits():
    values = torch.tensor([0, 0.5, 1, 1.2, -0.3]).repeat(3, 2, 1)
    image = data.to_uint8(values)
    assert image.shape == (2, 5, 3) and image.dtype == np.uint8 and image[0, :, 0].tolist() == [0, 128, 255, 255, 0]


def test_progress_is_one_line_on_a_terminal_and_nothing_in_a_file(capsys, monkeypatch):
    data.progress("cooking", 3, 4, start=0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    data.progress("cooking", 3, 4, start=time.time() - 6, note="  salt")
    shown = capsys.readouterr().out
    assert "cooking 3/4" in shown and "0:02 left  salt" in shown and "\n" not in shown and shown.startswith("\r")
    data.progress("cooking", 4, 4, start=0)
    assert "cooking" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Files, mistakes and the command
# ------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new/folder/depth.npy"
    with data.whole_file(file) as f:
        f.write(b"whole")
        assert not file.exists()
    assert file.read_bytes() == b"whole"
    for error in (KeyboardInterrupt, ZeroDivisionError, UserError):
        with pytest.raises(error), data.whole_file(file) as f:
            f.write(b"half")
            raise error
    with complains(r"depth.npy: cannot be written \(No space left on device\): make room"), data.whole_file(file):
        raise OSError(28, "No space left on device")
    assert file.read_bytes() == b"whole" and list(file.parent.iterdir()) == [file]


def test_what_dead_processes_left_is_cleared_and_what_others_write_or_own_stays(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    stay = [f"a[1].h5.partial-{os.getppid()}", "a[1].h5.partial-mine", f"a1.h5.partial-{dead.pid}", "a[1].h5"]
    for name in (*stay, f"a[1].h5.partial-{dead.pid}"):
        (tmp_path / name).touch()
    with data.whole_file(tmp_path / "a[1].h5"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(stay)


@pytest.mark.parametrize("kind, good, bad", [
    (data.positive(int), {"3": 3}, ["0", "-1", "1.5", "two"]),
    (data.positive(float), {"0.5": 0.5, "3": 3.0}, ["0", "-1", "inf", "nan", "two"]),
    (data.non_negative, {"0": 0, "2": 2}, ["-1", "0.5", ""]),
    (data.multiple_of_32, {"32": 32, "224": 224}, ["0", "-32", "33", "32.0"]),
])
def test_a_flag_takes_only_numbers_that_make_sense(kind, good, bad, capsys):
    parser = data.make_parser("A script.")
    parser.add_argument("--number", type=kind, help="a number")
    for text, value in good.items():
        assert parser.parse_args(["--number", text]).number == value
    for text in bad:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"--number={text}"])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 2  # usage and error, a line each


def test_help_says_every_default():
    parser = data.make_parser("A script.")
    parser.add_argument("--epochs", type=int, default=10, help="how many")
    parser.add_argument("--out", help="a folder")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False, help="half precision")
    text = parser.format_help()
    assert "how many (default: 10)" in text and "None" not in text and "a folder\n" in text


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99"])
def test_an_unknown_device_is_refused(name):
    data.check_device("cpu")
    with complains(f"--device {name}: PyTorch finds no such device here"):
        data.check_device(name)


class ScriptError(ValueError):
    """A mistake that a script names to run_script, as model.py's ModelError."""


@pytest.mark.parametrize("error, code, message", [
    (UserError("a.png: is no image"), 2, "a.png: is no image"),
    (ScriptError("no such model"), 2, "no such model"),
    (FileNotFoundError(2, "No such file", "a.png"), 2, "[Errno 2] No such file: 'a.png'"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 2, "GPU's memory is too small: lower --batch-size"),
    (KeyboardInterrupt(), 130, ""),
    (SystemExit(1), 1, ""),
])
def test_a_mistake_is_one_line_and_its_exit_code(monkeypatch, capsys, error, code, message):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/here/script.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main, ScriptError)
    printed = capsys.readouterr()
    assert stop.value.code == code and printed.out == "" and message in printed.err
    assert len(printed.err.splitlines()) == bool(message) and printed.err.startswith("script.py: error: "[:len(printed.err)])


@pytest.mark.parametrize("bug", [ValueError, RuntimeError, TypeError, KeyError, IndexError, AssertionError])
def test_a_bug_is_a_traceback(bug):
    def main():
        raise bug("an internal line")

    with pytest.raises(bug, match="an internal line"):
        run_script(main)
    assert run_script(lambda: {"rmse": 1}) == {"rmse": 1}


def test_a_mistake_in_a_worker_is_the_same_line(tmp_path, capsys):
    save_pair(tmp_path)
    (tmp_path / "rgb/0.png").write_bytes(b"junk")
    dataset = open_dataset(tmp_path, "all")
    with pytest.raises(SystemExit):
        run_script(lambda: list(DataLoader(dataset, num_workers=1)))
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and f"error: {tmp_path}/rgb/0.png: cannot be read as an image" in printed[0]


def script(*arguments, cwd, **options):
    """The running `python data.py ARGUMENTS`, as a user's shell would start it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # which would hide buffering
    command = [sys.executable, Path(data.__file__).resolve(), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, text=True, env=environment, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_wrong_path_is_one_line_and_exit_code_2(tmp_path):
    process = script("nowhere", cwd=tmp_path)
    out, error = process.communicate()
    assert process.returncode == 2 and out == "" and list(tmp_path.iterdir()) == []
    assert error == "data.py: error: nowhere: no such file or folder\n"


def test_a_reader_who_closes_the_pipe_sees_no_traceback(tmp_path):
    process = script("rooms:64", cwd=tmp_path)
    assert process.stdout.readline().startswith("rooms:64: rooms")
    process.stdout.close()  # as `| head -1` does
    assert process.stderr.read() == "" and process.wait() == 141 and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="cannot see what a process has imported")
def test_ctrl_c_while_the_imports_run_is_no_traceback(tmp_path):
    process = script("--help", cwd=tmp_path)
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == -signal.SIGINT and out == error == ""


def test_the_command_prints_facts_and_writes_a_contact_sheet(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abcdef":
        save(tmp_path / f"pairs/rgb/{name}.png", frame()[0])
        save(tmp_path / f"pairs/depth/{name}.png", np.full((24, 32), 20, np.float32))
    data.main(["pairs", "--depth-scale", "5000"])
    printed = capsys.readouterr().out
    for fact in ("paired folders", "5 train, 1 val; 1 scenes", "pairs/rgb/a.png with pairs/depth/a.png", "24x32",
                 "median 4.00 m", "100% measured", "16-bit scale 5000", "look    runs/data-pairs.png"):
        assert fact in printed
    with Image.open("runs/data-pairs.png") as sheet:
        assert sheet.size == (3 * 480 + 8, 2 * 180 + 4)
    data.main(["pairs", "--out", "sheet.png"])
    assert "--depth-scale 5000 (TUM) would make it 4 m" in capsys.readouterr().err and Path("sheet.png").is_file()


def test_the_command_names_a_broken_file_and_writes_no_sheet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path / "broken")
    (tmp_path / "broken/depth/0.png").write_bytes(b"junk")
    with complains("depth/0.png: cannot be read as depth"):
        data.main(["broken", "--out", "sheet.png"])
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("flags, complaint", [
    (["--size", "60", "80"], "--size: .*--pack"),
    (["--pack", "set.hdf"], "set.hdf: .*call it set.h5"),
])
def test_a_wrong_flag_is_refused_before_anything_is_written(tmp_path, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path / "pairs")
    with complains(complaint):
        data.main(["pairs", *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]
