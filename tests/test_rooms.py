"""Rooms: what image and depth must agree on, an independent ray tracer, and the layout rooms:N[:SEED]."""
from itertools import product

import numpy as np
import pytest

import data
from data import open_dataset, render_room, write_pack
from test_data import complains

FOCAL = 0.81  # of the longer side, NYU's
SIZE = (120, 160)


@pytest.fixture(scope="module")
def rendered():
    """(image, exact depth) of 24 rooms."""
    return [render_room(f"5 val {i}", SIZE) for i in range(24)]


# ------------------------------------------------------------------------------------------------------------
# The renderer
# ------------------------------------------------------------------------------------------------------------


def test_rooms_are_8_bit_images_with_depth_in_metres(rendered):
    for image, depth in rendered:
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
        assert depth.shape == SIZE and depth.dtype == np.float32
        assert 0.6 < depth.min() and depth.max() < 14  # nothing nearer than NYU's cameras come
        assert image.std() > 10 and 40 < image.mean() < 220  # none is blank
    depths = np.stack([depth for _, depth in rendered])
    assert 2 < np.median(depths) < 3.5 and 0.5 < np.quantile(depths, 0.01) < np.quantile(depths, 0.99) < 9


def test_where_depth_jumps_the_image_changes(rendered):
    """More than elsewhere, and more than at the same place of the flipped depth."""
    change = np.stack([np.abs(np.diff(image.astype(float), axis=1)).mean(-1) for image, _ in rendered])
    jump = np.stack([np.abs(np.diff(depth, axis=1)) > 0.2 for _, depth in rendered])
    assert change[jump].mean() > 1.5 * max(change[~jump].mean(), change[jump[..., ::-1]].mean())


def first_hit(room, rays):
    """The depth at which each ray (H, W, 3) first meets a box, by slabs in float64: the textbook's test."""
    boxes = []
    for box, (x, z, turn) in zip(room.boxes, room.poses):
        cos, sin = np.cos(turn), np.sin(turn)
        into_frame = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
        eye = into_frame @ (room.eye - [x, 0, z])
        slabs = np.sort((box.reshape(2, 1, 1, 3) - eye) / (rays @ into_frame.T), axis=0)
        enter, leave = slabs[0].max(-1), slabs[1].min(-1)
        boxes.append(np.where((0 < enter) & (enter < leave), enter, np.inf) if boxes else leave)
    return np.min(boxes, axis=0)  # box 0 is the room itself: of that, the far side is seen


@pytest.mark.parametrize("index, size", [(0, (60, 80)), (1, (60, 80)), (2, (60, 80)), (3, (80, 60))])
def test_depth_is_that_of_the_nearest_body_found_along_each_ray(index, size):
    room = data.furnish(np.random.default_rng(list(f"9 val {index}".encode())))
    y, x = (np.indices(size) + 0.5 - np.reshape(size, (2, 1, 1)) / 2) / (FOCAL * 80)
    right, up, ahead = room.axes
    assert np.allclose(room.axes @ room.axes.T, np.eye(3)) and np.linalg.det(room.axes) == pytest.approx(1)
    assert 0.9 <= room.eye[1] <= 1.75 and up[1] > 0.85  # the camera is held upright, at eye level
    rays = x[..., None] * right - y[..., None] * up + ahead
    agree = np.isclose(render_room(f"9 val {index}", size)[1], first_hit(room, rays), rtol=1e-4)
    assert agree.mean() > 0.995  # a ray along an edge may take either side


def test_a_size_changes_only_the_resolution(rendered):
    """The rays through the middles of 3x3 pixels are those of a third of the size."""
    for i in range(2):
        image, depth = render_room(f"5 val {i}", (3 * SIZE[0], 3 * SIZE[1]))
        assert np.isclose(depth[1::3, 1::3], rendered[i][1], rtol=1e-4).mean() > 0.998
        small = image.reshape(SIZE[0], 3, SIZE[1], 3, 3).mean((1, 3))
        assert np.corrcoef(small.ravel(), rendered[i][0].ravel())[0, 1] > 0.9


def test_the_look_of_rooms_is_that_of_this_version():
    """If this fails because rooms look otherwise, raise ROOMS_VERSION: else old packs would still be used."""
    image, _ = render_room("0 val 1", (24, 32))
    pixels = ("457e3ba1ffa045803e5798485d93509fff9fc58a7f5c9356"
              "362f178efa85262615589053ff9e8b25130d1c191a548e50")
    expected = np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(4, 4, 3).astype(int)
    assert data.ROOMS_VERSION == 3
    same = np.abs(image[3::6, 4::8] - expected) <= 1
    assert same.mean() > 0.9  # rounding may differ between machines


def test_holes_lie_left_of_what_is_near():
    """The shadow of the projector falls to one side only."""
    depth = np.full((60, 80), 4, np.float32)
    depth[20:40, 30:50] = 1
    holes = np.mean([data.kinect_holes(depth, np.random.default_rng(i)) == 0 for i in range(50)], axis=0)
    assert (holes[20:40, 29] == 1).all()
    assert holes[20:40, 50:].max() < 0.5 and holes[:20].max() < 0.5  # only patches, which lie anywhere


# ------------------------------------------------------------------------------------------------------------
# The layout
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root, train, val", [
    ("rooms:8", 8, 1),
    ("rooms:17:-3", 17, 2),
    ("rooms:8192", 8192, 512),
])
def test_rooms_are_n_to_train_on_and_an_eighth_at_most_512_to_validate(root, train, val):
    names = [open_dataset(root, split).files for split in ("train", "val", "all")]
    assert [len(set(part)) for part in names] == [train, val, train + val]
    assert open_dataset(root, "all").layout == "rooms"
    with complains(f"{root}: its test split is empty .rooms: {train} train, {val} val"):
        open_dataset(root, "test")


def test_a_room_depends_on_seed_part_and_index_alone(monkeypatch):
    """So more training rooms never become validation rooms, and their order does not matter."""
    monkeypatch.setattr(data, "ROOM_SIZE", (24, 32))
    images = {}
    for root, split in product(("rooms:8", "rooms:24", "rooms:8:1"), ("train", "val")):
        dataset = open_dataset(root, split)
        backwards = [dataset.read(i)[0].tobytes() for i in reversed(range(len(dataset)))]
        images[root, split] = backwards[::-1]
    for split in ("train", "val"):
        assert images["rooms:24", split][:len(images["rooms:8", split])] == images["rooms:8", split]
    others = images["rooms:24", "train"] + images["rooms:24", "val"] + images["rooms:8:1", "train"]
    assert len(set(others)) == 24 + 3 + 8


def test_only_the_depth_to_train_on_has_holes_and_the_rest_of_it_is_exact(monkeypatch):
    monkeypatch.setattr(data, "ROOM_SIZE", SIZE)
    shares = []
    for split in ("train", "val"):
        dataset = open_dataset("rooms:16:5", split)
        for i in range(len(dataset)):
            image, depth = dataset.read(i)
            exact_image, exact = render_room(f"5 {split} {i}", SIZE)
            measured = depth > 0
            assert (image == exact_image).all() and (depth == exact)[measured].all()
            assert measured.all() == (split == "val")
            shares.append(measured.mean())
    assert 0.7 < min(shares) and 0.8 < np.mean(shares[:16]) < 0.99


def test_rooms_have_the_size_of_half_a_kinects_frame_or_that_of_their_pack(tmp_path, monkeypatch):
    image, depth = open_dataset("rooms:8", "val").read(0)
    assert image.shape == (240, 320, 3) and depth.shape == (240, 320)
    write_pack(tmp_path / "rooms.h5", "rooms:8", size=(48, 64))
    monkeypatch.setattr(data, "ROOM_SIZE", (48, 64))
    pack, direct = (open_dataset(root, "all") for root in (tmp_path / "rooms.h5", "rooms:8"))
    assert pack.files == direct.files and [s.part for s in pack.samples] == [s.part for s in direct.samples]
    for i in range(9):  # workers rendered those of the pack
        assert (pack.read(i)[0] == direct.read(i)[0]).all()  # rendered at that size, not squeezed to it
        assert np.abs(pack.read(i)[1] - direct.read(i)[1]).max() <= 0.0005 + 1e-6
