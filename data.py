"""Data: pairs of a picture and its depth, from any common layout, at one size.

    ds = open_dataset("data/rooms", "train")         # layouts: see LAYOUTS
    image, depth, index = ds[0]                      # (3, 224, 224) RGB in [0, 1], (1, 224, 224) metres, 0 = not measured
    ds.files[index]                                  # its name, for messages

Depth is metres along the optical axis (z, not the length of the ray). What must happen once in the project happens
here: files to metres (`to_metres`), the mask (`valid_mask`), the geometry (`sampling_grid`), the split (`open_dataset`).

    python data.py data/rooms                        # facts and a contact sheet
    python data.py --rooms 4000 --out data/many      # render rooms: depth that is known exactly, no download
"""
import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

# ------------------------------------------------------------------------------------------------------------------
# Units: files -> uint8 RGB, metres
# ------------------------------------------------------------------------------------------------------------------


def to_metres(raw, scale=1000.0, file=""):
    """Depth as stored -> float32 metres, 0 = not measured. The only conversion in the project.

    float: metres; NaN and inf are not measured.  uint16 (or wider): value / scale, 0 and 65535 are not measured (NYU
    and ScanNet 1000, TUM 5000, KITTI 256).  uint8: 255 = 10 m.  ValueError names the file when nothing is measured or
    the values must be another unit.
    """
    if raw.ndim != 2:
        raise ValueError(f"{file}: depth must have one channel, this has the shape {raw.shape}: it is a picture of depth, not depth")
    if raw.dtype.kind == "f":
        metres = np.where(np.isfinite(raw) & (raw > 0), raw, 0).astype(np.float32)
    elif raw.dtype == np.uint8:
        metres = raw.astype(np.float32) * (10 / 255)
    else:
        metres = np.where(raw == 65535, 0, raw).astype(np.float32) / np.float32(scale)
    measured = metres[metres > 0]
    if measured.size == 0:
        raise ValueError(f"{file}: no pixel of this depth map is measured (all are 0, NaN or inf): remove the file")
    if (median := float(np.median(measured[::97]))) > 200:  # a hundredth of the pixels is enough to tell metres from millimetres
        cure = "floats must be metres, these look like millimetres" if raw.dtype.kind == "f" else "set --depth-scale"
        raise ValueError(f"{file}: the median depth would be {median:.0f} m: {cure}")
    return metres


def valid_mask(depth, max_depth=10.0):
    """Where depth counts: measured, finite and not beyond max_depth (metres). The only mask in the project."""
    return torch.isfinite(depth) & (depth > 0) & (depth <= max_depth)


def read_image(file):
    """Any picture file -> (H, W, 3) uint8 RGB, upright. ValueError names the file when it cannot be read."""
    try:
        with Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip it to white
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:  # hidden pixels keep colours nobody sees
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except Exception as error:  # PIL raises whatever a damaged file makes it stumble over
        raise ValueError(f"{file}: cannot be read as a picture ({error}): replace or remove it") from None


# ------------------------------------------------------------------------------------------------------------------
# Layouts: how each kind of data set is found, and read(source) -> (H, W, 3) uint8, (H, W) float32 metres
# ------------------------------------------------------------------------------------------------------------------


def place_of(path, root):
    """The part (train, val, test or None) and the scene that a folder's path below root names."""
    where = path.relative_to(root).parts
    part = where[0] if where and where[0] in ("train", "val", "test") else None
    return part, "/".join(where[1:] if part else where)


def find_hdf5(root):
    """{train,val}/<scene>/*.h5 (FastDepth, sparse-to-dense, rooms) -> [(part, scene, source, name)]."""
    files = sorted(p for part in ("train", "val", "test") for p in (root / part).glob("**/*.h5"))
    samples = [(*place_of(p.parent, root), p, str(p)) for p in files]
    # NYU's 654 official test frames: choosing a model on them would be tuning on the test set
    return [("test", *s[1:]) if s[:2] == ("val", "official") else s for s in samples]


def read_hdf5(file, scale):
    """rgb (3, H, W) uint8 and depth (H, W) float metres."""
    try:
        with h5py.File(file) as h5:
            image, depth = h5["rgb"][:], h5["depth"][:]
    except (KeyError, TypeError):
        raise ValueError(f"{file}: has no dataset 'rgb' or 'depth': not a FastDepth HDF5 file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as HDF5 ({error}): replace or remove it") from None
    if image.ndim != 3 or len(image) != 3 or image.dtype != np.uint8:
        raise ValueError(f"{file}: rgb must be (3, H, W) uint8, this is {image.shape} {image.dtype}")
    return image.transpose(1, 2, 0), to_metres(depth, scale, file)


IMAGE_FOLDERS, PICTURES, DEPTHS = ("rgb", "image", "color"), (".jpg", ".jpeg", ".png"), (".png", ".npy", ".npz")


def find_pairs(root):
    """Folders rgb | image | color beside depth, at any level, or NAME_image beside NAME_depth -> [(part, scene, source, name)].

    The scene of a frame is what the rows `frame,scene` of scenes.csv say, else the folder that holds the pair of folders.
    """
    scenes = {}
    if (root / "scenes.csv").is_file():
        rows = [line.split(",") for line in (root / "scenes.csv").read_text().splitlines()]
        scenes = {row[0].strip(): row[1].strip() for row in rows[1:] if len(row) > 1}
    samples = []
    for folder, _, names in sorted(os.walk(root)):
        folder = Path(folder)
        part, scene = place_of(folder, root)
        for colour in (folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir() and (folder / "depth").is_dir()):
            depths = {p.stem: p for p in sorted((folder / "depth").iterdir()) if p.suffix.lower() in DEPTHS}
            pairs = [(p.stem, p, depths[p.stem]) for p in sorted(colour.iterdir()) if p.suffix.lower() in PICTURES and p.stem in depths]
            samples += [(part, scenes.get(stem, scene), (image, depth), str(image)) for stem, image, depth in pairs]
        depths = {p.stem: p for p in map(folder.joinpath, sorted(names)) if p.stem.endswith("_depth") and p.suffix.lower() in DEPTHS}
        for image in (p for p in map(folder.joinpath, sorted(names)) if p.stem.endswith("_image") and p.suffix.lower() in PICTURES):
            if depth := depths.get(image.stem[:-5] + "depth"):
                samples.append((part, scene, (image, depth), str(image)))
    return samples


def read_pair(source, scale):
    """A picture, and depth as a PNG (16 bit / scale, 8 bit = 10 m / 255), .npy or .npz (metres)."""
    image_file, depth_file = source
    try:
        if depth_file.suffix.lower() == ".png":
            with Image.open(depth_file) as picture:
                if picture.mode == "P":
                    raise ValueError("its pixels are numbers of colours, not depth")
                raw = np.asarray(picture)
        else:
            raw = np.load(depth_file)
            raw = raw[raw.files[0]] if depth_file.suffix.lower() == ".npz" else raw
    except Exception as error:  # numpy and PIL raise whatever a damaged file makes them stumble over
        raise ValueError(f"{depth_file}: cannot be read as depth ({error}): replace or remove it") from None
    return read_image(image_file), to_metres(raw, scale, depth_file)


# To add a layout: find(root) lists (part, scene, source, name), with part train, val, test or None; read(source, scale).
LAYOUTS = {
    # name                  find        read        recognised by
    "HDF5 folders":        (find_hdf5,  read_hdf5,  "{train,val}/<scene>/*.h5"),
    "paired folders":      (find_pairs, read_pair,  "rgb, image or color beside depth, or NAME_image beside NAME_depth"),
}


# ------------------------------------------------------------------------------------------------------------------
# Geometry: one function for training, evaluation and prediction
# ------------------------------------------------------------------------------------------------------------------

GEOMETRIES = ("fastdepth", "full")
FASTDEPTH_VIEW = (250, 333), (228, 304)  # FastDepth's grid, and the crop in its middle that the network sees


def nearest(n_in, n_out):
    """The input pixel under the centre of each output pixel, as PIL's NEAREST chooses it.

    torch's "nearest-exact" is the same but where a centre lies on the border of two pixels (4 of the 250 rows of a 480-row
    frame): there PIL's rounding decides, since it adds up steps.
    """
    steps = torch.full((n_out,), n_in / n_out, dtype=torch.float64)
    steps[0] /= 2
    return steps.cumsum(0).long()


def sampling_grid(height, width, size, geometry="fastdepth", zoom=1.0, angle=0.0, flip=False):
    """Which source pixel every output pixel shows: rows, cols (h, w) int64, and inside (h, w) bool, False where the
    rotation looks past the picture. One lookup serves image and depth, so that they cannot drift apart.

    fastdepth: centre crop to 4:3, nearest to 250x333, centre crop 228x304, nearest to size (the official transforms).
    full:      the whole picture squeezed to size.
    zoom, angle (degrees) and flip move the view before the crop, in pixels that are square: the squeezed output is not.
    """
    if geometry == "fastdepth":
        box_h, box_w = min(height, round(width * 3 / 4)), min(width, round(height * 4 / 3))
        (grid_h, grid_w), (crop_h, crop_w) = FASTDEPTH_VIEW
    elif geometry == "full":
        (box_h, box_w) = (grid_h, grid_w) = (crop_h, crop_w) = (height, width)
    else:
        raise ValueError(f"unknown geometry {geometry!r}: choose one of {', '.join(GEOMETRIES)}")
    source_rows = nearest(box_h, grid_h) + (height - box_h) // 2  # of each row of the grid
    source_cols = nearest(box_w, grid_w) + (width - box_w) // 2
    top, left = round((grid_h - crop_h) / 2), round((grid_w - crop_w) / 2)

    # Grid pixels from the centre of the crop to the centre of each output pixel
    y = ((torch.arange(size[0], dtype=torch.float64) + 0.5) * crop_h / size[0] - crop_h / 2)[:, None]
    x = ((torch.arange(size[1], dtype=torch.float64) + 0.5) * crop_w / size[1] - crop_w / 2)[None, :]
    x = -x if flip else x
    cos, sin = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    rows = (sin * x + cos * y + top + crop_h / 2).floor().long()
    cols = (cos * x - sin * y + left + crop_w / 2).floor().long()
    inside = (rows >= 0) & (rows < grid_h) & (cols >= 0) & (cols < grid_w)
    return source_rows[rows.clamp(0, grid_h - 1)], source_cols[cols.clamp(0, grid_w - 1)], inside


def jitter(image, brightness, contrast, saturation):
    """(3, H, W) in [0, 1] -> the same, each factor as in torchvision's ColorJitter: 1 changes nothing."""
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    image = (image * brightness).clamp(0, 1)
    mean = (image * luma).sum(0).mean()
    image = (mean + (image - mean) * contrast).clamp(0, 1)
    grey = (image * luma).sum(0)
    return (grey + (image - grey) * saturation).clamp(0, 1)


class DepthDataset(torch.utils.data.Dataset):
    """ds[i] -> image (3, h, w) float32 RGB in [0, 1], depth (1, h, w) float32 metres (0 = not measured), i.

    augment: "none" or False; "flip", a mirror image half of the time; "paper" or True, what FastDepth draws: also zoom 1 to 1.5
    with depth divided by it (what is nearer looks larger), rotation +-5 degrees, brightness, contrast and saturation 0.6 to
    1.4. The draw depends on (seed, epoch, i) alone: set ds.epoch before each epoch, and any number of workers gives the
    same pictures. size None: as stored, not augmented.
    """

    def __init__(self, layout, samples, size, geometry, augment, seed, scale):
        self.layout, self.sources, self.files = layout, [s[2] for s in samples], [s[3] for s in samples]
        self.size, self.geometry, self.augment, self.seed, self.scale, self.epoch = size, geometry, augment, seed, scale, 0

    def __len__(self):
        return len(self.sources)

    def read(self, index):
        """As stored: (H, W, 3) uint8 RGB and (H, W) float32 metres of the same height and width."""
        image, depth = LAYOUTS[self.layout][1](self.sources[index], self.scale)
        (h, w), (dh, dw) = image.shape[:2], depth.shape
        if abs(h * dw - w * dh) > 0.02 * h * dw:
            raise ValueError(f"{self.files[index]}: the picture is {h}x{w} and its depth {dh}x{dw}: not the same view")
        return image, depth if (h, w) == (dh, dw) else depth[nearest(dh, h)[:, None].numpy(), nearest(dw, w).numpy()]

    def __getitem__(self, index):
        image, depth = map(torch.from_numpy, self.read(index))
        move, colour = {}, None
        if self.augment not in (False, "none") and self.size:
            key = f"{self.seed} {self.epoch} {index}".encode()
            u = torch.rand(6, generator=torch.Generator().manual_seed(zlib.crc32(key))).tolist()
            move = dict(flip=u[0] < 0.5)
            if self.augment != "flip":
                move |= dict(zoom=1 + 0.5 * u[1], angle=10 * u[2] - 5)
                colour = [0.6 + 0.8 * v for v in u[3:]]
        if self.size is None:
            rows, cols, inside = torch.arange(depth.shape[0])[:, None], torch.arange(depth.shape[1]), torch.tensor(True)
        else:
            rows, cols, inside = sampling_grid(*depth.shape, self.size, self.geometry, **move)
        depth = torch.where(inside, depth[rows, cols] / move.get("zoom", 1), 0)
        image = image[rows, cols].permute(2, 0, 1).float() / 255 * inside
        return jitter(image, *colour) if colour else image, depth[None], index


def open_dataset(root, split, size=(224, 224), augment=False, geometry="fastdepth", seed=0, depth_scale=1000.0, limit=None):
    """The split "train", "val", "test" or "all" of the data at root, whose layout is recognised. ValueError if there is none.

    test: only an official test part, which train and val never touch.  val: the data's own, else held out of train by
    scene, crc32(scene) % 5 == 0; without scenes, or too few, the last fifth of the sorted names.  limit: only so many, evenly chosen.
    """
    root = Path(root)
    if not root.exists():
        raise ValueError(f"{root}: no such folder: check --data")
    for layout, (find, _, _) in LAYOUTS.items():
        if samples := find(root):
            break
    else:
        known = "; ".join(f"{name}: {mark}" for name, (_, _, mark) in LAYOUTS.items())
        raise ValueError(f"{root}: no known layout found there. Known are {known}")
    if split not in ("train", "val", "test", "all"):
        raise ValueError(f"unknown split {split!r}: choose one of train, val, test, all")
    parts, scenes = [s[0] for s in samples], [s[1] for s in samples]
    if "val" not in parts:
        own = [i for i, part in enumerate(parts) if part != "test"]
        by_scene = len({scenes[i] for i in own}) > 1
        held_out = [zlib.crc32(scenes[i].encode()) % 5 == 0 for i in own] if by_scene else []
        if len(set(held_out)) < 2:  # no scenes, or too few of them to hold some out
            held_out = [k >= len(own) - len(own) // 5 for k in range(len(own))]
        for i, held in zip(own, held_out):
            parts[i] = "val" if held else "train"
    chosen = [s for s, part in zip(samples, parts) if split in ("all", part)]
    if not chosen:
        held = ", ".join(f"{parts.count(p)} {p}" for p in ("train", "val", "test") if p in parts)
        raise ValueError(f"{root}: its {split} split is empty ({layout}: {held}): choose another split")
    if limit:
        n = min(limit, len(chosen))
        chosen = [chosen[i * len(chosen) // n] for i in range(n)]
    return DepthDataset(layout, chosen, size, geometry, augment, seed, depth_scale)


def batches(loader):
    """iter(loader), whose worker processes never heed Ctrl-C: it is the main process that stops, once they all are there."""
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))  # forked workers keep this one
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------------------------------------
# Rooms: rendered pictures with exact depth, from which a network can truly learn metres: the focal length is NYU's, and
# things have the sizes that such things have (a door 2.03 m, a table 0.74 m, planks, tiles, bricks).
# ------------------------------------------------------------------------------------------------------------------

ROOMS_VERSION = 1  # raise it when the pictures change: data/rooms is then rendered again
ROOM_SIZE = (240, 320)
FOCAL = 0.81  # of the picture's width: NYU's Kinect

# A thing is a few boxes (x0, y0, z0, x1, y1, z1) in fractions of its width, height and depth: x from its middle, y from
# the floor, z from the wall behind it. Sizes are ranges in metres.
#   name           width       height        depth
ON_WALLS = (
    ("cupboard",  (0.8, 2.0), (1.80, 2.20), (0.40, 0.60), [(-.5, 0, 0, .5, 1, 1)]),
    ("sideboard", (0.8, 1.8), (0.70, 0.90), (0.40, 0.50), [(-.5, .1, 0, .5, 1, 1), (-.45, 0, 0, .45, .1, .9)]),
    ("bookcase",  (0.6, 1.2), (1.60, 2.10), (0.25, 0.35), [(-.5, 0, 0, .5, 1, 1)]),
    ("bed",       (0.9, 1.8), (0.90, 1.10), (1.95, 2.10), [(-.5, 0, 0, .5, .5, 1), (-.5, .5, 0, .5, 1, .03), (-.4, .5, .03, .4, .62, .2)]),
    ("sofa",      (1.5, 2.2), (0.80, 0.90), (0.80, 0.95), [(-.5, 0, 0, .5, .5, 1), (-.5, .5, 0, .5, 1, .25),
                                                            (-.5, .5, 0, -.4, .7, 1), (.4, .5, 0, .5, .7, 1)]),
    ("desk",      (1.0, 1.6), (0.72, 0.76), (0.60, 0.80), [(-.5, .95, 0, .5, 1, 1), (-.5, 0, 0, -.46, .95, 1), (.2, 0, 0, .5, .95, 1)]),
)
ABOVE = (
    ("door",      (0.8, 0.9), (2.03, 2.03), (0.04, 0.05), [(-.5, 0, 0, .5, 1, 1)]),
    ("window",    (0.8, 1.8), (2.05, 2.20), (0.03, 0.04), [(-.5, .42, 0, .5, 1, 1)]),
    ("picture",   (0.4, 1.0), (1.75, 1.90), (0.02, 0.04), [(-.5, .68, 0, .5, 1, 1)]),
)
STANDING = (
    ("table",     (0.8, 1.8), (0.72, 0.76), (0.70, 1.00), [(-.5, .95, 0, .5, 1, 1), (-.48, 0, .04, -.42, .95, .1), (.42, 0, .04, .48, .95, .1),
                                                            (-.48, 0, .9, -.42, .95, .96), (.42, 0, .9, .48, .95, .96)]),
    ("chair",     (.42, 0.5), (0.85, 0.95), (0.42, 0.50), [(-.5, .47, 0, .5, .52, 1), (-.5, .52, 0, .5, 1, .08), (-.5, 0, 0, -.4, .47, .1),
                                                            (.4, 0, 0, .5, .47, .1), (-.5, 0, .9, -.4, .47, 1), (.4, 0, .9, .5, .47, 1)]),
    ("low table", (0.6, 1.2), (0.38, 0.46), (0.50, 0.80), [(-.5, .88, 0, .5, 1, 1), (-.4, 0, .1, -.3, .88, .9), (.3, 0, .1, .4, .88, .9)]),
    ("crate",     (0.3, 0.6), (0.25, 0.50), (0.30, 0.50), [(-.5, 0, 0, .5, 1, 1)]),
)
PARTS = 6  # boxes of the thing that has most
# Patterns are cells of u x v metres; with shift 1 every second row is moved by half a cell.
#               u     v    shift
PATTERNS = ((9.00, 9.00, 0),   # plain
            (0.30, 0.30, 0),   # tiles
            (0.15, 1.20, 0),   # planks
            (0.24, 0.08, 1),   # bricks
            (0.45, 0.60, 0),   # panels
            (0.05, 0.33, 0))   # rows of books


def hashed(*keys):
    """Integer tensors -> random-looking numbers in [0, 1), the same on every device."""
    h = sum(key.to(torch.int32) * prime for key, prime in zip(keys, (374761393, 668265263, 1274126177)))
    h = (h ^ (h >> 13 & 0x7FFFF)) * 1274126177
    return ((h ^ (h >> 16)) & 0xFFFFFF).float() / 2**24


def furnish(keys):
    """Random seeds, one a room -> dict of tensors, one row a room, in metres. x right, y up from the floor, z forward.

    The order of the draws makes the rooms: whoever changes it raises ROOMS_VERSION.
    """
    u, used = torch.stack([torch.rand(256, generator=torch.Generator().manual_seed(key)) for key in keys]), 0

    def between(low, high, *shape):  # takes the next unused random numbers of every room
        nonlocal used
        used += math.prod(shape)
        return low + (high - low) * u[:, used - math.prod(shape):used].view(-1, *shape)

    def choose(kinds, n):  # n things a room -> their sizes (B, n, 3) and boxes (B, n, PARTS, 6); a missing box has size 0
        low, high = (torch.tensor([[extent[end] for extent in kind[1:4]] for kind in kinds]) for end in (0, 1))
        boxes = torch.tensor([kind[4] + [(0,) * 6] * (PARTS - len(kind[4])) for kind in kinds])
        which = between(0, len(kinds), n).long()
        sizes = low[which] + (high - low)[which] * between(0, 1, n, 3)
        return sizes, boxes[which] * torch.cat([sizes, sizes], -1)[:, :, None]

    width, height, length = room = between(3, 7), between(2.4, 3), between(3, 8)
    floor = torch.stack([width, length], -1)[:, None]  # (B, 1, 2)

    def place(kinds, n, at_wall):  # -> boxes, and the pose (x, z, turn) of the frame that each stands in (B, n, PARTS, 3)
        sizes, boxes = choose(kinds, n)
        turn = between(0, 4, n).floor() * (math.pi / 2) if at_wall else between(0, 2 * math.pi, n)
        across, ahead = torch.stack([turn.cos(), -turn.sin()], -1), torch.stack([turn.sin(), turn.cos()], -1)  # its x and z
        if at_wall:
            slack = ((across * floor).sum(-1).abs() - sizes[..., 0]).clamp(min=0)
            xz = across * (between(-.5, .5, n) * slack)[..., None] - ahead * (ahead * floor).sum(-1, True).abs() / 2
        else:
            xz = between(-.35, .35, n, 2) * floor
        return boxes, torch.cat([xz, turn[..., None]], -1)[:, :, None].expand(-1, -1, PARTS, -1)

    things = [place(ON_WALLS, 4, True), place(ABOVE, 4, True), place(STANDING, 4, False)]
    boxes, poses = (torch.cat(group, 1) for group in zip(*things))
    n = boxes.shape[1] + 3  # materials: walls, floor, ceiling, and one for each thing
    bright, kind = between(.1, .95, n), between(0, 6, n).long()
    bright[:, :3] = bright[:, :3] * torch.tensor([.4, .5, .1]) + torch.tensor([.5, .15, .8])
    colour = bright[..., None] * (1 + between(-.6, .6, n, 3) * between(0, 1, n, 1) ** 2)
    wooden = between(0, 1, n, 1) < torch.tensor([0, .5, 0] + [.4] * (n - 3))[:, None]
    colour = torch.where(wooden, torch.tensor([.62, .42, .26]) * (.4 + bright[..., None]), colour).clamp(.03, .97)
    kind[:, 0], kind[:, 1], kind[:, 2] = 3 * (kind[:, 0] == 3), 1 + kind[:, 1] % 2, 0
    box_kind = torch.arange(n - 3).repeat_interleave(PARTS) + 3
    return dict(
        room=torch.stack(room, -1), eye=torch.stack([between(-.4, .4) * width, between(1, 1.8), between(-.4, .4) * length], -1),
        target=torch.stack([between(-.3, .3) * width, between(-.3, .3) * length], -1), pitch=between(-.45, .05), roll=between(-.05, .05),
        boxes=boxes.flatten(1, 2), poses=poses.flatten(1, 2), material=box_kind.expand(len(keys), -1),
        colour=colour, pattern=torch.cat([torch.tensor(PATTERNS)[kind], between(.05, .5, n, 1)], -1),
        lamp=torch.stack([between(-.3, .3) * width, height - between(.1, .6), between(-.3, .3) * length], -1),
        # exposure, ambient light, red and blue gain, noise
        camera=torch.stack([between(.4, .55), between(.3, .6), between(.88, 1.12), between(.88, 1.12), between(.01, .05)], -1))


def turned(x, z, turn):
    """World x, z -> those in a frame turned by `turn`."""
    return x * turn.cos() - z * turn.sin(), x * turn.sin() + z * turn.cos()


def render(indices, seed=0, size=ROOM_SIZE, device="cpu"):
    """Rooms `indices` of a seed -> pictures (B, 3, H, W) uint8 and exact depth (B, H, W) float32 metres.

    A room depends on (seed, index) alone; its numbers are drawn on the CPU, so that every device renders the same.
    """
    keys = [zlib.crc32(f"room {seed} {index}".encode()) for index in indices]
    s = {name: value.to(device) for name, value in furnish(keys).items()}
    (H, W), B = size, len(keys)

    # Rays with z = 1 in the camera's frame, so that the distance along a ray is the depth.
    v, u = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
    u, v = u.flatten(), v.flatten()
    cam = torch.stack([(u + .5 - W / 2) / (FOCAL * W), (H / 2 - v - .5) / (FOCAL * W), torch.ones_like(u, dtype=torch.float32)])
    toward = F.normalize(s["target"] - s["eye"][:, ::2], dim=-1) * s["pitch"].cos()[:, None]
    ahead = torch.stack([toward[:, 0], s["pitch"].sin(), toward[:, 1]], -1)
    side = F.normalize(torch.stack([ahead[:, 2], 0 * ahead[:, 0], -ahead[:, 0]], -1), dim=-1)
    up = torch.linalg.cross(ahead, side)
    cos, sin = s["roll"].cos()[:, None], s["roll"].sin()[:, None]
    side, up = side * cos + up * sin, up * cos - side * sin
    axes = torch.stack([side, up, ahead], -1)  # (B, 3, 3), columns: the camera's axes in the world
    rays, eye = sum(axes[:, :, k, None] * cam[k] for k in range(3)), s["eye"][:, :, None]  # (B, 3, N), (B, 3, 1)

    # Only boxes that the camera may see are traced: a corner in front of it and inside the widest angle, the camera not within 0.3 m.
    lo, hi = s["boxes"][..., :3].transpose(1, 2), s["boxes"][..., 3:].transpose(1, 2)  # (B, 3, K)
    px, pz, turn = s["poses"].unbind(-1)  # (B, K)
    ex, ez = turned(eye[:, 0] - px, eye[:, 2] - pz, turn)
    local_eye = torch.stack([ex, eye[:, 1].expand_as(ex), ez], 1)  # (B, 3, K)
    near = ((local_eye > lo - .3) & (local_eye < hi + .3)).all(1)
    corners = torch.stack([torch.where(torch.tensor([i >> a & 1 for a in range(3)], device=device, dtype=torch.bool)[:, None], hi, lo)
                           for i in range(8)], -1)  # (B, 3, K, 8) in the box's frame
    cx, cz = turned(corners[:, 0], corners[:, 2], -turn[..., None])
    seen = axes.transpose(1, 2) @ (torch.stack([cx + px[..., None], corners[:, 1], cz + pz[..., None]], 1).flatten(2) - eye)
    x, y, z = seen.view(B, 3, -1, 8).unbind(1)
    outside = torch.stack([z < .1, x > z * .62, x < -z * .62, y > z * .62 * H / W, y < -z * .62 * H / W]).all(-1).any(0)
    visible = (hi > lo).all(1) & ~near & ~outside
    order = visible.float().argsort(1, descending=True)[:, :int(visible.sum(1).max())]  # (B, K'): each room's visible ones first
    lo, hi, local_eye = (t.gather(2, order[:, None].expand(-1, 3, -1)) for t in (lo, hi, local_eye))
    turn, material, visible = turn.gather(1, order), s["material"].gather(1, order), visible.gather(1, order)

    # The room itself is the box that every ray leaves; then the nearest box that it enters.
    shell = s["room"][:, :, None] * torch.tensor([[-.5, .5], [0, 1], [-.5, .5]], device=device)  # (B, 3, 2): low, high
    depth = torch.maximum((shell[:, :, :1] - eye) / rays, (shell[:, :, 1:] - eye) / rays).amin(1)  # (B, N)
    hit = torch.full_like(depth, -1, dtype=torch.long)
    for k in range(order.shape[1]):
        dx, dz = turned(rays[:, 0], rays[:, 2], turn[:, k, None])
        inverse = 1 / torch.stack([dx, rays[:, 1], dz], 1)
        t0, t1 = (lo[:, :, k, None] - local_eye[:, :, k, None]) * inverse, (hi[:, :, k, None] - local_eye[:, :, k, None]) * inverse
        enter, leave = torch.minimum(t0, t1).amax(1), torch.maximum(t0, t1).amin(1)
        closer = (enter < leave) & (enter > .1) & (enter < depth) & visible[:, k, None]
        depth, hit = torch.where(closer, enter, depth), torch.where(closer, k, hit)

    # Where the ray ends: the point in the frame of what it hit, and which of the faces.
    lo, hi, local_eye, turn = (torch.cat([first, t], -1) for first, t in (
        (shell[:, :, :1], lo), (shell[:, :, 1:], hi), (eye, local_eye), (torch.zeros(B, 1, device=device), turn)))
    pick = (hit + 1)[:, None].expand(-1, 3, -1)
    turn = turn.gather(1, hit + 1)
    dx, dz = turned(rays[:, 0], rays[:, 2], turn)
    ray = torch.stack([dx, rays[:, 1], dz], 1)
    lo, point = lo.gather(2, pick), local_eye.gather(2, pick) + depth[:, None] * ray
    gap = torch.minimum(point - lo, hi.gather(2, pick) - point).abs()  # (B, 3, N) to the nearer face on each axis
    axis = gap.argmin(1)
    edge = gap.sort(1)[0][:, 1]  # metres to the next edge or corner of the room
    shell_kind = torch.where(axis == 1, torch.where(rays[:, 1] < 0, 1, 2), 0)  # walls, floor, ceiling
    kind = torch.where(hit < 0, shell_kind, material.gather(1, hit.clamp(min=0)) if order.shape[1] else shell_kind)

    # Colour: a pattern of cells with darker joints, fine grain that fades with distance, a lamp, corners, the camera.
    look = torch.cat([s["colour"], s["pattern"]], -1).transpose(1, 2)  # (B, 7, materials)
    red, green, blue, cell_u, cell_v, shift, contrast = look.gather(2, kind[:, None].expand(-1, 7, -1)).unbind(1)
    inner = point - lo
    fu = torch.where(axis == 0, inner[:, 2], inner[:, 0])
    fv = torch.where(axis == 1, inner[:, 2], inner[:, 1])
    row = (fv / cell_v).floor()
    column = (fu / cell_u + .5 * shift * row).floor()
    du, dv = fu / cell_u + .5 * shift * row - column, fv / cell_v - row
    joint = (torch.minimum(du, 1 - du) * cell_u < .004) | (torch.minimum(dv, 1 - dv) * cell_v < .004)
    shade = 1 - contrast * hashed(column, row, kind) - .25 * joint
    grain = hashed((fu / .02).floor(), (fv / .02).floor(), kind) - .5
    shade = shade + grain * .25 * contrast * (1.5 / depth).clamp(max=1)
    world = eye + depth[:, None] * rays
    to_lamp = s["lamp"][:, :, None] - world
    distance = to_lamp.square().sum(1).sqrt()
    tx, tz = turned(to_lamp[:, 0], to_lamp[:, 2], turn)
    normal = -ray.gather(1, axis[:, None])[:, 0].sign()
    facing = (normal * torch.stack([tx, to_lamp[:, 1], tz], 1).gather(1, axis[:, None])[:, 0] / distance).clamp(min=0)
    exposure, ambient, red_gain, blue_gain, noise = (c[:, None] for c in s["camera"].unbind(-1))
    light = (ambient + facing / (1 + (distance / 3) ** 2) * 2) * (1 - .35 * torch.exp(-edge / .15))
    image = torch.stack([red * red_gain, green, blue * blue_gain], 1) * (shade * light)[:, None]
    image = image * (exposure / image.mean((1, 2))[:, None])[:, None]
    seeds = torch.tensor(keys, device=device)[:, None, None] % 65521
    pixel = (v * W + u) + H * W * torch.arange(3, device=device)[:, None]  # (3, N)
    image = image + noise[:, None] * (hashed(pixel[None].expand(B, -1, -1), seeds, seeds) + hashed(pixel[None] + 977, seeds, seeds + 1) - 1)
    image = (image.clamp(0, 1) ** .8 * 255).round().to(torch.uint8)
    return image.view(B, 3, H, W), depth.view(B, H, W)


def kinect_holes(depth, index):
    """Depth (H, W) as a Kinect would measure it: nothing in the shadow that near things throw on far ones, nothing in
    some patches (glass, black cloth); 0 = not measured. For training depth only."""
    H, W = depth.shape
    shift = 8 / depth.clamp(min=.5)  # pixels: the projector stands to the side, so near things are shifted further
    shadow = sum(F.pad(shift, (0, k))[:, k:] - shift >= k for k in range(1, 9)) > 0
    v, u = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    patch = hashed(u // 20, v // 16, torch.tensor(index)) < .02
    return torch.where(shadow | patch, 0, depth)


def write_rooms(out, n, seed=0, device="cpu"):
    """Render n training and n // 8 validation rooms into {train,val}/rooms/*.h5 below `out`, which appears when complete.

    The training depth has holes as a Kinect's, the validation depth is exact and complete.
    """
    out = Path(out)
    if out.exists() and not (out / "rooms.json").is_file():
        raise ValueError(f"{out}: exists and holds no rooms: choose another --out")
    counts, start, done = {"train": n, "val": n // 8}, time.time(), 0
    partial = out.with_name(out.name + f".partial-{os.getpid()}")
    try:
        for part, count in counts.items():
            (partial / part / "rooms").mkdir(parents=True)
            for i in range(0, count, 4):
                # Validation rooms are numbers -1, -2, ...: more training rooms never become validation rooms.
                numbers = [j if part == "train" else -1 - j for j in range(i, min(i + 4, count))]
                for j, image, depth in zip(range(i, count), *(t.cpu() for t in render(numbers, seed, device=device))):
                    depth = kinect_holes(depth, j) if part == "train" else depth
                    with h5py.File(partial / part / "rooms" / f"{j:05d}.h5", "w") as h5:
                        packed = dict(compression="lzf", shuffle=True)
                        h5.create_dataset("rgb", data=image.numpy(), chunks=tuple(image.shape), **packed)
                        # 1/1024 m is exact in float32 with few bits set, so it compresses
                        h5.create_dataset("depth", data=((depth * 1024).round() / 1024).numpy(), chunks=tuple(depth.shape), **packed)
                done += len(numbers)
                progress("rendering rooms", done, sum(counts.values()), start)
        print(f"rendered {done} rooms into {out} in {time.time() - start:.0f} s")
        facts = dict(version=ROOMS_VERSION, seed=seed, **counts)
        (partial / "rooms.json").write_text(json.dumps(facts) + "\n")
        shutil.rmtree(out, ignore_errors=True)  # rooms of another version, number or seed
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def have_rooms(out, n, seed=0):
    """Whether `out` holds these very rooms, rendered by this version."""
    try:
        return json.loads((Path(out) / "rooms.json").read_text()) == dict(version=ROOMS_VERSION, seed=seed, train=n, val=n // 8)
    except (OSError, ValueError):
        return False


# ------------------------------------------------------------------------------------------------------------------
# For people: progress, pictures, the command
# ------------------------------------------------------------------------------------------------------------------


def progress(what, done, total, start, note=""):
    """On a terminal, one line that updates itself, with rate and time left, and is gone when all is done."""
    seconds = max(time.time() - start, 1e-9)
    left = round(seconds / done * (total - done))
    line = f"{what} {done}/{total}  {done / seconds:.1f}/s  {left // 60}:{left % 60:02} left{note}" if done < total else ""
    if sys.stdout.isatty():
        print(f"\r{line:<79}", end="" if line else "\r", flush=True)


# Near is bright, far is dark, not measured is grey: readable in print and to the colour-blind.
RAMP = np.array([[252, 253, 191], [254, 194, 135], [251, 135, 97], [229, 80, 100], [182, 54, 122], [130, 37, 129],
                 [80, 18, 123], [29, 17, 71], [0, 0, 4]], dtype=np.float32)


def colourise(depth, near, far):
    """(H, W) metres -> (H, W, 3) uint8, from bright at `near` to dark at `far` (which may be less); 0 and NaN are grey."""
    depth = np.asarray(depth, dtype=np.float32)
    measured = np.isfinite(depth) & (depth > 0)
    t = np.where(measured, (depth - near) / (far - near or 1), 0).clip(0, 1) * (len(RAMP) - 1)
    colour = np.stack([np.interp(t, np.arange(len(RAMP)), RAMP[:, c]) for c in range(3)], -1)
    return np.where(measured[..., None], colour, 96).astype(np.uint8)


def tile(rows, labels=(), gap=4):
    """Rows of equally large (H, W, 3) uint8 pictures -> one PIL picture, with a label above each column."""
    h, w = rows[0][0].shape[:2]
    top = 18 if labels else 0
    sheet = Image.new("RGB", (max(map(len, rows)) * (w + gap) - gap, top + len(rows) * (h + gap) - gap), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (c * (w + gap), top + r * (h + gap)))
    for c, label in enumerate(labels):
        ImageDraw.Draw(sheet).text((c * (w + gap) + 4, 3), label, fill="black")
    return sheet


def to_picture(image):
    """(3, H, W) float in [0, 1] -> (H, W, 3) uint8."""
    return (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all others (run_script)."""

    def error(self, message):
        """What argparse calls for a wrong flag."""
        raise ValueError(message)


def check_device(name):
    """ValueError if PyTorch has no such device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: PyTorch finds no such device here") from None


def run_script(main):
    """Exit codes of every script: 0 done, 1 a claim failed, 2 the user's mistake in one line, 130 Ctrl-C."""
    try:
        main()
    except (ValueError, OSError) as error:  # a worker's error ends in the same line, after a traceback
        line = str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv=None):
    parser = Parser(description="Look at a data set, or render rooms.")
    parser.add_argument("path", nargs="?", help="a data set of any known layout")
    parser.add_argument("--depth-scale", type=float, default=1000.0, help="16-bit depth / this = metres (TUM 5000, KITTI 256)")
    parser.add_argument("--rooms", type=int, metavar="N", help="render N training and N/8 validation rooms into --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where to render")
    parser.add_argument("--out", help="folder of the rooms, or the contact sheet's file (default runs/data-NAME.png)")
    args = parser.parse_args(argv)
    if (args.path is None) == (args.rooms is None):
        parser.error("give the path of a data set, or --rooms N to render one")
    if args.rooms is not None:
        if args.rooms < 8:
            parser.error(f"--rooms must be at least 8, got {args.rooms}")
        check_device(args.device)
        write_rooms(args.out or "data/rooms", args.rooms, args.seed, args.device)
        return

    counts = {}
    for split in ("train", "val", "test", "all"):
        try:
            counts[split] = len(ds := open_dataset(args.path, split, size=None, depth_scale=args.depth_scale))
        except ValueError:
            if split == "all":
                raise
    print(f"{args.path}: {ds.layout} ({LAYOUTS[ds.layout][2]})")
    print("pairs:  " + ", ".join(f"{n} {split}" for split, n in counts.items()))
    picked, values, rows = torch.linspace(0, len(ds) - 1, min(len(ds), 24)).long().tolist(), [], []
    for i in picked:
        image, depth = ds.read(i)
        values.append(depth)
        far = np.quantile(depth[depth > 0], 0.99)
        grid = tuple(t.numpy() for t in sampling_grid(*depth.shape, (180, 240), "full")[:2])
        rows.append(np.concatenate([image[grid], colourise(depth, 0, far)[grid]], 1))
    measured = np.concatenate([d[d > 0] for d in values])
    q = np.quantile(measured, (0, .01, .5, .99, 1))
    print(f"size:   {' '.join(sorted({f'{d.shape[0]}x{d.shape[1]}' for d in values}))} in {len(picked)} pairs looked at")
    print(f"depth:  {q[2]:.2f} m at the median, 98 % in {q[1]:.2f} to {q[3]:.2f} m, all in {q[0]:.2f} to {q[4]:.2f} m; "
          f"{measured.size / sum(d.size for d in values):.0%} measured; 16-bit scale {args.depth_scale:g}")
    out = Path(args.out or f"runs/data-{Path(args.path).resolve().name}.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    tile([rows[i:i + 3] for i in range(0, len(rows), 3)]).save(out)
    print(f"look:   {out}")


if __name__ == "__main__":
    run_script(main)
