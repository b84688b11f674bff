"""Evaluation and prediction, with a checkpoint (.pt) or an exported network (.onnx).

    python eval.py runs/fastdepth-1/best.pt --data data/rooms --split val          # metrics and a sheet of pictures
    python eval.py best.pt --data nyu --split test --protocol eigen --json nyu.json
    python eval.py best.pt --images photos/*.jpg --out depth                       # depth of your own pictures

Metrics are computed per image and then averaged over images. What is compared, and where, is a protocol:

    own          what the network was trained and validated on: its size, geometry and range
    fastdepth    224x224 view of the FastDepth papers (crop, nearest), every measured pixel
    eigen        480x640 frames, rows 45:471, columns 41:601, 1 mm to 10 m, prediction clamped to that
    densedepth   480x640 frames, rows 20:460, columns 24:616, clamped to 0.1 to 10 m, all pixels pooled, mirrored average
"""
import argparse
import copy
import csv
import glob
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import (FASTDEPTH_VIEW, FOCAL, GEOMETRIES, PICTURES, Parser, above_0, batches, check_device, colourise, multiple_of_32,
                  open_dataset, progress, read_image, run_script, sampling_grid, tile, to_picture, valid_mask)
from model import load_model

# ------------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------------

METRICS = ("rmse", "mae", "absrel", "sqrel", "rmse_log", "log10", "silog", "d1", "d2", "d3", "irmse")


def moments(pred, target, mask):
    """(B, 1, H, W) metres -> dict of (B,) per-image means over the mask, from which every metric follows.

    Logarithms and inverses take max(pred, 1 mm), so that a network may answer 0. NaN where an image has no valid pixel.
    """
    pred, target = pred.double(), torch.where(mask, target, 1).double()
    safe, count = pred.clamp(min=1e-3), mask.sum((1, 2, 3))
    error, log_error = pred - target, safe.log() - target.log()
    ratio = torch.maximum(safe / target, target / safe)
    values = dict(squared=error**2, mae=error.abs(), absrel=error.abs() / target, sqrel=error**2 / target,
                  log=log_error, log_squared=log_error**2, log10=log_error.abs() / math.log(10),
                  inverse_squared=(1 / safe - 1 / target)**2, d1=ratio < 1.25, d2=ratio < 1.25**2, d3=ratio < 1.25**3)
    return {name: torch.where(mask, v, 0).double().sum((1, 2, 3)) / count for name, v in values.items()} | {"count": count}


def from_moments(m):
    """Means of moments() -> the metrics: rmse, mae in m; irmse in 1/m; silog 100 x the standard deviation of the log error."""
    values = dict(m, rmse=m["squared"].sqrt(), rmse_log=m["log_squared"].sqrt(), irmse=m["inverse_squared"].sqrt(),
                  silog=100 * (m["log_squared"] - m["log"]**2).clamp(min=0).sqrt())
    return {name: values[name] for name in METRICS}


def depth_metrics(pred, target, mask):
    """(B, 1, H, W) prediction, truth in metres and bool mask -> dict of (B,) tensors, NaN where nothing is valid.

    rmse, mae (m), irmse (1/m); absrel, sqrel (relative to the truth); rmse_log, log10; silog (KITTI's, x 100);
    d1, d2, d3: the share of pixels with max(pred/target, target/pred) below 1.25, 1.25^2, 1.25^3.
    """
    return from_moments(moments(pred, target, mask))


EDGES = torch.tensor([0.0, 1, 2, 3, 5, 10, 20, 40])  # of the table by depth, metres; the last range is open


def range_sums(pred, target, mask):
    """As moments(), for the true depth's ranges -> (4, ranges): pixels, squared error, relative error, d1, summed over all of mask."""
    pred, target = pred[mask].double(), target[mask].double()
    near = torch.bucketize(target, EDGES[1:].double())  # an edge belongs to the nearer range
    error, safe = pred - target, pred.clamp(min=1e-3)
    hit = torch.maximum(safe / target, target / safe) < 1.25
    return torch.stack([torch.bincount(near, weight, len(EDGES)) for weight in (torch.ones_like(error), error**2, error.abs() / target, hit.double())])


# ------------------------------------------------------------------------------------------------------------------
# Protocols
# ------------------------------------------------------------------------------------------------------------------

PROTOCOLS = {
    #             frame          rows        columns    clamp          max_depth   pooled, flip
    "own":        dict(native=False, rows=(0, None), cols=(0, None), clamp=None, max_depth=None, pooled=False, flip=False),
    "fastdepth":  dict(native=False, rows=(0, None), cols=(0, None), clamp=None, max_depth=math.inf, pooled=False, flip=False),
    "eigen":      dict(native=True, rows=(45, 471), cols=(41, 601), clamp=(1e-3, 10.0), max_depth=10.0, pooled=False, flip=False),
    "densedepth": dict(native=True, rows=(20, 460), cols=(24, 616), clamp=(0.1, 10.0), max_depth=10.0, pooled=True, flip=True),
}


def flip_average(predict):
    """A prediction that is the mean of the picture's and of its mirror image's, mirrored back."""
    return lambda image: (predict(image) + predict(image.flip(-1)).flip(-1)) / 2


@torch.no_grad()
def evaluate(predict, loader, max_depth=math.inf, rows=(0, None), cols=(0, None), clamp=None, pooled=False, what=None):
    """Metrics of predict: (B, 3, H, W) -> metres, over a loader of (image, depth, index). Returns means over images as a
    dict, with `images` (counted) and `skipped` (no valid pixel), and a second dict with what they hide: `images`, the
    metrics of each as (N,) tensors, NaN where skipped, and `ranges`, a dict for each range of the true depth that occurs.

    The prediction is enlarged bilinearly to the truth's size. rows, cols: the part that counts; pooled: means over all
    pixels instead; what: a label for the progress line.
    """
    found, ranges, start, done = [], 0, time.time(), 0
    for image, depth, _ in batches(loader):
        pred = F.interpolate(predict(image).float().cpu(), depth.shape[-2:], mode="bilinear", align_corners=False)
        pred = pred if clamp is None else pred.clamp(*clamp)
        part = (..., slice(*rows), slice(*cols))
        pred, depth = pred[part], depth[part]
        mask = valid_mask(depth, max_depth)
        found.append(moments(pred, depth, mask))
        ranges = ranges + range_sums(pred, depth, mask)
        done += len(image)
        if what:
            progress(what, done, len(loader.dataset), start)
    images = {name: torch.cat([m[name] for m in found]) for name in found[0]}
    counted = images["count"] > 0
    if not counted.any():
        raise ValueError("no image has a valid pixel: check --max-depth and --depth-scale")
    kept = {name: value[counted] for name, value in images.items()}
    weight = kept["count"] / kept["count"].sum()
    result = from_moments({name: (value * weight).sum() for name, value in kept.items()}) if pooled else \
        {name: value.mean() for name, value in from_moments(kept).items()}
    limits, share = EDGES.tolist() + [math.inf], (ranges[0] / ranges[0].sum()).tolist()
    _, squared, absrel, d1 = ranges / ranges[0]
    ranges = [{"from": limits[i], "to": limits[i + 1], "share": share[i], "rmse": squared[i].sqrt().item(), "absrel": absrel[i].item(),
               "d1": d1[i].item()} for i in range(len(EDGES)) if share[i] > 0]
    return ({name: value.item() for name, value in result.items()} | dict(images=len(weight), skipped=int((~counted).sum())),
            dict(images=from_moments(images), ranges=ranges))


# ------------------------------------------------------------------------------------------------------------------
# Networks from files, and the size at which they see a picture
# ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_batch_norm(model):
    """A copy in eval mode, its weights channels last, without batch norm: scale and offset are in the convolution before it."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    for block in model.modules():
        if isinstance(block, nn.Sequential) and isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn, transpose=isinstance(block.conv, nn.ConvTranspose2d))
            block.bn = nn.Identity()
    return model


def load_predictor(file, device="cpu", threads=0):
    """A .pt or .onnx file -> predict: (B, 3, H, W) in [0, 1] -> (B, 1, H', W') metres, and its facts: model, size,
    geometry, max_depth, fixed (whether an .onnx file takes one size only) and runs_on. threads: of onnxruntime, 0: all
    cores. ValueError names the file."""
    if Path(file).suffix != ".onnx":
        model, facts = load_model(file, device)
        folded = fold_batch_norm(model)
        return lambda image: folded(image.to(device, memory_format=torch.channels_last)), facts | dict(fixed=False, runs_on=str(device))
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"{file}: running an .onnx file needs onnxruntime: pip install onnxruntime") from None
    kind = device.split(":")[0].upper()  # CUDAExecutionProvider needs onnxruntime-gpu; without it, the CPU
    providers = [p for p in onnxruntime.get_available_providers() if p in (f"{kind}ExecutionProvider", "CPUExecutionProvider")]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        facts = json.loads(session.get_modelmeta().custom_metadata_map["fastdepth"])
    except KeyError:
        raise ValueError(f"{file}: was not written by export.py: its size and unit are not known") from None
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise ValueError(f"{file}: onnxruntime cannot read it ({str(error).splitlines()[0]}): export it again") from None
    facts["runs_on"] = "onnxruntime's " + session.get_providers()[0]
    return lambda image: torch.from_numpy(session.run(["depth"], {"image": image.cpu().numpy()})[0]), facts


def frame_size(facts):
    """The legal size at which a whole 480x640 frame has the scale of training: 224x224 of FastDepth's crop -> 256x256."""
    if facts["fixed"] or facts["geometry"] == "full":
        return tuple(facts["size"])
    return tuple(round(n * grid / crop / 32) * 32 for n, grid, crop in zip(facts["size"], *FASTDEPTH_VIEW))


def whole_picture_size(height, width, frame):
    """The multiple of 32 at which a whole picture of any shape is shown to a network, so that things have the size of
    training: frame is that of a 480x640 frame, and cameras are taken to have its angle along the longer side."""
    scale = 640 / max(height, width)
    return tuple(max(32, round(n * scale * to / of / 32) * 32) for n, to, of in zip((height, width), frame, (480, 640)))


def shown(size, geometry):
    """The view of a batch of images that `geometry` (data.sampling_grid) gives at `size`."""
    def view(image):
        """(B, C, H, W) -> (B, C, *size)."""
        rows, cols, _ = sampling_grid(*image.shape[-2:], size, geometry)
        return image[..., rows, cols]
    return view


# ------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------


def picture_row(image, truth, pred, max_depth):
    """RGB, truth, prediction and error of one sample, (C, H, W) tensors -> four (H, W, 3) uint8 pictures.

    Truth and prediction share one range; the error is dark at 0 and bright at 1 m and more.
    """
    truth, pred = truth[0].cpu(), pred[0].float().cpu()
    mask = valid_mask(truth, max_depth)
    near, far = (truth[mask].min().item(), truth[mask].max().item()) if mask.any() else (0, 1)
    error = torch.where(mask, (pred - truth).abs().clamp(1e-6, 1), 0)
    return [to_picture(image), colourise(truth * mask, near, far), colourise(pred.clamp(min=1e-3), near, far), colourise(error, 1, 0)]


@torch.no_grad()
def sample_sheet(predict, dataset, file, max_depth, n=6, notes=None):
    """Write n evenly chosen samples, or those of notes (index -> text below the picture), as RGB | truth | prediction | error."""
    rows = []
    for i in notes or torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long().tolist():
        image, depth, _ = dataset[i]
        pred = F.interpolate(predict(image[None]).float().cpu(), depth.shape[-2:], mode="bilinear", align_corners=False)[0]
        rows.append(picture_row(image, depth, pred, max_depth))
        if notes:
            picture = Image.fromarray(rows[-1][0])
            ImageDraw.Draw(picture).text((4, picture.height - 4), notes[i], fill="white", anchor="ld", stroke_width=2, stroke_fill="black")
            rows[-1][0] = np.array(picture)
    tile(rows, ("RGB", "truth", "prediction", "error, 0 (dark) to 1 m")).save(file)


def with_scale_bar(depth):
    """(H, W) metres -> colour picture with a bar that says which colour is how far, in metres."""
    near, far = np.quantile(depth, (0.01, 0.99))
    far = max(far, near + 0.1)
    height, width = depth.shape
    bar = np.linspace(near, far, max(height, 64))[:, None].repeat(max(12, height // 24), 1)
    font = max(10, height // 28)
    sheet = Image.new("RGB", (width + bar.shape[1] + 5 * font, len(bar)), "white")
    sheet.paste(Image.fromarray(colourise(depth, near, far)))
    sheet.paste(Image.fromarray(colourise(bar, near, far)), (width + font, 0))
    for k in range(5):
        value = near + (far - near) * k / 4
        y = round((len(bar) - 1.3 * font) * k / 4)
        ImageDraw.Draw(sheet).text((width + bar.shape[1] + int(1.3 * font), y), f"{value:.1f} m", fill="black", font_size=font)
    return sheet


def write_ply(file, depth, image, focal):
    """A coloured point cloud: x right, y down, z forward, in metres, of (H, W) depth and (H, W, 3) uint8; focal in pixels."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width].astype(np.float32) + 0.5
    points = np.zeros(height * width, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    points["xyz"] = np.stack([(u - width / 2) / focal * depth, (v - height / 2) / focal * depth, depth], -1).reshape(-1, 3)
    points["rgb"] = image.reshape(-1, 3)
    points = points[depth.ravel() > 0]
    fields = "".join(f"property float {c}\n" for c in "xyz") + "".join(f"property uchar {c}\n" for c in ("red", "green", "blue"))
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{fields}end_header\n"
    Path(file).write_bytes(header.encode() + points.tobytes())


def find_pictures(paths):
    """Files, folders and globs -> picture files, sorted. ValueError names what matches nothing."""
    found = []
    for path in paths:
        here = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in PICTURES) if Path(path).is_dir() else \
            sorted(map(Path, glob.glob(path))) or [Path(path)]
        if not here or not here[0].exists():
            raise ValueError(f"{path}: no picture there ({', '.join(PICTURES)})")
        found += here
    return found


LONGEST = 4096  # pixels; depth of a larger picture is written at a half, a third, ... of its size


def visible_part(height, width, geometry):
    """Rows and columns of a picture that a geometry shows: all of them, or FastDepth's crop."""
    if geometry == "full":
        return slice(0, height), slice(0, width)
    rows, cols, _ = sampling_grid(height, width, FASTDEPTH_VIEW[1], geometry)
    return slice(rows.min(), rows.max() + 1), slice(cols.min(), cols.max() + 1)


@torch.no_grad()
def predict_pictures(predict, facts, files, out, size=None, geometry="full", focal=None, ply=False):
    """Write for each picture, at its size, NAME.png (16-bit millimetres, at most 65.534 m; 0 where the network answers 0 or less),
    NAME.npy (float32 metres), NAME_colour.png and NAME_sheet.png (the picture beside its depth), and NAME.ply if asked.

    geometry full: all of the picture, at the scale of training; fastdepth: the published crop of it, and depth of that alone.
    """
    taken = {file.resolve() for file in files}
    for file in files:
        for suffix in (".png", ".npy", "_colour.png", "_sheet.png") + (".ply",) * ply:
            target = (out / (file.stem + suffix)).resolve()
            if target in taken:
                raise ValueError(f"{file}: its result {target.name} would overwrite another file: choose another --out or name")
            taken.add(target)
    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # PIL warns above 90 megapixels, and refuses above 180
    for file in files:
        picture = read_image(file)
        height, width = picture.shape[:2]
        if (step := -(-max(height, width) // LONGEST)) > 1:
            picture = picture[::step, ::step].copy()
        at = size or (facts["size"] if facts["fixed"] or geometry != "full" else whole_picture_size(height, width, frame_size(facts)))
        image = shown(at, geometry)(torch.from_numpy(picture).permute(2, 0, 1)[None]).float() / 255
        picture = picture[visible_part(*picture.shape[:2], geometry)]
        depth = F.interpolate(predict(image).float().cpu(), picture.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
        Image.fromarray((depth * 1000).round().clip(0, 65534).astype(np.uint16)).save(out / f"{file.stem}.png")
        np.save(out / f"{file.stem}.npy", depth)
        colour = with_scale_bar(depth)
        colour.save(out / f"{file.stem}_colour.png")
        sheet = Image.new("RGB", (picture.shape[1] + 4 + colour.width, colour.height), "white")
        sheet.paste(Image.fromarray(picture))
        sheet.paste(colour, (picture.shape[1] + 4, 0))
        sheet.save(out / f"{file.stem}_sheet.png")
        part = f", written at {depth.shape[1]}x{depth.shape[0]}" * (depth.shape != (height, width)) + ": FastDepth's crop" * (geometry != "full")
        print(f"{file}: {width}x{height} seen at {at[1]}x{at[0]}{part}, {depth.min():.2f} to {depth.max():.2f} m, median {np.median(depth):.2f} m")
        if ply:
            pixels = focal or FOCAL * max(width, height)
            write_ply(out / f"{file.stem}.ply", depth, picture, pixels / step)
            print(f"{out / file.stem}.ply: focal length {pixels:.0f} pixels, {'given' if focal else 'assumed: 0.81 of the longer side'}")


# ------------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(description="Evaluate a network on a data set, or predict the depth of pictures.")
    parser.add_argument("model", help="a .pt file of train.py or an .onnx file of export.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=multiple_of_32, nargs=2, metavar=("H", "W"), help="what the network is shown (default: as it was trained)")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="how a frame becomes that size (default: the protocol's; for --images full)")
    # evaluation
    parser.add_argument("--data", help="data set of any layout that data.py knows")
    parser.add_argument("--split", default="val", choices=("train", "val", "test", "all"))
    parser.add_argument("--protocol", default="own", choices=PROTOCOLS)
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="average with the mirror image (default: the protocol's)")
    parser.add_argument("--depth-scale", type=above_0(float), default=1000.0)
    parser.add_argument("--batch-size", type=above_0(int), default=8)
    parser.add_argument("--workers", type=above_0(int, or_0=True), default=0, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too, also those by depth and by image")
    parser.add_argument("--csv", metavar="FILE", help="write a line an image there")
    parser.add_argument("--sheet", metavar="FILE", help="picture of samples (default: NAME-SPLIT.png beside the model); the worst "
                                                        "images go to the same name with -worst")
    parser.add_argument("--expect-rmse", type=float, metavar="M", help="exit with 1 when the RMSE is above this")
    # prediction
    parser.add_argument("--images", nargs="+", metavar="PATH", help="pictures, folders of pictures or globs")
    parser.add_argument("--out", default="runs/depth", help="folder for the predictions")
    parser.add_argument("--ply", action="store_true", help="also write a coloured point cloud")
    parser.add_argument("--focal", type=above_0(float), metavar="PIXELS", help="the camera's focal length, for --ply")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.images is None):
        parser.error("give --data to evaluate, or --images to predict")
    size = tuple(args.size) if args.size else None
    check_device(args.device)
    predict, facts = load_predictor(args.model, args.device)
    if facts["fixed"] and size not in (None, tuple(facts["size"])):
        raise ValueError(f"{args.model}: takes {facts['size'][0]}x{facts['size'][1]} only: export it with --size or --dynamic")
    if args.images:
        return predict_pictures(flip_average(predict) if args.flip else predict, facts, find_pictures(args.images), Path(args.out), size,
                                args.geometry or "full", args.focal, args.ply)

    protocol = dict(PROTOCOLS[args.protocol])
    native, own_flip = protocol.pop("native"), protocol.pop("flip")
    flip = own_flip if args.flip is None else args.flip
    protocol["max_depth"] = protocol["max_depth"] or facts["max_depth"]
    at = size or (frame_size(facts) if native else (224, 224) if args.protocol == "fastdepth" else tuple(facts["size"]))
    if facts["fixed"] and at != tuple(facts["size"]):
        raise ValueError(f"{args.model}: takes {facts['size'][0]}x{facts['size'][1]} only, protocol {args.protocol} shows {at[0]}x{at[1]}: "
                         "export it with --size or --dynamic")
    geometry = args.geometry or ("full" if native else facts["geometry"] if args.protocol == "own" else "fastdepth")
    dataset = open_dataset(args.data, args.split, None if native else at, geometry=geometry, depth_scale=args.depth_scale)
    if native and (found := dataset.read(0)[1].shape) != (480, 640):
        raise ValueError(f"{dataset.files[0]}: protocol {args.protocol} is defined for 480x640 frames, this is {found[0]}x{found[1]}: "
                         "use --protocol own")
    predict, view = flip_average(predict) if flip else predict, shown(at, geometry)
    answer = (lambda image: predict(view(image))) if native else predict
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, num_workers=args.workers)
    result, detail = evaluate(answer, loader, **protocol, what="evaluating")
    print(f"{args.model} ({facts['runs_on']}) on {args.data} {args.split}: protocol {args.protocol}, seen at {at[0]}x{at[1]} ({geometry}){', flip' * flip}; "
          f"{result['images']} images, {result['skipped']} without depth skipped")
    print("  ".join(f"{name:>8}" for name in METRICS))
    print("  ".join(f"{result[name]:8.4f}" for name in METRICS))
    print("\nby true depth, all pixels pooled\n" + f"{'metres':>10}{'share':>9}{'rmse':>9}{'absrel':>9}{'d1':>9}")
    for r in detail["ranges"]:
        print(f"{r['from']:4g} to {r['to']:2g}{r['share']:9.1%}{r['rmse']:9.4f}{r['absrel']:9.4f}{r['d1']:9.4f}")

    images = [dict(file=file, **dict(zip(METRICS, values))) for file, values in
              zip(dataset.files, torch.stack([detail["images"][name] for name in METRICS], 1).tolist())]
    counted = [i for i in range(len(images)) if not math.isnan(images[i]["rmse"])]
    worst = sorted(counted, key=lambda i: -images[i]["rmse"])[:6]
    sheet = Path(args.sheet or Path(args.model).with_name(f"{Path(args.model).stem}-{args.split}.png"))
    worst_sheet = sheet.with_stem(sheet.stem + "-worst")
    for file in filter(None, (args.json, args.csv, sheet)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        found = dict(vars(args), **result, size=at, geometry=geometry, flip=flip, ranges=detail["ranges"], per_image=images)
        found = json.loads(json.dumps(found), parse_constant=lambda _: None)  # JSON has no NaN and no infinity
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, images[0])
            writer.writeheader()
            writer.writerows(images)
    sample_sheet(answer, dataset, sheet, protocol["max_depth"])
    sample_sheet(answer, dataset, worst_sheet, protocol["max_depth"],
                 notes={i: f"{'/'.join(Path(images[i]['file']).parts[-2:])[-34:]}\nRMSE {images[i]['rmse']:.3f} m" for i in worst})
    print(f"\npictures: {sheet}, the worst: {worst_sheet}")
    if args.expect_rmse is not None and not result["rmse"] <= args.expect_rmse:
        print(f"RMSE {result['rmse']:.4f} is above the expected {args.expect_rmse}")
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
