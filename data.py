"""Data for monocular depth: pairs of an image and its depth, from any common layout, at one size.

    ds = open_dataset("nyu", "train")       # a folder, a list, a .mat, a pack, or rooms:N; see LAYOUTS
    image, depth, index = ds[0]             # (3, 224, 224) in [0, 1]; (1, 224, 224) metres, 0 = not measured
    ds.files[index]                         # the name of that sample, for messages

Depth is metres along the optical axis (z, not the length of the ray). Each rule stands here once: files to
metres (`to_metres`), which pixels count (`valid_mask`), which source pixel each output pixel shows
(`sampling_grid`), what is held out for validation (`assign_parts`).

    python data.py nyu                      # what is there: facts and a contact sheet
    python data.py nyu --pack nyu.h5        # write it once as one file that is read at memory speed
    python data.py rooms:4096               # rendered rooms: exact depth, no download
"""
import argparse
import glob
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import h5py
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

# ------------------------------------------------------------------------------------------------------------
# Units: files -> uint8 RGB and metres
# ------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A user error. run_script prints it as one line, which names the file and the cure."""


# 16-bit depth: value / scale = metres. SUN RGB-D rotates the bits of millimetres by 3: x 8 below 8.19 m.
SCALES = {1000: "NYU, ScanNet", 5000: "TUM", 256: "KITTI", 8000: "SUN RGB-D", 10000: "tenths of a millimetre"}


def to_metres(raw, scale=1000.0, file=""):
    """Depth as stored, (H, W) or with a channel axis of 1 -> float32 metres, 0 = not measured.

    Floats are metres, integers of 16 bits or more metres x `scale`, and with 8 bits 255 is 10 m. NaN, inf,
    negative values and the integer 65535 are not measured. UserError names the file if nothing is measured or
    if the median is no plausible distance.
    """
    if raw.ndim == 3 and 1 in raw.shape:
        raw = raw.squeeze()
    if raw.ndim != 2 or raw.dtype.kind not in "fiu":
        raise UserError(f"{file}: depth must be (H, W) numbers, not {raw.shape} {raw.dtype}")
    if raw.dtype.kind == "f":
        metres = np.where(np.isfinite(raw) & (raw > 0), raw, 0).astype(np.float32)
        cure = "floats must be metres"
    elif raw.dtype == np.uint8:
        metres = raw.astype(np.float32) * (10 / 255)
        cure = "8-bit depth must have 255 = 10 m"
    else:
        metres = np.where((raw > 0) & (raw != 65535), raw, 0).astype(np.float32) / np.float32(scale)
        cure = None
    some = metres.ravel()[::97]  # one pixel in a hundred tells metres from millimetres, and takes no time
    measured = some[some > 0] if some.any() else metres[metres > 0]
    if not measured.size:
        raise UserError(f"{file}: no pixel of this depth map is measured: remove the file")
    median = float(np.median(measured))
    if not 0.05 < median < 200:
        cure = cure or likely_scales(median, scale) or "set --depth-scale"
        raise UserError(f"{file}: the median depth would be {median:.4g} m: {cure}")
    return metres


def likely_scales(median, scale):
    """Flags, as text, that would bring 16-bit depth with this median at this scale to the size of rooms."""
    medians = [(s, median * scale / s) for s in SCALES if s != scale]
    return ", ".join(f"--depth-scale {s} ({SCALES[s]}) would make it {m:.2g} m"
                     for s, m in medians if 0.5 < m < 25)


def valid_mask(depth, max_depth=10.0):
    """Which pixels count: measured, finite and not beyond max_depth metres. The only mask in the project."""
    return torch.isfinite(depth) & (depth > 0) & (depth <= max_depth)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
UNREAD = (".heic", ".heif", ".avif")  # phone formats that Pillow may not read: never skipped silently
DEPTH_SUFFIXES = (".png", ".tif", ".tiff", ".pgm", ".npy", ".npz")


def read_image(file):
    """An image file -> (H, W, 3) uint8 RGB, upright. UserError names the file if it cannot be read."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip it to white
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:  # transparent pixels hide colours
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise UserError(f"{file}: cannot be read as an image ({error}): convert or remove it") from None


def read_depth(file, scale):
    """A depth file -> (H, W) metres: .npy, .npz, or an image of 16 bits (value / scale) or 8 (255 = 10 m)."""
    try:
        if file.suffix.lower() in (".npy", ".npz"):
            raw = np.load(file)
            raw = raw[raw.files[0]] if isinstance(raw, np.lib.npyio.NpzFile) else raw
        else:
            with Image.open(file) as image:
                if image.mode == "P":
                    raise UserError("its pixels are indices of a palette")
                codec, *_, options = image.tile[0] if image.tile else ("", "")
                if codec.startswith("ppm") and options[-1] not in (255, 65535):  # Pillow would rescale it
                    raise UserError(f"its maxval is {options[-1]}, not 255 or 65535")
                raw = np.asarray(image)
    except Exception as error:  # numpy and Pillow raise errors of many types for damaged files
        raise UserError(f"{file}: cannot be read as depth ({error}): replace or remove it") from None
    return to_metres(raw, scale, file)


# ------------------------------------------------------------------------------------------------------------
# Geometry: which source pixel each output pixel shows, for training, evaluation and prediction
# ------------------------------------------------------------------------------------------------------------

GEOMETRIES = ("fastdepth", "full")
# What each draws: moves of sampling_grid and, from "colour" on, brightness, contrast and saturation of 0.6 to
# 1.4. An image does not reveal its zoom, so "paper" makes depth come out too small: docs/results.md.
AUGMENTS = {
    "none": [],
    "flip": ["flip"],  # half of the time
    "colour": ["flip", "roll"],  # roll by up to 5 degrees
    "camera": ["flip", "roll", "yaw", "pitch"],  # yaw, pitch: up to 6; exact for a turned camera
    "paper": ["flip", "roll", "zoom"],  # FastDepth's: a zoom of 1 to 1.5, by which depth is divided
}
FASTDEPTH_GRID = (250, 333)  # FastDepth resizes a frame to this ...
FASTDEPTH_CROP = (228, 304)  # ... and shows its network the middle
FOCAL = 0.81  # focal length / longer side of a frame: NYU's Kinect; assumed for unknown cameras


@lru_cache(maxsize=16)
def nearest(n_in, n_out):
    """The input pixel under the centre of each of n_out output pixels, as Pillow's NEAREST picks it.

    torch's "nearest-exact" differs where a centre lies between two pixels: in 4 rows of FastDepth's 250.
    """
    ramp = Image.fromarray(np.arange(n_in, dtype=np.int32)[None])
    return torch.tensor(np.array(ramp.resize((n_out, 1), Image.Resampling.NEAREST))[0]).long()


def source_grid(height, width, geometry):
    """The rows and columns of a frame that make up the grid, and the sizes (H, W) of the box and the crop.

    fastdepth, the official transforms: centre crop to 4:3 (the box), nearest to 250x333, of which the middle
    228x304 (the crop) is shown. full: all of the frame.
    """
    if geometry == "full":
        return torch.arange(height), torch.arange(width), (height, width), (height, width)
    if geometry != "fastdepth":
        raise UserError(f"unknown geometry {geometry!r}: choose one of {', '.join(GEOMETRIES)}")
    box_h, box_w = min(height, round(width * 3 / 4)), min(width, round(height * 4 / 3))
    rows = nearest(box_h, FASTDEPTH_GRID[0]) + (height - box_h) // 2
    cols = nearest(box_w, FASTDEPTH_GRID[1]) + (width - box_w) // 2
    return rows, cols, (box_h, box_w), FASTDEPTH_CROP


@lru_cache(maxsize=16)
def sampling_grid(height, width, size, geometry="fastdepth", flip=False, zoom=1, roll=0, yaw=0, pitch=0):
    """Which pixel of a frame each output pixel shows, for image and depth alike.

    Returns rows and cols (h, w) int64, and factor (h, w) float32, by which depth must be multiplied; 0 where
    the view looks past the frame. By default what source_grid shows, squeezed to `size` by nearest. The rest
    is augmentation: a horizontal flip, a zoom about the centre, and turns of the camera in degrees. After a
    turn R, an output pixel with the ray r (r_z = 1) looks along R r. What is z metres deep in the frame is
    then z / (R r)_z metres deep.
    """
    source_rows, source_cols, box, (crop_h, crop_w) = source_grid(height, width, geometry)
    grid_h, grid_w = len(source_rows), len(source_cols)
    centre_y = round((grid_h - crop_h) / 2) + crop_h / 2
    centre_x = round((grid_w - crop_w) / 2) + crop_w / 2

    # Offsets from the crop's centre in grid pixels, which are square: turning output pixels would shear.
    y = ((torch.arange(size[0], dtype=torch.float64) + 0.5) * crop_h / size[0] - crop_h / 2)[:, None] / zoom
    x = ((torch.arange(size[1], dtype=torch.float64) + 0.5) * crop_w / size[1] - crop_w / 2)[None, :] / zoom
    if flip:
        x = -x
    focal = FOCAL * max(height, width) * (grid_w / box[1])  # in pixels of the grid
    ray = [x, y, focal]  # to be turned by R
    for angle, i, j in ((pitch, 1, 2), (yaw, 2, 0), (roll, 0, 1)):  # about x (right), y (down), z (ahead)
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        ray[i], ray[j] = cos * ray[i] - sin * ray[j], sin * ray[i] + cos * ray[j]
    scale = focal / ray[2]
    rows = (ray[1] * scale + centre_y).floor().long()
    cols = (ray[0] * scale + centre_x).floor().long()
    inside = (rows >= 0) & (rows < grid_h) & (cols >= 0) & (cols < grid_w)
    factor = torch.where(inside, scale / zoom, 0).float()
    return source_rows[rows.clamp(0, grid_h - 1)], source_cols[cols.clamp(0, grid_w - 1)], factor


def view(image, size, geometry):
    """What `geometry` shows of a (..., H, W) tensor at `size`: (..., h, w), by nearest."""
    rows, cols, _ = sampling_grid(*image.shape[-2:], tuple(size), geometry)
    return image[..., rows, cols]


def visible_size(height, width, geometry):
    """How many rows and columns of a frame a geometry shows."""
    rows, cols, box, crop = source_grid(height, width, geometry)
    return box[0] * crop[0] / len(rows), box[1] * crop[1] / len(cols)


# A network's metres hold for one focal length: zooming in by 2 looks like halving the distance. So whole
# images are shown at the focal length of training, and depth_factor corrects what rounding to 32 changed.


def focal_lengths(focal, frame, size, geometry):
    """Focal lengths (vertical, horizontal), in output pixels, of a frame (H, W) shown at `size`."""
    return tuple(focal * shown / seen for shown, seen in zip(size, visible_size(*frame, geometry)))


def trained_focal(config):
    """The focal lengths at which the network of a checkpoint's config was trained."""
    return focal_lengths(FOCAL * max(config["frame"]), config["frame"], config["size"], config["geometry"])


def whole_image_size(frame, focal, config):
    """The size, in multiples of 32, at which things in a whole image look as large as in training."""
    exact = [n * trained / focal for n, trained in zip(frame, trained_focal(config))]
    return tuple(max(32, round(n / 32) * 32) for n in exact)


def depth_factor(focal, frame, size, geometry, config):
    """Shown / trained focal length: what depth predicted from a frame (H, W) must be multiplied by."""
    shown = focal_lengths(focal, frame, size, geometry)
    return math.sqrt(math.prod(shown) / math.prod(trained_focal(config)))  # geometric mean of both directions


def shrink(image, factor):
    """(H, W, 3) uint8 -> `factor` times the rows and columns, antialiased; never more than there are."""
    if factor >= 1:
        return image
    height, width = image.shape[:2]
    small = max(1, round(width * factor)), max(1, round(height * factor))
    return np.array(Image.fromarray(image).resize(small, Image.Resampling.BILINEAR))


def colour_jitter(image, brightness, contrast, saturation):
    """(3, H, W) in [0, 1] -> the same; 1 changes nothing. As torchvision's, but always in this order."""
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    image = (image * brightness).clamp(0, 1)
    mean = (image * luma).sum(0).mean()
    image = (mean + (image - mean) * contrast).clamp(0, 1)
    grey = (image * luma).sum(0)
    return (grey + (image - grey) * saturation).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------------
# Data sets
# ------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")


class Sample(NamedTuple):
    """One image with its depth, not read yet: what a layout's find() lists."""
    part: str | None  # train, val or test where the data set says so
    scene: str  # a scene is never split between train and val
    source: object  # what the layout's read() takes; hashable, so a tuple and not a list
    name: str  # for messages


def by(size):
    """(480, 640) -> "480x640": height first, everywhere."""
    return f"{size[0]}x{size[1]}"


def same_aspect(size, other):
    """Whether two sizes (H, W) have the same ratio, to 2 %."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= 0.02 * size[0] * other[1]


class DepthDataset(torch.utils.data.Dataset):
    """ds[i] -> image (3, h, w) float32 RGB in [0, 1], depth (1, h, w) float32 metres (0 = not measured), i.

    augment is a name in AUGMENTS. The draw depends only on (seed, epoch, i), so the number of workers does
    not matter. Set ds.epoch before each epoch. size None: frames as stored, without augmentation; batches
    need frames of one size.
    """

    def __init__(self, layout, samples, size, geometry, augment, seed, scale):
        self.layout, self.samples, self.scale = layout, samples, scale
        self.size, self.geometry, self.augment = size, geometry, augment
        self.seed, self.epoch = seed, 0
        self.files = [sample.name for sample in samples]

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        """As stored: (H, W, 3) uint8 RGB and (H, W) float32 metres."""
        _, read, _ = LAYOUTS[self.layout]
        image, depth = read(self.samples[index].source, self.scale)
        size = image.shape[:2]
        if not same_aspect(size, depth.shape):
            raise UserError(f"{self.files[index]}: the image is {by(size)} and its depth {by(depth.shape)}: "
                            "not the same view")
        if size != depth.shape:
            depth = depth[np.ix_(*map(nearest, depth.shape, size))]
        return image, depth

    def draw(self, index):
        """A sample's augmentation in this epoch: sampling_grid's keywords, and colour_jitter's or None."""
        key = f"{self.seed} {self.epoch} {index}".encode()
        u = torch.rand(8, generator=torch.Generator().manual_seed(zlib.crc32(key))).tolist()
        moves = dict(flip=u[0] < 0.5, roll=10 * u[1] - 5, zoom=1 + 0.5 * u[2], yaw=12 * u[3] - 6,
                     pitch=12 * u[4] - 6)
        colour = [0.6 + 0.8 * v for v in u[5:]] if self.augment not in ("none", "flip") else None
        return {name: moves[name] for name in AUGMENTS[self.augment]}, colour

    def __getitem__(self, index):
        image, depth = self.read(index)
        if self.size is None:
            image = torch.from_numpy(image).permute(2, 0, 1).float() / 255
            return image, torch.from_numpy(depth)[None], index
        move, colour = self.draw(index)
        rows, cols, factor = sampling_grid(*depth.shape, self.size, self.geometry, **move)
        pixel = (rows * depth.shape[1] + cols).numpy()  # take() is several times faster than [rows, cols]
        image = torch.from_numpy(image.reshape(-1, 3).take(pixel, 0)).permute(2, 0, 1).float() / 255
        depth = torch.from_numpy(depth.take(pixel))
        if "roll" in move:
            image, depth = image * (factor > 0), depth * factor
        if colour:
            image = colour_jitter(image, *colour)
        return image, depth[None], index


def assign_parts(samples):
    """The samples with a part each: train, val or test.

    An official test part is only ever test: choosing a model on it would be tuning on the test set. val is
    the data set's own if it has one. Otherwise it is held out of train: the scenes with crc32(scene) % 5 == 0
    (the last scene if that takes none or all), or without scenes the last fifth of the samples.
    """
    parts = [sample.part or "train" for sample in samples]
    if "val" not in parts:
        own = [i for i, part in enumerate(parts) if part != "test"]
        held_out = own[len(own) - len(own) // 5:]
        scenes = sorted({samples[i].scene for i in own})
        if len(scenes) > 1:
            chosen = [scene for scene in scenes if zlib.crc32(scene.encode()) % 5 == 0]
            if len(chosen) in (0, len(scenes)):
                chosen = [scenes[-1]]
            held_out = [i for i in own if samples[i].scene in chosen]
        for i in held_out:
            parts[i] = "val"
    return [sample._replace(part=part) for sample, part in zip(samples, parts)]


def open_dataset(root, split, size=(224, 224), augment=False, geometry="fastdepth", seed=0,
                 depth_scale=1000.0, limit=None):
    """The data at `root`, of any layout -> a DepthDataset of its split: "train", "val", "test" or "all".

    augment is explained at AUGMENTS (True is "paper"), depth_scale at to_metres; limit takes only so many
    samples, evenly chosen. UserError if there is no data set, or nothing in that split.
    """
    augment = {False: "none", True: "paper"}.get(augment, augment)
    for value, choices in ((split, (*SPLITS, "all")), (augment, AUGMENTS), (geometry, GEOMETRIES)):
        if value not in choices:
            raise UserError(f"{value!r} is unknown: choose one of {', '.join(choices)}")
    layout, samples = find_samples(root)
    chosen = [sample for sample in samples if split in ("all", sample.part)]
    if not chosen:
        few = ": at least 5 pairs are needed to hold one out" if split == "val" else ""
        raise UserError(f"{root}: its {split} split is empty ({layout}: {counts_of(samples)}){few}")
    chosen = [chosen[i] for i in evenly(len(chosen), limit or len(chosen))]
    return DepthDataset(layout, chosen, size and tuple(size), geometry, augment, seed, depth_scale)


def find_samples(root):
    """The data set at `root` -> the name of its layout, and all its samples, each with its part."""
    root = Path(root)
    if not (root.exists() or root.parent.suffix == ".mat" or str(root).startswith("rooms:")):
        raise UserError(f"{root}: no such file or folder; rendered rooms are called rooms:N")
    for name, (find, _, _) in LAYOUTS.items():
        if samples := list(find(root)):
            return name, assign_parts(samples)
    files = [str(p.relative_to(root)) for p in sorted(root.rglob("*"))[:10000] if p.is_file()]
    shown = ", ".join(files[i] for i in evenly(len(files), 4)) or "nothing"
    raise UserError(f"{root}: no image has a depth map beside it (found: {shown}): names that work "
                    "are rgb/1.jpg and depth/1.png, 1_image.jpg and 1_depth.png, or a list in train.txt")


def counts_of(samples):
    """How many samples each part has, as text: "637 train, 158 val"."""
    parts = [sample.part for sample in samples]
    return ", ".join(f"{parts.count(part)} {part}" for part in SPLITS if part in parts)


def evenly(n, k):
    """At most k of the indices 0 to n - 1, evenly spaced from the first on."""
    k = min(n, k)
    return [i * n // k for i in range(k)]


def check_scale(dataset, max_depth):
    """Say in one line if half of the depth lies beyond max_depth: a wrong unit, or another kind of scene."""
    some = [dataset.read(i)[1].ravel()[::31] for i in evenly(len(dataset), 8)]
    depth = np.concatenate([d[d > 0] for d in some])
    if depth.size and (median := float(np.median(depth))) > max_depth:
        cures = likely_scales(median, dataset.scale)
        cures = f", or for 16-bit depth: {cures}" if cures else ""
        if dataset.layout == "pack":  # which holds metres
            cures = ", or pack it again with the right --depth-scale"
        note(f"half of the depth lies beyond {max_depth:g} m (median {median:.1f} m): train with a larger "
             f"--max-depth{cures}")


def check_crop(dataset, size):
    """Say in one line if geometry fastdepth hides more than a third of the frames' width or height."""
    height, width = dataset.read(0)[1].shape
    shown_h, shown_w = visible_size(height, width, dataset.geometry)
    if min(shown_h / height, shown_w / width) < 2 / 3:
        scale = math.sqrt(size[0] * size[1] / (height * width))
        h, w = (max(32, round(n * scale / 32) * 32) for n in (height, width))
        note(f"FastDepth's crop shows {shown_h / height:.0%} of the height and {shown_w / width:.0%} of the "
             f"width of {by((height, width))} frames: --geometry full --size {h} {w} shows them whole")


# ------------------------------------------------------------------------------------------------------------
# Layouts: find(root) lists the samples of a data set, read(source, scale) gives one
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def opened(file, kind):
    """An HDF5 file; UserError names it if it is damaged or of another kind."""
    try:
        with h5py.File(file) as h5:
            yield h5
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).strip("'")
        raise UserError(f"{file}: is not {kind} ({reason})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as HDF5 ({error}): replace or remove it") from None


def find_hdf5(root):
    """{train,val}/<scene>/*.h5."""
    for part in SPLITS:
        for file in sorted((root / part).glob("**/[!.]*.h5")):
            scene = "/".join(file.relative_to(root / part).parts[:-1])
            official = (part, scene) == ("val", "official")  # FastDepth's name for NYU's 654 test frames
            yield Sample("test" if official else part, scene, file, str(file))


def read_hdf5(file, scale):
    """rgb (3, H, W) uint8 and depth (H, W) float metres."""
    with opened(file, "a FastDepth HDF5 file") as h5:
        image, depth = h5["rgb"][:], h5["depth"][:]
    if image.ndim != 3 or len(image) != 3 or image.dtype != np.uint8:
        raise UserError(f"{file}: rgb must be (3, H, W) uint8, this is {image.shape} {image.dtype}")
    return image.transpose(1, 2, 0), to_metres(depth, scale, file)


# The official split of the .mat's 1449 frames as run lengths: 2 test, 6 train, 1 test, ...
NYU_RUNS = """
2 6 1 4 5 2 1 6 16 2 2 8 2 1 5 12 4 4 8 25 3 5 5 1 4 2 1 15 3 11 3 1 6 3 23 4 6 7 3 27 1 13 1 6 3 5 7 10 7 7 3
2 3 7 11 15 2 2 10 19 7 4 3 13 4 15 6 5 8 13 5 2 9 30 6 1 12 4 3 3 3 9 3 3 17 7 5 7 4 8 5 4 2 3 5 11 6 5 2 4 2
4 3 4 2 3 6 2 6 4 5 2 2 2 3 6 8 3 2 5 5 2 4 8 2 14 29 12 5 5 5 6 3 9 14 3 3 4 6 6 3 34 3 8 3 6 3 3 4 9 3 11 4
2 3 2 8 13 5 5 4 5 3 8 3 8 3 3 2 8 2 2 2 3 2 16 10 3 9 1 7 1 4 7 3 3 9 3 2 7 15 3 6 2 2 2 3 2 6 7 5 4 12 3 5 5
5 2 3 11 4 3 12 9 6 4 11 1 3 2 7 5 2 13 4 2 6 6 3 3 4 7 2 2 2 14 8 2 8 5 8 6 4 5 4 7 9"""


def find_mat(root):
    """nyu_depth_v2_labeled.mat, its depth filled in; FILE.mat/rawDepths is the Kinect's own, with holes."""
    if (root / "nyu_depth_v2_labeled.mat").is_file():
        root = root / "nyu_depth_v2_labeled.mat"
    file, depths = (root, "depths") if root.suffix == ".mat" else (root.parent, root.name)
    if file.suffix != ".mat" or file.is_dir():
        return []
    with opened(file, "NYU's labelled .mat file") as h5:
        n = len(h5[depths])
        scenes = ["".join(map(chr, h5[ref][:].ravel())) for ref in h5["scenes"][:].ravel()]
    runs = np.array(NYU_RUNS.split(), int)
    parts = np.resize(["test", "train"], len(runs)).repeat(runs).tolist()
    if n != len(parts):  # a selection of the official frames
        parts = [None] * n
    return [Sample(parts[i], scenes[i], (file, depths, i), f"{file}/{depths}[{i}]") for i in range(n)]


def read_mat(source, scale):
    """MATLAB's axes come reversed: images (N, 3, W, H) uint8, depths (N, W, H) float metres."""
    file, depths, i = source
    with opened(file, "NYU's labelled .mat file") as h5:
        image, depth = h5["images"][i], h5[depths][i]
    return image.transpose(2, 1, 0), to_metres(depth.T, scale, f"{file}/{depths}[{i}]")


def lines_of(file):
    """The lines of a text file."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()  # drops Excel's byte order mark
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text: save it as UTF-8") from None


def find_lists(root):
    """A list of lines `image depth`, or train.txt, val.csv, ... or Kaggle's nyu2_train.csv in a folder."""
    if root.suffix in (".txt", ".csv") and root.is_file():
        yield from read_list(root, None)
    for part in SPLITS:
        for folder in (root, root / "data"):  # Kaggle's archive holds a folder data
            for name in (f"{part}.txt", f"{part}.csv", f"nyu2_{part}.txt", f"nyu2_{part}.csv"):
                if (folder / name).is_file():
                    yield from read_list(folder / name, part)


def read_list(file, part):
    """The samples of one list. Words without the suffix of an image or depth file are skipped."""
    for number, line in enumerate(lines_of(file), 1):
        words = re.split(r"[,;\t]\s*" if re.search(r"[,;\t]", line) else r"\s+", line.strip())
        words = [word.strip(' "') for word in words]
        names = [word for word in words if word.lower().endswith(IMAGE_SUFFIXES + DEPTH_SUFFIXES)]
        header = number == 1 and not names
        if header or not line.strip() or line.startswith("#") or "None" in words:  # KITTI's without depth
            continue
        if len(names) != 2:
            raise UserError(f"{file}: line {number} does not name an image and its depth: {line[:60]!r}")
        paths = []
        for name in names:  # each starts in the list's folder or the one above
            below = name.lstrip("/")  # every path in BTS's lists starts with one
            places = file.parent / name, file.parent / below, file.parent.parent / below
            place = next(filter(Path.is_file, places), None)
            if not place:
                raise UserError(f"{file}: line {number} points nowhere: no file {name}")
            paths.append(place)
        yield Sample(part, str(Path(names[0]).parent), tuple(paths), str(paths[0]))


# Words that say what kind of file a path is, not which frame it shows.
MARKERS = set("""rgb image images img imgs color colors colour colours colored frame frames map maps wide sync
                 raw proj groundtruth gt abs lowres arkit iphone mm meters""".split())


def words_of(path):
    """The words of a path: runs of letters, in any script, or of digits; lower case."""
    return re.findall(r"[^\W\d_]+|\d+", str(path).lower())


def key_of(path):
    """The words that say which frame it is: all but the markers and those that begin with `depth`."""
    return tuple(word for word in words_of(path) if word not in MARKERS and not word.startswith("depth"))


def find_pairs(root):
    """Images and depth maps in folders, paired by name: rgb/1.jpg and depth/1.png, 1_rgb.jpg and 1_depth.png.

    Files with equal keys show one frame. The path that says `depth` most often is the depth map, the one that
    says it least the image; ties go to the path with fewer words. What is left over is paired by time (TUM).
    The first folder named train, val or test is the part; the others, or a scenes.csv, name the scene.
    """
    images, depths = {}, {}  # key -> [(how often the path says depth, number of words, path)]
    for path in map(Path, sorted(glob.glob("**/*.*", root_dir=root, recursive=True))):
        words = words_of(path.with_suffix(""))
        says = sum(word.startswith("depth") for word in words)
        if path.suffix.lower() in UNREAD:
            note(f"{root}: {path.suffix} files are not read: convert them to JPEG")
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(key_of(path.with_suffix("")), []).append((says, len(words), path))
        if path.suffix.lower() in DEPTH_SUFFIXES:
            depths.setdefault(key_of(path.with_suffix("")), []).append((-says, len(words), path))
    pairs = []
    for key in sorted(images.keys() & depths.keys()):
        if min(images[key])[0] >= -min(depths[key])[0]:
            continue  # none says depth more often than another
        for rivals in images[key], depths[key]:
            first, *rest = sorted(rivals)
            if rest and first[:2] == rest[0][:2]:
                raise UserError(f"{root}: {first[2]} and {rest[0][2]} are for the same frame: "
                                "remove one, or name the pairs in a list")
        pairs.append((min(images.pop(key))[2], min(depths.pop(key))[2]))
    rgb = [path for group in images.values() for says, _, path in group if says == 0]
    depth = [path for group in depths.values() for says, _, path in group if says < 0]
    timed = list(pair_by_time(rgb, depth))
    if (pairs or timed) and len(rgb) > len(timed):
        note(f"{root}: {len(rgb) - len(timed)} images have no depth, {len(pairs) + len(timed)} have")
    listed = root / "scenes.csv"  # rows `frame,scene`, where frame is a file's stem
    rows = [line.split(",") for line in lines_of(listed)[1:]] if listed.is_file() else []
    scenes = {row[0].strip(): row[1].strip() for row in rows if len(row) > 1}
    scenes = {Path(name).stem: scene for name, scene in scenes.items()} | scenes  # 2.png is as good as 2
    for image, depth in sorted(pairs + timed):
        folders = image.parts[:-1]
        part = next((folder for folder in folders if folder in SPLITS), None)
        scene = "/".join(folder for folder in folders if folder != part and key_of(folder))
        if rows and image.stem not in scenes:
            raise UserError(f"{listed}: names no scene of {image.stem}: add a row `{image.stem},SCENE`")
        yield Sample(part, scenes.get(image.stem, scene), (root / image, root / depth), str(root / image))


def pair_by_time(images, depths, apart=0.02):
    """Pairs of files named by their time in seconds, in folders side by side, as TUM's."""
    timed = {}  # key of a folder -> [(seconds, path)]
    for depth in depths:
        if re.fullmatch(r"\d+(\.\d+)?", depth.stem):
            timed.setdefault(key_of(depth.parent), []).append((float(depth.stem), depth))
    times = {key: np.array([seconds for seconds, _ in group]) for key, group in timed.items()}
    for image in images:
        key = key_of(image.parent)
        if key in timed and re.fullmatch(r"\d+(\.\d+)?", image.stem):
            gaps = np.abs(times[key] - float(image.stem))
            if gaps.min() <= apart:
                yield image, timed[key][gaps.argmin()][1]


def read_pair(source, scale):
    """An image file, and a depth file as read_depth takes it."""
    image, depth = source
    return read_image(image), read_depth(depth, scale)


def pack_frame(dataset, size, index):
    """One frame as a pack stores it: (h, w, 3) uint8, (h, w) uint16 millimetres."""
    image, depth = dataset.read(index)
    rows, cols = map(nearest, depth.shape, size) if size else source_grid(*depth.shape, "fastdepth")[:2]
    grid = np.ix_(rows, cols)
    millimetres = (depth[grid] * 1000).round()
    return image[grid], np.where(millimetres < 65535, millimetres, 0).astype(np.uint16)


def write_pack(file, root, size=None, depth_scale=1000.0):
    """Write the data at `root` as one file that is read at memory speed: uint8 RGB, uint16 millimetres.

    size None: frames are FastDepth's 250x333 grid with the margin outside its crop, so that geometry
    fastdepth and its augmentation read the same pixels; frames that are not 4:3 keep only their 4:3 centre,
    and rooms keep their own size. With a size: whole frames, squeezed to it, and rooms rendered at it. Depth
    beyond 65.534 m counts as not measured. Uses all cores; the file does not depend on their number.
    """
    file, start = Path(file), time.time()
    if file.suffix != ".h5":
        raise UserError(f"{file}: a pack is an HDF5 file: its name must end in .h5")
    dataset = open_dataset(root, "all", size=None, depth_scale=depth_scale)
    if dataset.layout == "rooms":
        size = size or ROOM_SIZE
        dataset.samples = [s._replace(source=(s.source[0], size)) for s in dataset.samples]
    elif size and not same_aspect(dataset.read(0)[1].shape, size):
        note(f"--size {size[0]} {size[1]} squeezes the frames: train with --geometry full, or leave it out")
    n, (h, w) = len(dataset), size or FASTDEPTH_GRID
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    frames = torch.utils.data.DataLoader(range(n), batch_size=None, worker_init_fn=worker_init,
                                         num_workers=cores, collate_fn=partial(pack_frame, dataset, size))
    with whole_file(file) as f:
        megabytes, free = n * h * w * 5 / 1e6, shutil.disk_usage(file.parent).free / 1e6
        if megabytes > free:
            raise UserError(f"{file}: needs {megabytes:.0f} MB, and {free:.0f} MB are free: make room for it")
        print(f"packing {n} frames of {h}x{w} into {file}, {megabytes:.0f} MB")
        f.truncate(n * h * w * 5)  # exceeding a file size limit is an error here, a crash in HDF5
        with h5py.File(f.name, "w") as h5:
            h5.attrs["fastdepth_pack"] = 1  # find_pack looks for it
            images = h5.create_dataset("image", (n, h, w, 3), np.uint8)
            depths = h5.create_dataset("depth", (n, h, w), np.uint16)
            for key in ("part", "scene", "name"):
                h5[key] = [getattr(sample, key) for sample in dataset.samples]
            images[0, 0, 0, 0] = depths[0, 0, 0] = 0  # makes HDF5 allocate both
            places = images.id.get_offset(), depths.id.get_offset()
        for i, frame in enumerate(frames):
            for place, array in zip(places, frame):
                f.seek(place + i * array.nbytes)
                f.write(array)
            progress("packing", i + 1, n, start)
    print(f"packed {n} frames in {time.time() - start:.0f} s")


def find_pack(root):
    """One file that write_pack wrote."""
    if root.suffix != ".h5" or root.is_dir():
        return []
    with opened(root, "a pack: write one with python data.py PATH --pack FILE.h5") as h5:
        h5.attrs["fastdepth_pack"]  # KeyError: another file
        parts, scenes, names = (h5[key].asstr()[:] for key in ("part", "scene", "name"))
    written = root.stat().st_mtime_ns
    return [Sample(parts[i], scenes[i], (root, written, i), names[i]) for i in range(len(names))]


@lru_cache(maxsize=2)
def arrays_of(file, written):
    """The images (N, h, w, 3) and depths (N, h, w) of a pack, mapped into memory that all processes share."""
    with opened(file, "a pack") as h5:
        return [np.memmap(file, d.dtype, "r", d.id.get_offset(), d.shape) for d in (h5["image"], h5["depth"])]


def read_pack(source, scale):
    """uint8 RGB and uint16 millimetres, whatever the scale of the original was."""
    file, written, i = source
    images, depths = arrays_of(file, written)
    return np.array(images[i]), depths[i] / np.float32(1000)


def find_rooms(root):
    """rooms:N[:SEED], a name instead of a path: N rooms to train on, and N / 8, at most 512, to validate."""
    if not str(root).startswith("rooms:"):
        return []
    match = re.fullmatch(r"rooms:(\d+)(?::(-?\d+))?", str(root))
    if not match or int(match[1]) < 8:
        raise UserError(f"{root}: write rooms:N or rooms:N:SEED, with N at least 8: N / 8 more are rendered "
                        "for validation")
    n, seed = int(match[1]), int(match[2] or 0)
    # A room depends on its key alone, so more training rooms never become validation rooms.
    rooms = [f"{seed} train {i}" for i in range(n)] + [f"{seed} val {i}" for i in range(min(n // 8, 512))]
    return [Sample(key.split()[1], "rooms", (key, ROOM_SIZE), f"room {key}") for key in rooms]


def read_room(source, scale):
    """A rendered room. Only the training rooms' depth has a Kinect's holes."""
    key, size = source
    image, depth = render_room(key, size)
    if " train " in key:
        depth = kinect_holes(depth, np.random.default_rng(list(f"{key} holes".encode())))
    return image, depth


# To add a layout: write find and read, and add a row with how people recognise it. find(root: Path) gives the
# Samples, or none if root is something else: the first row that gives some is taken. read(source, scale)
# returns (H, W, 3) uint8 RGB and (H, W) float32 metres.
LAYOUTS = {
    "rooms": (find_rooms, read_room, "rooms:N or rooms:N:SEED, rendered"),
    "HDF5 folders": (find_hdf5, read_hdf5, "{train,val}/<scene>/*.h5"),
    "NYU's labelled file": (find_mat, read_mat, "nyu_depth_v2_labeled.mat, or FILE.mat/rawDepths"),
    "lists": (find_lists, read_pair, "a .txt or .csv of lines `image depth`, or train.txt, ..."),
    "pack": (find_pack, read_pack, "a .h5 file written by python data.py PATH --pack FILE.h5"),
    "paired folders": (find_pairs, read_pair, "images and depth maps whose names differ by `depth`"),
}

# ------------------------------------------------------------------------------------------------------------
# Rooms: rendered images with exact depth, to learn from without any download
# ------------------------------------------------------------------------------------------------------------

ROOMS_VERSION = 3  # raise it when the images change: packs of rooms are then rendered again
ROOM_SIZE = (240, 320)
MAIN, OTHER, LIGHT, WALL = range(4)  # what a part is made of: the thing's two colours, a light, the walls


def thing(name, width, height, depth, *parts):
    """A kind of thing: its least and largest size in metres (2, 3), and its parts (n, 7), which are boxes.

    A part is x0, y0, z0, x1, y1, z1 in fractions of that size, x from the middle, y up from the floor, z from
    the back; then what it is made of. Loose objects are put on top of the first part.
    """
    return np.array([width, height, depth]).T, np.array([(*part, MAIN)[:7] for part in parts])


def legs(top, thick=.06):
    """The four legs of a table or chair."""
    return [(x, 0, z, x + thick, top, z + thick) for z in (0, 1 - thick) for x in (-.5, .5 - thick)]


AGAINST_WALLS = [
    thing("cupboard", (.8, 2), (1.6, 2.2), (.4, .6),
          (-.5, 0, 0, .5, 1, 1), (-.01, .45, 1, .01, .6, 1.1, OTHER)),
    thing("drawers", (.6, 1.6), (.7, 1.2), (.4, .5),
          (-.5, .05, 0, .5, 1, .95), (-.47, .1, 0, .47, .35, 1), (-.47, .38, 0, .47, .64, 1),
          (-.47, .67, 0, .47, .95, 1), (-.45, 0, .05, .45, .05, .9, OTHER)),
    thing("television", (.9, 1.5), (1, 1.4), (.4, .5),
          (-.5, .05, 0, .5, .42, 1), (-.1, .42, .4, .1, .5, .7, OTHER), (-.4, .5, .45, .4, 1, .6, OTHER)),
    thing("kitchen", (1.4, 2.8), (2.1, 2.3), (.58, .62),
          (-.5, .41, 0, .5, .43, 1.05, OTHER), (-.5, .04, 0, .5, .41, 1),
          (-.5, .66, 0, -.1, 1, .55), (.2, .66, 0, .5, 1, .55)),
    thing("bookshelf", (.6, 1.6), (1.2, 2.2), (.25, .4),
          (-.5, .3, 0, .5, .32, 1), (-.5, .02, 0, .5, .04, 1), (-.5, .52, 0, .5, .54, 1),
          (-.5, .74, 0, .5, .76, 1), (-.5, .98, 0, .5, 1, 1), (-.5, 0, 0, -.47, 1, 1), (.47, 0, 0, .5, 1, 1),
          (-.46, .04, .1, .3, .24, .8, OTHER), (-.2, .54, .1, .46, .7, .8, OTHER)),
    thing("bed", (.9, 1.8), (.9, 1.2), (1.95, 2.1),
          (-.52, .3, .03, .52, .52, 1.02, OTHER), (-.5, .1, 0, .5, .3, 1), (-.5, 0, 0, .5, 1, .03),
          (-.42, .52, .04, -.04, .66, .22), (.04, .52, .04, .42, .66, .22)),
    thing("sofa", (1.5, 2.2), (.75, .95), (.8, .95),
          (-.4, .4, .25, .4, .52, 1), (-.5, .08, 0, .5, .4, 1), (-.5, .4, 0, .5, 1, .25),
          (-.5, .4, 0, -.4, .7, 1), (.4, .4, 0, .5, .7, 1), (-.35, .52, .25, -.1, .9, .4, OTHER)),
    thing("desk", (1, 1.8), (.72, .76), (.6, .8),
          (-.5, .95, 0, .5, 1, 1), (-.5, 0, 0, -.46, .95, 1), (.2, 0, 0, .5, .95, .96, OTHER)),
    thing("pier", (.1, 1), (3.3, 3.3), (.3, 1.4), (-.5, 0, 0, .5, 1, 1, WALL))]
STANDING = [
    thing("table", (.8, 1.8), (.4, .76), (.6, 1), (-.5, .94, 0, .5, 1, 1, OTHER), *legs(.94)),
    thing("bar table", (.4, .8), (.7, 1.1), (.4, .8),
          (-.5, .95, 0, .5, 1, 1), (-.06, 0, .44, .06, .95, .56), (-.25, 0, .25, .25, .04, .75)),
    thing("chair", (.42, .5), (.85, 1.1), (.42, .5),
          (-.5, .45, 0, .5, .5, 1, OTHER), (-.5, .9, 0, .5, 1, .06), *legs(.47), *legs(.9)[:2],
          (-.25, .5, 0, -.2, .9, .05), (0, .5, 0, .05, .9, .05), (.2, .5, 0, .25, .9, .05)),
    thing("office chair", (.5, .6), (.9, 1.1), (.5, .6),
          (-.45, .42, 0, .45, .5, .9, OTHER), (-.4, .55, 0, .4, 1, .12, OTHER), (-.05, .1, .4, .05, .42, .5),
          (-.5, .04, .42, .5, .1, .48), (-.03, .04, 0, .03, .1, .9),
          (-.5, .6, .2, -.44, .64, .7), (.44, .6, .2, .5, .64, .7)),
    thing("armchair", (.7, .9), (.75, 1), (.75, .9),
          (-.35, .05, .25, .35, .45, 1, OTHER), (-.5, .05, 0, .5, 1, .25),
          (-.5, .05, 0, -.35, .65, 1), (.35, .05, 0, .5, .65, 1)),
    thing("lamp", (.3, .4), (1.4, 1.7), (.3, .4),
          (-.4, 0, .1, .4, .02, .9), (-.04, .02, .46, .04, .8, .54), (-.5, .8, 0, .5, 1, 1, LIGHT)),
    thing("plant", (.4, .7), (.7, 1.6), (.4, .7),
          (-.25, 0, .25, .25, .25, .75), (-.03, .25, .47, .03, .6, .53), (-.5, .55, .3, .1, .8, .6, OTHER),
          (-.1, .65, .1, .4, .9, .8, OTHER), (-.2, .75, .4, .2, 1, .95, OTHER),
          (-.3, .4, .5, .5, .55, .7, OTHER)),
    thing("rug", (1.2, 2.4), (.01, .02), (.9, 1.7), (-.5, 0, 0, .5, 1, 1, OTHER)),
    thing("crate", (.3, .6), (.25, .5), (.3, .5), (-.5, 0, 0, .5, 1, 1))]
ON_WALLS = [
    thing("door", (.8, .9), (2.03, 2.03), (.04, .05),
          (-.5, 0, 0, .5, 1, 1), (.36, .48, 1, .42, .5, 2.5, OTHER),
          (-.58, 0, 0, -.5, 1.04, 1.3), (.5, 0, 0, .58, 1.04, 1.3), (-.5, 1, 0, .5, 1.04, 1.3)),
    thing("window", (.6, 1.6), (2.05, 2.2), (.05, .06),
          (-.5, .42, 0, .5, 1, .2, LIGHT), (-.56, .38, 0, .56, .42, 3), (-.54, .42, 0, -.5, 1, 1),
          (.5, .42, 0, .54, 1, 1), (-.54, 1, 0, .54, 1.03, 1), (-.02, .42, 0, .02, 1, 1)),
    thing("print", (.3, 1), (1.75, 1.9), (.02, .04),
          (-.5, .7, 0, .5, 1, 1), (-.43, .73, 0, .43, .97, 1.1, OTHER)),
    thing("poster", (.4, .9), (1.6, 2), (.01, .01), (-.5, .6, 0, .5, 1, 1, OTHER)),
    thing("curtain", (.4, .9), (2.2, 2.35), (.08, .15), (-.5, .02, 0, .5, 1, 1)),
    thing("wall shelf", (.6, 1.2), (1.5, 1.9), (.2, .25),
          (-.5, .7, 0, .5, .72, 1), (-.4, .72, 0, .2, .85, 1, OTHER))]
TRIES = 10  # per list: what finds no place is left out
LOOSE = 24  # a thing carries fewer loose objects than this

# Patterns are cells of u x v metres with dark joints between them; with shift 1 every second row is moved by
# half a cell; `hues` is how much the colours of the cells differ.
#    u     v     shift  joint  hues
PATTERNS = np.array([
    (9.00, 9.00, 0,     0,     0),    # plain
    (0.45, 0.60, 0,     .006,  0),    # panels
    (1.20, 0.12, 1,     .003,  .05),  # planks
    (0.30, 0.30, 0,     .006,  .03),  # tiles
    (0.24, 0.08, 1,     .008,  .05),  # bricks
    (9.00, 0.05, 0,     .010,  0),    # blinds
    (0.05, 9.00, 0,     0,     .05),  # folds
    (0.04, 0.31, 0,     .003,  1),    # books
    (0.11, 0.09, 1,     0,     .6)])  # prints
#   wood saturation brightness  glow       plain panels planks tiles bricks blinds folds books prints, in %
LOOKS = np.array([
    (0,  .02, .45,  .50, .95,   0,  0,     80,   6,     5,     2,    5,     0,     2,    0,    0),   # walls
    (.5, .05, .50,  .15, .70,   0,  0,     40,   0,     35,    15,   2,     0,     0,    0,    8),   # floor
    (0,  .00, .15,  .75, .95,   .1, .4,    75,   25,    0,     0,    0,     0,     0,    0,    0),   # ceiling
    (.5, .00, .45,  .05, .95,   0,  0,     62,   16,    12,    0,    0,     4,     6,    0,    0),   # MAIN
    (.3, .00, .60,  .05, .90,   0,  0,     45,   5,     5,     2,    0,     3,     8,    16,   16),  # OTHER
    (0,  .00, .20,  .80, 1.0,   .3, 1.5,   60,   5,     0,     0,    0,     35,    0,    0,    0),   # LIGHT
    (.1, .00, .80,  .03, .90,   0,  0,     60,   0,     0,     0,    0,     5,     10,   10,   15)])  # loose


class Room(NamedTuple):
    """A furnished room. Metres; x to the right, y up, z ahead, from the middle of the floor."""
    boxes: np.ndarray   # (K, 6) low and high corner in the frame of the thing; box 0 is the room itself
    poses: np.ndarray   # (K, 3) where that frame stands: x, z and turn in radians
    look: np.ndarray    # (K,) which row of `looks` a box has; the room has three: walls, floor, ceiling
    looks: np.ndarray   # (N, 10) red, green, blue, contrast of cells, glow, and a row of PATTERNS
    eye: np.ndarray     # (3,) where the camera is
    axes: np.ndarray    # (3, 3) rows: its right, up and ahead
    lamps: np.ndarray   # (2, 3)
    camera: np.ndarray  # (7,) exposure, ambient light, noise, tone, gains of red, green and blue


def furnish(rng):
    """Draw a Room. The order of the draws makes the rooms: whoever changes it raises ROOMS_VERSION."""
    width, height, length = (2.6, 2.4, 3) + (5.9, .8, 6.5) * rng.random(3)
    heading = rng.uniform(0, 2 * math.pi)
    sin, cos = math.sin(heading), math.cos(heading)
    away = (rng.uniform(-1, 1, 2) - (.7 * sin, .7 * cos)).clip(-1, 1)  # mostly with the room ahead of it
    eye_x, eye_z = away * (width / 2 - .5, length / 2 - .5)

    floor, camera = (width, length), (eye_x, eye_z, sin, cos)
    boxes = [[(-width / 2, 0, -length / 2, width / 2, height, length / 2, 0)]]
    poses = [(0, 0, 0)]
    taken = [(eye_x - .75, eye_z - .75, eye_x + .75, eye_z + .75)]  # nothing stands nearer to the camera
    n_looks = 3 + 9 * TRIES  # of the room, of three materials a thing; then one of each loose object
    for kinds, space in (AGAINST_WALLS, taken), (STANDING, taken), (ON_WALLS, taken[:]):
        for kind in rng.integers(len(kinds), size=TRIES):
            sizes, parts = kinds[kind]
            size = rng.uniform(*sizes)
            pose = find_place(rng, size, floor, kinds is not STANDING, space, camera)
            if pose is None:
                continue
            parts = parts * (*size, *size, 1)
            made_of = parts[:, 6]
            parts[:, 6] = np.where(made_of == WALL, 0, 3 * len(boxes) + made_of)  # the row of looks
            if kinds is not ON_WALLS:
                loose = scatter(rng, parts[0], rng.integers(LOOSE), n_looks)
                n_looks += len(loose)
                parts = np.concatenate([parts, loose])
            boxes.append(parts)
            poses += [pose] * len(parts)
    boxes = np.concatenate(boxes)
    rows = np.array([0, 1, 2] + [3, 4, 5] * 3 * TRIES + [6] * (n_looks - 3 - 9 * TRIES))
    looks = paint(rng, rows)
    eye_y, pitch, roll = rng.uniform((.9, -.42, -.06), (1.75, .12, .06))
    level = np.array([cos, 0, -sin])
    ahead = np.array([sin, math.tan(pitch), cos]) * math.cos(pitch)
    right = level * math.cos(roll) + np.cross(ahead, level) * math.sin(roll)
    return Room(
        boxes[:, :6], np.array(poses), boxes[:, 6].astype(int), looks,
        eye=np.array([eye_x, eye_y, eye_z]),
        axes=np.array([right, np.cross(ahead, right), ahead]),
        lamps=rng.uniform((-.3, -.9, -.3), (.3, -.1, .3), (2, 3)) * (width, 1, length) + (0, height, 0),
        camera=rng.uniform((.42, .3, .01, .75, .95, .95, .85), (.6, .8, .04, 1.2, 1.15, 1.05, 1.1)))


def find_place(rng, size, floor, at_wall, taken, camera):
    """A free place that the camera sees -> x, z and turn of the thing's frame; None after eight tries."""
    eye_x, eye_z, sin_heading, cos_heading = camera
    for x, z, turn, skew in rng.random((8, 4)).tolist():
        turn = int(4 * turn) * math.pi / 2 + (0 if at_wall else skew - .5)
        cos, sin = math.cos(turn), math.sin(turn)  # x, z of its right: cos, -sin; of its front: sin, cos
        half_x = (abs(cos) * size[0] + abs(sin) * size[2]) / 2
        half_z = (abs(sin) * size[0] + abs(cos) * size[2]) / 2
        x = (2 * x - 1) * (floor[0] / 2 - half_x)
        z = (2 * z - 1) * (floor[1] / 2 - half_z)
        if at_wall:  # back until it touches the wall
            x = abs(cos) * x - sin * (floor[0] / 2 - half_x)
            z = abs(sin) * z - cos * (floor[1] / 2 - half_z)
        ahead = (x - eye_x) * sin_heading + (z - eye_z) * cos_heading
        aside = (x - eye_x) * cos_heading - (z - eye_z) * sin_heading
        free = all(x + half_x <= x0 or x1 <= x - half_x or z + half_z <= z0 or z1 <= z - half_z
                   for x0, z0, x1, z1 in taken)
        if free and abs(aside) < .7 * ahead + .3:
            taken.append((x - half_x, z - half_z, x + half_x, z + half_z))
            return x - sin * size[2] / 2, z - cos * size[2] / 2, turn


def scatter(rng, part, count, look):
    """`count` loose objects on a part, as rows like its own, with looks of their own from row `look` on."""
    low, high = part[:3], part[3:6]
    size = .04 + .4 * rng.random((count, 3)) ** 3
    foot = low + (high - low) * rng.uniform(.1, .9, (count, 3))
    foot[:, 1] = high[1]
    low, high = foot - size * (.5, 0, .5), foot + size * (.5, 1, .5)
    return np.column_stack([low, high, look + np.arange(count)])


def paint(rng, rows):
    """Rows of LOOKS (n,) -> Room.looks (n, 10)."""
    wood, ranges = LOOKS[rows, 0], LOOKS[rows, 1:7].T
    draw = rng.random((8, len(rows)))
    low, high = ranges[::2], ranges[1::2]
    saturation, value, glow = low + (high - low) * np.array([draw[0]**2, draw[1], draw[2]])
    hue = np.where(draw[3] < .65, .05 + .09 * draw[4], draw[4])  # most things are between red and yellow
    wooden = draw[5] < wood
    hue = np.where(wooden, .03 + .05 * draw[4], hue)
    saturation = np.where(wooden, .25 + .35 * draw[0], saturation)
    value = np.where(wooden, .1 + .7 * value, value)
    ramp = (np.array([[5], [3], [1]]) + 6 * hue) % 6  # from hue, saturation and value to RGB
    colour = value * (1 - saturation * np.minimum(ramp, 4 - ramp).clip(0, 1))
    pattern = (draw[6] * 100 > LOOKS[rows, 7:].cumsum(1).T).sum(0)
    return np.column_stack([colour.T, .02 + .3 * draw[7]**2, glow, PATTERNS[pattern]])


def find_faces(room):
    """Room -> corners (K, 8, 3) of its boxes, outward normals (K, 6, 3) and offsets (K, 6) of their faces.

    Faces are ordered low x, y, z, then high x, y, z. Of a point p inside, normal . p < offset.
    """
    low, high = room.boxes[:, None, :3], room.boxes[:, None, 3:]  # (K, 1, 3)
    half = (high - low) / 2
    x, z, turn = room.poses.T
    cos, sin, zero, one = np.cos(turn), np.sin(turn), 0 * turn, 1 + 0 * turn
    axes = np.array([cos, zero, -sin, zero, one, zero, sin, zero, cos]).T.reshape(-1, 3, 3)
    middle = (low + high) / 2 @ axes + np.column_stack([x, zero, z])[:, None]
    normals = np.concatenate([-axes, axes], 1)
    offsets = (normals * middle).sum(-1) + np.concatenate([half, half], 2)[:, 0]
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return middle + half * signs @ axes, normals, offsets


def trace(faces, eye, axes, x, y):
    """What each ray meets first -> 1 / depth (H, W) float32, and which face (H, W): 6 x box + face.

    The ray of a pixel is x right + y up + ahead, so that the distance t along it is depth. It meets a plane
    at 1 / t = normal . ray / (offset - normal . eye), which is affine in x (W,) and y (H,). It enters a box
    at the last face with the eye in front of it, and leaves at the first of the others. 1 / t falls with t.
    """
    corners, normals, offsets = faces
    gap = offsets - normals @ eye  # (K, 6), negative where the eye is in front
    seen = (corners - eye) @ axes.T  # (K, 8, 3)
    columns = (seen[..., 0] / seen[..., 2] - x[0]) / (x[1] - x[0])
    rows = (seen[..., 1] / seen[..., 2] - y[0]) / (y[1] - y[0])
    bounds = np.array([rows.min(1), rows.max(1) + 1, columns.min(1), columns.max(1) + 1]).T
    bounds[seen[..., 2].min(1) < .02] = 0, len(y), 0, len(x)  # partly behind the eye: look everywhere
    bounds = bounds.clip(0, (len(y), len(y), len(x), len(x))).astype(int)
    drawn = (bounds[:, 0] < bounds[:, 1]) & (bounds[:, 2] < bounds[:, 3])
    drawn &= (seen[..., 2].max(1) > 0) & (gap < 0).any(1)  # the eye is in no thing, only in the room

    across, up, ahead = (normals @ axes.T / gap[..., None]).astype(np.float32).T[..., None]  # (6, K, 1)
    planes = (up[:, 0] * y)[..., None] + (across[:, 0] * x + ahead[:, 0])[:, None]  # (6, H, W) of the room
    near = planes.max(0)  # where the ray leaves it
    hit = planes.argmax(0)
    order, fronts = gap.argsort(1), (gap < 0).sum(1)
    for box in np.flatnonzero(drawn):
        top, bottom, left, right = bounds[box]
        by_row = up[:, box] * y[top:bottom]
        by_column = across[:, box] * x[left:right] + ahead[:, box]
        planes = by_row[..., None] + by_column[:, None]
        front, behind = order[box, :fronts[box]], order[box, fronts[box]:]  # the eye is before it, or not
        enter = planes[front].min(0)
        closer = enter > np.maximum(planes[behind].max(0), near[top:bottom, left:right])
        np.copyto(near[top:bottom, left:right], enter, where=closer)
        for face in front:
            shown = closer & (planes[face] == enter)
            np.copyto(hit[top:bottom, left:right], 6 * box + face, where=shown)
    return near, hit


def hashed(*keys):
    """Whole numbers (H, W) -> four random-looking bytes each (H, W, 4) uint8."""
    primes = np.array([374761393, 668265263, 1274126177], np.uint32)
    bits = sum(prime * key.astype(np.int32).view(np.uint32) for key, prime in zip(keys, primes))
    bits = (bits ^ bits >> 13) * primes[2]
    return (bits ^ bits >> 16)[..., None].view(np.uint8)


def render_room(key, size=ROOM_SIZE):
    """The room of a str -> image (H, W, 3) uint8 RGB and exact depth (H, W) float32 metres."""
    rng = np.random.default_rng(list(key.encode()))  # numpy refuses negative seeds
    room = furnish(rng)
    faces = find_faces(room)
    height, width = size
    focal = FOCAL * max(size)
    x = ((np.arange(width) + .5 - width / 2) / focal).astype(np.float32)
    y = ((height / 2 - np.arange(height) - .5) / focal).astype(np.float32)
    near, hit = trace(faces, room.eye, room.axes, x, y)
    depth = 1 / near
    point = [at + depth * (right * x + up * y[:, None] + ahead)
             for at, (right, up, ahead) in zip(room.eye.astype(np.float32), room.axes.T.astype(np.float32))]
    image = shade(room, faces, hit, point)

    # The camera: white balance, exposure, noise, tone.
    exposure, _, noise, tone, *gains = room.camera.astype(np.float32)
    image *= gains
    image *= exposure / np.sqrt(image).mean()**2
    image += noise * (rng.integers(0, 256, image.shape, np.uint8) / np.float32(128) - 1)
    image = (image - np.float32(.05)).clip(0, 1)**(1 / tone)
    return (255 * image + .5).astype(np.uint8), depth


def shade(room, faces, hit, point):
    """The light (H, W, 3) that comes from points x, y, z (H, W) on faces `hit` (H, W)."""
    # What is known of each face, for the face that each pixel shows.
    look = room.look.repeat(6)
    look[1], look[4] = 1, 2  # floor and ceiling
    _, normals, offsets = faces
    before = (normals @ room.lamps.T - offsets[..., None]).clip(0).reshape(-1, 2)  # metres from plane to lamp
    at_x, at_z, turn = room.poses.repeat(6, 0).T
    axis = np.arange(len(look)) % 3  # 0, 1, 2: x, y, z
    table = np.column_stack([axis, at_x, at_z, np.cos(turn), np.sin(turn), before, look, room.looks[look]])
    (axis, at_x, at_z, cos, sin, before_0, before_1, look, red, green, blue, contrast, glow,
     cell_u, cell_v, shift, joint, hues) = table.T.astype(np.float32).take(hit, axis=1, mode="clip")

    # Colour: cells with dark joints.
    along = cos * (point[0] - at_x) - sin * (point[2] - at_z)
    across = sin * (point[0] - at_x) + cos * (point[2] - at_z)
    u = np.where(axis == 0, across, along)
    v = np.where(axis == 1, across, point[1])
    row = v / cell_v
    column = u / cell_u + .5 * shift * np.floor(row)
    chance = hashed(np.floor(column), np.floor(row), look) / np.float32(256)
    to_joint = np.minimum(np.abs(column - np.rint(column)) * cell_u, np.abs(row - np.rint(row)) * cell_v)
    reflected = 1 - contrast * chance[..., 3] - .5 * (to_joint < joint)

    # Light: of the room, less towards its corners, and of two lamps.
    low, high = room.boxes[0].astype(np.float32).reshape(2, 3)
    to_x, to_y, to_z = (np.minimum(at - low[i], high[i] - at) for i, at in enumerate(point))
    to_corner = np.maximum(np.minimum(to_x, to_z), np.minimum(np.maximum(to_x, to_z), to_y))  # second least
    light = np.float32(room.camera[1]) * (to_corner + .15) / (to_corner + .3) + glow
    for lamp, distance in zip(room.lamps.astype(np.float32), (before_0, before_1)):
        square = sum((position - at)**2 for position, at in zip(point, lamp))
        light += 1.2 * distance / (np.sqrt(square) * (1 + square / 9))
    reflected *= light
    return np.stack([colour * reflected * (1 + hues * (chance[..., i] - .5))
                     for i, colour in enumerate((red, green, blue))], -1)


def kinect_holes(depth, rng):
    """Depth (H, W) as a Kinect would measure it, for training only; 0 = not measured.

    Nothing is measured in the shadow that near things cast on far ones, nor in some patches (glass, cloth).
    """
    height, width = depth.shape
    shift = width / 40 / depth.clip(.5)  # pixels: the projector is at the side; near things move further
    patches = rng.random((15, 16)) < .02
    hole = patches[np.arange(height)[:, None] * 15 // height, np.arange(width) * 16 // width]
    for k in range(1, 9):
        hole[:, :-k] |= shift[:, k:] - shift[:, :-k] >= k
    return np.where(hole, 0, depth)


# ------------------------------------------------------------------------------------------------------------
# For people: images, progress, mistakes, the command
# ------------------------------------------------------------------------------------------------------------

# Near is bright, far is dark, not measured is grey: readable in print and to the colour-blind.
RAMP = np.array([[252, 253, 191], [254, 194, 135], [251, 135, 97], [229, 80, 100], [182, 54, 122],
                 [130, 37, 129], [80, 18, 123], [29, 17, 71], [0, 0, 4]], dtype=np.float32)


def colourise(depth, near, far):
    """(H, W) metres -> (H, W, 3) uint8: `near` bright, `far` (may be less) dark, 0 and NaN grey."""
    depth = np.asarray(depth, dtype=np.float32)
    measured = np.isfinite(depth) & (depth > 0)
    t = np.where(measured, (depth - near) / (far - near or 1), 0).clip(0, 1) * (len(RAMP) - 1)
    colour = np.stack([np.interp(t, np.arange(len(RAMP)), RAMP[:, c]) for c in range(3)], -1)
    return np.where(measured[..., None], colour, 96).astype(np.uint8)


def colour_bar(near, far, height):
    """The colour scale of colourise, labelled in metres: (height, w, 3) uint8."""
    font = max(10, height // 28)
    bar = colourise(np.linspace(near, far, height).clip(1e-6)[:, None].repeat(font, 1), near, far)
    sheet = Image.new("RGB", (6 * font, height), "white")
    sheet.paste(Image.fromarray(bar), (font // 2, 0))
    for k in range(5):
        where = 2 * font, (height - 1.3 * font) * k / 4
        label = f"{near + (far - near) * k / 4:.1f} m"
        ImageDraw.Draw(sheet).text(where, label, fill="black", font_size=font)
    return np.array(sheet)


def tile(rows, labels=(), gap=4):
    """Rows of equally high (H, W, 3) uint8 images -> one Pillow image, with a label above each column."""
    h, w = rows[0][0].shape[:2]
    top = 18 if labels else 0
    widest = max(sum(image.shape[1] + gap for image in row) for row in rows) - gap
    sheet = Image.new("RGB", (widest, top + len(rows) * (h + gap) - gap), "white")
    for r, row in enumerate(rows):
        left = 0
        for image in row:
            sheet.paste(Image.fromarray(image), (left, top + r * (h + gap)))
            left += image.shape[1] + gap
    for c, label in enumerate(labels):
        ImageDraw.Draw(sheet).text((c * (w + gap) + 4, 3), label, fill="black")
    return sheet


def progress(what, done, total, start, more=""):
    """On a terminal, a line with speed and time left that updates itself and disappears at the end."""
    if not sys.stdout.isatty():
        return
    seconds = max(time.time() - start, 1e-9)
    left = round(seconds / done * (total - done))
    line = f"{what} {done}/{total}  {done / seconds:.1f}/s  {left // 60}:{left % 60:02} left{more}"
    print(f"\r{'' if done == total else line[-79:]:<79}", end="\r", flush=True)


@cache
def note(text):
    """Print a note to stderr, once."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def whole_file(file):
    """A temporary binary file that replaces `file` when the block ends: whole or not at all."""
    file = Path(file)
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: is a folder or a device: choose another name")
    unfinished = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        clear_partials(file)
        with open(unfinished, "wb") as f:
            yield f
        os.replace(unfinished, file)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(f"{file}: cannot be written ({reason}): make room, or choose another place") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


def clear_partials(file):
    """Remove the unfinished files of processes that were killed while writing `file`."""
    for unfinished in file.parent.glob(f"{glob.escape(file.name)}.partial-*"):
        try:
            if pid := re.fullmatch(r"\.partial-(\d{1,9})", unfinished.suffix):
                os.kill(int(pid[1]), 0)  # signal 0 only asks whether it lives
        except ProcessLookupError:
            unfinished.unlink(missing_ok=True)
        except PermissionError:
            pass  # another user's process, still running


def worker_init(worker_id):
    """For DataLoader(worker_init_fn=...): ignore Ctrl-C in a worker, which the main process stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default except None and False."""

    def _get_help_string(self, action):
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


def make_parser(description):
    """A parser whose --help says the defaults, and whose errors are short."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter,
                                   usage="%(prog)s [flags]; --help lists them")


def checked(kind, test, rule):
    """The argparse type of a number that passes a test."""
    def number(text):
        """The number in `text`, or argparse's error that says the rule."""
        if not test(value := kind(text)):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value
    number.__name__ = kind.__name__  # argparse names the type where the text is no number
    return number


positive = partial(checked, test=lambda n: 0 < n < math.inf, rule="above 0 and finite")  # positive(int)
non_negative = checked(float, lambda x: 0 <= x < math.inf, "0 or more, and finite")
up_to_256 = checked(int, lambda n: 0 <= n <= 256, "0 to 256")
int64 = checked(int, lambda n: -2**63 <= n < 2**63, "of 64 bits")
multiple_of_32 = checked(int, lambda n: n > 0 and n % 32 == 0, "a multiple of 32")


def check_device(name):
    """UserError if PyTorch has no such device here."""
    try:
        torch.zeros(1, device=name).item()  # fails on "meta", which holds no numbers
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: PyTorch finds no such device here") from None


def run_script(main, *mistakes):
    """Run a script's main. Exit codes: 0 done, 1 a check failed or a loss was not finite, 2 a user error,
    130 Ctrl-C, 141 a closed pipe.

    mistakes: further exceptions that mean a user error. Any other exception is a bug: a traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Write each line at once, and escape what the terminal cannot show.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head -1` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        sys.exit(141)
    except torch.OutOfMemoryError:
        message = "the GPU's memory is too small: lower --size, or in training --batch-size"
    except (UserError, OSError, *mistakes) as error:
        message = str(error).strip() or type(error).__name__
        message = re.sub(r"^[\w.]*Error: ", "", message.splitlines()[-1])  # a worker's brings a traceback
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    parser = make_parser("Look at a data set, or pack it into one file.")
    parser.add_argument("path", help="a data set of any known layout, or rooms:N")
    parser.add_argument("--depth-scale", type=positive(float), default=1000.0,
                        help="16-bit depth / this = metres (TUM 5000, KITTI 256)")
    writes = parser.add_mutually_exclusive_group().add_argument
    writes("--pack", metavar="FILE.h5", help="write the data as one file, read at memory speed")
    writes("--out", help="the contact sheet's file (default: runs/data-NAME.png)")
    parser.add_argument("--size", type=positive(int), nargs=2, metavar=("H", "W"),
                        help="of the pack's frames (default: what geometry fastdepth reads)")
    args = parser.parse_args(argv)
    if args.size and not args.pack:
        raise UserError("--size: is the size of the frames of --pack: give that too")
    if args.pack:
        return write_pack(args.pack, args.path, args.size and tuple(args.size), args.depth_scale)

    dataset = open_dataset(args.path, "all", size=None, depth_scale=args.depth_scale)
    _, read, mark = LAYOUTS[dataset.layout]
    print(f"{args.path}: {dataset.layout} ({mark})")
    print(f"pairs   {counts_of(dataset.samples)}; {len({s.scene for s in dataset.samples})} scenes")
    for i in evenly(len(dataset), 2):  # a person sees whether the right files were paired
        source = dataset.samples[i].source
        print(f"        {' with '.join(map(str, source)) if read is read_pair else dataset.files[i]}")
    pairs = [dataset.read(i) for i in evenly(len(dataset), 24)]
    sizes = sorted({by(depth.shape) for _, depth in pairs})
    measured = np.concatenate([depth[depth > 0] for _, depth in pairs])
    if not measured.size:
        raise UserError(f"{args.path}: no pixel of these frames is measured")
    first, median, last = np.quantile(measured, (0.01, 0.5, 0.99))
    share = measured.size / sum(depth.size for _, depth in pairs)
    print(f"size    {' '.join(sizes)} in {len(pairs)} pairs looked at")
    print(f"depth   median {median:.2f} m, 98 % from {first:.2f} to {last:.2f}, max {measured.max():.2f}; "
          f"{share:.0%} measured; 16-bit scale {dataset.scale:g}")
    check_scale(dataset, max_depth=10.0)

    cells = []
    for image, depth in pairs:
        rows, cols, _ = (t.numpy() for t in sampling_grid(*depth.shape, (180, 240), "full"))
        far = np.quantile(depth[depth > 0], 0.99) if depth.any() else last
        cells.append(np.concatenate([image[rows, cols], colourise(depth[rows, cols], 0, far)], 1))
    out = Path(args.out or f"runs/data-{Path(args.path).resolve().name.replace(':', '-')}.png")
    with whole_file(out) as f:
        tile([cells[i:i + 3] for i in range(0, len(cells), 3)]).save(f, "PNG")
    print(f"look    {out}")


if __name__ == "__main__":
    run_script(main)
