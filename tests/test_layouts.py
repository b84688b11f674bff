"""Each layout of data.py in miniature, in exactly the form in which the data set is published, and packs."""
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from itertools import product

import h5py
import numpy as np
import pytest
import torch
from conftest import full_disk, save_hdf5
from PIL import Image

import data
from data import AUGMENTS, find_samples, open_dataset, write_pack
from test_data import complains, frame, save, save_pair


def touch(root, *names):
    """Empty files: enough for what only looks at names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs_of(root):
    """{image, depth: part, scene} of the samples at root, with the files' names below it."""
    return {tuple(str(file.relative_to(root)) for file in sample.source): (sample.part, sample.scene)
            for sample in find_samples(root)[1]}


# ------------------------------------------------------------------------------------------------------------
# The pairing rule: the layouts of public data sets
# ------------------------------------------------------------------------------------------------------------

FOLDERS = {  # their part and scene
    "": ("train", ""),
    "house/raw_kitchen/": ("train", "house/raw_kitchen"),
    "train/厨房/": ("train", "厨房"),
    "val/a/": ("val", "a"),
    "test/b1/": ("test", "b1"),
}


@pytest.mark.parametrize("names", [  # an image, its depth, and what belongs to neither
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
    "image/0002_sync_image_0005_image_02.png "  # KITTI's selection
    "groundtruth_depth/0002_sync_groundtruth_depth_0005_image_02.png",
    "image/1.jpg depth/1.png depth_bfx/1.png",  # SUN RGB-D
    "image/img_0063.jpg depth/img_0063_abs.png",
    "rgb/frame_000001.jpg depth/frame_000001.png",  # ScanNet++
    "images/img_001.png depth/img_001.png",
    "rgb/IMG_1234.jpg depth/IMG_1234.png",
    "frames/1.png depths/1.png",
    "01.png depth_map_01.png",
    "RGB/1.png Depths/1.PNG",
    "rgb/1.tif depth/1.tiff",
    "rgb/1.webp depth/1.npz",
    "rgb/1.png depth/1.png depth_raw/1.png depth_color/1.png rgb_raw/1.png",
    "rgb/1.png depth/1.png rgb/2.png depth/3.png",
    "rgb/1.png depth/1.npy confidence/1.png rgb/._1.png .cache/rgb/1.png .cache/depth/1.npy notes.txt",
])
def test_the_layouts_of_public_data_sets_are_paired_at_any_place(tmp_path, names):
    image, depth, *others = names.split()
    touch(tmp_path, *(folder + name for folder in FOLDERS for name in (image, depth, *others)))
    assert pairs_of(tmp_path) == {(folder + image, folder + depth): FOLDERS[folder] for folder in FOLDERS}


@pytest.mark.parametrize("names", [
    "image/0000001-000000000000.jpg depth/0000001-000000033369.png",  # SUN3D
    "a_Color_1.12.png a_Depth_2.34.png",  # a RealSense viewer's export
    "rgb/1.png gt/1.png",
    "2011_09/image_02/data/05.png proj_depth/groundtruth/image_02/05.png",  # KITTI's official tree
    "a_i0_1.jpg a_d0_1.png",  # Matterport
    "r-1.1-2.ppm d-1.2-3.pgm",  # NYU's raw dump
    "rgb/1.png depth/1.exr",
    "depth/1.png depth_raw/1.png",
])
def test_where_nothing_pairs_a_short_line_names_a_few_files_and_the_cure(tmp_path, names):
    touch(tmp_path, *names.split(), *(f"more/{i:03d}.txt" for i in range(100)))
    cure = f"beside it .found: {min(names.split())}, .*rgb/1.jpg and depth/1.png.*a list"
    with complains(f"no image has a depth map {cure}") as caught:
        find_samples(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("first, second, other", [
    ("rgb/1.jpg", "rgb/1.png", "depth/1.pgm"),
    ("images/1.png", "rgb/1.png", "depth/1.npy"),
    ("depth/1.npy", "depth/1.npz", "rgb/1.jpg"),
    ("depth_map/1.png", "depth_raw/1.png", "rgb/1.png"),
])
def test_two_files_for_one_frame_are_named(tmp_path, first, second, other):
    touch(tmp_path, first, second, other)
    with complains(f"{first} and {second} are for the same frame: remove one"):
        find_samples(tmp_path)


def test_tums_images_and_depths_are_paired_by_time_folder_by_folder(tmp_path, capsys):
    rgb = ["1305031102.175304", "1305031102.211214", "1305031103.00"]
    depth = ["1305031102.160407", "1305031102.226738", "1305031103.03"]  # the third is 0.03 s apart
    for folder in ("desk", "xyz"):
        touch(tmp_path, *(f"{folder}/rgb/{name}.png" for name in rgb))
        touch(tmp_path, *(f"{folder}/depth/{name}.png" for name in depth))
    touch(tmp_path, "floor/rgb/1305031102.17.png")
    assert list(pairs_of(tmp_path)) == [(f"{folder}/rgb/{rgb[i]}.png", f"{folder}/depth/{depth[i]}.png")
                                        for folder in ("desk", "xyz") for i in (0, 1)]
    assert capsys.readouterr().err == f"note: {tmp_path}: 3 images have no depth, 4 have\n"


def test_heic_beside_photos_is_said_once(tmp_path, capsys):
    touch(tmp_path, "rgb/1.jpg", "depth/1.png", "rgb/2.HEIC", "depth/2.png", "rgb/3.HEIC", "depth/3.png")
    assert list(pairs_of(tmp_path)) == [("rgb/1.jpg", "depth/1.png")]
    assert capsys.readouterr().err == f"note: {tmp_path}: .HEIC files are not read: convert them to JPEG\n"


def test_scenes_csv_names_the_scene_of_a_frame(tmp_path):
    touch(tmp_path, *(f"{folder}/{i}.png" for folder in ("rgb", "depth") for i in (1, 2, 3)))
    touch(tmp_path, "rgb/frame-4.color.jpg", "depth/frame-4.depth.png")
    rows = ["frame,scene", "1,kitchen", "3, study ", "rgb/2.png,hall", "frame-4.color,bath", ""]
    (tmp_path / "scenes.csv").write_text("\n".join(rows))
    assert [sample.scene for sample in find_samples(tmp_path)[1]] == ["kitchen", "hall", "study", "bath"]
    (tmp_path / "scenes.csv").write_text("frame;scene\n1;kitchen\n2;hall\n3;study\n")  # as Excel writes it
    with complains("scenes.csv: names no scene of 1: add a row `1,SCENE`"):  # not one scene for all frames
        find_samples(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy", ".npz", ".h5"])
def test_pairs_and_hdf5_folders_give_back_what_was_stored(tmp_path, suffix):
    for seed in range(2):
        if suffix == ".h5":
            save_hdf5(tmp_path / f"train/house/kitchen/{seed}.h5", *frame(seed=seed))
        else:
            save_pair(tmp_path / "house/kitchen", seed, suffix=suffix, seed=seed)
    touch(tmp_path, "train/house/kitchen/._0.h5")  # what macOS leaves beside a file
    dataset = open_dataset(tmp_path, "all", depth_scale=2000.0)
    assert dataset.layout == ("HDF5 folders" if suffix == ".h5" else "paired folders")
    assert [sample.scene for sample in dataset.samples] == ["house/kitchen"] * 2
    for seed in range(2):
        image, metres = dataset.read(seed)
        expected_image, expected = frame(seed=seed)
        expected = expected / 2 if suffix in (".png", ".tif") else expected  # metres need no scale
        assert (image == expected_image).all() and metres.dtype == np.float32
        np.testing.assert_allclose(metres, expected, rtol=1e-6)


def test_fastdepths_val_official_is_a_test_part(tmp_path):
    touch(tmp_path, "train/study/0.h5", "val/official/1.h5", "val/cafe/2.h5", "test/3.h5")
    parts = {sample.source.stem: sample.part for sample in find_samples(tmp_path)[1]}
    assert parts == {"0": "train", "1": "test", "2": "val", "3": "test"}


# ------------------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train/s/0.h5", "rgb/0.png", "depth/0.png", "depth/0.npy", "depth/0.npz"])
@pytest.mark.parametrize("kept", ["junk", 0, 0.1, 0.5, 0.9])
def test_a_damaged_file_is_named(tmp_path, name, kept):
    file = tmp_path / name
    if file.suffix == ".h5":
        save_hdf5(file, *frame())
    else:
        save_pair(tmp_path, suffix=file.suffix)
    whole = file.read_bytes()
    file.write_bytes(b"not what the name says\n" * 99 if kept == "junk" else whole[:int(kept * len(whole))])
    with complains(f"{name}: cannot be read .*: .* or remove it"):
        open_dataset(tmp_path, "all")[0]


IMAGE, DEPTH = frame()


@pytest.mark.parametrize("name, content, complaint", [
    ("train/s/0.h5", dict(depth=DEPTH), "is not a FastDepth HDF5 file .*rgb"),
    ("train/s/0.h5", dict(rgb=IMAGE), "is not a FastDepth HDF5 file .*depth"),
    ("train/s/0.h5", dict(rgb=IMAGE[:3, :, 0], depth=DEPTH), r"rgb must be \(3, H, W\) uint8"),
    ("train/s/0.h5", dict(rgb=IMAGE, depth=DEPTH), r"rgb must be \(3, H, W\) uint8"),
    ("train/s/0.h5", dict(rgb=np.ones((3, 24, 32)), depth=DEPTH), r"rgb must be \(3, H, W\) uint8"),
    ("train/s/0.h5", dict(rgb=IMAGE.transpose(2, 0, 1), depth=np.ones((3, 24, 32))), r"must be \(H, W\)"),
    ("train/s/0.h5", dict(rgb=IMAGE.transpose(2, 0, 1), depth=DEPTH[:, :28]), "24x32 and its depth 24x28"),
    ("depth/0.png", IMAGE, r"must be \(H, W\) numbers, not \(24, 32, 3\)"),
    ("depth/0.png", Image.fromarray(IMAGE).convert("P"), "cannot be read as depth .*palette"),
    ("depth/0.npy", np.array([[{}]], object), "cannot be read as depth"),
    ("depth/0.pgm", b"P5\n1 1\n4095\n\7\xd0", "cannot be read as depth .*maxval"),  # 2000, of at most 4095
    ("depth/0.pgm", b"P2 2 1 10000 2000 3000", "cannot be read as depth .*maxval"),
])
def test_a_file_that_holds_something_else_is_named(tmp_path, name, content, complaint):
    save(tmp_path / "rgb/0.png", IMAGE)
    (tmp_path / name).parent.mkdir(parents=True)
    if isinstance(content, dict):
        with h5py.File(tmp_path / name, "w") as h5:
            h5.update(content)
    elif isinstance(content, Image.Image):
        content.save(tmp_path / name)
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        save(tmp_path / name, content)
    with complains(f"{name}: .*{complaint}"):
        open_dataset(tmp_path, "all")[0]


@pytest.mark.parametrize("name", ["e.mat", "e.h5", "e.txt", "e.csv"])
def test_a_folder_may_be_called_as_a_file(tmp_path, name):
    assert len(open_dataset(save_pair(tmp_path / name), "all")) == 1


@pytest.mark.parametrize("path, complaint", [
    ("nowhere", "nowhere: no such file or folder"),
    ("photo.jpg", "photo.jpg: no image has a depth map"),
    ("junk.mat", "junk.mat: cannot be read as HDF5"),
    ("none.mat", "none.mat: no such file"),
    ("none.mat/rawDepths", "none.mat: cannot be read as HDF5"),
    ("junk.h5", "junk.h5: cannot be read as HDF5"),
    ("other.h5", "other.h5: is not a pack: write one with .*--pack"),
    ("nyu.mat/depth", "nyu.mat: is not NYU's labelled .mat file"),
    ("rooms:7", "rooms:7: .* at least 8"),
    ("rooms:-8", "rooms:-8: write rooms:N or rooms:N:SEED"),
    ("rooms:8:x", "rooms:8:x: write rooms:N or rooms:N:SEED"),
])
def test_a_path_to_no_data_set_is_named(tmp_path, monkeypatch, path, complaint):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "photo.jpg", "junk.mat", "junk.h5")
    save_hdf5(tmp_path / "other.h5", *frame())
    save_hdf5(tmp_path / "nyu.mat", *frame())
    with complains(complaint):
        find_samples(path)


# ------------------------------------------------------------------------------------------------------------
# nyu_depth_v2_labeled.mat, and lists
# ------------------------------------------------------------------------------------------------------------


def write_mat(file, n=1449):
    """As MATLAB writes it: axes reversed, scenes as references to columns of characters. Frames are 3x4."""
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


def test_the_labelled_file_has_the_official_split_and_is_read_upright_filled_in_or_raw(tmp_path):
    mat = write_mat(tmp_path / "nyu_depth_v2_labeled.mat")
    samples = find_samples(mat)[1]
    test = [i for i, sample in enumerate(samples) if sample.part == "test"]
    assert len(samples) == 1449 and len(test) == 654 and samples[59].scene == "room_0019"
    assert zlib.crc32(" ".join(map(str, test)).encode()) == 160099413  # of the published list
    assert all(sample.part in ("train", "val") for i, sample in enumerate(samples) if i not in test)
    assert find_samples(tmp_path)[1] == samples  # the folder will do

    few = find_samples(write_mat(tmp_path / "few.mat", 60))[1]
    assert {sample.part for sample in few} == {"train", "val"}  # a selection is split by scene

    image, depth = open_dataset(mat, "all").read(7)
    assert image[0, -1].tolist() == [7, 200, 7] and image[-1, 0].tolist() == [7, 7, 7]
    assert image.shape == (3, 4, 3) and depth.shape == (3, 4) and (depth == 8).all()
    raw = open_dataset(mat / "rawDepths", "all").read(7)[1]
    assert raw[-1, 0] == 0 and (raw == 8).sum() == raw.size - 1


def test_kaggles_lists_have_8_bit_training_and_16_bit_test_depth(tmp_path):
    """They lie in the archive's folder data, and their paths begin with it. 8 bit: 255 = 10 m; 16 bit: mm."""
    lines = []
    for scene, number in product(("bedroom_0001", "study_0003", "cafe_0001", "office_0009"), (1, 2)):
        name = f"data/nyu2_train/{scene}/{number}"
        save(tmp_path / f"{name}.jpg", frame()[0])
        save(tmp_path / f"{name}.png", np.full((24, 32), 51 * number, np.uint8))
        lines.append(f"{name}.jpg,{name}.png")
    (tmp_path / "data/nyu2_train.csv").write_text("\n".join(lines))
    test = "data/nyu2_test/00000_colors.png,data/nyu2_test/00000_depth.png"
    for name, array in zip(test.split(","), frame()):
        save(tmp_path / name, array)
    (tmp_path / "data/nyu2_test.csv").write_text(test)

    train, val, test = (open_dataset(tmp_path / "data", part) for part in data.SPLITS)
    assert train.layout == "lists" and (test.read(0)[1] == frame()[1]).all()
    assert {float(train.read(i)[1].max().round(5)) for i in range(len(train))} == {2, 4}
    scenes = [{sample.scene for sample in part.samples} for part in (train, val)]
    assert not scenes[0] & scenes[1] and len(scenes[0] | scenes[1]) == 4
    assert open_dataset(tmp_path, "all").files == open_dataset(tmp_path / "data", "all").files


@pytest.mark.parametrize("line", [
    "{i} {d}", "{i},{d}", "{i}\t{d}", "{i}; {d}", '"{i}" , "{d}"', "#{i} {d}\n{i} {d}",
    "/{i} /{d} 721.5377",  # BTS
    "1305031102.1753 {i} 1305031102.1604 {d}",  # TUM
])
@pytest.mark.parametrize("header", ["", "# image depth\n", "image,depth\n", "\ufeff", "a/x.png None 721.5\n"])
def test_a_list_may_have_a_header_other_columns_and_images_without_depth(tmp_path, monkeypatch, header, line):
    for folder in ("set", "here"):
        touch(tmp_path / folder, *(f"{kind}/{name}.png" for kind in "ab" for name in "xyz"))
    lines = [line.format(i=f"a/{name}.png", d=f"b/{name}.png") for name in "xyz"]
    (tmp_path / "set/pairs.txt").write_text(header + "\n".join(lines) + "\n\n")
    monkeypatch.chdir(tmp_path / "here")  # where files of the same names do not count
    expected = [(tmp_path / f"set/a/{name}.png", tmp_path / f"set/b/{name}.png") for name in "xyz"]
    assert [sample.source for sample in find_samples(tmp_path / "set/pairs.txt")[1]] == expected


def test_lists_name_the_parts_of_a_folder_and_go_before_its_structure(tmp_path):
    touch(tmp_path, *(f"{kind}/{name}.png" for kind in ("rgb", "depth") for name in "abcdefgh"))
    touch(tmp_path, "living room/1.jpg")
    for part, names in dict(train="abc", val="d", test="ef").items():
        lines = [f"rgb/{name}.png depth/{name}.png\n" for name in names]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    (tmp_path / "val.csv").write_text(f"living room/1.jpg, {tmp_path}/depth/a.png\n")  # a .csv allows spaces
    assert [len(open_dataset(tmp_path, part)) for part in ("train", "val", "test", "all")] == [3, 2, 2, 7]


@pytest.mark.parametrize("text, complaint", [
    (b"rgb/0.png depth/0.png\nrgb/0.png depth/9.png", "line 2 points nowhere: no file depth/9.png"),
    (b"rgb/0.png depth/0.png\nrgb/0.png", "line 2 does not name an image and its depth: 'rgb/0.png'"),
    (b"rgb/0.png depth/0.png depth/0.png", "line 1 does not name"),
    (b"rgb/0.png depth/0.png\nrgb/0.heic", "line 2 does not name"),
    (bytes(range(256)), "is not UTF-8 text"),
])
def test_a_wrong_list_is_named_with_its_line(tmp_path, text, complaint):
    (save_pair(tmp_path) / "train.txt").write_bytes(text)
    with complains(f"train.txt: {complaint}"):
        open_dataset(tmp_path, "train")


# ------------------------------------------------------------------------------------------------------------
# Packs
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Eight frames of four scenes, with holes in the depth, and two wider ones in an official test part."""
    root = tmp_path_factory.mktemp("originals")
    for seed in range(10):
        image, depth = frame(60, 100 if seed > 7 else 80, seed)
        depth[:9, :7] = 0
        part = "test" if seed > 7 else "train"
        save_hdf5(root / f"{part}/scene{seed // 2}/{seed}.h5", image, depth)
    return root


@pytest.fixture(scope="module")
def pack(originals, tmp_path_factory):
    """The originals as a pack; copy it before changing it."""
    file = tmp_path_factory.mktemp("pack") / "set.h5"
    write_pack(file, originals)
    return file


def test_a_pack_gives_what_the_originals_give_with_the_margin_that_a_turn_needs(pack, originals):
    for split, augment in product((*data.SPLITS, "all"), AUGMENTS):
        if augment == "camera" and split in ("test", "all"):
            continue  # what is not 4:3 loses its margin, and the focal length that depends on it
        ours, theirs = (open_dataset(root, split, (64, 96), augment, seed=3) for root in (pack, originals))
        assert ours.files == theirs.files
        assert [sample.scene for sample in ours.samples] == [sample.scene for sample in theirs.samples]
        for (image, depth, i), (expected_image, expected_depth, j) in zip(ours, theirs):
            assert i == j and torch.equal(image, expected_image)
            assert torch.allclose(depth, expected_depth, rtol=1e-6, atol=0)
        assert ours.read(0)[0].flags.writeable  # a copy: whoever writes on it does not write on the pack


def test_a_pack_of_whole_frames_gives_what_geometry_full_gives_also_written_anew(tmp_path, capsys):
    roots = tmp_path / "set.h5", tmp_path / "set"
    for seed in (1, 2):
        write_pack(roots[0], save_pair(roots[1], height=60, width=100, seed=seed), size=(32, 64))
        ours, theirs = (open_dataset(root, "all", (32, 64), geometry="full")[0] for root in roots)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert "--size 32 64 squeezes the frames: train with --geometry full" in capsys.readouterr().err


def test_a_pack_keeps_half_a_millimetre_and_drops_what_it_cannot_hold(tmp_path, capsys):
    depth = np.linspace(0.3, 90, 1200, dtype=np.float32).reshape(30, 40)
    save_pair(tmp_path / "set", depth=depth, suffix=".npy", height=30, width=40)
    write_pack(tmp_path / "set.h5", tmp_path / "set", size=(30, 40))
    assert not capsys.readouterr().err  # nothing is squeezed
    packed = open_dataset(tmp_path / "set.h5", "all", depth_scale=5000.0).read(0)[1]  # of originals only
    assert np.abs(packed - depth)[depth < 65.53].max() <= 0.0005 + 1e-6
    assert (packed[depth > 65.535] == 0).all()


def test_a_packed_frame_without_depth_in_its_4_3_centre_is_read_as_not_measured(tmp_path):
    depth = np.zeros((30, 80), np.float32)
    depth[:, 0] = 2
    save_pair(tmp_path / "set", depth=depth, suffix=".npy", height=30, width=80)
    write_pack(tmp_path / "set.h5", tmp_path / "set")
    assert not open_dataset(tmp_path / "set.h5", "all").read(0)[1].any()
    with complains("set.h5: no pixel of these frames is measured"):
        data.main([str(tmp_path / "set.h5")])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_pack_does_not_depend_on_how_many_worked(pack, originals, tmp_path, monkeypatch):
    for cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
        write_pack(tmp_path / "set.h5", originals)
        assert (tmp_path / "set.h5").read_bytes() == pack.read_bytes()


@pytest.mark.parametrize("change", [
    lambda h5: h5.attrs.pop("fastdepth_pack"),
    lambda h5: (h5.pop("part"), h5.create_group("part")),
])
def test_a_file_of_another_form_is_no_pack(pack, tmp_path, change):
    with h5py.File(shutil.copy(pack, tmp_path), "a") as h5:
        change(h5)
    with complains("set.h5: is not a pack"):
        find_samples(tmp_path / "set.h5")


def test_where_there_is_no_room_nothing_is_begun(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 9e9, 4e6))
    (tmp_path / "set.h5.partial-99999999").touch()  # of a killed process: cleared first
    with complains("set.h5: needs 4 MB, and 4 MB are free: make room"):
        write_pack(tmp_path / "set.h5", originals)
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(originals, tmp_path):
    with complains("set.h5: cannot be written .File too large.: make room"), full_disk(3000):
        write_pack(tmp_path / "set.h5", originals)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_frame_is_one_line_though_a_worker_read_it_and_the_old_pack_stays(tmp_path, refused):
    save_pair(tmp_path / "set")
    (tmp_path / "set/depth/0.png").write_bytes(b"junk")
    (tmp_path / "old.h5").write_bytes(b"a pack")
    line = refused(data, [tmp_path / "set", "--pack", tmp_path / "old.h5"])
    assert line.startswith(f"{tmp_path}/set/depth/0.png: cannot be read as depth")
    assert (tmp_path / "old.h5").read_bytes() == b"a pack" and len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_packing_left_is_cleared_by_the_next_and_ctrl_c_leaves_nothing(tmp_path):
    command = [sys.executable, data.__file__, "rooms:4096", "--pack", "rooms.h5"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for stop in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        partial = tmp_path / f"rooms.h5.partial-{process.pid}"
        assert process.stdout.readline() == "packing 4608 frames of 240x320 into rooms.h5, 1769 MB\n"
        while not partial.exists() or partial.stat().st_blocks < 2000:  # until both workers have given rooms
            time.sleep(0.05)
        assert list(tmp_path.iterdir()) == [partial]
        os.killpg(process.pid, stop)  # to the workers too, as a terminal does
        printed = process.communicate(timeout=60)
    assert process.returncode == 130 and printed == ("", "") and list(tmp_path.iterdir()) == []


def test_the_command_packs_with_its_flags(monkeypatch):
    asked = []
    monkeypatch.setattr(data, "write_pack", lambda *words: asked.append(words))
    data.main("nyu --pack nyu.h5 --size 30 40 --depth-scale 5000".split())
    assert asked == [("nyu.h5", "nyu", (30, 40), 5000.0)]
