"""Units, readers, splits, geometry and the command, on miniature data sets that each test writes for itself."""
import pickle
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from unittest.mock import ANY

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import data
from data import colourise, jitter, open_dataset, progress, read_image, sampling_grid, tile, to_metres, valid_mask

HDF5 = "HDF5 folders"
PAIRED = {  # layout -> its files below the root, for a frame of a given name
    "rgb + 16-bit png": ("rgb/{}.png", "depth/{}.png"),
    "image + npy": ("image/{}.png", "depth/{}.npy"),
    "color + npz": ("color/{}.png", "depth/{}.npz"),
    "NAME_image + png": ("{}_image.png", "{}_depth.png"),
    "NAME_image + npy": ("{}_image.png", "{}_depth.npy"),
}


def frame(height=24, width=32, seed=0):
    """A picture of noise, and depth in whole millimetres, so that every way of storing it is exact."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(500, 9000, (height, width)).astype(np.float32) / 1000


def save(file, array):
    """A picture, or depth in metres, stored as the file's name demands."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, array)
    elif file.suffix == ".npz":
        np.savez(file, array)
    else:
        Image.fromarray((array * 1000).round().astype(np.uint16) if array.dtype == np.float32 else array).save(file)


def save_hdf5(file, image, depth):
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as h5:
        h5["rgb"], h5["depth"] = image.transpose(2, 0, 1), depth


def write(root, layout=HDF5, names="0", folder="", **options):
    """One frame for each name, below root/folder. HDF5 is the layout train/<scene>/*.h5."""
    for seed, name in enumerate(names):
        image, depth = frame(seed=seed, **options)
        if layout == HDF5:
            save_hdf5(root / (folder or "train/scene") / f"{name}.h5", image, depth)
        else:
            image_file, depth_file = PAIRED[layout]
            save(root / folder / image_file.format(name), image)
            save(root / folder / depth_file.format(name), depth)
    return root


def complains(about):
    """The block raises a ValueError whose message is one line and matches `about`."""
    return pytest.raises(ValueError, match=rf"\A[^\n]*{about}[^\n]*\Z")


def as_array(image):
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


# ------------------------------------------------------------------------------------------------------------------
# Units
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_depth_is_metres_and_what_is_not_finite_is_not_measured(dtype):
    metres = to_metres(np.array([[1.5, 0, np.nan], [np.inf, -np.inf, 7.25]], dtype))
    assert metres.dtype == np.float32 and metres.tolist() == [[1.5, 0, 0], [0, 0, 7.25]]


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 2, 3)])
def test_depth_may_have_a_channel_of_its_own(shape):
    assert to_metres(np.arange(1, 7, dtype=np.float32).reshape(shape)).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("scale", [1000.0, 5000.0, 256.0])
def test_integer_depth_is_divided_by_its_scale_and_0_and_65535_are_not_measured(dtype, scale):
    metres = to_metres(np.array([[0, 65535], [1, 20000]], dtype), scale)
    assert metres.dtype == np.float32
    np.testing.assert_allclose(metres, [[0, 0], [1 / scale, 20000 / scale]], rtol=1e-6)


def test_8_bit_depth_is_tenths_of_255_whatever_the_scale():
    metres = to_metres(np.array([[0, 51, 255]], np.uint8), scale=256)
    assert metres.dtype == np.float32
    np.testing.assert_allclose(metres, [[0, 2, 10]], rtol=1e-6)


@pytest.mark.parametrize("raw, complaint", [
    (np.zeros((4, 4), np.float32), "no pixel"),
    (np.full((4, 4), np.nan), "no pixel"),
    (np.full((4, 4), 65535, np.uint16), "no pixel"),
    (np.zeros((4, 4), np.uint8), "no pixel"),
    (np.full((4, 4), 1500.0), "millimetres"),
    (np.full((4, 4, 3), 9, np.uint8), r"\(4, 4, 3\)"),
])
def test_depth_that_cannot_be_metres_is_refused_by_name(raw, complaint):
    with complains(f"depth/7.png.*{complaint}"):
        to_metres(raw, file="depth/7.png")


def test_16_bit_depth_at_an_impossible_scale_points_to_the_flag():
    with complains("7.png.*1500 m.*--depth-scale"):
        to_metres(np.full((4, 4), 1500, np.uint16), scale=1, file="7.png")


@pytest.mark.parametrize("max_depth", [10.0, 80.0])
def test_the_mask_is_finite_above_0_and_up_to_max_depth(max_depth):
    depth = np.array([np.nan, np.inf, -np.inf, -1, -0.0, 0, 1e-6, 3, 10, 10.001, 80, 81], np.float32)
    with np.errstate(invalid="ignore"):
        expected = ~np.isnan(depth) & (0 < depth) & (depth <= max_depth)
    mask = valid_mask(torch.from_numpy(depth).view(1, 1, 3, 4), max_depth)
    assert mask.dtype == torch.bool and mask.flatten().tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------------------------------
# Readers
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "house/kitchen"])
@pytest.mark.parametrize("layout", [HDF5, *PAIRED])
def test_every_layout_gives_back_what_was_stored(tmp_path, layout, folder):
    folder = f"train/{folder or 'scene'}" if layout == HDF5 else folder
    ds = open_dataset(write(tmp_path, layout, "ab", folder), "all", size=None)
    assert len(ds) == len(ds.files) == 2
    for seed, (image, depth, index) in enumerate(ds[i] for i in range(2)):
        expected_image, expected_depth = frame(seed=seed)
        assert index == seed and Path(ds.files[index]).stem.startswith("ab"[index])
        assert image.shape == (3, 24, 32) and image.dtype == torch.float32
        assert depth.shape == (1, 24, 32) and depth.dtype == torch.float32
        assert (as_array(image) == expected_image).all() and (depth[0].numpy() == expected_depth).all()


def test_the_scale_of_16_bit_depth_can_be_chosen(tmp_path):
    ds = open_dataset(write(tmp_path, "rgb + 16-bit png"), "all", size=None, depth_scale=5000.0)
    np.testing.assert_allclose(ds[0][1][0], frame()[1] / 5, rtol=1e-6)


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


def keep(share):
    return lambda file: file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])


def junk(file):
    file.write_text("not what the name says\n" * 99)


def drop(key):
    def damage(file):
        with h5py.File(file, "a") as h5:
            del h5[key]
    return damage


@pytest.mark.parametrize("layout, name", [
    (HDF5, "train/scene/0.h5"),
    ("rgb + 16-bit png", "rgb/0.png"),
    ("rgb + 16-bit png", "depth/0.png"),
    ("image + npy", "depth/0.npy"),
    ("color + npz", "depth/0.npz"),
])
@pytest.mark.parametrize("damage", [junk, keep(0), keep(0.1), keep(0.5), keep(0.9)], ids="junk 0 0.1 0.5 0.9".split())
def test_a_damaged_file_is_named(tmp_path, layout, name, damage):
    ds = open_dataset(write(tmp_path, layout), "all")
    damage(tmp_path / name)
    with complains(name):
        ds[0]


@pytest.mark.parametrize("key", ["rgb", "depth"])
def test_an_hdf5_file_without_one_of_its_keys_is_named(tmp_path, key):
    drop(key)(write(tmp_path) / "train/scene/0.h5")
    with complains(f"0.h5.*{key}"):
        open_dataset(tmp_path, "all")[0]


@pytest.mark.parametrize("key, shape, dtype", [
    ("rgb", (24, 32), np.uint8),
    ("rgb", (24, 32, 3), np.uint8),
    ("rgb", (3, 24, 32), np.float32),
    ("depth", (3, 24, 32), np.float32),
    ("depth", (24, 28), np.float32),
])
def test_an_hdf5_file_with_another_shape_or_type_is_named(tmp_path, key, shape, dtype):
    file = write(tmp_path) / "train/scene/0.h5"
    drop(key)(file)
    with h5py.File(file, "a") as h5:
        h5[key] = np.ones(shape, dtype)
    with complains("0.h5"):
        open_dataset(tmp_path, "all")[0]


@pytest.mark.parametrize("layout, name", [("rgb + 16-bit png", "depth/0.png"), ("image + npy", "depth/0.npy")])
def test_depth_without_a_measured_pixel_is_named(tmp_path, layout, name):
    save(write(tmp_path, layout) / name, np.zeros((24, 32), np.float32))
    with complains(f"{name}.*no pixel"):
        open_dataset(tmp_path, "all")[0]


def test_a_missing_folder_and_an_unknown_layout_are_named(tmp_path):
    with complains("nowhere.*no such file or folder"):
        open_dataset(tmp_path / "nowhere", "train")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear reader")
    with complains("letters.*layout"):
        open_dataset(tmp_path / "letters", "train")


def stored(tmp_path, picture, **options):
    picture.save(tmp_path / "p.png", **options)
    array = read_image(tmp_path / "p.png")
    assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
    return array


def test_grey_8_and_16_bit_pictures_become_rgb_of_the_same_brightness(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    for picture in (grey, grey.astype(np.uint16) * 257):  # 257 = 65535 / 255
        assert (stored(tmp_path, Image.fromarray(picture)) == grey[..., None]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colours_hidden_under_transparent_pixels_do_not_show(tmp_path, mode):
    shown = []
    for hidden in (0, 255):
        picture = np.full((8, 8, len(mode)), hidden, np.uint8)
        picture[..., -1] = 0
        picture[2:5, 2:5] = [200, 100, 50, 255] if mode == "RGBA" else [90, 255]
        shown.append(stored(tmp_path, Image.fromarray(picture)))
    assert (shown[0] == shown[1]).all()
    assert (shown[0][2:5, 2:5] == ([200, 100, 50] if mode == "RGBA" else [90] * 3)).all()


def test_a_palette_is_looked_up_and_its_transparent_colour_does_not_show(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    picture.putpalette([9, 8, 7, 200, 10, 20, 30, 220, 40])
    assert stored(tmp_path, picture).tolist() == [[[9, 8, 7], [200, 10, 20]], [[30, 220, 40], [200, 10, 20]]]
    array = stored(tmp_path, picture, transparency=0)
    assert array[0, 0].tolist() != [9, 8, 7] and array[1, 0].tolist() == [30, 220, 40]


@pytest.mark.parametrize("orientation, upright", [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])
def test_a_camera_held_on_its_side_gives_an_upright_picture(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x112] = orientation
    assert (stored(tmp_path, Image.fromarray(frame()[0]), exif=exif) == upright(frame()[0])).all()


def test_a_picture_too_large_to_be_honest_and_a_missing_one_are_named(tmp_path, monkeypatch):
    save(tmp_path / "0.png", frame()[0])
    with complains("1.png"):
        read_image(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with complains("0.png"):
        read_image(tmp_path / "0.png")


# ------------------------------------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------------------------------------


def split_names(root, **options):
    """The names of the frames of each split that is not empty."""
    names = {}
    for split in ("train", "val", "test", "all"):
        try:
            ds = open_dataset(root, split, **options)
        except ValueError as error:
            assert str(root) in str(error) and split in str(error) and "\n" not in str(error)
        else:
            assert len(ds) == len(ds.files) > 0
            names[split] = [Path(file).stem.removesuffix("_image") for file in ds.files]
    parts = [name for split in ("train", "val", "test") for name in names.get(split, [])]
    assert sorted(parts) == sorted(names["all"])  # none twice, none lost
    return names


def held_out(scene):
    return zlib.crc32(scene.encode()) % 5 == 0


SCENES = [f"kitchen_{i:04d}" for i in range(12)]


@pytest.mark.parametrize("layout", ["scenes.csv", "folders", HDF5])
def test_whole_scenes_are_held_out_by_their_checksum(tmp_path, layout):
    scene_of = {f"{i:03d}": SCENES[i // 2] for i in range(24)}
    if layout == "scenes.csv":
        write(tmp_path, "rgb + 16-bit png", scene_of)
        (tmp_path / "scenes.csv").write_text("frame,scene\n" + "".join(f"{name},{scene}\n" for name, scene in scene_of.items()))
    for name, scene in scene_of.items():
        if layout == "folders":
            write(tmp_path, "rgb + 16-bit png", [name], scene)
        elif layout == HDF5:
            write(tmp_path, HDF5, [name], f"train/{scene}")
    names = split_names(tmp_path)
    assert set(names["val"]) == {name for name, scene in scene_of.items() if held_out(scene)}
    assert set(names) == {"train", "val", "all"}


@pytest.mark.parametrize("layout", PAIRED)
def test_without_scenes_the_last_fifth_of_the_names_is_held_out(tmp_path, layout):
    names = split_names(write(tmp_path, layout, "jihgfedcba"))
    assert sorted(names["train"]) == list("abcdefgh") and sorted(names["val"]) == list("ij")


@pytest.mark.parametrize("layout", [HDF5, "rgb + 16-bit png"])
@pytest.mark.parametrize("parts", [("train", "val"), ("train", "val", "test")])
def test_a_folder_with_its_own_parts_keeps_them(tmp_path, layout, parts):
    for part in parts:
        write(tmp_path, layout, [f"{part}-{i}" for i in range(4)], f"{part}/rooms")
    assert split_names(tmp_path) == {part: [f"{part}-{i}" for i in range(4)] for part in parts} | {"all": ANY}


def test_the_official_frames_of_fastdepth_are_only_ever_test(tmp_path):
    for scene in SCENES:
        write(tmp_path, HDF5, [scene], f"train/{scene}")
    write(tmp_path, HDF5, "xyz", "val/official")
    names = split_names(tmp_path)
    assert sorted(names["test"]) == list("xyz")
    assert names["val"] and set(names["val"]) == {scene for scene in SCENES if held_out(scene)}


def test_an_unknown_split_is_refused(tmp_path):
    with complains("'validation'.*train, val, test, all"):
        open_dataset(write(tmp_path), "validation")


def test_an_unknown_augmentation_is_refused(tmp_path):
    with complains("'flips'.*none, flip, colour, paper"):
        open_dataset(write(tmp_path), "all", augment="flips")


@pytest.mark.parametrize("limit", [1, 4, 8, 12, 99])
def test_a_limit_chooses_evenly_over_the_whole_split(tmp_path, limit):
    names = "abcdefghijkl"
    files = open_dataset(write(tmp_path, HDF5, names), "all", limit=limit).files
    chosen = [names.index(Path(file).stem) for file in files]
    assert len(chosen) == min(limit, 12) and chosen == sorted(set(chosen))
    assert abs(sum(i < 6 for i in chosen) - sum(i >= 6 for i in chosen)) <= 1


# ------------------------------------------------------------------------------------------------------------------
# Geometry: against PIL
# ------------------------------------------------------------------------------------------------------------------


def pil_fastdepth(array, size=(224, 224)):
    """The official transforms: Resize(250 / 480), CenterCrop(228, 304), Resize(224, 224), all nearest."""
    picture = Image.fromarray(array).resize((333, 250), Image.NEAREST)
    left, top = int(round((333 - 304) / 2)), int(round((250 - 228) / 2))
    return np.asarray(picture.crop((left, top, left + 304, top + 228)).resize(size[::-1], Image.NEAREST))


def through_dataset(tmp_path, image, depth, **options):
    save(tmp_path / "rgb/0.png", image)
    save(tmp_path / "depth/0.npy", depth)
    image, depth, _ = open_dataset(tmp_path, "all", **options)[0]
    return as_array(image), depth[0].numpy()


@pytest.mark.parametrize("size", [(224, 224), (256, 320)])
@pytest.mark.parametrize("height, width", [(480, 640), (240, 320), (720, 960)])
def test_the_fastdepth_geometry_is_that_of_the_official_transforms(tmp_path, height, width, size):
    image, depth = frame(height, width)
    got_image, got_depth = through_dataset(tmp_path, image, depth, size=size)
    assert (got_image == pil_fastdepth(image, size)).all() and (got_depth == pil_fastdepth(depth, size)).all()


@pytest.mark.parametrize("height, width, crop", [
    (360, 640, np.s_[:, 80:560]),
    (640, 480, np.s_[140:500]),
    (304, 304, np.s_[38:266]),
    (375, 1240, np.s_[:, 370:870]),
])
def test_other_aspects_are_first_cropped_to_4_3_about_the_centre(tmp_path, height, width, crop):
    image, depth = frame(height, width)
    assert depth[crop].shape[1] * 3 == depth[crop].shape[0] * 4
    got_image, got_depth = through_dataset(tmp_path, image, depth)
    assert (got_image == pil_fastdepth(image[crop])).all() and (got_depth == pil_fastdepth(depth[crop])).all()


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (60, 80), (480, 640)])
@pytest.mark.parametrize("height, width", [(480, 640), (240, 320), (120, 397)])
def test_the_full_geometry_is_one_nearest_resize_of_the_whole_frame(tmp_path, height, width, size):
    """Of PIL, but for 640 -> 224: there PIL's rounding shifts 20 columns, whose middles fall on the border of two pixels."""
    for got, array in zip(through_dataset(tmp_path, *frame(height, width), size=size, geometry="full"), frame(height, width)):
        exact = torch.from_numpy(array).view(height, width, -1).permute(2, 0, 1)[None].float()
        exact = torch.nn.functional.interpolate(exact, size=size, mode="nearest-exact")[0].permute(1, 2, 0).numpy()
        assert (got.reshape(exact.shape) == exact).all()
        if size != (224, 224):
            assert (got == np.asarray(Image.fromarray(array).resize(size[::-1], Image.NEAREST))).all()


def test_an_unknown_geometry_is_refused():
    with complains("'square'.*fastdepth"):
        sampling_grid(48, 64, (32, 32), "square")


def view(array, size, **move):
    rows, cols, inside = (index.numpy() for index in sampling_grid(*array.shape[:2], size, **move))
    return array[rows, cols], np.broadcast_to(inside, size)


@pytest.mark.parametrize("geometry", ["fastdepth", "full"])
def test_a_flip_is_the_mirror_image_to_the_pixel(geometry):
    array = frame(240, 320)[1]
    for size in ((224, 224), (48, 64)):
        assert (view(array, size, geometry=geometry, flip=True)[0] == view(array, size, geometry=geometry)[0][:, ::-1]).all()


def test_a_zoom_of_2_shows_the_middle_twice_as_large():
    array = frame(48, 64)[1]
    shown, inside = view(array, (48, 64), geometry="full", zoom=2.0)
    assert inside.all() and (shown == array[12:36, 16:48].repeat(2, 0).repeat(2, 1)).all()


def test_a_quarter_turn_is_that_of_numpy():
    array = frame(64, 64)[1]
    shown, inside = view(array, (64, 64), geometry="full", angle=90.0)
    assert inside.all() and (shown == np.rot90(array)).all()  # counter-clockwise, as PIL and torchvision count


@pytest.mark.parametrize("geometry", ["fastdepth", "full"])
def test_what_a_rotation_uncovers_is_outside_and_nothing_else(geometry):
    array = frame(240, 320)[1]
    assert view(array, (64, 64), geometry=geometry)[1].all()
    assert view(array, (64, 64), geometry=geometry, angle=30.0, zoom=3.0)[1].all()
    inside = view(array, (64, 64), geometry=geometry, angle=30.0)[1]
    assert not inside[[0, 0, -1, -1], [0, -1, 0, -1]].any() and inside[16:48, 16:48].all()
    if geometry == "full":  # what is covered is the overlap of a 4:3 rectangle with itself turned by 30 degrees
        rotated = Image.new("L", (320, 240), 255).rotate(30, Image.NEAREST).resize((64, 64), Image.NEAREST)
        assert (inside == (np.asarray(rotated) > 0)).mean() > 0.995
    else:  # the margin outside the crop is used: at 5 degrees less is lost than a crop turned in itself would lose
        alone = Image.new("L", (304, 228), 255).rotate(5, Image.NEAREST)
        assert view(array, (228, 304), angle=5.0)[1].mean() > (np.asarray(alone) > 0).mean() + 0.01


# ------------------------------------------------------------------------------------------------------------------
# The data set and its augmentation
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
def test_an_item_is_a_picture_in_0_to_1_and_metres_with_0_for_not_measured(tmp_path, size, augment):
    image, depth = frame(48, 64)
    depth[10:30, 20:40] = np.nan
    save(tmp_path / "rgb/0.png", image)
    save(tmp_path / "depth/0.npy", depth)
    image, depth, index = open_dataset(tmp_path, "all", size=size, augment=augment)[0]
    assert image.shape == (3, *size) and depth.shape == (1, *size) and index == 0
    assert image.dtype == depth.dtype == torch.float32
    assert 0 <= image.min() < 0.2 and 0.8 < image.max() <= 1
    assert 0 < depth.eq(0).float().mean() < 0.5 and depth.isfinite().all() and depth[depth > 0].min() >= 0.5 / 1.5


def test_without_a_size_nothing_is_augmented(tmp_path):
    write(tmp_path)
    image, depth, _ = open_dataset(tmp_path, "all", size=None, augment=True)[0]
    assert (as_array(image) == frame()[0]).all() and (depth[0].numpy() == frame()[1]).all()


def test_the_augmentation_can_be_a_flip_alone(tmp_path):
    plain, ds = (open_dataset(write(tmp_path), "all", size=(48, 64), augment=augment) for augment in (False, "flip"))
    plain, flips = torch.cat(plain[0][:2]), []
    for ds.epoch in range(40):
        item = torch.cat(ds[0][:2])
        flips.append(torch.equal(item, plain.flip(-1)))
        assert flips[-1] or torch.equal(item, plain)
    assert 10 < sum(flips) < 30


def test_the_colour_augmentation_is_the_papers_without_its_zoom(tmp_path):
    write(tmp_path, HDF5, "a")
    colour, paper = (open_dataset(tmp_path, "all", size=(48, 64), augment=augment) for augment in ("colour", "paper"))
    depths = set(colour.read(0)[1].ravel().tolist()) | {0.0}
    for colour.epoch in range(6):
        paper.epoch = colour.epoch
        (move, factors), (with_zoom, same) = colour.draw(0), paper.draw(0)
        assert factors == same and move == with_zoom | {"zoom": 1.0} and with_zoom["zoom"] > 1
        assert set(colour[0][1].unique().tolist()) <= depths  # nothing is divided


def test_an_augmented_item_depends_on_seed_epoch_and_index_alone(tmp_path):
    for name in "01":
        save_hdf5(tmp_path / f"train/scene/{name}.h5", *frame())  # the same frame under two numbers

    def item(seed=3, epoch=2, index=1):
        ds = open_dataset(tmp_path, "all", size=(32, 32), augment=True, seed=seed)
        ds.epoch = epoch
        torch.rand(1), ds[0]  # what was drawn or read before does not matter
        return torch.cat(ds[index][:2])

    assert torch.equal(item(), item())
    for other in (item(seed=4), item(epoch=3), item(index=0)):
        assert not torch.equal(other, item())


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    ds = open_dataset(write(tmp_path, HDF5, "abcdef"), "all", size=(32, 32), augment=True)
    ds[0]  # reading leaves no open file that a worker could not inherit
    for ds.epoch in (0, 1):
        alone, together = (list(torch.utils.data.DataLoader(ds, batch_size=3, num_workers=n)) for n in (0, 2))
        assert len(alone) == 2 and alone[0][0].shape == (3, 3, 32, 32)
        assert all(torch.equal(a, b) for one, two in zip(alone, together) for a, b in zip(one, two))


@pytest.mark.parametrize("layout", [HDF5, "rgb + 16-bit png"])
def test_a_data_set_pickles_even_after_it_was_read(tmp_path, layout):
    ds = open_dataset(write(tmp_path, layout, "ab"), "all", size=(32, 32), augment=True)
    before, copy = ds[1], pickle.loads(pickle.dumps(ds))
    assert copy.files == ds.files and all(torch.equal(a, b) for a, b in zip(before[:2], copy[1][:2]))


def test_the_jitter_is_that_of_torchvision():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(jitter(image, 1, 1, 1), image, atol=1e-6)
    for factors in ((0.6, 1.2, 1.4), (1.4, 1.4, 0.6), (1.1, 0.6, 0.8)):
        expected = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(image, factors[0]), factors[1]), factors[2])
        assert torch.allclose(jitter(image, *factors), expected, atol=2e-3)  # it rounds 0.299 to 0.2989


HEIGHT, WIDTH, SIZE, TONES = 240, 320, (48, 64), np.array([[70, 70, 70], [110, 110, 110], [130, 90, 90]], np.uint8)


@pytest.fixture(scope="module", params=["fastdepth", "full"])
def draws(request, tmp_path_factory):
    """Augmented views of one picture in three tones. Its depth is 1 m, or the number of the row, or that of the column: a draw
    depends on the seed, the epoch and the index, so these three show the zoom and where every pixel comes from."""
    root = tmp_path_factory.mktemp("draws")
    rows, cols = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32) / 4 + 1
    tones = np.random.default_rng(0).integers(0, 3, (HEIGHT, WIDTH))
    datasets = []
    for name, depth in (("one", np.ones_like(rows)), ("rows", rows), ("cols", cols)):
        save_hdf5(root / name / "train/scene/0.h5", TONES[tones], depth)
        datasets.append(open_dataset(root / name, "all", size=SIZE, augment=True, geometry=request.param))
    views = []
    for epoch in range(120):
        for ds in datasets:
            ds.epoch = epoch
        (image, one, _), (_, rows, _), (_, cols, _) = (ds[0] for ds in datasets)
        inside, zoom = one[0] > 0, 1 / one.max()
        assert (one[0][inside] == one.max()).all()  # one zoom for the whole view
        rows, cols = (((depth[0] * zoom - 1) * 4).round().long().numpy() for depth in (rows, cols))
        views.append((image.numpy(), inside.numpy(), rows, cols, zoom.item()))
    shown = (HEIGHT * 228 / 250, WIDTH * 304 / 333) if request.param == "fastdepth" else (HEIGHT, WIDTH)  # without a zoom
    return tones, views, shown


def similarity(rows, cols, inside, shown):
    """Least squares: source = matrix @ output + offset, both (x, y) from their centres, in square pixels of the source."""
    y, x = (np.mgrid[:SIZE[0], :SIZE[1]] + 0.5) * np.reshape(np.divide(shown, SIZE), (2, 1, 1))
    output = np.stack([x - shown[1] / 2, y - shown[0] / 2, np.ones(SIZE)], -1)[inside]
    source = np.stack([cols + 0.5 - WIDTH / 2, rows + 0.5 - HEIGHT / 2], -1)[inside]
    solution = np.linalg.lstsq(output, source, rcond=None)[0].T
    assert np.abs(output @ solution.T - source).max() < 2  # two roundings to the nearest pixel
    return solution[:, :2], solution[:, 2]


def test_every_view_is_zoomed_turned_and_mirrored_about_the_centre_and_never_sheared(draws):
    _, views, shown = draws
    zooms, angles, flips = [], [], []
    for _, inside, rows, cols, zoom in views:
        matrix, offset = similarity(rows, cols, inside, shown)
        flip = np.linalg.det(matrix) < 0
        turn = matrix @ np.diag([-1 if flip else 1, 1]) * zoom
        angle = np.arctan2(turn[1, 0], turn[0, 0])
        np.testing.assert_allclose(turn, [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], atol=0.005)
        assert np.abs(offset).max() < 1
        zooms.append(zoom), angles.append(np.degrees(angle)), flips.append(flip)
    assert 1 <= min(zooms) < 1.03 and 1.47 < max(zooms) <= 1.5001
    assert -5.1 < min(angles) < -4.8 and 4.8 < max(angles) < 5.1
    assert 0.35 < np.mean(flips) < 0.65


def test_picture_and_depth_stay_aligned(draws):
    tones, views, _ = draws
    for image, inside, rows, cols, _ in views:
        shown = np.where(inside, tones[rows, cols], -1)
        means = [image[:, shown == tone].mean(1) for tone in range(3)]
        assert all(np.ptp(image[:, shown == tone], axis=1).max() < 1e-5 for tone in range(3))  # a tone is still one colour
        assert all(np.abs(means[tone] - means[tone - 1]).max() > 0.01 for tone in range(3))  # and no two tones are the same


def test_uncovered_corners_have_no_depth(draws):
    _, views, shown = draws
    uncovered = [inside for _, inside, *_ in views if not inside.all()]
    assert all(inside.mean() > 0.9 and not inside[[0, 0, -1, -1], [0, -1, 0, -1]].all() for inside in uncovered)
    assert 5 < len(uncovered) < 60 if shown == (HEIGHT, WIDTH) else len(uncovered) < 5  # the margin of the crop covers nearly all


def test_brightness_contrast_and_saturation_are_drawn_from_0_6_to_1_4(draws):
    tones, views, _ = draws
    dark, light, red = TONES / 255
    luma = (TONES / 255 @ [0.299, 0.587, 0.114]).mean()
    found = []
    for image, _, rows, cols, zoom in (view for view in views if view[1].all()):
        seen = [image[:, tones[rows, cols] == tone].mean(1) for tone in range(3)]
        gain = (seen[1][0] - seen[0][0]) / (light[0] - dark[0])  # brightness x contrast
        brightness = (seen[0][0] - gain * dark[0]) / luma + gain
        saturation = (seen[2][0] - seen[2][1]) / (red[0] - red[1]) / gain
        found.append([brightness, gain / brightness, saturation, zoom, cols[0, 0] < cols[0, -1]])
    found = np.array(found).T
    for factor in found[:3]:
        assert 0.58 < factor.min() < 0.65 and 1.35 < factor.max() < 1.42
    assert np.abs(np.corrcoef(found) - np.eye(5)).max() < 0.4  # each is a draw of its own, also from zoom and flip


# ------------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------------


def run(*arguments, cwd):
    command = [sys.executable, Path(data.__file__).resolve(), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_facts_say_what_the_scale_makes_of_16_bit_depth(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "pairs/rgb/0.png", frame()[0])
    save(tmp_path / "pairs/depth/0.png", np.full((24, 32), 20, np.float32))
    data.main(["pairs", "--depth-scale", "5000"])
    printed = capsys.readouterr().out
    assert "4.00 m at the median" in printed and "5000" in printed and "100% measured" in printed
    assert Path(printed.split()[-1]).is_file()


def test_a_wrong_path_is_one_line_and_exit_code_2(tmp_path):
    result = run("nowhere", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
    assert len(result.stderr.splitlines()) == 1 and "nowhere" in result.stderr


@pytest.mark.parametrize("arguments, complaint", [
    ([], "--rooms"),
    (["here", "--rooms", "8"], "--rooms"),
    (["--rooms", "7", "--out", "new"], "7"),
    (["--rooms", "many"], "many"),
    (["--rooms", "8", "--device", "abacus"], "abacus"),
])
def test_a_wrong_flag_is_one_line_and_renders_nothing(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    with complains(complaint):
        data.main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_a_broken_file_and_writes_no_sheet(tmp_path):
    keep(0.5)(write(tmp_path / "broken") / "train/scene/0.h5")
    with complains("0.h5"):
        data.main([str(tmp_path / "broken"), "--out", str(tmp_path / "sheet.png")])
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


# ------------------------------------------------------------------------------------------------------------------
# Pictures and progress
# ------------------------------------------------------------------------------------------------------------------


def test_near_is_bright_far_is_dark_and_not_measured_is_grey():
    picture = colourise(np.array([[1, 2, 3, 4, 5, 99], [0, np.nan, np.inf, -1, 0, 0]]), near=1, far=5)
    assert picture.shape == (2, 6, 3) and picture.dtype == np.uint8
    brightness = picture[0].astype(int).sum(1)
    assert (np.diff(brightness)[:4] < 0).all() and (picture[0, 5] == picture[0, 4]).all()
    assert (picture[1] == picture[1, 0, 0]).all() and 50 < picture[1, 0, 0] < 200 and np.ptp(picture[0, 1:4], axis=1).min() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colourise(np.full((2, 2), 3.0), near=3, far=3).shape == (2, 2, 3)  # a flat map has no range
    assert (colourise([[1, 2, 5]], near=5, far=1)[0, ::2] == colourise([[5, 2, 1]], near=1, far=5)[0, ::2]).all()  # 5 bright, 1 dark


def test_a_sheet_shows_every_picture_in_its_place():
    rows = [[np.full((10, 20, 3), 40 * r + 10 * c, np.uint8) for c in range(3)] for r in range(2)]
    sheet = np.asarray(tile(rows, gap=4))
    assert sheet.shape == (24, 68, 3) and (sheet[10:14] == 255).all()
    for r, c in np.ndindex(2, 3):
        assert (sheet[14 * r:14 * r + 10, 24 * c:24 * c + 20] == 40 * r + 10 * c).all()
    labelled = np.asarray(tile(rows, ["a", "b", "c"], gap=4))
    assert (labelled[-24:] == sheet).all() and (labelled[:-24] < 128).any()


def test_progress_is_one_line_on_a_terminal_and_silent_in_a_file(capsys, monkeypatch):
    progress("cooking", 3, 4, start=0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress("cooking", 3, 4, start=0, note="  salt")
    shown = capsys.readouterr().out
    assert "cooking 3/4" in shown and "salt" in shown and "\n" not in shown and shown.startswith("\r")
    progress("cooking", 4, 4, start=0)
    assert "cooking" not in capsys.readouterr().out
