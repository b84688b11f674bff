"""Each layout of data.py in miniature, written by the test in exactly the form in which the data set is published, and packs."""
import os
import subprocess
import sys
import zlib
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import AUGMENTS, find_samples, open_dataset, write_pack
from test_data import complains, frame, save, write


ROOT = str(Path(data.__file__).parent)


def stored(folder, stem, seed, picture="{}.jpg", depth="{}.png", scale=1000):
    """One frame of `frame(seed)`, its picture and depth below folder; depth as 16-bit PNG."""
    image, metres = frame(seed=seed)
    save(folder / picture.format(stem), image)
    file = folder / depth.format(stem)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((metres * scale).round().astype(np.uint16)).save(file)
    return metres


def depths_of(dataset):
    return [dataset.read(i)[1] for i in range(len(dataset))]


# ------------------------------------------------------------------------------------------------------------------
# nyu_depth_v2_labeled.mat
# ------------------------------------------------------------------------------------------------------------------


def write_mat(file, n=1449, width=4, height=3):
    """As MATLAB writes it: axes reversed, scene names as references to columns of characters. Frame i is i % 9 + 1 m deep."""
    metres = (np.arange(n) % 9 + 1).astype(np.float32)
    with h5py.File(file, "w") as h5:
        h5["images"] = np.broadcast_to((np.arange(n) % 256).astype(np.uint8)[:, None, None, None], (n, 3, width, height)).copy()
        h5["images"][:, 1, -1, 0] = 200  # green in the upper right corner
        h5["depths"] = np.broadcast_to(metres[:, None, None], (n, width, height)).copy()
        h5["rawDepths"] = h5["depths"][:]
        h5["rawDepths"][:, 0, -1] = 0  # a hole in the lower left corner
        names = [h5.create_dataset(f"#refs#/{s}", data=np.array([[ord(c)] for c in f"room_{s:04d}"], np.uint16)) for s in range(20)]
        h5["scenes"] = np.array([[names[i // 3 % 20].ref for i in range(n)]], h5py.ref_dtype)
    return file


@pytest.fixture(scope="module")
def mat(tmp_path_factory):
    return write_mat(tmp_path_factory.mktemp("mat") / "nyu_depth_v2_labeled.mat")


def test_the_labelled_file_has_the_official_split(mat):
    layout, samples = find_samples(mat)
    test = [i for i, s in enumerate(samples) if s.part == "test"]
    assert len(samples) == 1449 and len(test) == 654
    assert test[:6] == [0, 1, 8, 13, 14, 15] and test[-10:] == [1432, *range(1440, 1449)]  # the first runs and the last ones
    for s in samples:
        assert s.part == "test" or s.part == ("val" if zlib.crc32(s.scene.encode()) % 5 == 0 else "train")
    assert samples[59].scene == "room_0019"


def test_the_labelled_file_is_read_upright(mat):
    dataset = open_dataset(mat, "all", size=None)
    image, depth = dataset.read(7)
    assert image.shape == (3, 4, 3) and image[0, -1].tolist() == [7, 200, 7] and image[-1, 0].tolist() == [7, 7, 7]
    assert depth.shape == (3, 4) and (depth == 8).all()


def test_the_depth_of_the_labelled_file_is_filled_in_or_raw(mat):
    raw = open_dataset(mat / "rawDepths", "all", size=None).read(7)[1]
    assert raw[-1, 0] == 0 and (raw > 0).sum() == raw.size - 1


def test_a_labelled_file_of_another_length_is_split_by_scene(tmp_path):
    layout, samples = find_samples(write_mat(tmp_path / "few.mat", n=60))
    assert {s.part for s in samples} == {"train", "val"}


@pytest.mark.parametrize("path, complaint", [("nyu.mat/depth", "nyu.mat: is not NYU's"), ("none.mat", "none.mat: no such file"),
                                             ("none.mat/rawDepths", "none.mat: cannot be read"), ("junk.mat", "junk.mat: cannot be read")])
def test_a_wrong_labelled_file_is_named(tmp_path, path, complaint):
    write_mat(tmp_path / "nyu.mat", n=3)
    (tmp_path / "junk.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with complains(complaint):
        find_samples(tmp_path / path)


# ------------------------------------------------------------------------------------------------------------------
# Lists
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kaggle(tmp_path):
    """data/nyu2_train.csv with 8-bit depth, data/nyu2_test.csv with 16-bit millimetres; paths start with data/."""
    root, lines = tmp_path / "data", []
    for scene, number in product(("bedroom_0001_out", "study_0003_out", "cafe_0001_out", "office_0009_out"), (1, 2)):
        folder = root / "nyu2_train" / scene
        save(folder / f"{number}.jpg", frame()[0])
        Image.fromarray(np.full((24, 32), 51 * number, np.uint8)).save(folder / f"{number}.png")
        lines.append(f"data/nyu2_train/{scene}/{number}.jpg,data/nyu2_train/{scene}/{number}.png")
    (root / "nyu2_train.csv").write_text("\n".join(lines))
    stored(root / "nyu2_test", "00000", 5, "{}_colors.png", "{}_depth.png")
    (root / "nyu2_test.csv").write_text("data/nyu2_test/00000_colors.png,data/nyu2_test/00000_depth.png\n")
    return root


def test_kaggles_lists_have_8_bit_training_and_16_bit_test_depth(kaggle):
    train = open_dataset(kaggle, "train", size=None)
    assert train.layout == "lists" and {d.flat[0].round(5) for d in depths_of(train)} == {2, 4}
    assert (depths_of(open_dataset(kaggle, "test", size=None))[0] == frame(seed=5)[1]).all()
    scenes = [{s.scene for s in open_dataset(kaggle, split).samples} for split in ("train", "val")]
    assert not scenes[0] & scenes[1] and len(scenes[0] | scenes[1]) == 4


def test_kaggles_archive_may_be_named_above_its_data_folder(kaggle):
    assert open_dataset(kaggle.parent, "all").files == open_dataset(kaggle, "all").files


@pytest.mark.parametrize("line", ["{p} {d}", "/{p} /{d}", "{p} {d} 721.5377", "1305031102.1753 {p} 1305031102.1604 {d}", "{p},{d}", "{p}\t{d}", "{p}; {d}"])
@pytest.mark.parametrize("header", ["", "# picture depth\n", "image,depth\n", "\ufeff", "a/x.png None 721.5377\n"])
def test_a_list_may_have_a_header_and_other_columns(tmp_path, header, line):
    expected = [stored(tmp_path, name, seed, "a/{}.png", "b/{}.png") for seed, name in enumerate("xyz")]
    lines = [line.format(p=f"a/{name}.png", d=f"b/{name}.png") for name in "xyz"]
    (tmp_path / "pairs.txt").write_text(header + "\n".join(lines) + "\n\n")
    found = depths_of(open_dataset(tmp_path / "pairs.txt", "all", size=None))
    assert len(found) == 3 and all((a == b).all() for a, b in zip(found, expected))


def test_lists_name_the_parts_of_a_folder_and_go_before_its_structure(tmp_path):
    write(tmp_path, "rgb + 16-bit png", names="abcdef")
    for part, names in dict(train="abc", val="d", test="ef").items():
        (tmp_path / f"{part}.txt").write_text("".join(f"rgb/{name}.png depth/{name}.png\n" for name in names))
    assert [len(open_dataset(tmp_path, part)) for part in ("train", "val", "test", "all")] == [3, 1, 2, 6]


def test_paths_with_spaces_are_possible_in_a_csv(tmp_path):
    stored(tmp_path / "living room", "1", 0)
    (tmp_path / "all.csv").write_text("living room/1.jpg, living room/1.png\n")
    assert len(open_dataset(tmp_path / "all.csv", "all")) == 1


@pytest.mark.parametrize("line, complaint", [("a/1.png b/9.png", "line 2 points nowhere.*b/9.png"), ("a/1.png", "line 2 does not name"),
                                             ("a/1.png b/1.png b/1.png", "line 2 does not name")])
def test_a_wrong_line_of_a_list_is_named(tmp_path, line, complaint):
    stored(tmp_path, "1", 0, "a/{}.png", "b/{}.png")
    (tmp_path / "train.txt").write_text(f"a/1.png b/1.png\n{line}\n")
    with complains(f"train.txt: {complaint}"):
        open_dataset(tmp_path, "train")


def test_a_list_that_is_no_text_is_named(tmp_path):
    (tmp_path / "pairs.txt").write_bytes(bytes(range(256)))
    with complains("pairs.txt: is not text"):
        open_dataset(tmp_path / "pairs.txt", "all")


def test_of_two_scenes_one_is_held_out_whole_though_the_checksum_holds_out_none(tmp_path):
    scenes = [name for name in map("scene{:04d}_00".format, range(20)) if zlib.crc32(name.encode()) % 5][:2]
    for scene, name in product(scenes, "abc"):
        stored(tmp_path / scene, name, 0, "color/{}.jpg", "depth/{}.png")
    assert [{s.scene for s in open_dataset(tmp_path, part).samples} for part in ("train", "val")] == [{scenes[0]}, {scenes[1]}]


# ------------------------------------------------------------------------------------------------------------------
# Folders whose names do not simply match
# ------------------------------------------------------------------------------------------------------------------


def test_tums_pictures_and_depths_are_paired_by_time(tmp_path):
    times = {"1305031102.175304": "1305031102.160407", "1305031102.211214": "1305031102.226738", "1305031103.0": "1305031104.0"}
    for seed, (picture, depth) in enumerate(times.items()):
        save(tmp_path / "rgb" / f"{picture}.png", frame(seed=seed)[0])
        save(tmp_path / "depth" / f"{depth}.png", frame(seed=seed)[1])
    dataset = open_dataset(tmp_path, "all", size=None)
    assert len(dataset) == 2  # the third pair is a second apart
    for i in range(2):
        image, depth = dataset.read(i)
        assert (image == frame(seed=i)[0]).all() and (depth == frame(seed=i)[1]).all()


@pytest.mark.parametrize("picture, depth", [("frame-{}.color.png", "frame-{}.depth.png"), ("{}_colors.png", "{}_depth.png"),
                                            ("{}-rgb.jpg", "{}-depth.npy"), ("{}_image.png", "{}_depth.npz")])
def test_pairs_side_by_side_have_the_names_that_data_sets_use(tmp_path, picture, depth):
    for seed, name in enumerate(("000000", "000001")):
        save(tmp_path / "seq-01" / picture.format(name), frame(seed=seed)[0])
        save(tmp_path / "seq-01" / depth.format(name), frame(seed=seed)[1])
    found = depths_of(open_dataset(tmp_path, "all", size=None))
    assert len(found) == 2 and all((d == frame(seed=i)[1]).all() for i, d in enumerate(found))


# ------------------------------------------------------------------------------------------------------------------
# Units
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored_scale, scale, likely", [(1000, 1, "1000"), (5000, 1e6, "5000"), (256, 1, "256"), (1000, 1e6, "1000")])
def test_an_implausible_scale_is_refused_with_the_likely_one(tmp_path, stored_scale, scale, likely):
    stored(tmp_path, "1", 0, "rgb/{}.png", "depth/{}.png", stored_scale)
    with complains(f"depth/1.png: the median depth would be .* m: .*--depth-scale {likely} "):
        open_dataset(tmp_path, "all", depth_scale=scale)[0]


def test_frames_of_several_sizes_cannot_be_one_batch_and_the_odd_one_is_named(tmp_path):
    write(tmp_path, "rgb + 16-bit png", names="ab")
    write(tmp_path / "small", "rgb + 16-bit png", names="c", height=12, width=16)
    dataset = open_dataset(tmp_path, "all", size=None)
    with complains("small/rgb/c.png: is 12x16, other frames are 24x32"):
        [dataset[i] for i in range(3)]


# ------------------------------------------------------------------------------------------------------------------
# Packs
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def originals(tmp_path):
    """Eight frames of four scenes, with holes in the depth, and two official test frames."""
    for seed in range(10):
        image, depth = frame(60, 100, seed)
        depth[:9, :7] = 0
        part = "test" if seed > 7 else "train"
        save(tmp_path / "set" / part / f"scene{seed // 2}" / "rgb" / f"{seed}.png", image)
        save(tmp_path / "set" / part / f"scene{seed // 2}" / "depth" / f"{seed}.png", depth)
    return tmp_path / "set"


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_pack_gives_what_the_originals_give_bit_for_bit(originals, tmp_path, augment):
    write_pack(tmp_path / "set.h5", originals)
    for split in ("train", "val", "test", "all"):
        ours, theirs = (open_dataset(root, split, (64, 96), augment, seed=3) for root in (tmp_path / "set.h5", originals))
        assert ours.files == theirs.files and [s.scene for s in ours.samples] == [s.scene for s in theirs.samples]
        for (image, depth, i), (expected_image, expected_depth, j) in zip(ours, theirs):
            assert i == j and torch.equal(image, expected_image) and torch.equal(depth, expected_depth)


def test_a_pack_of_whole_frames_gives_what_geometry_full_gives(originals, tmp_path):
    write_pack(tmp_path / "set.h5", originals, size=(32, 64))
    ours, theirs = (open_dataset(root, "all", (32, 64), geometry="full") for root in (tmp_path / "set.h5", originals))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(ours, theirs))


def test_a_pack_keeps_half_a_millimetre_and_drops_what_it_cannot_hold(tmp_path):
    image, depth = frame(30, 40)[0], np.linspace(0.3, 90, 1200, dtype=np.float32).reshape(30, 40)
    save(tmp_path / "set/rgb/1.png", image)
    save(tmp_path / "set/depth/1.npy", depth)
    write_pack(tmp_path / "set.h5", tmp_path / "set", size=(30, 40))
    packed = open_dataset(tmp_path / "set.h5", "all", size=None).read(0)[1]
    near = depth < 65.53
    assert np.abs(packed - depth)[near].max() <= 0.0005 + 1e-6 and (packed[depth > 65.535] == 0).all()


@pytest.mark.filterwarnings("error")
def test_a_pack_as_stored_is_free_to_be_written_on(originals, tmp_path):
    write_pack(tmp_path / "set.h5", originals)
    image, depth, _ = open_dataset(tmp_path / "set.h5", "all", size=None)[0]
    assert image.shape == (3, 250, 333) and depth.shape == (1, 250, 333)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no limit on the size of files")
@pytest.mark.parametrize("arguments, target", [(["SET", "--pack", "set.h5"], "set.h5"), (["--rooms", "8", "--out", "rooms"], "rooms")])
def test_a_full_disk_is_one_line_and_leaves_nothing(originals, tmp_path, arguments, target):
    script = "import data, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
             "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); data.run_script(data.main)"
    arguments = [str(originals) if a == "SET" else a for a in arguments]
    result = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, text=True, capture_output=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and f"{target}: cannot be written" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_workers_share_a_pack_and_it_pickles(originals, tmp_path):
    write_pack(tmp_path / "set.h5", originals)
    dataset = open_dataset(tmp_path / "set.h5", "all", (32, 32))
    expected = torch.stack([dataset[i][0] for i in range(10)])
    for image, _, index in torch.utils.data.DataLoader(dataset, 5, num_workers=2):
        assert torch.equal(image, expected[index])


def test_a_pack_that_was_written_anew_is_read_anew(originals, tmp_path):
    for part in ("train", "test"):
        write_pack(tmp_path / "set.h5", originals / part)
        first = open_dataset(tmp_path / "set.h5", "all").read(0)[0]
        assert (first == open_dataset(originals / part, "all").read(0)[0][data.fastdepth_grid(60, 100)[0][:, None], data.fastdepth_grid(60, 100)[1]]).all()


@pytest.mark.parametrize("spoil, complaint", [
    (lambda h5: h5.attrs.__delitem__("fastdepth_pack"), "is not a pack: write one with .*--pack"),
    (lambda h5: h5.attrs.__setitem__("fastdepth_pack", 0), "is a pack of version 0.*write it again with --pack"),
])
def test_a_foreign_or_stale_pack_is_refused(originals, tmp_path, spoil, complaint):
    write_pack(tmp_path / "set.h5", originals)
    with h5py.File(tmp_path / "set.h5", "a") as h5:
        spoil(h5)
    with complains(f"set.h5: {complaint}"):
        open_dataset(tmp_path / "set.h5", "train")


def test_a_cut_off_pack_is_named(originals, tmp_path):
    write_pack(tmp_path / "set.h5", originals)
    os.truncate(tmp_path / "set.h5", (tmp_path / "set.h5").stat().st_size // 2)
    with complains("set.h5: cannot be read as HDF5"):
        open_dataset(tmp_path / "set.h5", "train")


def test_an_interrupted_packing_leaves_the_old_pack_and_nothing_else(originals, tmp_path, monkeypatch):
    write_pack(tmp_path / "set.h5", originals)
    old = (tmp_path / "set.h5").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "progress", stop)
    with pytest.raises(KeyboardInterrupt):
        write_pack(tmp_path / "set.h5", originals)
    assert (tmp_path / "set.h5").read_bytes() == old and not list(tmp_path.glob("*partial*"))


def test_the_command_packs_and_the_pack_can_be_looked_at(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main([str(originals), "--pack", "set.h5"])
    data.main(["set.h5"])
    out = capsys.readouterr().out
    assert "10 frames of 250x333" in out and "set.h5: pack" in out and "2 test" in out and (tmp_path / "runs/data-set.h5.png").is_file()


@pytest.mark.parametrize("flags", [["--size", "60", "80"], ["--pack", "set.h5", "--size", "0", "80"]])
def test_a_wrong_size_is_refused_before_anything_is_written(originals, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with complains("--size"):
        data.main([str(originals), *flags])
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("*.h5*"))
