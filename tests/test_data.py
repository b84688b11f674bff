"""Units, images, geometry, augmentation, splits, mistakes and the command of data.py, on miniatures."""
import io
import os
import pickle
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_hdf5
from PIL import Image
from scipy.spatial.transform import Rotation  # scikit-image brings it
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF

import data
from data import AUGMENTS, GEOMETRIES, UserError, open_dataset, run_script, sampling_grid, to_metres
from model import ModelError


def frame(height=24, width=32, seed=0):
    """An image of noise, and depth in whole millimetres, so that every way of storing it is exact."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return image, rng.integers(500, 9000, (height, width)).astype(np.float32) / 1000


def save(file, array):
    """An image, raw depth (uint16) or depth in metres (float32), stored as the file's name demands."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, array)
    elif file.suffix == ".npz":
        np.savez(file, array)
    elif array.dtype == np.float32:
        Image.fromarray((array * 1000).round().astype(np.uint16)).save(file)
    else:
        Image.fromarray(array).save(file)


def save_pair(folder, name="0", depth=None, suffix=".png", **options):
    """frame(**options), or its image and another depth, as folder/rgb/NAME.png and folder/depth/NAME.png."""
    image, its_depth = frame(**options)
    save(folder / f"rgb/{name}.png", image)
    save(folder / f"depth/{name}{suffix}", its_depth if depth is None else depth)
    return folder


def complains(about):
    """The block raises a UserError whose message is one line and matches `about`."""
    return pytest.raises(UserError, match=rf"\A[^\n]*{about}[^\n]*\Z")


@pytest.fixture(autouse=True)
def nothing_noted_yet():
    data.note.cache_clear()


# ------------------------------------------------------------------------------------------------------------
# Units
# ------------------------------------------------------------------------------------------------------------

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("raw, scale, metres", [
    (np.float16([[1.5, 0, NAN], [-INF, -3, 7.25]]), 1000, [[1.5, 0, 0], [0, 0, 7.25]]),
    (np.float32([[1.5, 0, NAN], [INF, -3, 7.25]]), 5000, [[1.5, 0, 0], [0, 0, 7.25]]),
    (np.float64([[[1.5], [2]], [[3], [4]]]), 1000, [[1.5, 2], [3, 4]]),  # with a channel axis
    (np.uint16([[[0, 65535], [2500, 20000]]]), 1000, [[0, 0], [2.5, 20]]),
    (np.int32([[0, 65535], [256, 20480]]), 256, [[0, 0], [1, 80]]),
    (np.int16([[-1, -32768], [2500, 20000]]), 1000, [[0, 0], [2.5, 20]]),
    (np.uint8([[0, 51, 255]]), 256, [[0, 2, 10]]),  # 255 = 10 m whatever the scale
])
def test_depth_as_stored_becomes_metres_and_what_is_not_measured_0(raw, scale, metres):
    converted = to_metres(raw, scale)
    assert converted.dtype == np.float32
    np.testing.assert_allclose(converted, metres, rtol=1e-6)


def test_one_measured_pixel_is_enough_and_a_corner_of_noise_decides_nothing():
    depth = np.zeros((40, 50), np.uint16)
    depth[20, 7] = 1234
    assert to_metres(depth).max() == np.float32(1.234)
    depth[:4] = 1
    depth[10:] = 2000
    assert to_metres(depth).max() == 2


@pytest.mark.parametrize("raw, scale, complaint", [
    (np.full((4, 4), NAN), 1000, "no pixel"),
    (np.full((4, 4), 1500.0), 1000, "1500 m: floats must be metres"),
    (np.full((4, 4), 1, np.uint8), 1000, "255 = 10 m"),
    (np.full((4, 4), 1500, np.uint16), 1, r"1500 m: --depth-scale 1000 \(NYU, ScanNet\) would make it 1.5 m"),
    (np.full((4, 4), 7500, np.uint16), 1e6, r"0.0075 m: .*--depth-scale 5000 \(TUM\) would make it 1.5 m"),
    (np.full((4, 4), 5, np.uint16), 1000, "0.005 m: set --depth-scale"),
    (np.full((4, 4, 3), 9, np.uint8), 1000, r"must be \(H, W\) numbers, not \(4, 4, 3\)"),
    (np.full((1, 1, 4), 9, np.uint8), 1000, r"must be \(H, W\) numbers, not \(4,\)"),
    (np.array([["near", "far"]]), 1000, r"must be \(H, W\) numbers"),
])
def test_depth_that_cannot_be_metres_is_refused_by_name(raw, scale, complaint):
    with complains(f"depth/7.png: .*{complaint}"):
        to_metres(raw, scale, file="depth/7.png")


def test_the_mask_is_finite_above_0_and_up_to_max_depth():
    depth = torch.tensor([NAN, INF, -INF, -1, -0.0, 0, 1e-6, 3, 10, 10.001, 80, 81]).view(1, 1, 3, 4)
    for max_depth, valid in (10, [1e-6, 3, 10]), (80, [1e-6, 3, 10, 10.001, 80]):
        mask = data.valid_mask(depth, max_depth)
        assert mask.shape == depth.shape and depth[mask].tolist() == pytest.approx(valid)


MM = np.random.default_rng(0).integers(1500, 4000, (24, 32)).astype(np.uint16)


@pytest.mark.parametrize("raw, max_depth, said", [
    (MM << 3 | MM >> 13, 10, "--depth-scale 8000 (SUN RGB-D) would make it 2."),
    (MM * 10, 10, "--depth-scale 10000 (tenths of a millimetre) would make it 2."),
    (MM * 10, 80, ""),
    (MM, 10, ""),
])
def test_an_unlikely_scale_is_said_once_with_the_likely_one(tmp_path, capsys, raw, max_depth, said):
    dataset = open_dataset(save_pair(tmp_path, depth=raw), "all")
    for _ in range(2):
        data.check_scale(dataset, max_depth)
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err
    assert printed.err.count("note: ") == printed.err.count("\n") == bool(said)


def test_a_pack_in_a_wrong_scale_must_be_packed_again(tmp_path, capsys):
    data.write_pack(tmp_path / "set.h5", save_pair(tmp_path, depth=MM * 5))
    data.check_scale(open_dataset(tmp_path / "set.h5", "all"), 10)
    assert capsys.readouterr().err.endswith("--max-depth, or pack it again with the right --depth-scale\n")


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


def test_colours_hidden_under_transparent_pixels_do_not_show(tmp_path):
    white = [255, 255, 255]
    image = Image.fromarray(np.uint8([[[0, 0, 0, 0], [200, 100, 50, 255], [99, 99, 99, 0]]]))
    assert stored(tmp_path, image).tolist() == [[white, [200, 100, 50], white]]
    assert stored(tmp_path, image.convert("LA")).tolist() == [[white, [124, 124, 124], white]]
    image = Image.fromarray(np.uint8([[0, 1]]), "P")
    image.putpalette([9, 8, 7, 200, 10, 20])
    assert stored(tmp_path, image).tolist() == [[[9, 8, 7], [200, 10, 20]]]
    assert stored(tmp_path, image, transparency=0).tolist() == [[white, [200, 10, 20]]]


@pytest.mark.parametrize("orientation, turns", [(3, 2), (6, 3), (8, 1)])
def test_a_camera_held_on_its_side_gives_an_upright_image(tmp_path, orientation, turns):
    exif = Image.Exif()
    exif[0x112] = orientation
    image = frame()[0]
    assert (stored(tmp_path, Image.fromarray(image), exif=exif) == np.rot90(image, turns)).all()


def test_an_image_too_large_to_be_honest_and_a_missing_one_are_named(tmp_path, monkeypatch):
    save(tmp_path / "0.png", frame()[0])
    with complains("1.png: no such file"):
        data.read_image(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with complains("0.png: cannot be read as an image"):
        data.read_image(tmp_path / "0.png")


# ------------------------------------------------------------------------------------------------------------
# Geometry: against Pillow, and against what a turned camera sees
# ------------------------------------------------------------------------------------------------------------


def seen(array, size, geometry="fastdepth", **move):
    """What sampling_grid shows of an array, and its factor."""
    rows, cols, factor = (t.numpy() for t in sampling_grid(*array.shape[:2], size, geometry, **move))
    return array[rows, cols], factor


def pillow_fastdepth(array, size):
    """The official transforms: Resize(250 / 480), CenterCrop(228, 304), Resize(size), all nearest."""
    middle = Image.fromarray(array).resize((333, 250), Image.NEAREST).crop((14, 11, 318, 239))
    return np.array(middle.resize(size[::-1], Image.NEAREST))


@pytest.mark.parametrize("size", [(224, 224), (128, 128), (256, 320)])
@pytest.mark.parametrize("height, width, crop", [
    (480, 640, np.s_[:]),
    (720, 960, np.s_[:]),
    (360, 640, np.s_[:, 80:560]),  # other aspects are first cropped to 4:3 about the centre
    (640, 480, np.s_[140:500]),
    (375, 1240, np.s_[:, 370:870]),
])
def test_the_fastdepth_geometry_is_that_of_the_official_transforms(height, width, crop, size):
    for array in frame(height, width):
        shown, factor = seen(array, size)
        assert (shown == pillow_fastdepth(array[crop], size)).all() and (factor == 1).all()


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (60, 80), (480, 640)])
@pytest.mark.parametrize("height, width", [(480, 640), (240, 320), (120, 397)])
def test_the_full_geometry_is_one_nearest_resize_of_the_whole_frame(height, width, size):
    depth = frame(height, width)[1]
    shown = seen(depth, size, "full")[0]
    exact = torch.nn.functional.interpolate(torch.from_numpy(depth)[None, None], size, mode="nearest-exact")
    assert (shown == exact[0, 0].numpy()).all()


FOCAL = 0.81 * 640  # of NYU's frames
PLANE = [0.3, -0.4, 0.8]  # where PLANE . point = 2; x right, y down, z ahead


def depth_of_plane(size, geometry, flip=False, zoom=1, pitch=0, yaw=0, roll=0):
    """What a turned camera sees of the plane, (h, w) metres, and the rays (h, w, 3) that it looks along."""
    height, width = (480 * 228 / 250, 640 * 304 / 333) if geometry == "fastdepth" else (480, 640)
    y, x = ((np.arange(n) + 0.5) * length / n - length / 2 for n, length in zip(size, (height, width)))
    x, y = np.meshgrid(-x if flip else x, y)
    turn = Rotation.from_euler("xyz", [pitch, yaw, roll], degrees=True)  # about x, then y, then z
    rays = np.stack([x / zoom, y / zoom, np.full(size, FOCAL)], -1) / FOCAL @ turn.as_matrix().T
    return 2 / (rays @ PLANE), rays


@pytest.mark.parametrize("geometry, size, tolerance", [
    ("full", (480, 640), 0.002),
    ("full", (96, 64), 0.002),
    ("fastdepth", (224, 224), 0.01),
])
@pytest.mark.parametrize("move", [
    dict(yaw=6.0),
    dict(pitch=6.0),
    dict(roll=5.0),
    dict(flip=True, roll=5.0, yaw=-6.0, pitch=-6.0),
    dict(flip=True, roll=-30.0, zoom=1.2),
], ids=str)
def test_a_turned_camera_sees_a_tilted_plane_at_its_exact_depth(geometry, size, tolerance, move):
    """But for the rounding to the nearest pixel. Nothing is lost but what lies outside the frame itself."""
    shown, factor = seen(depth_of_plane((480, 640), "full")[0], size, geometry, **move)
    exact, rays = depth_of_plane(size, geometry, **move)
    inside = factor > 0
    assert np.abs(shown * factor * move.get("zoom", 1) / exact - 1)[inside].max() < tolerance
    in_frame = np.abs(rays[..., :2] / rays[..., 2:]) < np.array([320, 240]) / FOCAL
    assert (inside == in_frame.all(-1)).mean() > 0.98 and 0.75 < inside.mean() < 1


EXACT = 224 * (250 / 228 * 333 / 304) ** 0.5  # a whole frame beside a crop at 224x224: 246x245


@pytest.mark.parametrize("trained, geometry, frame, focal, size, factor", [
    ((224, 224), "fastdepth", (480, 640), FOCAL, (256, 256), 256 / EXACT),
    ((128, 128), "fastdepth", (480, 640), FOCAL, (128, 128), 224 / EXACT),  # exactly 140x140
    ((224, 224), "fastdepth", (20, 20), FOCAL, (32, 32), 32 / 20 * (480 * 640) ** 0.5 / EXACT),  # the least
    ((480, 640), "full", (480, 640), 0.9 * FOCAL, (544, 704), (544 / 480 * 704 / 640) ** 0.5 * 0.9),
])
def test_whole_images_are_shown_at_the_focal_length_of_training(trained, geometry, frame, focal,
                                                                size, factor):
    config = dict(size=trained, geometry=geometry, frame=(480, 640))
    assert data.whole_image_size(frame, focal, config) == size
    assert data.depth_factor(focal, frame, size, "full", config) == pytest.approx(factor)


def test_an_image_never_shrinks_to_nothing():
    assert data.shrink(np.zeros((3, 5, 3), np.uint8), 0.06).shape == (1, 1, 3)


@pytest.mark.parametrize("height, width, geometry, said", [
    (96, 318, "fastdepth", "91% of the height and 37% of the width of 96x318 frames: "
                           "--geometry full --size 128 416 shows them whole"),
    (64, 48, "fastdepth", "51% of the height and 91% of the width"),
    (96, 318, "full", ""),
    (72, 128, "fastdepth", ""),
])
def test_a_crop_that_hides_more_than_a_third_is_said(tmp_path, capsys, height, width, geometry, said):
    save_pair(tmp_path, height=height, width=width)
    data.check_crop(open_dataset(tmp_path, "all", geometry=geometry), (224, 224))
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == bool(said)


# ------------------------------------------------------------------------------------------------------------
# The data set, its augmentation and its splits
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(12, 16), (48, 64), (30, 40)])
def test_depth_of_another_size_is_taken_by_nearest(tmp_path, height, width):
    depth = frame(height, width)[1]
    save_pair(tmp_path, depth=depth, suffix=".npy")
    expected = Image.fromarray(depth).resize((32, 24), Image.NEAREST)
    assert (open_dataset(tmp_path, "all", size=None)[0][1][0].numpy() == np.asarray(expected)).all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("augment", AUGMENTS)
def test_an_item_is_its_draw_applied_to_image_and_depth_alike(tmp_path, augment, geometry):
    image, depth = frame(60, 80)
    depth[20:30, 30:50] = 0
    save_pair(tmp_path, depth=np.where(depth == 0, NAN, depth), suffix=".npy", height=60, width=80)
    dataset = open_dataset(tmp_path, "all", (48, 64), augment, geometry)
    for dataset.epoch in range(8):
        move, colour = dataset.draw(0)
        rows, cols, factor = sampling_grid(60, 80, (48, 64), geometry, **move)
        expected = torch.from_numpy(image[rows, cols]).permute(2, 0, 1) / 255 * (factor > 0)
        if colour is not None:
            expected = data.colour_jitter(expected, *colour)
        shown, metres, index = dataset[0]
        assert torch.equal(shown, expected) and index == 0
        assert torch.equal(metres, torch.from_numpy(depth[rows, cols])[None] * factor)
    dataset.size = None  # as stored, without augmentation
    shown, metres, _ = dataset[0]
    assert torch.equal(shown, torch.from_numpy(image).permute(2, 0, 1) / 255)
    assert torch.equal(metres, torch.from_numpy(depth)[None])


COLOURS = dict(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4))


@pytest.mark.parametrize("augment, ranges", [
    ("none", {}),
    ("flip", dict(flip=(0, 1))),
    ("colour", dict(flip=(0, 1), roll=(-5, 5), **COLOURS)),
    ("camera", dict(flip=(0, 1), roll=(-5, 5), yaw=(-6, 6), pitch=(-6, 6), **COLOURS)),
    ("paper", dict(flip=(0, 1), roll=(-5, 5), zoom=(1, 1.5), **COLOURS)),
])
def test_an_augmentation_draws_its_numbers_evenly_and_apart_from_each_other(tmp_path, augment, ranges):
    dataset = open_dataset(save_pair(tmp_path), "all", augment=augment)
    draws = []
    for dataset.epoch in range(400):
        move, colour = dataset.draw(0)
        draws.append(dict(move, **dict(zip(COLOURS, colour or ()))))
    assert set(draws[0]) == set(ranges)
    values = np.array([[draw[name] for name in ranges] for draw in draws], float)
    for column, (low, high) in zip(values.T, ranges.values()):
        column = (column - low) / (high - low)
        assert 0 <= column.min() < 0.03 and 0.97 < column.max() <= 1 and 0.4 < column.mean() < 0.6
    if len(ranges) > 1:
        assert np.abs(np.corrcoef(values.T) - np.eye(len(ranges))).max() < 0.2


def test_a_draw_depends_on_seed_epoch_and_index_alone_and_on_each_of_them(tmp_path):
    for name in "01":
        save_pair(tmp_path, name)  # the same frame under two numbers

    def item(seed, epoch, index):
        dataset = open_dataset(tmp_path, "all", size=(32, 32), augment=True, seed=seed)
        dataset.epoch = epoch
        torch.rand(1), dataset[0]  # what was drawn or read before does not matter
        return torch.cat(dataset[index][:2]).numpy().tobytes()

    assert item(3, 2, 1) == item(3, 2, 1) and open_dataset(tmp_path, "all", augment=True).augment == "paper"
    keys = [(0, 2, 0), (1, 1, 0), (2, 0, 0), (1, 11, 0), (11, 1, 0), (1, 1, 1), (-1, 1, 1)]
    assert len({item(*key) for key in keys}) == len(keys)  # no sum of two of them decides


def test_the_jitter_is_that_of_torchvision():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(data.colour_jitter(image, 1, 1, 1), image, atol=1e-6)
    for brightness, contrast, saturation in ((0.6, 1.2, 1.4), (1.4, 1.4, 0.6), (1.1, 0.6, 0.8)):
        expected = TF.adjust_contrast(TF.adjust_brightness(image, brightness), contrast)
        expected = TF.adjust_saturation(expected, saturation)
        jittered = data.colour_jitter(image, brightness, contrast, saturation)
        assert torch.allclose(jittered, expected, atol=2e-3)  # torchvision rounds 0.299 to 0.2989


def test_workers_and_a_pickled_copy_give_the_same_items(tmp_path):
    for seed in range(6):
        save_hdf5(tmp_path / f"set/train/scene/{seed}.h5", *frame(seed=seed))
    data.write_pack(tmp_path / "pack.h5", tmp_path / "set")
    for root in (tmp_path / "set", tmp_path / "pack.h5"):
        dataset = open_dataset(root, "all", size=(32, 32), augment="camera")
        for dataset.epoch in (0, 1):  # what was read before leaves no open file that could not be inherited
            expected = [torch.stack([dataset[i][k] for i in range(6)]) for k in (0, 1)]
            copy = pickle.loads(pickle.dumps(dataset))
            batch = next(iter(DataLoader(copy, 6, num_workers=2, worker_init_fn=data.worker_init)))
            assert all(torch.equal(a, b) for a, b in zip(batch, expected))


def held_out(scene):
    return zlib.crc32(scene.encode()) % 5 == 0


SCENES = [f"kitchen_{i:04d}" for i in range(40)]
IN, OUT = ([scene for scene in SCENES if held_out(scene) == out][:2] for out in (False, True))


@pytest.mark.parametrize("samples, parts", [
    ([(None, scene) for scene in SCENES], ["val" if held_out(scene) else "train" for scene in SCENES]),
    ([(None, scene) for scene in IN], ["train", "val"]),  # the last one where the checksum holds out none ...
    ([(None, scene) for scene in OUT], ["train", "val"]),  # ... or all
    ([(None, "")] * 11, ["train"] * 9 + ["val"] * 2),  # without scenes the last fifth
    ([("train", "a")] * 11, ["train"] * 9 + ["val"] * 2),
    ([(None, "")] * 4, ["train"] * 4),
    ([("val", "a"), ("train", "b"), ("test", "c"), (None, "d")], ["val", "train", "test", "train"]),
    ([("test", OUT[0]), ("train", IN[0]), ("train", OUT[1])], ["test", "train", "val"]),
], ids="scenes none all without one few own test".split())
def test_val_is_the_data_sets_own_or_held_out_by_scene_and_never_from_test(samples, parts):
    samples = [data.Sample(part, scene, i, str(i)) for i, (part, scene) in enumerate(samples)]
    assigned = data.assign_parts(samples)
    assert [sample.part for sample in assigned] == parts
    assert [sample.source for sample in assigned] == list(range(len(parts)))


@pytest.mark.parametrize("choice, options", [
    ("'validation'.*train, val, test, all", dict(split="validation")),
    ("'flips'.*none, flip, colour, camera, paper", dict(augment="flips")),
    ("'square'.*fastdepth, full", dict(geometry="square")),
    (r"its val split is empty \(paired folders: 4 train\): at least 5 pairs are needed", dict(split="val")),
    (r"its test split is empty \(paired folders: 4 train\)$", dict(split="test")),
])
def test_an_unknown_choice_and_an_empty_split_are_refused_with_what_there_is(tmp_path, choice, options):
    for name in "abcd":
        save_pair(tmp_path, name)
    with complains(choice):
        open_dataset(tmp_path, **{"split": "all", **options})


@pytest.mark.parametrize("limit", [1, 4, 8, 12, 99])
def test_a_limit_chooses_evenly_over_the_whole_split(tmp_path, limit):
    for i in range(12):
        save_pair(tmp_path, f"{i:02d}")
    chosen = [int(Path(file).stem) for file in open_dataset(tmp_path, "all", limit=limit).files]
    assert chosen[0] == 0 and len(chosen) == min(limit, 12) and chosen == sorted(set(chosen))
    assert abs(sum(i < 6 for i in chosen) - sum(i >= 6 for i in chosen)) <= 1


# ------------------------------------------------------------------------------------------------------------
# For people: colours, files, mistakes, the command
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_near_is_bright_far_is_dark_and_not_measured_is_grey():
    colours = data.colourise(np.array([[1, 2, 3, 4, 5, 99], [0, NAN, INF, -1, 0, 0]]), near=1, far=5)
    assert colours.shape == (2, 6, 3) and colours.dtype == np.uint8
    assert (np.diff(colours[0].astype(int).sum(1))[:4] < 0).all() and (colours[0, 5] == colours[0, 4]).all()
    assert (colours[1] == colours[1, 0, 0]).all() and 50 < colours[1, 0, 0] < 200  # grey ...
    assert np.ptp(colours[0, 1:4], axis=1).min() > 0  # ... as nothing that was measured is
    assert data.colourise(np.full((2, 2), 3.0), near=3, far=3).shape == (2, 2, 3)  # flat depth has no range
    backwards = data.colourise([[1, 2, 5]], near=5, far=1)  # 5 is bright, 1 is dark
    assert (backwards[0, ::2] == data.colourise([[5, 2, 1]], near=1, far=5)[0, ::2]).all()


def test_a_colour_bar_runs_from_near_to_far_beside_five_labels():
    bar = data.colour_bar(0, 8, 240)
    assert bar.shape[0] == 240 and bar.shape[2] == 3 and bar.dtype == np.uint8
    brightness = bar[:, 8].astype(int).sum(1)
    assert (np.diff(brightness) <= 0).all() and brightness[0] > 600 and brightness[-1] < 60
    text = (bar[:, bar.shape[1] // 3:] < 128).any((1, 2))
    assert (np.diff(text.astype(int)) == 1).sum() + text[0] == 5


def test_a_sheet_shows_every_image_in_its_place():
    rows = [[np.full((10, 20, 3), 40 * r + 10 * c, np.uint8) for c in range(3)] for r in range(2)]
    sheet = np.asarray(data.tile(rows, gap=4))
    assert sheet.shape == (24, 68, 3) and (sheet[10:14] == 255).all()
    for r, c in np.ndindex(2, 3):
        assert (sheet[14 * r:14 * r + 10, 24 * c:24 * c + 20] == 40 * r + 10 * c).all()
    labelled = np.asarray(data.tile(rows, ["a", "b", "c"], gap=4))
    assert (labelled[18:] == sheet).all() and (labelled[:18] < 128).any()


def test_progress_is_one_line_on_a_terminal_and_nothing_in_a_file(capsys, monkeypatch):
    data.progress("cooking", 1, 4, start=0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    data.progress("cooking", 3, 4, start=time.time() - 270, more="  salt")
    shown = capsys.readouterr().out
    assert shown.startswith("\rcooking 3/4") and "1:30 left  salt" in shown and "\n" not in shown
    data.progress("cooking in a kitchen far away", 1, 4, start=0, more=99 * "salt")
    assert len(capsys.readouterr().out) == 2 + 79  # of a terminal's 80 columns
    data.progress("cooking", 4, 4, start=0)
    assert "cooking" not in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new/folder/depth.npy"
    with data.whole_file(file) as f:
        f.write(b"old")
        assert not file.exists()
    with open(file, "rb") as reader:
        with data.whole_file(file) as f:
            f.write(b"whole")
        assert reader.read() == b"old"  # whoever reads it now is not disturbed
    for error in (KeyboardInterrupt, ZeroDivisionError, UserError):
        with pytest.raises(error), data.whole_file(file) as f:
            f.write(b"half")
            raise error
    with complains("depth.npy: cannot be written .No space left on device."), data.whole_file(file):
        raise OSError(28, "a paragraph")
    assert file.read_bytes() == b"whole" and list(file.parent.iterdir()) == [file]
    for name in ("depth.npy/below", "x" * 250):  # below a file, and too long with .partial-PID
        with complains(f"{name}: cannot be written"), data.whole_file(file.parent / name):
            pass


def test_what_dead_processes_left_is_cleared_and_what_others_write_or_own_stays(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    stay = [f"a[1].h5.partial-{os.getppid()}", "a[1].h5.partial-mine", f"a1.h5.partial-{dead.pid}", "a[1].h5",
            f"a[1].h5.partial-{dead.pid}.bak", f"a[1].h5.partial-{2**70}"]
    for name in (*stay, f"a[1].h5.partial-{dead.pid}"):
        (tmp_path / name).touch()
    with data.whole_file(tmp_path / "a[1].h5"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(stay)


@pytest.mark.parametrize("kind, good, bad", [
    (data.positive(int), "3", "0 -1 1.5 two"),
    (data.positive(float), "0.5 3", "0 -1 inf nan two"),
    (data.non_negative, "0 0.5", "-1 inf nan"),
    (data.int64, "-1", f"{2**63} 0.5"),
    (data.up_to_256, "0 256", "-1 257 many"),
    (data.multiple_of_32, "32 224", "0 -32 33 32.0"),
])
def test_a_flag_takes_only_numbers_that_make_sense(kind, good, bad, capsys):
    parser = data.make_parser("A script.")
    parser.add_argument("--number", type=kind)
    for text in good.split():
        assert parser.parse_args([f"--number={text}"]).number == float(text)
    for text in bad.split():
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"--number={text}"])
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 2  # usage, and the error


@pytest.mark.parametrize("error, code, message", [
    (UserError("a.png: is no image"), 2, "script.py: error: a.png: is no image\n"),
    (ModelError("no such model"), 2, "script.py: error: no such model\n"),
    (FileNotFoundError(2, "No such file", "a.png"), 2, "script.py: error: [Errno 2] No such file: 'a.png'\n"),
    (torch.OutOfMemoryError("CUDA ..."), 2, "script.py: error: the GPU's memory is too small: lower --"),
    (KeyboardInterrupt(), 130, ""),
])
def test_a_mistake_is_one_line_and_its_exit_code(monkeypatch, capsys, error, code, message):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/here/script.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main, ModelError)
    printed = capsys.readouterr()
    assert stop.value.code == code and printed.out == "" and printed.err.startswith(message)
    assert len(printed.err.splitlines()) == bool(message)


def test_a_reader_who_closes_the_pipe_sees_no_traceback(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: print("a line"))
    assert stop.value.code == 141
    sys.stdout.close()  # as Python does when it exits


def test_a_name_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run_script(lambda: print("写真: 1 pair"))
    assert sys.stdout.buffer.getvalue() == rb"\u5199\u771f: 1 pair" + b"\n"


def test_the_command_prints_facts_and_writes_a_contact_sheet(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abcde":
        save_pair(tmp_path / "pairs", name, depth=np.full((24, 32), 20000, np.uint16))
    data.main(["pairs", "--depth-scale", "5000"])
    printed = capsys.readouterr().out
    for fact in ("paired folders", "4 train, 1 val; 1 scenes", "pairs/rgb/a.png with pairs/depth/a.png",
                 "24x32", "median 4.00 m", "100% measured", "scale 5000", "look    runs/data-pairs.png"):
        assert fact in printed
    with Image.open("runs/data-pairs.png") as sheet:
        assert sheet.size == (3 * 480 + 8, 2 * 180 + 4)
    data.main(["pairs", "--out", "sheet.png"])
    assert Path("sheet.png").is_file()
    assert "--depth-scale 5000 (TUM) would make it 4 m" in capsys.readouterr().err


@pytest.mark.parametrize("flags, complaint", [
    (["--out", "sheet.png"], "depth/0.png: cannot be read as depth"),
    (["--size", "60", "80"], "--size: .*--pack"),
    (["--pack", "set.hdf"], "set.hdf: .*end in .h5"),
    (["--pack", "set.h5", "--out", "sheet.png"], "--out: not allowed with .*--pack"),
])
def test_the_command_names_a_broken_file_or_a_wrong_flag(tmp_path, monkeypatch, refused, flags, complaint):
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path / "broken")
    (tmp_path / "broken/depth/0.png").write_bytes(b"junk")
    assert re.search(complaint, refused(data, ["broken", *flags]))
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
