"""Each layout of data.py in miniature, in exactly the form in which the data set is published, and packs."""
import multiprocessing
import os
import resource
import shutil
import signal
import time
import zlib
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import AUGMENTS, find_samples, open_dataset, write_pack
from test_data import as_array, complains, frame, save, save_hdf5, save_pair, script


def touch(root, *names):
    """Empty files: enough for what only looks at names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def pairs_of(root):
    """The names of each image and its depth below root."""
    return [tuple(str(file.relative_to(root)) for file in sample.source) for sample in find_samples(root)[1]]


# ------------------------------------------------------------------------------------------------------------
# The pairing rule: the layouts of public data sets
# ------------------------------------------------------------------------------------------------------------

PUBLIC = [  # image, its depth, and files that belong to neither
    "rgb/00002.jpg depth/00002.png",
    "images/0001.png depth/0001.png",  # HoloLens recordings
    "color/12.jpg depth/12.png",  # ScanNet
    "color/1.png depth/1.pgm",
    "rgb_00045.jpg sync_depth_00045.png",  # BTS
    "rgb/rgb_00045.jpg depth/sync_depth_00045.png",
    "00000_colors.png 00000_depth.png",  # DenseDepth's test frames
    "frame-000000.color.jpg frame-000000.depth.png",  # 7-Scenes
    "frame000000.jpg depth000000.png",  # Replica
    "rgb2.png depth2.png",
    "image.jpg arkit_depth.png",
    "lowres_wide/41_1.png lowres_depth/41_1.png",  # ARKitScenes
    "00001_indoors_000.png 00001_indoors_000_depth.npy 00001_indoors_000_depth_mask.npy",  # DIODE
    "image/0002_sync_image_0005_image_02.png groundtruth_depth/0002_sync_groundtruth_depth_0005_image_02.png",  # KITTI
    "image/1.jpg depth/1.png depth_bfx/1.png",  # SUN RGB-D
    "rgb/frame_000001.jpg depth/frame_000001.png",  # ScanNet++
    "images/img_001.png depth/img_001.png",
    "rgb/IMG_1234.jpg depth/IMG_1234.png",
    "image/img_0063.jpg depth/img_0063_abs.png",  # SUN RGB-D
    "frames/1.png depths/1.png",
    "01.png depth_map_01.png",
    "RGB/1.png Depths/1.png",
    "rgb/1.tif depth/1.tiff",
    "rgb/1.webp depth/1.npz",
    "rgb/1.png depth/1.npy",
    "1-rgb.jpg 1-depth.npy",
    "rgb/1.png depth/1.png depth_raw/1.png depth_color/1.png",
    "rgb/1.png depth/1.png semantic/1.png confidence/1.png ._1.png .cache/depth/1.png notes.txt",
    "rgb/1.png depth/1.png rgb/2.png depth/3.png",
]
FOLDERS = {"": "", "house/raw_kitchen/": "house/raw_kitchen", "train/厨房/": "厨房", "val/a/": "a", "test/b1/": "b1"}


@pytest.mark.parametrize("names", PUBLIC)
def test_the_layouts_of_public_data_sets_are_paired_at_any_place(tmp_path, names):
    names = names.split()
    touch(tmp_path, *(folder + name for folder in FOLDERS for name in names))
    assert set(pairs_of(tmp_path)) == {(folder + names[0], folder + names[1]) for folder in FOLDERS}
    for sample in find_samples(tmp_path)[1]:
        folder = str(sample.source[0].relative_to(tmp_path)).removesuffix(names[0])
        assert (sample.part, sample.scene) == (folder.split("/")[0] if folder[:1] in "tv" and folder else "train",
                                               FOLDERS[folder])


@pytest.mark.parametrize("names", [
    "image/0000001-000000000000.jpg depth/0000001-000000033369.png",  # SUN3D
    "a_Color_1.12.png a_Depth_2.34.png",  # a RealSense viewer's export
    "rgb/1.png gt/1.png",
    "2011_09/image_02/data/05.png proj_depth/groundtruth/image_02/05.png",  # KITTI's official tree
    "a_i0_1.jpg a_d0_1.png",  # Matterport
    "r-1.1-2.ppm d-1.2-3.pgm",  # NYU's raw dump
    "rgb/1.png depth/1.exr",
    "rgb/1.png depth/2.png",
    "depth/1.png depth_raw/1.png",
])
def test_where_nothing_pairs_a_short_line_names_a_few_files_and_the_cure(tmp_path, names):
    names = names.split()
    touch(tmp_path, *names, *(f"more/{i:03d}.txt" for i in range(100)))
    with complains(f"no image has a depth map beside it .found: {min(names)}, .*rgb/1.jpg and depth/1.png.*list") as caught:
        find_samples(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("first, second", [
    ("rgb/1.jpg", "rgb/1.png"), ("images/1.png", "rgb/1.png"), ("depth/1.npy", "depth/1.npz"),
    ("depth/1.npy", "depth/1.png"), ("depth_map/1.png", "depth_raw/1.png"),
])
def test_two_files_for_one_frame_are_named(tmp_path, first, second):
    other = "color/1.jpg" if "depth" in first else "depth/1.pgm"
    touch(tmp_path, first, second, *([other] if other != first else []))
    with complains(f"{first} and {second} are for the same frame"):
        find_samples(tmp_path)


def test_tums_images_and_depths_are_paired_by_time_folder_by_folder(tmp_path, capsys):
    times = {"1305031102.175304": "1305031102.160407", "1305031102.211214": "1305031102.226738", "1305031103.00": "1305031103.03"}
    for folder in ("desk", "xyz"):
        touch(tmp_path / folder, *(f"rgb/{name}.png" for name in times), *(f"depth/{name}.png" for name in times.values()))
    touch(tmp_path, "floor/rgb/1305031102.17.png")
    expected = [(f"{folder}/rgb/{image}.png", f"{folder}/depth/{depth}.png")
                for folder in ("desk", "xyz") for image, depth in list(times.items())[:2]]  # the third is 0.03 s apart
    assert pairs_of(tmp_path) == expected
    assert capsys.readouterr().err == f"note: {tmp_path}: 3 images have no depth, 4 have\n"


@pytest.mark.parametrize("depth", ["depth/{}.png", "depth/{}.npy", "depth/{}.npz", "depth/{}.tif"])
@pytest.mark.parametrize("folder", ["", "house/kitchen"])
def test_pairs_give_back_what_was_stored(tmp_path, depth, folder):
    for seed, name in enumerate("ab"):
        save(tmp_path / folder / f"rgb/{name}.png", frame(seed=seed)[0])
        save(tmp_path / folder / depth.format(name), frame(seed=seed)[1])
    dataset = open_dataset(tmp_path, "all", size=None)
    assert dataset.layout == "paired folders" and [Path(file).stem for file in dataset.files] == ["a", "b"]
    for seed, (image, metres, index) in enumerate(dataset[i] for i in range(2)):
        assert index == seed and image.dtype == metres.dtype == torch.float32
        assert (as_array(image) == frame(seed=seed)[0]).all() and (metres[0].numpy() == frame(seed=seed)[1]).all()


def test_the_scale_of_16_bit_depth_can_be_chosen(tmp_path):
    dataset = open_dataset(save_pair(tmp_path), "all", size=None, depth_scale=5000.0)
    np.testing.assert_allclose(dataset[0][1][0], frame()[1] / 5, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# HDF5 folders, and damage
# ------------------------------------------------------------------------------------------------------------


def test_hdf5_folders_give_back_what_was_stored_and_hidden_files_are_passed_over(tmp_path):
    save_hdf5(tmp_path / "train/house/kitchen/0.h5", *frame())
    touch(tmp_path, "train/house/kitchen/._0.h5")
    dataset = open_dataset(tmp_path, "all", size=None)
    assert dataset.layout == "HDF5 folders" and [s.scene for s in dataset.samples] == ["house/kitchen"]
    image, depth = dataset.read(0)
    assert (image == frame()[0]).all() and (depth == frame()[1]).all()


@pytest.mark.parametrize("key, value", [
    ("rgb", None), ("depth", None),
    ("rgb", np.ones((24, 32), np.uint8)), ("rgb", np.ones((24, 32, 3), np.uint8)), ("rgb", np.ones((3, 24, 32))),
    ("depth", np.ones((3, 24, 32))), ("depth", np.ones((24, 28))), ("depth", np.zeros((24, 32))),
])
def test_an_hdf5_file_without_a_key_or_of_another_shape_or_type_is_named(tmp_path, key, value):
    save_hdf5(tmp_path / "train/scene/0.h5", *frame())
    with h5py.File(tmp_path / "train/scene/0.h5", "a") as h5:
        del h5[key]
        if value is not None:
            h5[key] = value
    with complains("0.h5: .*" + (key if value is None else "")):
        open_dataset(tmp_path, "all")[0]


@pytest.mark.parametrize("name", ["train/scene/0.h5", "rgb/0.png", "depth/0.png", "depth/0.npy", "depth/0.npz"])
@pytest.mark.parametrize("kept", ["junk", 0, 0.1, 0.5, 0.9])
def test_a_damaged_file_is_named(tmp_path, name, kept):
    if name.endswith("h5"):
        save_hdf5(tmp_path / name, *frame())
    else:
        save(tmp_path / "rgb/0.png", frame()[0])
        save(tmp_path / name.replace("rgb/0", "depth/0"), frame()[1])
    dataset = open_dataset(tmp_path, "all")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"not what the name says\n" * 99 if kept == "junk" else whole[:int(kept * len(whole))])
    with complains(f"{name}: cannot be read .*: replace or remove it"):
        dataset[0]


@pytest.mark.parametrize("array, complaint", [
    (np.array([["near", "far"]]), "depth must be .H, W. numbers"),
    (np.array([[{}]], object), "cannot be read as depth"),
    (np.zeros((24, 32)), "no pixel"),
    (np.full((24, 32), 2000.0), "the median depth would be 2000 m: floats must be metres"),
])
def test_an_array_that_is_no_depth_is_named(tmp_path, array, complaint):
    save(tmp_path / "rgb/0.png", frame()[0])
    save(tmp_path / "depth/0.npy", array)
    with complains(f"depth/0.npy: {complaint}"):
        open_dataset(tmp_path, "all")[0]


def test_depth_in_the_colours_of_a_palette_is_refused(tmp_path):
    save(tmp_path / "rgb/0.png", frame()[0])
    (tmp_path / "depth").mkdir()
    Image.fromarray(frame()[0][..., 0]).convert("P").save(tmp_path / "depth/0.png")
    with complains("depth/0.png: .*palette"):
        open_dataset(tmp_path, "all")[0]


@pytest.mark.parametrize("name", ["e.mat", "e.h5", "e.txt", "e.csv"])
def test_a_folder_may_be_called_as_a_file(tmp_path, name):
    assert len(open_dataset(save_pair(tmp_path / name), "all")) == 1


@pytest.mark.parametrize("name, complaint", [("none", "no such file or folder"), ("letters", "no image has a depth map"),
                                             ("a.jpg", "no image has a depth map")])
def test_a_missing_folder_and_an_unknown_layout_are_named(tmp_path, name, complaint):
    touch(tmp_path, "letters/a.txt", "a.jpg")
    with complains(f"{name}: {complaint}"):
        open_dataset(tmp_path / name, "train")


# ------------------------------------------------------------------------------------------------------------
# nyu_depth_v2_labeled.mat, and lists
# ------------------------------------------------------------------------------------------------------------


def write_mat(file, n=1449):
    """As MATLAB writes it: axes reversed, scene names as references to columns of characters. Frames are 3x4."""
    with h5py.File(file, "w") as h5:
        images = np.zeros((n, 3, 4, 3), np.uint8) + (np.arange(n) % 256).astype(np.uint8)[:, None, None, None]
        images[:, 1, -1, 0] = 200  # green in the upper right corner
        h5["images"] = images
        h5["depths"] = np.ones((n, 4, 3), np.float32) * (np.arange(n) % 9 + 1)[:, None, None]
        h5["rawDepths"] = h5["depths"][:]
        h5["rawDepths"][:, 0, -1] = 0  # a hole in the lower left corner
        names = [np.array([[ord(c)] for c in f"room_{scene:04d}"], np.uint16) for scene in range(20)]
        refs = [h5.create_dataset(f"#refs#/{i}", data=name).ref for i, name in enumerate(names)]
        h5["scenes"] = np.array([[refs[i // 3 % 20] for i in range(n)]], h5py.ref_dtype)
    return file


@pytest.fixture(scope="module")
def mat(tmp_path_factory):
    return write_mat(tmp_path_factory.mktemp("mat") / "nyu_depth_v2_labeled.mat")


def test_the_labelled_file_has_the_official_split(mat):
    samples = find_samples(mat)[1]
    test = [i for i, sample in enumerate(samples) if sample.part == "test"]
    assert len(samples) == 1449 and len(test) == 654
    assert test[:6] == [0, 1, 8, 13, 14, 15] and test[-10:] == [1432, *range(1440, 1449)]
    assert zlib.crc32(" ".join(map(str, test)).encode()) == 160099413
    for sample in samples:
        held_out = "val" if zlib.crc32(sample.scene.encode()) % 5 == 0 else "train"
        assert sample.part in ("test", held_out)
    assert samples[59].scene == "room_0019" and find_samples(mat.parent)[1] == samples


def test_the_labelled_file_is_read_upright_with_filled_in_or_raw_depth(mat):
    image, depth = open_dataset(mat, "all").read(7)
    assert image.shape == (3, 4, 3) and image[0, -1].tolist() == [7, 200, 7] and image[-1, 0].tolist() == [7, 7, 7]
    assert depth.shape == (3, 4) and (depth == 8).all()
    raw = open_dataset(mat / "rawDepths", "all").read(7)[1]
    assert raw[-1, 0] == 0 and (raw == 8).sum() == raw.size - 1


@pytest.mark.parametrize("path, complaint", [
    ("nyu.mat/depth", "nyu.mat: is not NYU's"), ("none.mat", "none.mat: no such file"),
    ("none.mat/rawDepths", "none.mat: cannot be read"), ("junk.mat", "junk.mat: cannot be read"),
])
def test_a_wrong_labelled_file_is_named_and_one_of_another_length_is_split_by_scene(tmp_path, path, complaint):
    assert {sample.part for sample in find_samples(write_mat(tmp_path / "nyu.mat", n=60))[1]} == {"train", "val"}
    (tmp_path / "junk.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with complains(complaint):
        find_samples(tmp_path / path)


def test_kaggles_lists_have_8_bit_training_and_16_bit_test_depth(tmp_path):
    """The archive's folder data holds them, and their paths begin with it; 255 = 10 m, or millimetres."""
    lines = []
    for scene, number in product(("bedroom_0001_out", "study_0003_out", "cafe_0001_out", "office_0009_out"), (1, 2)):
        name = f"data/nyu2_train/{scene}/{number}"
        save(tmp_path / f"{name}.jpg", frame()[0])
        save(tmp_path / f"{name}.png", np.full((24, 32), 51 * number, np.uint8))
        lines.append(f"{name}.jpg,{name}.png")
    (tmp_path / "data/nyu2_train.csv").write_text("\n".join(lines))
    save(tmp_path / "data/nyu2_test/00000_colors.png", frame()[0])
    save(tmp_path / "data/nyu2_test/00000_depth.png", frame()[1])
    (tmp_path / "data/nyu2_test.csv").write_text("data/nyu2_test/00000_colors.png,data/nyu2_test/00000_depth.png\n")

    root = tmp_path / "data"
    train, val, test = (open_dataset(root, part, size=None) for part in ("train", "val", "test"))
    assert train.layout == "lists" and (test.read(0)[1] == frame()[1]).all()
    assert {float(train.read(i)[1].max().round(5)) for i in range(len(train))} == {2, 4}
    scenes = [{sample.scene for sample in part.samples} for part in (train, val)]
    assert not scenes[0] & scenes[1] and len(scenes[0] | scenes[1]) == 4
    assert open_dataset(tmp_path, "all").files == open_dataset(root, "all").files


LINES = ["{i} {d}", "/{i} /{d}", "{i} {d} 721.5377", "1305031102.1753 {i} 1305031102.1604 {d}", "{i},{d}", "{i}\t{d}", "{i}; {d}"]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("header", ["", "# image depth\n", "image,depth\n", "\ufeff", "a/x.png None 721.5377\n"])
def test_a_list_may_have_a_header_and_other_columns(tmp_path, monkeypatch, header, line):
    """BTS's paths begin with a /, TUM's lines with times; KITTI has images without depth. The folder counts, not ours."""
    touch(tmp_path / "set", *(f"{folder}/{name}.png" for folder in "ab" for name in "xyz"))
    touch(tmp_path / "here", *(f"{folder}/{name}.png" for folder in "ab" for name in "xyz"))
    lines = [line.format(i=f"a/{name}.png", d=f"b/{name}.png") for name in "xyz"]
    (tmp_path / "set/pairs.txt").write_text(header + "\n".join(lines) + "\n\n")
    monkeypatch.chdir(tmp_path / "here")
    expected = [(tmp_path / f"set/a/{name}.png", tmp_path / f"set/b/{name}.png") for name in "xyz"]
    assert [sample.source for sample in find_samples(tmp_path / "set/pairs.txt")[1]] == expected


def test_lists_name_the_parts_of_a_folder_and_go_before_its_structure(tmp_path):
    touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("rgb", "depth") for name in "abcdefgh"), "living room/1.jpg")
    for part, names in dict(train="abc", val="d", test="ef").items():
        lines = [f"rgb/{name}.png depth/{name}.png\n" for name in names]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    (tmp_path / "val.csv").write_text(f"living room/1.jpg, {tmp_path}/depth/a.png\n")  # in a .csv a name may have spaces
    assert [len(open_dataset(tmp_path, part)) for part in ("train", "val", "test", "all")] == [3, 2, 2, 7]


@pytest.mark.parametrize("text, complaint", [
    ("rgb/0.png depth/0.png\nrgb/0.png depth/9.png", "line 2 points nowhere: no file depth/9.png"),
    ("rgb/0.png depth/0.png\nrgb/0.png", "line 2 does not name an image and its depth: 'rgb/0.png'"),
    ("rgb/0.png depth/0.png depth/0.png", "line 1 does not name"),
    (bytes(range(256)), "is not text"),
])
def test_a_wrong_list_is_named_with_its_line(tmp_path, text, complaint):
    save_pair(tmp_path)
    (tmp_path / "train.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with complains(f"train.txt: {complaint}"):
        open_dataset(tmp_path, "train")


# ------------------------------------------------------------------------------------------------------------
# Packs
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def originals(tmp_path):
    """Eight frames of four scenes, with holes in the depth, and two official test frames."""
    for seed in range(10):
        image, depth = frame(60, 80, seed)
        depth[:9, :7] = 0
        folder = tmp_path / "set" / ("test" if seed > 7 else "train") / f"scene{seed // 2}"
        save(folder / f"rgb/{seed}.png", image)
        save(folder / f"depth/{seed}.png", depth)
    return tmp_path / "set"


@pytest.fixture
def pack(originals, tmp_path):
    write_pack(tmp_path / "set.h5", originals)
    return tmp_path / "set.h5"


def test_a_pack_gives_what_the_originals_give_bit_for_bit_with_the_margin_that_a_roll_needs(pack, originals):
    for split, augment in product(("train", "val", "test", "all"), AUGMENTS):
        ours, theirs = (open_dataset(root, split, (64, 96), augment, seed=3) for root in (pack, originals))
        assert ours.files == theirs.files and [s.scene for s in ours.samples] == [s.scene for s in theirs.samples]
        for (image, depth, i), (expected_image, expected_depth, j) in zip(ours, theirs):
            assert i == j and torch.equal(image, expected_image) and torch.allclose(depth, expected_depth, rtol=1e-6)


def test_a_pack_of_whole_frames_gives_what_geometry_full_gives(originals, tmp_path):
    write_pack(tmp_path / "set.h5", originals, size=(32, 64))
    ours, theirs = (open_dataset(root, "all", (32, 64), geometry="full") for root in (tmp_path / "set.h5", originals))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(ours, theirs))


def test_a_pack_keeps_half_a_millimetre_and_drops_what_it_cannot_hold(tmp_path):
    depth = np.linspace(0.3, 90, 1200, dtype=np.float32).reshape(30, 40)
    save(tmp_path / "set/rgb/1.png", frame(30, 40)[0])
    save(tmp_path / "set/depth/1.npy", depth)
    write_pack(tmp_path / "set.h5", tmp_path / "set", size=(30, 40))
    packed = open_dataset(tmp_path / "set.h5", "all", size=None).read(0)[1]
    assert np.abs(packed - depth)[depth < 65.53].max() <= 0.0005 + 1e-6 and (packed[depth > 65.535] == 0).all()


@pytest.mark.filterwarnings("error")
def test_workers_share_a_pack_and_its_frames_are_free_to_be_written_on(pack):
    dataset = open_dataset(pack, "all", size=None)
    expected = torch.stack([dataset[i][0] for i in range(10)])
    assert expected.shape == (10, 3, 250, 333) and dataset[0][1].shape == (1, 250, 333)
    for images, depth, index in DataLoader(dataset, 5, num_workers=2):
        assert torch.equal(images, expected[index])


def test_a_pack_does_not_depend_on_how_many_worked(pack, originals, monkeypatch):
    first = pack.read_bytes()
    for cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        write_pack(pack, originals)
        assert pack.read_bytes() == first


def test_a_pack_that_was_written_anew_is_read_anew(originals, tmp_path):
    for part in ("train", "test"):
        write_pack(tmp_path / "set.h5", originals / part, size=(60, 80))
        packed = open_dataset(tmp_path / "set.h5", "all").read(0)[0]
        assert (packed == open_dataset(originals / part, "all").read(0)[0]).all()


@pytest.mark.parametrize("version, complaint", [(None, "is not a pack: write one with .*--pack"),
                                                (0, "is a pack of version 0.*pack it again")])
def test_a_foreign_or_stale_pack_is_refused(pack, version, complaint):
    with h5py.File(pack, "a") as h5:
        del h5.attrs["fastdepth_pack"]
        if version is not None:
            h5.attrs["fastdepth_pack"] = version
    with complains(f"set.h5: {complaint}"):
        open_dataset(pack, "train")


def test_a_cut_off_pack_is_named(pack):
    os.truncate(pack, pack.stat().st_size // 2)
    with complains("set.h5: cannot be read as HDF5"):
        open_dataset(pack, "train")


def test_where_there_is_no_room_nothing_is_begun(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 9e9, 4e6))
    with complains("set.h5: needs 4 MB, and 4 MB are free: make room"):
        write_pack(tmp_path / "set.h5", originals)
    assert capsys.readouterr().out == "" and [file.name for file in tmp_path.iterdir()] == ["set"]


def test_a_full_disk_is_one_line_and_leaves_nothing(originals, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with complains("set.h5: cannot be written"):
            write_pack(tmp_path / "set.h5", originals)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_a_bad_frame_stops_the_packing_and_the_old_pack_stays(pack, originals):
    old = pack.read_bytes()
    (originals / "train/scene1/rgb/3.png").write_bytes(b"junk")
    with pytest.raises(data.UserError, match="scene1/rgb/3.png: cannot be read"):
        write_pack(pack, originals)
    assert pack.read_bytes() == old and sorted(file.name for file in pack.parent.iterdir()) == ["set", "set.h5"]


def test_what_a_killed_packing_left_is_cleared_by_the_next(originals, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "progress", lambda *_: time.sleep(60))
    process = multiprocessing.get_context("fork").Process(target=write_pack, args=(tmp_path / "set.h5", originals))
    process.start()
    while not list(tmp_path.glob("set.h5.partial-*")):
        time.sleep(0.01)
    process.kill()
    process.join()
    monkeypatch.undo()
    assert not (tmp_path / "set.h5").exists() and list(tmp_path.glob("set.h5.partial-*"))
    write_pack(tmp_path / "set.h5", originals)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["set", "set.h5"]


def test_ctrl_c_while_packing_ends_without_a_traceback_and_leaves_nothing(tmp_path):
    process = script("rooms:4096", "--pack", "rooms.h5", cwd=tmp_path)
    assert process.stdout.readline() == "packing 4608 frames of 240x320 into rooms.h5, 1769 MB\n"  # at once
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # to the workers too, as a terminal does
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and out == error == "" and list(tmp_path.iterdir()) == []


def test_the_command_packs_and_the_pack_can_be_looked_at(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main([str(originals), "--pack", "set.h5"])
    data.main(["set.h5"])
    printed = capsys.readouterr().out
    assert "10 frames of 250x333" in printed and "set.h5: pack" in printed and "2 test" in printed
    assert Path("runs/data-set.h5.png").is_file()
