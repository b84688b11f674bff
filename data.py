"""Data: pairs of a picture and its depth, from any common layout, at one size.

    ds = open_dataset("data/rooms", "train")         # layouts: see LAYOUTS
    image, depth, index = ds[0]                      # (3, 224, 224) RGB in [0, 1], (1, 224, 224) metres, 0 = not measured
    ds.files[index]                                  # its name, for messages

Depth is metres along the optical axis (z, not the length of the ray). What must happen once in the project happens
here: files to metres (`to_metres`), the mask (`valid_mask`), the geometry (`sampling_grid`), the split (`open_dataset`).

    python data.py data/rooms                        # facts and a contact sheet
    python data.py nyu --pack nyu.h5                 # once: read at memory speed (for densedepth and fpn with --size 480 640)
    python data.py --rooms 4000 --out data/many      # render rooms: depth that is known exactly, no download
"""
import argparse
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

# ------------------------------------------------------------------------------------------------------------------
# Units: files -> uint8 RGB, metres
# ------------------------------------------------------------------------------------------------------------------


SCALES = {1000: "NYU, ScanNet", 5000: "TUM", 256: "KITTI"}  # of 16-bit depth: value / scale = metres


def to_metres(raw, scale=1000.0, file=""):
    """Depth as stored -> float32 metres, 0 = not measured. The only conversion in the project.

    float: metres; NaN and inf are not measured.  uint16 (or wider): value / scale, 0 and 65535 are not measured
    (SCALES).  uint8: 255 = 10 m.  ValueError names the file when nothing is measured or
    the values must be another unit.
    """
    raw = raw.squeeze() if raw.ndim == 3 and 1 in raw.shape else raw
    if raw.ndim != 2:
        raise ValueError(f"{file}: depth must have one channel, this has the shape {raw.shape}: it is a picture of depth, not depth")
    if raw.dtype.kind == "f":
        metres = np.where(np.isfinite(raw) & (raw > 0), raw, 0).astype(np.float32)
    elif raw.dtype == np.uint8:
        metres = raw.astype(np.float32) * (10 / 255)
    else:
        metres = np.where(raw == 65535, 0, raw).astype(np.float32) / np.float32(scale)
    some = metres.ravel()[::97]  # a hundredth of the pixels tells metres from millimetres
    some = some[some > 0] if some.any() else metres[metres > 0]
    if some.size == 0:
        raise ValueError(f"{file}: no pixel of this depth map is measured (all are 0, NaN or inf): remove the file")
    if not 0.05 < (median := float(np.median(some))) < 200:
        likely = {s: median * scale / s for s in SCALES if 0.5 < median * scale / s < 25}
        cure = ("floats must be metres" + ", these look like millimetres" * (median > 200) if raw.dtype.kind == "f" else
                "8-bit depth must have 255 = 10 m" if raw.dtype == np.uint8 else "; ".join(
                    f"--depth-scale {s} ({SCALES[s]}) would make it {metres:.2g} m" for s, metres in likely.items()) or "set --depth-scale")
        raise ValueError(f"{file}: the median depth would be {median:.4g} m: {cure}")
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
# Layouts: find(root) lists the samples of a data set, read(source, scale) gives one: (H, W, 3) uint8, (H, W) metres
# ------------------------------------------------------------------------------------------------------------------

SPLITS, PICTURES, DEPTHS = ("train", "val", "test"), (".jpg", ".jpeg", ".png"), (".png", ".npy", ".npz")


class Sample(NamedTuple):
    """What find() lists: one picture with its depth, not read yet."""
    part: str | None  # train, val or test, where the data set says so
    scene: str  # a scene is never split between train and val
    source: object  # what read() takes
    name: str  # for messages


def place_of(path, root):
    """The part and the scene that a folder's path below root names."""
    where = path.relative_to(root).parts
    part = where[0] if where and where[0] in SPLITS else None
    return part, "/".join(where[1:] if part else where)


def find_hdf5(root):
    """{train,val}/<scene>/*.h5."""
    files = sorted(p for part in SPLITS for p in (root / part).glob("**/*.h5"))
    samples = [Sample(*place_of(p.parent, root), p, str(p)) for p in files]
    # NYU's 654 official test frames: choosing a model on them would be tuning on the test set
    return [s._replace(part="test") if (s.part, s.scene) == ("val", "official") else s for s in samples]


@contextmanager
def opened(file, kind):
    """An HDF5 file; ValueError names it if it is damaged, or is not of its kind."""
    try:
        with h5py.File(file) as h5:
            yield h5
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not {kind} ({str(error).strip(chr(39))})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as HDF5 ({error}): replace or remove it") from None


def read_hdf5(file, scale):
    """rgb (3, H, W) uint8 and depth (H, W) float metres."""
    with opened(file, "a FastDepth HDF5 file") as h5:
        image, depth = h5["rgb"][:], h5["depth"][:]
    if image.ndim != 3 or len(image) != 3 or image.dtype != np.uint8:
        raise ValueError(f"{file}: rgb must be (3, H, W) uint8, this is {image.shape} {image.dtype}")
    return image.transpose(1, 2, 0), to_metres(depth, scale, file)


# The official split of nyu_depth_v2_labeled.mat as run lengths over its 1449 frames: 2 test frames, 6 train, 1 test, ...
NYU_RUNS = """
2 6 1 4 5 2 1 6 16 2 2 8 2 1 5 12 4 4 8 25 3 5 5 1 4 2 1 15 3 11 3 1 6 3 23 4 6 7 3 27 1 13 1 6 3 5 7 10 7 7 3 2 3 7
11 15 2 2 10 19 7 4 3 13 4 15 6 5 8 13 5 2 9 30 6 1 12 4 3 3 3 9 3 3 17 7 5 7 4 8 5 4 2 3 5 11 6 5 2 4 2 4 3 4 2 3 6 2
6 4 5 2 2 2 3 6 8 3 2 5 5 2 4 8 2 14 29 12 5 5 5 6 3 9 14 3 3 4 6 6 3 34 3 8 3 6 3 3 4 9 3 11 4 2 3 2 8 13 5 5 4 5 3 8
3 8 3 3 2 8 2 2 2 3 2 16 10 3 9 1 7 1 4 7 3 3 9 3 2 7 15 3 6 2 2 2 3 2 6 7 5 4 12 3 5 5 5 2 3 11 4 3 12 9 6 4 11 1 3 2
7 5 2 13 4 2 6 6 3 3 4 7 2 2 2 14 8 2 8 5 8 6 4 5 4 7 9"""


def find_mat(root):
    """nyu_depth_v2_labeled.mat, with the depth that its authors filled in; FILE.mat/rawDepths is depth as the Kinect measured it."""
    if (root / "nyu_depth_v2_labeled.mat").is_file():
        root = root / "nyu_depth_v2_labeled.mat"
    file, depths = (root, "depths") if root.suffix == ".mat" else (root.parent, root.name)
    if file.suffix != ".mat":
        return []
    with opened(file, "NYU's labelled .mat file") as h5:
        n, scenes = len(h5[depths]), ["".join(map(chr, h5[ref][:].ravel())) for ref in h5["scenes"][:].ravel()]
    runs = [int(run) for run in NYU_RUNS.split()]
    official = [part for i, run in enumerate(runs) for part in [(None if i % 2 else "test")] * run]
    parts = official if n == len(official) else [None] * n
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
        return file.read_text(encoding="utf-8-sig").splitlines()  # without the mark that Excel puts first
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not text: name a list of pictures and depths, or a folder") from None


def find_lists(root):
    """Lines that name a picture and its depth: root itself, or {train,val,test}.{txt,csv} in it, or Kaggle's nyu2_{train,test}.csv.

    Paths are relative to the list's folder or to the one above. The scene of a frame is the folder of its picture.
    """
    names = [(part, root / folder / f"{prefix}{part}{suffix}") for folder in ("", "data")  # Kaggle's archive holds a folder data
             for part in SPLITS for prefix in ("", "nyu2_") for suffix in (".txt", ".csv")]
    lists = [(None, root)] if root.suffix in (".txt", ".csv") else [(part, file) for part, file in names if file.is_file()]
    samples = []
    for part, file in lists:
        for number, line in enumerate(lines_of(file), 1):
            words = re.split(r"[,;\t]\s*" if re.search(r"[,;\t]", line) else r"\s+", line.strip())
            words = [word for word in words if word.lower().endswith(PICTURES + DEPTHS)]  # others are time stamps, focal lengths
            if not words and (number == 1 or not line.strip() or line.startswith("#")) or "None" in line.split():
                continue  # a header, or a picture that KITTI has no depth of
            if len(words) != 2:
                raise ValueError(f"{file}: line {number} does not name a picture and its depth: {line[:60]!r}")
            paths = [next((p for p in (Path(word), file.parent / word.lstrip("/"), file.parent.parent / word.lstrip("/")) if p.is_file()), None)
                     for word in words]
            if None in paths:
                raise ValueError(f"{file}: line {number} points nowhere: no file {words[paths.index(None)]}")
            samples.append(Sample(part, str(Path(words[0]).parent), tuple(paths), str(paths[0])))
    return samples


def find_pairs(root):
    """Folders rgb | image | color beside depth, at any level, or NAME_image beside NAME_depth (also _rgb, _colors, .color).

    The scene of a frame is what the rows `frame,scene` of scenes.csv say, else the folder that holds the pair.
    """
    scenes = {}
    if (root / "scenes.csv").is_file():
        rows = [line.split(",") for line in lines_of(root / "scenes.csv")]
        scenes = {row[0].strip(): row[1].strip() for row in rows[1:] if len(row) > 1}
    samples = []
    for folder, _, names in sorted(os.walk(root)):
        folder = Path(folder)
        marked = [(p, re.fullmatch(r"(.+)[._-](?:(image|rgb|colou?rs?)|depth)", p.stem)) for p in map(folder.joinpath, sorted(names))]
        images = {m[1]: p for p, m in marked if m and m[2] and p.suffix.lower() in PICTURES}
        depths = {m[1]: p for p, m in marked if m and not m[2] and p.suffix.lower() in DEPTHS}
        pairs = [(name, images[name], depths[name]) for name in images.keys() & depths.keys()]
        for colour in (folder / name for name in ("rgb", "image", "color") if (folder / name).is_dir() and (folder / "depth").is_dir()):
            images = {p.stem: p for p in colour.iterdir() if p.suffix.lower() in PICTURES}
            depths = {p.stem: p for p in (folder / "depth").iterdir() if p.suffix.lower() in DEPTHS}
            pairs += [(name, images[name], depths[name]) for name in images.keys() & depths.keys()] or by_time(images, depths)
        samples += [Sample(place_of(folder, root)[0], scenes.get(name, place_of(folder, root)[1]), (image, depth), str(image))
                    for name, image, depth in sorted(pairs)]
    return samples


def by_time(images, depths, apart=0.02):
    """TUM names each picture and each depth map by its own time in seconds: those at most 0.02 s apart belong together."""
    try:
        times = {float(name): depths[name] for name in depths}
        nearest_time = {name: min(times, key=lambda t: abs(t - float(name))) for name in images if times}
    except ValueError:
        return []
    return [(name, images[name], times[t]) for name, t in nearest_time.items() if abs(t - float(name)) <= apart]


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


PACK_VERSION = 1  # raise it when the form of the file changes


def write_pack(file, root, size=None, depth_scale=1000.0):
    """Write the data set at root as one file, read back at memory speed: uint8 RGB, uint16 millimetres; whole or not at all.

    Without a size, frames are FastDepth's 250x333 grid with the margin outside its crop: what geometry "fastdepth" and its
    augmentation read is the same to the pixel. With one, whole frames at that size. Beyond 65.534 m nothing is measured.
    """
    file, dataset, start = Path(file), open_dataset(root, "all", size=None, depth_scale=depth_scale), time.time()
    if file.suffix != ".h5":
        raise ValueError(f"{file}: a pack is an HDF5 file: call it {file.with_suffix('.h5')}")
    file.parent.mkdir(parents=True, exist_ok=True)
    n, frame, partial = len(dataset), size or FASTDEPTH_VIEW[0], file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        with h5py.File(partial, "w") as h5:
            h5.attrs["fastdepth_pack"] = PACK_VERSION
            images = h5.create_dataset("image", (n, *frame, 3), np.uint8)
            depths = h5.create_dataset("depth", (n, *frame), np.uint16)
            for key in ("part", "scene", "name"):
                h5[key] = [getattr(sample, key) or "" for sample in dataset.samples]
            for i in range(n):
                image, depth = dataset.read(i)
                rows, cols = fastdepth_grid(*depth.shape) if size is None else (nearest(m, k) for m, k in zip(depth.shape, size))
                grid = rows[:, None].numpy(), cols.numpy()
                millimetres = (depth[grid] * 1000).round()
                images[i], depths[i] = image[grid], np.where(millimetres < 65535, millimetres, 0)
                progress("packing", i + 1, n, start)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # h5py's answers to a full disk
        raise ValueError(f"{file}: cannot be written ({str(error).splitlines()[0]}): make room, or choose another place") from None
    finally:
        partial.unlink(missing_ok=True)
    print(f"{file}: {n} frames of {frame[0]}x{frame[1]}, {file.stat().st_size / 2**20:.0f} MiB, in {time.time() - start:.0f} s")


def find_pack(root):
    """One file that write_pack wrote."""
    if root.suffix != ".h5":
        return []
    with opened(root, "a pack: write one with python data.py PATH --pack FILE") as h5:
        version, parts, scenes, names = h5.attrs["fastdepth_pack"], *(h5[key].asstr()[:] for key in ("part", "scene", "name"))
    if version != PACK_VERSION:
        raise ValueError(f"{root}: is a pack of version {version}, this code reads {PACK_VERSION}: write it again with --pack")
    written = root.stat().st_mtime_ns
    return [Sample(part or None, scene, (root, written, i), name) for i, (part, scene, name) in enumerate(zip(parts, scenes, names))]


@lru_cache(maxsize=2)
def memory_of(file, written):
    """The pictures (N, H, W, 3) and depths (N, H, W) of a pack as memory of the system's file cache, shared by all processes."""
    with opened(file, "a pack") as h5:
        return [np.memmap(file, d.dtype, "r", d.id.get_offset(), d.shape) for d in (h5["image"], h5["depth"])]


def read_pack(source, scale):
    """uint8 RGB, and uint16 millimetres whatever the scale of the original was."""
    file, written, i = source
    images, depths = memory_of(file, written)
    return np.array(images[i]), to_metres(depths[i], 1000, f"{file}[{i}]")


# To add a layout: find(root) -> [Sample], empty if root is something else; read(source, scale).
LAYOUTS = {
    # name                  find        read        recognised by
    "HDF5 folders":        (find_hdf5,  read_hdf5,  "{train,val}/<scene>/*.h5"),
    "NYU's labelled file": (find_mat,   read_mat,   "nyu_depth_v2_labeled.mat, or nyu_depth_v2_labeled.mat/rawDepths"),
    "lists":               (find_lists, read_pair,  "a .txt or .csv of lines `picture depth`, or train.txt, val.txt, nyu2_train.csv, ... in a folder"),
    "paired folders":      (find_pairs, read_pair,  "rgb, image or color beside depth, or NAME_image beside NAME_depth"),
    "pack":                (find_pack,  read_pack,  "a .h5 file, written by python data.py PATH --pack FILE"),
}


# ------------------------------------------------------------------------------------------------------------------
# Geometry: one function for training, evaluation and prediction
# ------------------------------------------------------------------------------------------------------------------

GEOMETRIES, AUGMENTS = ("fastdepth", "full"), ("none", "flip", "colour", "paper")
FASTDEPTH_VIEW = (250, 333), (228, 304)  # FastDepth's grid, and the crop in its middle that the network sees


def nearest(n_in, n_out):
    """The input pixel under the centre of each output pixel, as PIL's NEAREST chooses it.

    torch's "nearest-exact" is the same but where a centre lies on the border of two pixels (4 of the 250 rows of a 480-row
    frame): there PIL's rounding decides, since it adds up steps.
    """
    steps = torch.full((n_out,), n_in / n_out, dtype=torch.float64)
    steps[0] /= 2
    return steps.cumsum(0).long()


def fastdepth_grid(height, width):
    """The source rows (250,) and columns (333,) of FastDepth's grid: centre crop to 4:3, nearest."""
    box_h, box_w = min(height, round(width * 3 / 4)), min(width, round(height * 4 / 3))
    (grid_h, grid_w), _ = FASTDEPTH_VIEW
    return nearest(box_h, grid_h) + (height - box_h) // 2, nearest(box_w, grid_w) + (width - box_w) // 2


@lru_cache(maxsize=16)
def sampling_grid(height, width, size, geometry="fastdepth", zoom=1.0, angle=0.0, flip=False):
    """Which source pixel every output pixel shows: rows, cols (h, w) int64, and inside (h, w) bool, False where the
    rotation looks past the picture. One lookup serves image and depth, so that they cannot drift apart.

    fastdepth: centre crop to 4:3, nearest to 250x333, centre crop 228x304, nearest to size (the official transforms).
    full:      the whole picture squeezed to size.
    zoom, angle (degrees) and flip move the view before the crop, in pixels that are square: the squeezed output is not.
    """
    if geometry == "fastdepth":
        (source_rows, source_cols), (crop_h, crop_w) = fastdepth_grid(height, width), FASTDEPTH_VIEW[1]
    elif geometry == "full":
        source_rows, source_cols, crop_h, crop_w = torch.arange(height), torch.arange(width), height, width
    else:
        raise ValueError(f"unknown geometry {geometry!r}: choose one of {', '.join(GEOMETRIES)}")
    grid_h, grid_w = len(source_rows), len(source_cols)
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

    augment: "none" or False; "flip", a mirror image half of the time; "colour", also rotation +-5 degrees, brightness, contrast
    and saturation 0.6 to 1.4; "paper" or True, what FastDepth draws: also zoom 1 to 1.5 with depth divided by it (what is
    nearer looks larger; but a network cannot see the zoom, and learns to answer too near). The draw depends on (seed, epoch, i)
    alone: set ds.epoch before each epoch, and any number of workers gives the same pictures. size None: as stored, not augmented.
    """

    def __init__(self, layout, samples, size, geometry, augment, seed, scale):
        self.layout, self.samples, self.files = layout, samples, [s.name for s in samples]
        self.size, self.geometry, self.augment, self.seed, self.scale, self.epoch = size, geometry, augment, seed, scale, 0
        self.native = None  # the one size of all frames, as soon as it is known

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        """As stored: (H, W, 3) uint8 RGB and (H, W) float32 metres of the same height and width."""
        image, depth = LAYOUTS[self.layout][1](self.samples[index].source, self.scale)
        (h, w), (dh, dw) = image.shape[:2], depth.shape
        if abs(h * dw - w * dh) > 0.02 * h * dw:
            raise ValueError(f"{self.files[index]}: the picture is {h}x{w} and its depth {dh}x{dw}: not the same view")
        return image, depth if (h, w) == (dh, dw) else depth[nearest(dh, h)[:, None].numpy(), nearest(dw, w).numpy()]

    def draw(self, index):
        """The augmentation of a sample in this epoch: how the view moves, and how colours change."""
        if self.augment == "none":
            return {}, None
        key = f"{self.seed} {self.epoch} {index}".encode()
        u = torch.rand(6, generator=torch.Generator().manual_seed(zlib.crc32(key))).tolist()
        if self.augment == "flip":
            return dict(flip=u[0] < 0.5), None
        zoom = 1 + 0.5 * u[1] if self.augment == "paper" else 1.0
        return dict(flip=u[0] < 0.5, zoom=zoom, angle=10 * u[2] - 5), [0.6 + 0.8 * v for v in u[3:]]

    def __getitem__(self, index):
        image, depth = self.read(index)
        h, w = depth.shape
        if self.size is None:
            self.native = self.native or (h, w)
            if self.native != (h, w):
                raise ValueError(f"{self.files[index]}: is {h}x{w}, other frames are {self.native[0]}x{self.native[1]}: use one size")
            return torch.from_numpy(image).permute(2, 0, 1).float() / 255, torch.from_numpy(depth)[None], index
        move, colour = self.draw(index)
        rows, cols, inside = sampling_grid(h, w, self.size, self.geometry, **move)
        pixel = (rows * w + cols).numpy()
        image = torch.from_numpy(image.reshape(-1, 3).take(pixel, 0)).permute(2, 0, 1).float() / 255
        depth = torch.from_numpy(depth.take(pixel)) / move.get("zoom", 1)
        if "angle" in move:
            image, depth = image * inside, depth * inside
        return jitter(image, *colour) if colour else image, depth[None], index


def find_samples(root):
    """The data set at root, whatever its layout -> the layout's name, and all samples, each with its part: train, val or test.

    test: only an official test part.  val: the data's own, else held out of train by scene, crc32(scene) % 5 == 0, or
    the last one where that gives none; without scenes, the last fifth of the sorted names.  ValueError if nothing is recognised.
    """
    root = Path(root)
    if not root.exists() and root.parent.suffix != ".mat":
        raise ValueError(f"{root}: no such file or folder: check --data")
    for layout, (find, _, _) in LAYOUTS.items():
        if samples := find(root):
            break
    else:
        known = "; ".join(f"{name}: {mark}" for name, (_, _, mark) in LAYOUTS.items())
        raise ValueError(f"{root}: no known layout found there. Known are {known}")
    own = [i for i, s in enumerate(samples) if s.part != "test"]
    if all(s.part != "val" for s in samples):
        held_out = [zlib.crc32(samples[i].scene.encode()) % 5 == 0 for i in own]
        scenes = sorted({samples[i].scene for i in own})
        if len(scenes) < 2:
            held_out = [k >= len(own) - len(own) // 5 for k in range(len(own))]
        elif len(set(held_out)) < 2:  # of few scenes the checksum may hold out none, or all
            held_out = [samples[i].scene == scenes[-1] for i in own]
        for i, held in zip(own, held_out):
            samples[i] = samples[i]._replace(part="val" if held else "train")
    return layout, samples


def open_dataset(root, split, size=(224, 224), augment=False, geometry="fastdepth", seed=0, depth_scale=1000.0, limit=None):
    """The split "train", "val", "test" or "all" of the data at root (find_samples). limit: only so many, evenly chosen."""
    if split not in (*SPLITS, "all"):
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}, all")
    augment = {False: "none", True: "paper"}.get(augment, augment)
    if augment not in AUGMENTS:
        raise ValueError(f"unknown augmentation {augment!r}: choose one of {', '.join(AUGMENTS)}")
    layout, samples = find_samples(root)
    chosen = [s for s in samples if split in ("all", s.part)]
    if not chosen:
        raise ValueError(f"{root}: its {split} split is empty ({layout}: {counts_of(samples)}): choose another split")
    n = min(limit or len(chosen), len(chosen))
    chosen = [chosen[i * len(chosen) // n] for i in range(n)]
    return DepthDataset(layout, chosen, size and tuple(size), geometry, augment, seed, depth_scale)


def counts_of(samples):
    """"637 train, 158 val": how many samples each part has."""
    counts = Counter(s.part for s in samples)
    return ", ".join(f"{counts[part]} {part}" for part in SPLITS if counts[part])


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

ROOMS_VERSION = 2  # raise it when the pictures change: data/rooms is then rendered again
ROOM_SIZE = (240, 320)
FOCAL = 0.81  # of the picture's width: NYU's Kinect

# A thing is a few boxes (x0, y0, z0, x1, y1, z1) in fractions of its width, height and depth: x from its middle, y from
# the floor, z from the wall behind it. The first box carries what lies about. Sizes are ranges in metres.
#   name           width       height        depth
ON_WALLS = (
    ("cupboard",  (0.8, 2.0), (1.60, 2.20), (0.40, 0.60), [(-.5, 0, 0, .5, 1, 1)]),
    ("sideboard", (0.8, 1.8), (0.70, 1.00), (0.40, 0.50), [(-.5, .1, 0, .5, 1, 1), (-.45, 0, 0, .45, .1, .9)]),
    ("counter",   (1.4, 2.8), (2.10, 2.30), (0.58, 0.62), [(-.5, .04, 0, .5, .41, 1), (-.5, .41, 0, .5, .43, 1.05), (-.5, .66, 0, .5, 1, .55)]),
    ("shelf",     (0.6, 1.4), (1.20, 2.10), (0.25, 0.35), [(-.5, .3, 0, .5, .33, 1), (-.5, 0, 0, .5, 1, .05), (-.5, 0, 0, -.47, 1, 1),
                                                            (.47, 0, 0, .5, 1, 1), (-.5, .03, 0, .5, .06, 1), (-.5, .62, 0, .5, .65, 1),
                                                            (-.5, .97, 0, .5, 1, 1)]),
    ("bed",       (0.9, 1.8), (0.90, 1.10), (1.95, 2.10), [(-.5, .1, 0, .5, .5, 1), (-.5, 0, 0, .5, 1, .03), (-.4, .5, .03, .4, .62, .2)]),
    ("sofa",      (1.5, 2.2), (0.75, 0.95), (0.80, 0.95), [(-.5, .1, 0, .5, .5, 1), (-.5, .5, 0, .5, 1, .25),
                                                            (-.5, .1, 0, -.4, .7, 1), (.4, .1, 0, .5, .7, 1), (-.35, .5, .25, .0, .85, .4)]),
    ("desk",      (1.0, 1.6), (0.72, 0.76), (0.60, 0.80), [(-.5, .95, 0, .5, 1, 1), (-.5, 0, 0, -.46, .95, 1), (.2, 0, 0, .5, .95, 1)]),
)
ABOVE = (
    ("door",      (0.8, 0.9), (2.03, 2.03), (0.04, 0.05), [(-.5, 0, 0, .5, 1, 1), (.36, .48, 1, .42, .5, 2.5)]),
    ("window",    (0.8, 1.8), (2.05, 2.20), (0.03, 0.04), [(-.5, .42, 0, .5, 1, 1), (-.55, .4, 0, .55, .42, 4)]),
    ("picture",   (0.4, 1.0), (1.75, 1.90), (0.02, 0.04), [(-.5, .68, 0, .5, 1, 1)]),
    ("curtain",   (0.4, 0.9), (2.20, 2.35), (0.08, 0.15), [(-.5, .02, 0, .5, 1, 1)]),
)
STANDING = (
    ("table",     (0.8, 1.8), (0.72, 0.76), (0.70, 1.00), [(-.5, .95, 0, .5, 1, 1), (-.48, 0, .04, -.42, .95, .1), (.42, 0, .04, .48, .95, .1),
                                                            (-.48, 0, .9, -.42, .95, .96), (.42, 0, .9, .48, .95, .96)]),
    ("chair",     (.42, 0.5), (0.85, 0.95), (0.42, 0.50), [(-.5, .47, 0, .5, .52, 1), (-.5, .52, 0, .5, 1, .08), (-.5, 0, 0, -.4, .47, .1),
                                                            (.4, 0, 0, .5, .47, .1), (-.5, 0, .9, -.4, .47, 1), (.4, 0, .9, .5, .47, 1)]),
    ("armchair",  (0.7, 0.9), (0.75, 1.00), (0.75, 0.90), [(-.35, .05, 0, .35, .45, 1), (-.5, .05, 0, .5, 1, .25),
                                                            (-.5, .05, 0, -.35, .65, 1), (.35, .05, 0, .5, .65, 1)]),
    ("low table", (0.6, 1.2), (0.38, 0.46), (0.50, 0.80), [(-.5, .88, 0, .5, 1, 1), (-.4, 0, .1, -.3, .88, .9), (.3, 0, .1, .4, .88, .9)]),
    ("crate",     (0.3, 0.6), (0.25, 0.50), (0.30, 0.50), [(-.5, 0, 0, .5, 1, 1)]),
    ("lamp",      (0.3, 0.4), (1.40, 1.70), (0.30, 0.40), [(-.4, 0, .1, .4, .02, .9), (-.04, .02, .46, .04, .8, .54), (-.5, .8, 0, .5, 1, 1)]),
)
PARTS = 7  # boxes of the thing that has most
# Patterns are cells of u x v metres; with shift 1 every second row is moved by half a cell.
#               u     v    shift
PATTERNS = ((9.00, 9.00, 0),   # plain
            (9.00, 9.00, 0),   # plain
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

    boxes (B, K, 6): low and high corner in a frame of its own, which stands at poses (B, K, 3): x, z, turn. The first box is the
    room, a box of NaN is none. looks (B, L, 8): of wall, floor, ceiling, then things and what lies about; things (K - 1): which of
    these a box is, from 1.
    The order of the draws makes the rooms: whoever changes it raises ROOMS_VERSION.
    """
    u, used = torch.stack([torch.rand(1024, generator=torch.Generator().manual_seed(key)) for key in keys]), 0

    def between(low, high, *shape):
        """The next unused random numbers of every room, (B, *shape)."""
        nonlocal used
        used += math.prod(shape)
        return low + (high - low) * u[:, used - math.prod(shape):used].view(-1, *shape)

    def choose(kinds, n):
        """n things a room: which kind (B, n), sizes (B, n, 3) and boxes (B, n, PARTS, 6); a missing box is NaN."""
        low, high = (torch.tensor([[extent[end] for extent in kind[1:4]] for kind in kinds]) for end in (0, 1))
        boxes = torch.tensor([kind[4] + [(math.nan,) * 6] * (PARTS - len(kind[4])) for kind in kinds])
        which = between(0, len(kinds), n).long()
        sizes = low[which] + (high - low)[which] * between(0, 1, n, 3)
        return which, sizes, boxes[which] * torch.cat([sizes, sizes], -1)[:, :, None]

    room = torch.stack([between(2.2, 6.5), between(2.4, 3), between(2.5, 7.5)], -1)  # (B, 3)
    floor = room[:, None, ::2]  # (B, 1, 2)

    def place(kinds, n, at_wall):
        """n things a room: which kind (B, n), boxes (B, n, PARTS, 6), and the pose x, z, turn of the frame of each (B, n, 3)."""
        which, sizes, boxes = choose(kinds, n)
        turn = between(0, 4, n).floor() * (math.pi / 2) if at_wall else between(0, 2 * math.pi, n)
        across, ahead = torch.stack([turn.cos(), -turn.sin()], -1), torch.stack([turn.sin(), turn.cos()], -1)  # its x and z
        if at_wall:
            slack = ((across * floor).sum(-1).abs() - sizes[..., 0]).clamp(min=0)
            xz = across * (between(-.5, .5, n) * slack)[..., None] - ahead * (ahead * floor).sum(-1, True).abs() / 2
        else:
            xz = between(-.4, .4, n, 2) * floor
        return which, boxes, torch.cat([xz, turn[..., None]], -1)

    each, loose = 5, 4
    low_things, n_things = 2 * each, 3 * each
    kinds, boxes, poses = zip(place(ON_WALLS, each, True), place(STANDING, each, False), place(ABOVE, each, True))
    boxes, poses = torch.cat(boxes, 1), torch.cat(poses, 1)  # (B, n_things, PARTS, 6), (B, n_things, 3)
    # What lies about: small boxes on the first box of each thing that stands on the floor.
    many = low_things, loose
    low, high = boxes[:, :low_things, None, 0].expand(-1, -1, loose, -1).unflatten(-1, (2, 3)).unbind(-2)  # (B, low_things, loose, 3)
    size = torch.stack([.04 + .4 * between(0, 1, *many)**2, .02 + .4 * between(0, 1, *many)**2, .04 + .3 * between(0, 1, *many)**2], -1)
    middle = low + (high - low) * torch.stack([between(.1, .9, *many), torch.ones(len(keys), *many), between(.15, .85, *many)], -1)
    foot = size * torch.tensor([.5, 0, .5])
    clutter = torch.cat([middle - foot, middle + size - foot], -1)  # (B, low_things, loose, 6)
    n_small = low_things * loose
    things = 1 + torch.cat([torch.arange(n_things).repeat_interleave(PARTS), n_things + torch.arange(n_small)])
    shell = torch.cat([room * torch.tensor([-.5, 0, -.5]), room * torch.tensor([.5, 1, .5])], -1)
    boxes = torch.cat([shell[:, None], boxes.flatten(1, 2), clutter.flatten(1, 2)], 1)
    of = torch.cat([torch.arange(n_things).repeat_interleave(PARTS), torch.arange(low_things).repeat_interleave(loose)])
    poses = torch.cat([torch.zeros(len(keys), 1, 3), poses[:, of]], 1)

    n = 3 + n_things + n_small  # looks: walls, floor, ceiling, things, what lies about
    bright, kind = between(.08, .95, n), between(0, len(PATTERNS), n).long()
    bright[:, :3] = bright[:, :3] * torch.tensor([.35, .55, .15]) + torch.tensor([.6, .15, .8])
    colour = bright[..., None] * (1 + between(-.6, .6, n, 3) * between(0, 1, n, 1)**2 * torch.tensor([.5, 1, .2] + [1.3] * (n - 3))[:, None])
    wooden = between(0, 1, n, 1) < torch.tensor([0, .5, 0] + [.4] * n_things + [.05] * n_small)[:, None]
    colour = torch.where(wooden, torch.tensor([.62, .42, .26]) * (.4 + bright[..., None]), colour).clamp(.03, .97)
    kind[:, 0], kind[:, 1], kind[:, 2] = 4 * (kind[:, 0] == 4), 2 + kind[:, 1] % 2, 0
    glow = torch.zeros(len(keys), n)
    glow[:, 3 + low_things:3 + n_things] = (kinds[2] == 1) * between(0, 1.6, each)  # windows by day
    looks = torch.cat([colour, torch.tensor(PATTERNS)[kind], between(.05, .5, n, 1), glow[..., None]], -1)
    return dict(
        boxes=boxes, poses=poses, things=things, looks=looks,
        eye=torch.stack([between(-.46, .46) * room[:, 0], between(.9, 1.75), between(-.46, .46) * room[:, 2]], -1),
        target=torch.stack([between(-.45, .45) * room[:, 0], between(-.45, .45) * room[:, 2]], -1), pitch=between(-.5, .12), roll=between(-.06, .06),
        lamps=torch.stack([between(-.4, .4, 2) * room[:, :1], room[:, 1:2] - between(.1, .9, 2), between(-.4, .4, 2) * room[:, 2:]], -1),
        # exposure, ambient light, red and blue gain, noise, tone curve
        camera=torch.stack([between(.38, .62), between(.3, .7), between(.9, 1.2), between(.75, 1.1), between(.01, .05), between(.7, 1)], -1))


def render(indices, seed=0, size=ROOM_SIZE, device="cpu"):
    """Rooms `indices` of a seed -> pictures (B, 3, H, W) uint8 and exact depth (B, H, W) float32 metres.

    A room depends on (seed, index) alone; its numbers are drawn on the CPU, so that every device renders the same.
    """
    keys = [zlib.crc32(f"room {seed} {index}".encode()) for index in indices]
    s = {name: value.to(device) for name, value in furnish(keys).items()}
    (H, W), B = size, len(keys)

    # The camera: columns of axes are its right, up and ahead. A ray has z = 1 there, so that the distance along it is depth.
    toward = F.normalize(s["target"] - s["eye"][:, ::2], dim=-1) * s["pitch"].cos()[:, None]
    ahead = torch.stack([toward[:, 0], s["pitch"].sin(), toward[:, 1]], -1)
    side = F.normalize(torch.stack([ahead[:, 2], 0 * ahead[:, 0], -ahead[:, 0]], -1), dim=-1)
    up = torch.linalg.cross(ahead, side)
    cos, sin = s["roll"].cos()[:, None], s["roll"].sin()[:, None]
    axes = torch.stack([side * cos + up * sin, up * cos - side * sin, ahead], -1)  # (B, 3, 3)
    focal = FOCAL * W  # pixels
    x = (torch.arange(W, device=device) + .5 - W / 2) / focal  # (W)
    y = (H / 2 - torch.arange(H, device=device) - .5) / focal  # (H)

    # Each box in its own frame, seen from the eye.
    px, pz, cos, sin = s["poses"][..., 0], s["poses"][..., 1], s["poses"][..., 2].cos(), s["poses"][..., 2].sin()  # (B, K)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([cos, zero, -sin, zero, one, zero, sin, zero, cos], -1).unflatten(-1, (3, 3))  # (B, K, 3, 3)
    eye = turn @ (s["eye"][:, None] - torch.stack([px, zero, pz], -1))[..., None]  # (B, K, 3, 1)
    low, high = s["boxes"].unflatten(-1, (2, 3)).sub(eye.mT).unbind(-2)  # (B, K, 3)
    frame = turn @ axes[:, None]  # (B, K, 3, 3)

    # A box is looked for in the rectangle around its corners, or everywhere if one is behind the camera.
    bits = torch.tensor([[i >> axis & 1 for axis in range(3)] for i in range(8)], device=device, dtype=torch.bool)
    corners = torch.where(bits, high[..., None, :], low[..., None, :]) @ frame  # (B, K, 8, 3) in the camera's frame
    behind = corners[..., 2] < .05  # (B, K, 8)
    within = ((low < .25) & (high > -.25)).all(-1)  # the camera does not stand in things
    u, v = corners[..., 0] / corners[..., 2] * focal + W / 2, corners[..., 1] / corners[..., 2] * -focal + H / 2  # pixels
    rectangle = torch.stack([u.amin(-1), v.amin(-1), -u.amax(-1) - 1, -v.amax(-1) - 1], -1)  # left, top, -right, -bottom
    limit = torch.tensor([0, 0, -W, -H], device=device)
    rectangle = torch.where(behind.any(-1, keepdim=True), limit, torch.maximum(rectangle, limit))
    hidden = within | behind.all(-1) | low.isnan().any(-1)
    rectangle = torch.where(hidden[..., None], 0, rectangle).amin(0) * torch.tensor([1, 1, -1, -1], device=device)  # of all rooms together
    traced = {k: (slice(top, bottom), slice(left, right)) for k, (left, top, right, bottom) in enumerate(rectangle.int().tolist())
              if k and left < right and top < bottom}

    # 1 / depth is affine in the pixel on any plane: the sum of what its column and what its row gives. Where the ray has passed
    # every plane that has the eye in front of it and none that has the eye behind it, it is in the box: three of the
    # former (inf where there are fewer), six of the latter (some twice where there are fewer).
    some = torch.tensor([0, *traced], device=device)
    lo, hi, inside, axis = low[:, some], high[:, some], (low * high < 0)[:, some], frame[:, some].repeat(1, 1, 3, 1)
    scale = torch.cat([torch.where(lo > 0, lo, hi), torch.where(lo > 0, hi, lo), torch.where(hi < 0, lo, hi)], -1).reciprocal()  # (B, K', 9)
    front = torch.where(hidden[:, some, None], -math.inf, torch.where(inside, math.inf, 0))  # (B, K', 3)
    scale[..., :3].masked_fill_(inside, 0)
    by_column = (scale * axis[..., 0])[..., None] * x + (scale * axis[..., 2] + F.pad(front, (0, 6)))[..., None]  # (B, K', 9, W)
    by_row = (scale * axis[..., 1])[..., None] * y  # (B, K', 9, H)

    # Box 0 is the room, which every ray leaves; the others are boxes that it may enter.
    near = (by_column[:, 0, 3:, None] + by_row[:, 0, 3:, :, None]).amax(1)  # (B, H, W), 1 / depth
    hit = torch.zeros(B, H, W, dtype=torch.int32, device=device)
    for i, (k, (rows, columns)) in enumerate(traced.items(), 1):
        planes = by_column[:, i, :, None, columns] + by_row[:, i, :, rows, None]  # (B, 9, rows, columns)
        enter, before = planes[:, :3].amin(1), near[:, rows, columns]
        closer = enter > torch.maximum(planes[:, 3:].amax(1), before)
        near[:, rows, columns] = torch.where(closer, enter, before)
        hit[:, rows, columns].masked_fill_(closer, k)
    depth = near.reciprocal()

    # Where each ray ends, in the frame of what it hit: metres from the low faces, and which face that is.
    first = torch.arange(B, device=device)[:, None, None]

    def look_up(table, index):
        """(B, n) numbers, (B, H, W) which of them -> (B, H, W)."""
        return table.flatten().index_select(0, (index + first * table.shape[1]).flatten()).view(B, H, W)

    def plane(weights):
        """(B, 3) -> weights . (x, y, 1) at every pixel, (B, H, W)."""
        return (weights[:, :1] * x + weights[:, 2:])[:, None] + (weights[:, 1:2] * y)[..., None]

    cos, sin = look_up(cos, hit), look_up(sin, hit)
    wx, ry, wz = (plane(axes[:, axis]) for axis in range(3))  # the ray in the world
    rx, rz = wx * cos - wz * sin, wx * sin + wz * cos  # and in the box's frame
    inner = [depth * ray - look_up(low[..., axis], hit) for axis, ray in enumerate((rx, ry, rz))]
    gaps = [torch.minimum(inner[axis], look_up((high - low)[..., axis], hit) - inner[axis]).abs() for axis in range(3)]
    gap = torch.minimum(gaps[0], gaps[1])
    edge = torch.minimum(torch.maximum(gaps[0], gaps[1]), torch.maximum(gap, gaps[2]))  # the second: metres to the next edge
    gap = torch.minimum(gap, gaps[2])
    on_x, on_y = gaps[0] == gap, gaps[1] == gap

    # Colour: a pattern of cells with darker joints, and fine grain that fades with distance.
    of_box = torch.cat([s["things"].new_zeros(1), s["things"] + 2]).int()
    what = torch.where(hit == 0, torch.where(on_y, torch.where(ry < 0, 1, 2), 0), of_box.index_select(0, hit.flatten()).view_as(hit))
    red, green, blue, cell_u, cell_v, shift, contrast, glow = (look_up(look, what) for look in s["looks"].unbind(-1))
    fu, fv = torch.where(on_x, inner[2], inner[0]), torch.where(on_y, inner[2], inner[1])
    cells_v = fv / cell_v
    row = cells_v.floor()
    cells_u = fu / cell_u + .5 * shift * row
    column = cells_u.floor()
    joint = torch.minimum((cells_u - column - .5).abs_().sub_(.5).mul_(-cell_u), (cells_v - row - .5).abs_().sub_(.5).mul_(-cell_v)) < .004
    grain = (hashed((fu * 50).floor(), (fv * 50).floor(), what) - .5) * (1.5 / depth).clamp(max=1)
    shade = 1 - .25 * joint - contrast * (hashed(column, row, what) - .25 * grain)

    # Light: of the room, of lamps, less in corners. A lamp at L from the eye is at L - depth * ray from here.
    exposure, ambient, red_gain, blue_gain, noise, tone = (c[:, None, None] for c in s["camera"].unbind(-1))
    light = ambient + glow
    along = torch.where(on_x, rx, torch.where(on_y, ry, rz))  # the ray along the face's axis
    nx, ny, nz = torch.where(on_x, cos, 0).where(on_x | on_y, sin), on_y.float(), torch.where(on_x, -sin, 0).where(on_x | on_y, cos)
    length = 1 + y[:, None]**2 + x**2  # (H, W), the ray's, squared
    for lamp in (s["lamps"] - s["eye"][:, None]).unbind(1):  # (B, 3)
        lx, ly, lz = lamp[..., None, None].unbind(1)
        square = lamp.square().sum(-1)[:, None, None] + depth * (depth * length - plane(2 * (lamp[:, None] @ axes)[:, 0]))
        facing = depth * along.abs() - along.sign() * (nx * lx + ny * ly + nz * lz)
        light = light + facing.clamp(min=0) * square.rsqrt() / (1 + square / 9) * 1.2
    shade = shade * light * (1 - .35 * torch.exp(edge / -.15))

    # The camera: white balance, exposure, noise, and a curve between linear and gamma 2.
    image = torch.stack([red * red_gain, green, blue * blue_gain], 1) * shade[:, None]
    image = image * (exposure / image.mean((1, 2, 3))[:, None, None])[:, None]
    pixel = torch.arange(H * W, device=device).view(1, H, W)
    random_bits = (hashed(pixel, torch.tensor(keys, device=device)[:, None, None] % 65521) * 2**24).int()
    image = image + noise[:, None] * torch.stack([(random_bits >> 8 * c & 255) / 128 - 1 for c in range(3)], 1)
    image = image.clamp(0, 1)
    image = tone[:, None] * image + (1 - tone[:, None]) * image.sqrt()
    return (image * 255).round().to(torch.uint8), depth


def kinect_holes(depth, index):
    """Depth (H, W) as a Kinect would measure it: nothing in the shadow that near things throw on far ones, nothing in
    some patches (glass, black cloth); 0 = not measured. For training depth only."""
    H, W = depth.shape
    shift = 8 / depth.clamp(min=.5)  # pixels: the projector stands to the side, so near things are shifted further
    shadow = sum(F.pad(shift, (0, k))[:, k:] - shift >= k for k in range(1, 9)) > 0
    v, u = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    patch = hashed(u // 20, v // 16, torch.tensor(index)) < .02
    return torch.where(shadow | patch, 0, depth)


def rooms_facts(n, seed):
    """What rooms.json says of a folder of rooms."""
    return dict(version=ROOMS_VERSION, seed=seed, train=n, val=n // 8)


def write_rooms(out, n, seed=0, device="cpu"):
    """Render n training and n // 8 validation rooms into {train,val}/rooms/*.h5 below `out`, which appears when complete.

    The training depth has holes as a Kinect's, the validation depth is exact and complete.
    """
    out = Path(out)
    if n < 8:  # n // 8 validate
        raise ValueError(f"--rooms must be at least 8, got {n}")
    if out.exists() and not (out / "rooms.json").is_file():
        raise ValueError(f"{out}: exists and holds no rooms: choose another --out")
    facts, start, done = rooms_facts(n, seed), time.time(), 0
    batch = 1 if device == "cpu" else 64  # one frame stays in a processor's cache
    partial = out.with_name(out.name + f".partial-{os.getpid()}")
    try:
        for part in ("train", "val"):
            (partial / part / "rooms").mkdir(parents=True)
            count = facts[part]
            for i in range(0, count, batch):
                # Validation rooms are numbers -1, -2, ...: more training rooms never become validation rooms.
                numbers = [j if part == "train" else -1 - j for j in range(i, min(i + batch, count))]
                for j, image, depth in zip(range(i, count), *(t.cpu() for t in render(numbers, seed, device=device))):
                    depth = kinect_holes(depth, j) if part == "train" else depth
                    with h5py.File(memory := io.BytesIO(), "w") as h5:  # HDF5 itself crashes on a full disk
                        packed = dict(compression="lzf", shuffle=True)
                        h5.create_dataset("rgb", data=image.numpy(), chunks=tuple(image.shape), **packed)
                        # 1/1024 m is exact in float32 with few bits set, so it compresses
                        h5.create_dataset("depth", data=((depth * 1024).round() / 1024).numpy(), chunks=tuple(depth.shape), **packed)
                    (partial / part / "rooms" / f"{j:05d}.h5").write_bytes(memory.getvalue())
                done += len(numbers)
                progress("rendering rooms", done, n + n // 8, start)
        print(f"rendered {done} rooms into {out} in {time.time() - start:.0f} s")
        (partial / "rooms.json").write_text(json.dumps(facts) + "\n")
        if not have_rooms(out, n, seed):  # another process may have been quicker
            shutil.rmtree(out, ignore_errors=True)  # rooms of another version, number or seed
            partial.rename(out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}): make room, or choose another --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def have_rooms(out, n, seed=0):
    """Whether `out` holds these very rooms, rendered by this version."""
    try:
        return json.loads((Path(out) / "rooms.json").read_text()) == rooms_facts(n, seed)
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
    """argparse whose errors are one line, as all others (run_script), and whose --help says every default."""

    def add_argument(self, *names, **more):
        """As argparse's."""
        if more.get("default") not in (None, [], argparse.SUPPRESS):
            more["help"] = f"{more.get('help', '')} (default: %(default)s)".lstrip()
        return super().add_argument(*names, **more)

    def error(self, message):
        """What argparse calls for a wrong flag."""
        raise ValueError(message)


def above_0(kind, or_0=False):
    """The argparse type of a number above 0, or also 0."""
    def number(text):
        """The number, or the error that argparse prints."""
        if not ((value := kind(text)) > 0 or or_0 and value == 0):
            raise argparse.ArgumentTypeError(f"must be {'0 or ' * or_0}above 0, got {text}")
        return value
    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


def multiple_of_32(text):
    """The argparse type of a height or width that the networks take."""
    if (value := int(text)) <= 0 or value % 32:
        raise argparse.ArgumentTypeError(f"must be a multiple of 32, got {text}")
    return value


def check_device(name):
    """ValueError if PyTorch has no such device here."""
    try:
        torch.zeros(1, device=name).item()  # which "meta", a device without numbers, cannot give
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: PyTorch finds no such device here") from None


def run_script(main):
    """Exit codes of every script: 0 done, 1 a claim failed, 2 the user's mistake in one line, 130 Ctrl-C."""
    try:
        main()
    except torch.OutOfMemoryError:
        print(f"{Path(sys.argv[0]).name}: error: the GPU's memory is too small: lower --batch-size or --size", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:  # a worker's error ends in the same line, after a traceback
        line = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv=None):
    parser = Parser(description="Look at a data set, or render rooms.")
    parser.add_argument("path", nargs="?", help="a data set of any known layout")
    parser.add_argument("--depth-scale", type=above_0(float), default=1000.0, help="16-bit depth / this = metres (TUM 5000, KITTI 256)")
    parser.add_argument("--pack", metavar="FILE.h5", help="write the data set as one file that is read at memory speed")
    parser.add_argument("--size", type=above_0(int), nargs=2, metavar=("H", "W"), help="of the frames of --pack (default: what geometry fastdepth reads)")
    parser.add_argument("--rooms", type=int, metavar="N", help="render N training and N/8 validation rooms into --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where to render")
    parser.add_argument("--out", help="folder of the rooms, or the contact sheet's file (default runs/data-NAME.png)")
    args = parser.parse_args(argv)
    if (args.path is None) == (args.rooms is None):
        parser.error("give the path of a data set, or --rooms N to render one")
    if args.rooms is not None:
        check_device(args.device)
        if not args.out:
            parser.error("--rooms needs --out FOLDER (data/rooms belongs to train.py, which renders it)")
        write_rooms(args.out, args.rooms, args.seed, args.device)
        return

    if args.size and not args.pack:
        parser.error("--size is the height and width of the frames of --pack: give that too")
    if args.pack:
        return write_pack(args.pack, args.path, args.size and tuple(args.size), args.depth_scale)
    ds = open_dataset(args.path, "all", size=None, depth_scale=args.depth_scale)
    print(f"{args.path}: {ds.layout} ({LAYOUTS[ds.layout][2]})")
    print(f"pairs:  {counts_of(ds.samples)}; scenes: {len({s.scene for s in ds.samples})}")
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
