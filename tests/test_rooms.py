"""Rooms: what the renderer's pictures and depth must agree on, and rooms on disk."""
import json
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import furnish, have_rooms, open_dataset, render, write_rooms
from test_data import complains, run


# ------------------------------------------------------------------------------------------------------------------
# Rooms: the renderer
# ------------------------------------------------------------------------------------------------------------------

FOCAL = 0.81  # of the width, NYU's
DIAGONAL = np.sqrt(8**2 + 8**2 + 3**2)  # of the largest room
CLEARANCE = 0.25  # metres around the camera without things


def faces(depth):
    """Inverse depth is affine in pixel coordinates on any plane: 1/z = n . ((u - cu)/f, (v - cv)/f, 1), where n is the plane's
    normal over its distance. -> n of each inner pixel (H-2, W-2, 3), and where its neighbours lie on the same plane."""
    height, width = depth.shape
    w = 1 / depth.double().numpy()
    du, dv = (w[1:-1, 2:] - w[1:-1, :-2]) / 2, (w[2:, 1:-1] - w[:-2, 1:-1]) / 2
    bent = [w[1:-1, 2:] + w[1:-1, :-2], w[2:, 1:-1] + w[:-2, 1:-1], w[2:, 2:] + w[:-2, :-2], w[2:, :-2] + w[:-2, 2:]]
    flat = np.all([np.abs(pair - 2 * w[1:-1, 1:-1]) < 2e-6 for pair in bent], axis=0)
    y, x = np.mgrid[1:height - 1, 1:width - 1] + 0.5
    x, y, f = x - width / 2, y - height / 2, FOCAL * width
    return np.stack([du * f, dv * f, w[1:-1, 1:-1] - du * x - dv * y], -1), flat


@pytest.fixture(scope="module")
def rendered():
    return render(range(16), seed=5, size=(96, 128))


def test_rooms_are_8_bit_pictures_with_depth_in_metres(rendered):
    images, depths = rendered
    assert images.shape == (16, 3, 96, 128) and images.dtype == torch.uint8
    assert depths.shape == (16, 96, 128) and depths.dtype == torch.float32
    assert depths.min() > 0.1 and depths.max() < DIAGONAL and depths.isfinite().all()
    assert 1 < depths.median() < 5
    assert images.float().std((1, 2, 3)).min() > 10  # none is blank
    assert 40 < images.float().mean((1, 2, 3)).min() and images.float().mean((1, 2, 3)).max() < 220


def test_rooms_are_made_of_planes(rendered):
    share = [faces(depth)[1].mean() for depth in rendered[1]]  # the rest are the edges, 3 pixels wide in 128
    assert min(share) > 0.7 and np.mean(share) > 0.8


def test_every_face_is_level_or_upright_and_the_camera_stands_at_eye_level(rendered):
    """Only true with the right focal length, and with depth along the axis instead of along the ray."""
    y, x = (np.mgrid[:96, :128] + 0.5 - np.reshape([48, 64], (2, 1, 1))) / (FOCAL * 128)
    eyes, heights = [], []
    for depth in rendered[1]:
        n, flat = faces(depth)
        normal = n[flat] / np.linalg.norm(n[flat], axis=1, keepdims=True)
        level = np.abs(normal[:, 1]) > 0.8
        if not level.any():
            continue  # this camera sees walls only
        down = (normal[level] * np.sign(normal[level][:, 1:2])).mean(0)
        down /= np.linalg.norm(down)
        lean = np.abs(normal @ down)
        assert np.minimum(lean, 1 - lean).max() < 0.02
        drop = np.stack([x, y, np.ones_like(x)], -1) @ down * depth.numpy()  # metres below the camera
        eyes.append(drop.max()), heights.append(np.ptp(drop))
    assert len(eyes) > 10
    assert max(eyes) < 1.801 and 1 < np.median(eyes)  # nothing is below the floor, which most cameras see
    assert 2.4 < max(heights) < 3.001


def test_nothing_is_seen_through_a_nearer_face(rendered):
    """Faces are convex: what lies half way between two pixels of one face is that face, or nearer. (Two legs of a chair also
    share a plane, with a gap between them, and so do the boards of a shelf: they are few.)"""
    for depth in rendered[1]:
        (n, flat), w = faces(depth), 1 / depth[1:-1, 1:-1].numpy()
        through = pairs = 0
        for gap in range(2, 30):
            same_face = flat[:, :-2 * gap] & flat[:, 2 * gap:] & (np.abs(n[:, :-2 * gap] - n[:, 2 * gap:]).max(-1) < 1e-3)
            behind = w[:, gap:-gap] < 0.97 * (w[:, :-2 * gap] + w[:, 2 * gap:]) / 2
            through, pairs = through + (same_face & behind).sum(), pairs + same_face.sum()
        assert through < 0.01 * pairs


def test_a_picture_shows_the_scene_of_its_depth(rendered):
    """Where depth jumps the picture changes: more than elsewhere, and more than at the mirrored place."""
    images, depths = rendered
    change = images.float().diff(dim=-1).abs().mean(1)
    jump = depths.diff(dim=-1).abs() > 0.2
    assert change[jump].mean() > 2 * change[~jump].mean() and change[jump].mean() > 2 * change[jump.flip(-1)].mean()


def test_a_room_depends_on_seed_and_number_alone(rendered):
    images, depths = render([7, -1, 3], seed=5, size=(96, 128))
    for a, b in ((0, 7), (2, 3)):
        assert torch.equal(images[a], rendered[0][b]) and torch.equal(depths[a], rendered[1][b])
    everything = [*rendered[1], depths[1], *render([7, 8], seed=6, size=(96, 128))[1]]
    assert len({tuple(depth.flatten().tolist()) for depth in everything}) == 19


def test_a_room_is_the_same_at_any_size(rendered):
    large = render(range(4), seed=5, size=(288, 384))[1][:, 1::3, 1::3]  # the rays through the middles of 3x3 pixels
    assert torch.isclose(large, rendered[1][:4], rtol=1e-4).float().mean() > 0.999


def test_depth_is_that_of_the_nearest_box_found_by_walking_along_each_ray():
    """The textbook's slabs, box by box in float64, with the camera turned by matrices."""
    size, numbers = (24, 32), range(8)
    depths = [render([i], seed=9, size=size)[1][0].double().numpy() for i in numbers]  # alone: a batch looks in larger rectangles
    rooms = furnish([zlib.crc32(f"room 9 {i}".encode()) for i in numbers])
    for depth, s in zip(depths, ({k: v[i].double().numpy() for k, v in rooms.items() if k != "things"} for i in numbers)):
        y, x = (np.mgrid[:24, :32] + 0.5 - np.reshape([12, 16], (2, 1, 1))) / (FOCAL * 32)
        x, y = np.cos(s["roll"]) * x + np.sin(s["roll"]) * y, np.cos(s["roll"]) * y - np.sin(s["roll"]) * x  # y down
        up, ahead = np.sin(s["pitch"]) - y * np.cos(s["pitch"]), np.cos(s["pitch"]) + y * np.sin(s["pitch"])
        east, north = (s["target"] - s["eye"][::2]) / np.linalg.norm(s["target"] - s["eye"][::2])
        ray = np.stack([x * north + ahead * east, up, ahead * north - x * east], -1)
        assert np.allclose((ray**2).sum(-1), 1 + x**2 + y**2)
        nearest = np.full(size, np.inf)
        for k, (box, (px, pz, turn)) in enumerate(zip(s["boxes"], s["poses"])):
            matrix = np.array([[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]])
            eye, towards = matrix @ (s["eye"] - [px, 0, pz]), ray @ matrix.T
            slabs = np.sort((box.reshape(2, 3)[:, None, None] - eye) / towards, axis=0)
            enter, leave = slabs[0].max(-1), slabs[1].min(-1)
            if k == 0:
                nearest = leave
            elif not ((box[:3] - CLEARANCE < eye) & (eye < box[3:] + CLEARANCE)).all():  # (NaN is no box)
                nearest = np.where((0 < enter) & (enter < leave) & (enter < nearest), enter, nearest)
        assert np.isclose(depth, nearest, rtol=1e-4).mean() > 0.995  # a ray along an edge may take either side


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_renders_the_same_rooms(rendered):
    images, depths = (t.cpu() for t in render(range(16), seed=5, size=(96, 128), device="cuda"))
    assert torch.isclose(depths, rendered[1], rtol=1e-3).float().mean() > 0.999
    assert (images.int() - rendered[0].int()).abs().le(2).float().mean() > 0.99


# ------------------------------------------------------------------------------------------------------------------
# Rooms on disk
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_rooms(monkeypatch):
    monkeypatch.setattr(data, "render", lambda numbers, seed=0, **options: render(numbers, seed, size=(24, 32)))


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupted(numbers, seed=0, **_):
        calls.append(numbers)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render(numbers, seed, size=(24, 32))

    monkeypatch.setattr(data, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_rooms(tmp_path / "rooms", 16)
    assert len(calls) == 2 and list(tmp_path.iterdir()) == [] and not have_rooms(tmp_path / "rooms", 16)


def test_rooms_of_another_number_seed_or_version_are_rendered_again(tmp_path, small_rooms):
    out = tmp_path / "deep" / "rooms"
    write_rooms(out, 16, seed=1)
    assert have_rooms(out, 16, seed=1)
    assert not have_rooms(out, 8, seed=1) and not have_rooms(out, 16, seed=2) and not have_rooms(tmp_path, 16, seed=1)
    first = torch.stack([image for image, _, _ in open_dataset(out, "train", size=None)])
    write_rooms(out, 8, seed=2)
    assert have_rooms(out, 8, seed=2) and not have_rooms(out, 16, seed=1)
    second = torch.stack([image for image, _, _ in open_dataset(out, "train", size=None)])
    assert len(first) == 16 and len(second) == 8 and not torch.equal(first[:8], second)
    facts = json.loads((out / "rooms.json").read_text())
    (out / "rooms.json").write_text(json.dumps(facts | {"version": facts["version"] + 1}))
    assert not have_rooms(out, 8, seed=2)
    write_rooms(out, 8, seed=2)
    assert have_rooms(out, 8, seed=2) and [p.name for p in out.parent.iterdir()] == ["rooms"]


def test_too_few_rooms_are_refused_and_those_that_are_there_stay(tmp_path, small_rooms):
    write_rooms(tmp_path / "rooms", 8)
    with complains("at least 8, got 4"):
        write_rooms(tmp_path / "rooms", 4)
    assert have_rooms(tmp_path / "rooms", 8)


def test_of_two_processes_that_render_the_same_rooms_the_second_leaves_those_of_the_first(tmp_path, monkeypatch):
    def quicker(numbers, seed=0, **_):
        monkeypatch.setattr(data, "render", lambda numbers, seed=0, **_: render(numbers, seed, size=(24, 32)))
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            write_rooms(tmp_path / "rooms", 8)  # while the second renders its first room
        (tmp_path / "rooms" / "being read").touch()
        return data.render(numbers, seed)

    monkeypatch.setattr(data, "render", quicker)
    write_rooms(tmp_path / "rooms", 8)
    assert (tmp_path / "rooms" / "being read").exists() and [p.name for p in tmp_path.iterdir()] == ["rooms"]


def test_more_training_rooms_never_become_validation_rooms(tmp_path, small_rooms):
    pictures = {}
    for n in (8, 24):
        write_rooms(tmp_path / str(n), n)
        for split in ("train", "val"):
            pictures[n, split] = [image.numpy().tobytes() for image, _, _ in open_dataset(tmp_path / str(n), split, size=None)]
    assert pictures[24, "train"][:8] == pictures[8, "train"] and pictures[24, "val"][:1] == pictures[8, "val"]
    assert len(set(pictures[24, "train"] + pictures[24, "val"])) == 24 + 3


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path, small_rooms):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with complains(str(tmp_path)):
        write_rooms(tmp_path, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    result = run("--rooms", 8, "--out", "new/rooms", "--seed", 5, cwd=root)
    assert result.returncode == 0 and result.stderr == ""
    return root / "new/rooms"


def test_the_command_writes_rooms_whose_training_depth_has_holes(rooms):
    assert have_rooms(rooms, 8, seed=5)
    train, val = (open_dataset(rooms, split, size=None) for split in ("train", "val"))
    assert len(train) == 8 and len(val) == 1
    images, depths = render(range(8), seed=5)
    assert images.shape[2:] == (240, 320)
    for image, depth, i in train:
        measured = depth > 0
        assert 0.7 < measured.float().mean() < 1
        assert (depth - depths[i])[measured].abs().max() < 0.001 and \
            (image * 255 - images[i]).abs().max() < 1.5  # a mean over other threads may round otherwise
    assert val[0][1].min() > 0.1 and not any(torch.equal(val[0][0], image) for image, _, _ in train)


def test_the_command_prints_facts_and_writes_a_contact_sheet(rooms, tmp_path):
    result = run(rooms, "--out", "look/sheet.png", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    for fact in ("HDF5", "8 train", "1 val", "scenes: 1", "240x320", " m at the median"):
        assert fact in result.stdout
    with Image.open(tmp_path / "look/sheet.png") as sheet:
        assert sheet.mode == "RGB" and min(sheet.size) > 300 and len(sheet.getcolors(2**24)) > 1000
