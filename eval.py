"""Evaluation and prediction, with a checkpoint (.pt) or an exported network (.onnx).

    python eval.py runs/fastdepth-1/best.pt --data rooms:768          # metrics, and a sheet of samples
    python eval.py best.pt --data nyu --split test --protocol eigen --json nyu.json
    python eval.py best.pt --images photos --out depth                # depth of your own photos

Metrics are computed per image, then averaged, unless the protocol pools all pixels. PROTOCOLS says what each
--protocol compares, and where. The default, own, is the view that the network was trained and validated on.
"""
import argparse
import glob
import json
import math
import signal
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import data
from data import (FOCAL, UserError, by, depth_factor, shrink, valid_mask, view, whole_file,
                  whole_image_size)
from model import ModelError, fold_batch_norm, load_model

# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------

METRICS = ("rmse", "mae", "absrel", "sqrel", "rmse_log", "log10", "silog", "d1", "d2", "d3", "irmse")
LIMITS = (1, 2, 3, 5, 10, 20, 40)  # metres, between the ranges of the table by distance


def depth_metrics(pred, target, mask):
    """(B, 1, H, W) prediction, ground truth (metres) and bool mask -> dict of (B,); NaN if nothing is valid.

    rmse, mae        m
    absrel, sqrel    |error| and error^2, relative to the ground truth
    rmse_log, log10  of the difference of logarithms: natural and squared, decimal and absolute
    silog            KITTI's: 100 x the standard deviation of the log error. (The loss silog is Eigen's.)
    d1, d2, d3       share of pixels with max(pred / target, target / pred) below 1.25, 1.25^2, 1.25^3
    irmse            1/m: the RMSE of inverse depth
    """
    return metrics_of({name: e.sum(1) for name, e in per_image_errors(pred, target, mask).items()})


def per_image_errors(pred, target, mask):
    """As depth_metrics, but the sums over pixels from which the metrics follow, for each image and each range
    of the ground truth between LIMITS: dict of (B, ranges).

    Logarithms and inverses take max(pred, 1 mm), so that a network may predict 0.
    """
    dtype = torch.float32 if mask.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    batch, ranges = len(mask), len(LIMITS) + 1
    image = torch.arange(batch, device=mask.device).view(-1, 1, 1, 1).expand_as(mask)[mask]
    pred, target = pred[mask].to(dtype), target[mask].to(dtype)
    safe = pred.clamp(min=1e-3)
    error = pred - target
    log_error = safe.log() - target.log()
    ratio = torch.maximum(safe / target, target / safe)
    errors = dict(
        count=torch.ones_like(error), mae=error.abs(), squared=error**2,
        absrel=error.abs() / target, sqrel=error**2 / target,
        log=log_error, log_squared=log_error**2, log10=log_error.abs() / math.log(10),
        d1=ratio < 1.25, d2=ratio < 1.25**2, d3=ratio < 1.25**3,
        inverse_squared=(1 / safe - 1 / target)**2)
    limits = torch.tensor(LIMITS, dtype=dtype, device=mask.device)
    cell = image * ranges + torch.bucketize(target, limits)  # a limit belongs to the nearer range
    return {name: torch.bincount(cell, e.to(dtype), batch * ranges).view(batch, ranges)
            for name, e in errors.items()}


def metrics_of(errors):
    """Sums of per_image_errors, of any shape -> metrics of that shape."""
    mean = {name: e / errors["count"] for name, e in errors.items()}
    mean["rmse"] = mean["squared"].sqrt()
    mean["rmse_log"] = mean["log_squared"].sqrt()
    mean["silog"] = 100 * (mean["log_squared"] - mean["log"]**2).clamp(min=0).sqrt()
    mean["irmse"] = mean["inverse_squared"].sqrt()
    return {name: mean[name] for name in METRICS}


# ------------------------------------------------------------------------------------------------------------
# Protocols and evaluation
# ------------------------------------------------------------------------------------------------------------

# A protocol fixes the grid of the ground truth (if it says none, the frame's own) and the pixels that count:
# rows and columns, in pixels or as shares of the frame, and depth up to max_depth metres. Predictions are
# clamped to `clamp`, and with `flip` averaged with those for the flipped images. `pooled` means over all
# pixels, not over images. The network sees the same view at the scale of its own training.
PROTOCOLS = {
    "own": dict(),  # size, geometry and max_depth of the network's config
    "fastdepth": dict(grid=((224, 224), "fastdepth"), max_depth=math.inf),  # every measured pixel
    "eigen": dict(frame=(480, 640), rows=(45, 471), cols=(41, 601), clamp=(1e-3, 10.0), max_depth=10.0),
    "densedepth": dict(frame=(480, 640), rows=(20, 460), cols=(24, 616), clamp=(0.1, 10.0), max_depth=10.0,
                       pooled=True, flip=True),
    "garg": dict(rows=(0.40810811, 0.99189189), cols=(0.03594771, 0.96405229), clamp=(1e-3, 80.0),
                 max_depth=80.0),  # KITTI
}


def cut(depth, rows, cols):
    """The part of (B, 1, H, W) between limits in pixels, or as fractions of H and W, truncated."""
    height, width = depth.shape[-2:]
    top, bottom = (int(n * height) if isinstance(n, float) else n for n in rows)
    left, right = (int(n * width) if isinstance(n, float) else n for n in cols)
    return depth[..., top:bottom, left:right]


def flip_average(predict):
    """predict, averaged with its prediction for the horizontal flip, flipped back."""
    return lambda image: (predict(image) + predict(image.flip(-1)).flip(-1)) / 2


def at_training_scale(predict, config, size=None, geometry="full"):
    """predict() for frames (B, 3, H, W) of any size: crops by `geometry`, resizes to `size`, corrects metres.

    size None: the one at which objects look as large as in training, assuming FOCAL.
    """
    def predict_frames(image):
        """(B, 3, H, W) in [0, 1] -> (B, 1, h, w) metres of what `geometry` shows."""
        frame = tuple(image.shape[-2:])
        focal = FOCAL * max(frame)
        shown = size or whole_image_size(frame, focal, config)
        return predict(view(image, shown, geometry)) * depth_factor(focal, frame, shown, geometry, config)
    return predict_frames


def compare(predict, image, depth, grid=None):
    """Prediction and ground truth of a batch, on the CPU, on the grid (size, geometry) or that of `depth`."""
    pred = predict(image).float().cpu()
    if grid:
        depth = view(depth, *grid)
    return F.interpolate(pred, depth.shape[-2:], mode="bilinear"), depth


def check_finite(depth, name):
    """UserError if a prediction contains NaN or infinity."""
    if not depth.isfinite().all():
        raise UserError(f"{name or 'the network'}: predicts NaN or infinity: its weights are damaged, "
                        "or in training --lr is too high")


@torch.no_grad()
def evaluate(predict, loader, max_depth=math.inf, grid=None, frame=None, rows=(0, None), cols=(0, None),
             clamp=None, pooled=False, name=None):
    """Metrics of predict: (B, 3, H, W) on the CPU -> metres, over a loader of (image, depth, index).

    Returns a dict of their means over images, with `images` (counted) and `skipped` (no valid pixel), and a
    dict of details: `images`, the metrics of each image as (N,) tensors, NaN where skipped, and
    `ranges`, a dict for each range of distance that occurs, over all its pixels.

    grid, frame, rows, cols, clamp, pooled: see PROTOCOLS.  name: of the network, for progress and errors.
    UserError if a frame is not of size `frame`, a prediction not finite, or no pixel valid.
    """
    found, done, start = [], 0, time.time()
    for image, depth, index in loader:
        if frame and tuple(depth.shape[-2:]) != frame:
            raise UserError(f"{loader.dataset.files[index[0]]}: is {by(depth.shape[-2:])}, and this protocol "
                            f"is defined for {by(frame)} frames: use --protocol own")
        pred, depth = compare(predict, image, depth, grid)
        check_finite(pred, name)
        if clamp:
            pred = pred.clamp(*clamp)
        pred, depth = cut(pred, rows, cols), cut(depth, rows, cols)
        found.append(per_image_errors(pred, depth, valid_mask(depth, max_depth)))
        done += len(image)
        if name:
            data.progress(name, done, len(loader.dataset), start)

    errors = {key: torch.cat([batch[key] for batch in found]) for key in found[0]}  # (N, ranges)
    images = metrics_of({key: e.sum(1) for key, e in errors.items()})
    counted = errors["count"].sum(1) > 0
    if not counted.any():
        raise UserError(f"no image has a valid pixel within {max_depth:g} m: check --depth-scale")
    if pooled:
        result = metrics_of({key: e.sum() for key, e in errors.items()})
    else:
        result = {key: values[counted].mean() for key, values in images.items()}
    result = {key: value.item() for key, value in result.items()}
    result |= dict(images=int(counted.sum()), skipped=int((~counted).sum()))

    by_range = metrics_of({key: e.sum(0) for key, e in errors.items()})
    by_range["share"] = errors["count"].sum(0) / errors["count"].sum()
    limits = [0, *LIMITS, None]  # the last range is open
    ranges = [{"from": limits[i], "to": limits[i + 1]} | {key: v[i].item() for key, v in by_range.items()}
              for i in range(len(LIMITS) + 1) if by_range["share"][i]]
    return result, dict(images=images, ranges=ranges)


def mean_depth_baseline(dataset, max_depth):
    """The mean depth of each pixel over at most 512 training frames, (1, 1, h, w): the best prediction, in
    squared error, that ignores the image."""
    total = seen = 0
    for i in torch.linspace(0, len(dataset) - 1, min(512, len(dataset))).long().tolist():
        depth = dataset[i][1]
        mask = valid_mask(depth, max_depth)
        total = total + torch.where(mask, depth, 0)
        seen = seen + mask.long()
    overall = total.sum() / seen.sum().clamp(min=1)
    return torch.where(seen > 0, total / seen.clamp(min=1), overall)[None]


@torch.no_grad()
def sample_sheet(predict, dataset, file, max_depth, n=6, grid=None):
    """Write n evenly chosen samples as one PNG: image | ground truth | prediction | error.

    All depths share one range of colours, and all errors another, from 0 (dark) up: the bars are in metres.
    Values beyond the end of a bar have the colour of that end.
    """
    shown = []
    for i in torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long().tolist():
        image, depth, _ = dataset[i]
        pred, depth = (metres[0, 0] for metres in compare(predict, image[None], depth[None], grid))
        if grid:
            image = view(image, *grid)
        mask = valid_mask(depth, max_depth)
        error = torch.where(mask, (pred - depth).abs().clamp(min=1e-6), 0)  # 0 would be drawn grey
        image = (255 * image.permute(1, 2, 0)).round().byte()
        shown.append((image, torch.where(mask, depth, 0), pred.clamp(min=1e-3), error))
    _, truth, preds, errors = (torch.cat([t.flatten() for t in column]) for column in zip(*shown))
    near, far = np.quantile(torch.cat([truth[truth > 0], preds]), (0.01, 0.99))
    most = np.quantile(errors[truth > 0], 0.99) if truth.any() else 1.0
    height = max(1, round(256 * shown[0][1].shape[0] / shown[0][1].shape[1]))
    rows = [[image.numpy(), data.colourise(depth, near, far), data.colourise(pred, near, far),
             data.colourise(error, most, 0)] for image, depth, pred, error in shown]
    rows = [[np.array(Image.fromarray(panel).resize((256, height), Image.Resampling.BOX)) for panel in row]
            for row in rows]
    rows[0] += [data.colour_bar(near, far, height), data.colour_bar(most, 0, height)]
    with whole_file(file) as f:
        data.tile(rows, ("image", "ground truth", "prediction", "error", "metres")).save(f, "PNG")


# ------------------------------------------------------------------------------------------------------------
# Networks from files
# ------------------------------------------------------------------------------------------------------------


def load_predictor(file, device="cpu", threads=0):
    """A .pt or .onnx file -> predict: (B, 3, H, W) in [0, 1] -> (B, 1, H', W') metres, and its config.

    config is load_model's, and `fixed`, the only size (H, W) that a static .onnx file takes, else None, and
    `runs_on`, to print.  threads: of ONNX Runtime; 0 is all cores.  UserError or ModelError names the file.
    """
    if Path(file).suffix == ".onnx":
        return load_onnx(file, device, threads)
    network, config = load_model(file, device)
    network = fold_batch_norm(network)

    @torch.no_grad()
    def predict(image):
        """(B, 3, H, W) on the CPU -> (B, 1, H', W') metres on `device`."""
        return network(image.to(device, memory_format=torch.channels_last))
    return predict, config | dict(fixed=None, runs_on=device)


def load_onnx(file, device, threads):
    """load_predictor for a file of export.py."""
    import onnxruntime
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    wanted = "CPUExecutionProvider", f"{device.split(':')[0].upper()}ExecutionProvider"
    providers = [name for name in onnxruntime.get_available_providers() if name in wanted]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions have no common base
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: ONNX Runtime cannot read it ({reason}): export it again") from None
    config = json.loads(session.get_modelmeta().custom_metadata_map.get("fastdepth", "{}"))
    if "frame" not in config:
        raise UserError(f"{file}: was not written by this version of export.py: export it again")
    for key in ("size", "frame", "fixed"):
        config[key] = config[key] and tuple(config[key])  # JSON has lists

    def predict(image):
        """(B, 3, H, W) -> (B, 1, H', W') metres. UserError if the file takes another size."""
        size = tuple(image.shape[-2:])
        if config["fixed"] not in (None, size):
            raise UserError(f"{file}: takes {by(config['fixed'])} only, and is shown {by(size)} here: "
                            f"export it with --size {size[0]} {size[1]}")
        return torch.from_numpy(session.run(["depth"], {"image": image.cpu().numpy()})[0])
    return predict, config | dict(runs_on=session.get_providers()[0])


def default_geometry(config):
    """Photos are seen whole, except by a static .onnx of the training size, which sees training's crop."""
    return config["geometry"] if config["fixed"] == config["size"] else "full"


# ------------------------------------------------------------------------------------------------------------
# Depth of one's own images
# ------------------------------------------------------------------------------------------------------------

LONGEST = 1280  # longest side of what is written: no network here sees more, and 12 megapixels are 48 MB
SOFTWARE = "FastDepth in six files"  # in the metadata of what is written: is_own looks for it


def find_images(paths):
    """Files, folders and globs -> image files, except hidden ones. UserError names a path without images."""
    files = []
    for path in paths:
        if Path(path).is_file():
            files.append(Path(path))
            continue
        found = sorted(Path(path).iterdir() if Path(path).is_dir() else map(Path, glob.glob(path)))
        suffixes = data.IMAGE_SUFFIXES + data.UNREAD
        found = [f for f in found if f.suffix.lower() in suffixes and f.name[0] != "."]
        readable = {f.with_suffix("") for f in found if f.suffix.lower() not in data.UNREAD}
        found = [f for f in found if f.suffix.lower() not in data.UNREAD or f.with_suffix("") not in readable]
        if not found:
            raise UserError(f"{path}: no image there ({', '.join(data.IMAGE_SUFFIXES)})")
        files += found
    return list(dict.fromkeys(files))  # each once


@torch.no_grad()
def predict_images(predict, config, files, out, size=None, geometry="full", focal=None, ply=False,
                   name=None):
    """Write the depth of image files into the folder `out` (see write_depth).

    size: at which the network sees them (None: where things are as large as in training).  geometry: full, or
    fastdepth for depth of the crop that training shows.  focal: the camera's, in pixels of the image (None:
    FOCAL x the longer side).  name: of the network, for errors.
    An image that cannot be read is named and skipped; a final UserError says how many.
    """
    taken = {file.resolve() for file in files}
    for file in files:
        again = is_own(out / f"{file.stem}_depth.png")  # an earlier prediction may be replaced
        ends = (".png", ".npy", "_depth.png", *([".ply"] if ply else []))
        for target in ((out / (file.stem + end)).resolve() for end in ends):
            if target in taken or target.exists() and not again:
                raise UserError(f"{file}: its {target.name} would overwrite a file: choose another --out, or "
                                "rename it")
            taken.add(target)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's, from 90 megapixels on
    failed = 0
    for file in files:
        try:
            image = data.read_image(file)
        except UserError as error:
            if len(files) == 1:
                raise
            print(error, file=sys.stderr)
            failed += 1
            continue
        frame = image.shape[:2]
        pixels = focal or FOCAL * max(frame)
        if not 0.1 <= pixels / max(frame) < 100:
            raise UserError(f"--focal {focal:g} cannot be in pixels: {file} is {by(frame)}")
        shown = size or whole_image_size(frame, pixels, config)
        seen = shrink(image, FOCAL * max(640, *config["frame"]) / pixels)  # then by nearest, as in training
        seen = torch.tensor(seen).permute(2, 0, 1)[None]  # (1, 3, H, W)
        depth = predict(view(seen, shown, geometry).float() / 255).float().cpu()
        check_finite(depth, name)
        depth = depth * depth_factor(pixels, frame, shown, geometry, config)
        small = shrink(image, LONGEST / max(frame))
        small_focal = pixels * max(small.shape[:2]) / max(frame)
        rows, cols = (max(1, round(n)) for n in data.visible_size(*small.shape[:2], geometry))
        top, left = (small.shape[0] - rows) // 2, (small.shape[1] - cols) // 2
        small = small[top:top + rows, left:left + cols]
        depth = F.interpolate(depth, (rows, cols), mode="bilinear")[0, 0].numpy()
        write_depth(out / file.stem, depth, small, small_focal if ply else None)
        print(f"{file}: {by(frame)}, focal length {pixels:.0f} pixels ({'given' if focal else 'assumed'}), "
              f"seen at {by(shown)} ({geometry}); depth {depth.min():.2f} to {depth.max():.2f} m, "
              f"written at {by(depth.shape)}")
    if failed:
        raise UserError(f"{failed} of {len(files)} images could not be read")


def write_depth(path, depth, image, focal=None):
    """Write (H, W) metres of a (H, W, 3) image:

    PATH.png        16-bit millimetres, at most 65.534 m, 0 where the network predicts 0 or less
    PATH.npy        float32 metres
    PATH_depth.png  to look at: the image, its depth in colours, and a colour bar in metres
    PATH.ply        with a focal length: a coloured point cloud
    """
    near, far = np.quantile(depth, (0.01, 0.99))
    far = max(far, near + 0.1)
    columns = [image, data.colourise(depth, near, far), data.colour_bar(near, far, len(depth))]
    own = PngInfo()
    own.add_text("Software", SOFTWARE)
    with whole_file(f"{path}_depth.png") as f:  # first: by it, the others may be replaced later
        data.tile([columns]).save(f, "PNG", pnginfo=own)
    with whole_file(f"{path}.png") as f:
        Image.fromarray((depth * 1000).round().clip(0, 65534).astype(np.uint16)).save(f, "PNG")
    with whole_file(f"{path}.npy") as f:
        np.save(f, depth)
    if focal:
        with whole_file(f"{path}.ply") as f:
            f.write(point_cloud(depth, image, focal))


def is_own(file):
    """Whether write_depth wrote this PATH_depth.png."""
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # missing, damaged, or no image: Pillow raises errors of many types
        return False


def point_cloud(depth, image, focal):
    """(H, W) metres, (H, W, 3) uint8 and the focal length in pixels -> the bytes of a .ply file: x to the
    right, y down, z forward, in metres."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width] + 0.5  # the centres of pixels
    x = (u - width / 2) / focal * depth
    y = (v - height / 2) / focal * depth
    columns = [x, y, depth, *image.transpose(2, 0, 1)]
    points = np.rec.fromarrays(columns, formats="<f4,<f4,<f4,u1,u1,u1")[depth > 0]
    properties = ("float x", "float y", "float z", "uchar red", "uchar green", "uchar blue")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}",
              *(f"property {name}" for name in properties)]
    return "\n".join([*header, "end_header", ""]).encode() + points.tobytes()


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = data.make_parser("Evaluate a network on a data set, or predict the depth of images.")
    add = parser.add_argument
    add("model", help="a .pt file from train.py or an .onnx file from export.py")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--size", type=data.multiple_of_32, nargs=2, metavar=("H", "W"),
        help="what the network sees (default: training's scale)")
    add("--geometry", choices=data.GEOMETRIES,
        help="how a frame becomes that size (default: the protocol's; full for --images)")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the flip (default: protocol's)")
    task = parser.add_mutually_exclusive_group(required=True).add_argument
    task("--data", metavar="PATH", help="evaluate on a data set of any layout that data.py knows")
    task("--images", nargs="+", metavar="PATH", help="predict depth: images, folders of images or globs")
    # evaluation
    add("--split", default="val", choices=(*data.SPLITS, "all"), help="of the data set")
    add("--protocol", default="own", choices=PROTOCOLS, help="what is compared, and where")
    add("--depth-scale", type=data.positive(float), default=1000.0, help="16-bit depth / this = metres")
    add("--workers", type=data.up_to_256, default=0, help="processes that read data")
    add("--json", metavar="FILE", help="write all numbers there, also by distance and by image")
    add("--sheet", metavar="FILE", help="where to write the sheet of samples (default: MODEL-SPLIT.png)")
    # prediction
    add("--out", default="runs/depth", metavar="DIR",
        help="folder for NAME.png in millimetres, NAME.npy in metres, and NAME_depth.png to look at")
    add("--focal", type=data.positive(float), metavar="PIXELS",
        help="focal length in pixels (default: 0.81 x the longer side)")
    add("--ply", action="store_true", help="also write a coloured point cloud")
    args = parser.parse_args(argv)

    for name in ("json", "sheet") if args.images else ("focal", "ply"):
        if getattr(args, name):
            raise UserError(f"--{name}: does nothing with --{'images' if args.images else 'data'}")
    if args.data and args.geometry and args.protocol != "own":
        raise UserError(f"--geometry {args.geometry}: protocol {args.protocol} has its own")
    data.check_device(args.device)
    predict, config = load_predictor(args.model, args.device)
    args.size = args.size and tuple(args.size)
    if args.flip is None:
        args.flip = bool(args.data) and PROTOCOLS[args.protocol].get("flip", False)
    if args.flip:
        predict = flip_average(predict)
    if args.data:
        return evaluate_command(args, predict, config)
    geometry = args.geometry or default_geometry(config)
    size = args.size or config["fixed"] or (config["size"] if geometry == "fastdepth" else None)
    predict_images(predict, config, find_images(args.images), Path(args.out), size, geometry, args.focal,
                   args.ply, args.model)


def evaluate_command(args, predict, config):
    """--data: metrics on the screen and as JSON, and a sheet of samples."""
    size, geometry = args.size or config["size"], "full"
    protocol = {key: value for key, value in PROTOCOLS[args.protocol].items() if key != "flip"}
    if args.protocol == "own":
        geometry = args.geometry or config["geometry"]
        protocol = dict(grid=(size, geometry), max_depth=config["max_depth"])
    elif args.protocol == "fastdepth":
        geometry = "fastdepth"
    else:
        size = args.size or (config["fixed"] if default_geometry(config) == "full" else None)

    dataset = data.open_dataset(args.data, args.split, None, geometry=geometry, depth_scale=args.depth_scale)
    data.check_scale(dataset, min(protocol["max_depth"], config["max_depth"]))
    if args.protocol == "own":
        data.check_crop(dataset, config["size"])
    frame = dataset.read(0)[1].shape
    shown = size or whole_image_size(frame, FOCAL * max(frame), config)
    predict_frames = at_training_scale(predict, config, size, geometry)
    # One frame at a time: they may differ in size. (A batch is no faster on a CPU.)
    loader = torch.utils.data.DataLoader(dataset, num_workers=args.workers, worker_init_fn=data.worker_init)
    result, detail = evaluate(predict_frames, loader, **protocol, name=args.model)

    flip = ", flip" if args.flip else ""
    print(f"{args.model} ({config['runs_on']}) on {args.data} {args.split}: protocol {args.protocol}, "
          f"seen at {by(shown)} ({geometry}{flip}); {result['images']} images, "
          f"{result['skipped']} skipped (no depth)")
    print("  ".join(f"{name:>8}" for name in METRICS))
    print("  ".join(f"{result[name]:8.4f}" for name in METRICS))
    print(f"\nby distance, all pixels pooled\n{'metres':>10}{'share':>9}{'rmse':>9}{'absrel':>9}{'d1':>9}")
    for r in detail["ranges"]:
        limits = f"{r['from']} to {r['to'] or '...'}"
        print(f"{limits:>10}{r['share']:9.1%}{r['rmse']:9.4f}{r['absrel']:9.4f}{r['d1']:9.4f}")

    if args.json:
        images = [dict(file=file) | {key: values[i].item() for key, values in detail["images"].items()}
                  for i, file in enumerate(dataset.files) if detail["images"]["rmse"][i].isfinite()]
        facts = vars(args) | result | dict(size=shown, geometry=geometry)
        with whole_file(args.json) as f:
            f.write(json.dumps(facts | dict(ranges=detail["ranges"], per_image=images), indent=1).encode())
    sheet = args.sheet or Path(args.model).with_name(f"{Path(args.model).stem}-{args.split}.png")
    sample_sheet(predict_frames, dataset, sheet, protocol["max_depth"], grid=protocol.get("grid"))
    print(f"\nsamples: {sheet}")


if __name__ == "__main__":
    data.run_script(main, ModelError)
