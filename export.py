"""Export a checkpoint to one self-contained ONNX file, run that file, and compare it with PyTorch.

    python export.py runs/fastdepth-1/best.pt                             # -> runs/fastdepth-1/best.onnx
    python export.py runs/fastdepth-1/best.pt --int8 --data data/rooms    # -> best-int8.onnx too, about twice as fast
    python export.py runs/fastdepth-1/best.pt --bench --threads 2         # how fast each way to run it is here

The network in the file: input `image` (B, 3, H, W) float32 RGB in [0, 1], output `depth` (B, 1, H', W') float32 metres; any
batch, and the height and width of training unless --size or --dynamic say otherwise. Batch norm is folded into the
convolutions. The file's metadata entry `fastdepth` says network, size, geometry, range and unit as JSON.
Exit code 1 when ONNX Runtime's numbers are not PyTorch's.
"""
import copy
import importlib.util
import json
import logging
import os
import statistics
import tempfile
import time
import types
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import Parser, above_0, multiple_of_32, open_dataset, read_image, render, run_script
from eval import evaluate, find_pictures, fold_batch_norm, load_predictor, shown
from model import NNConv5, count, load_model, x2

TOLERANCE = 1e-3  # metres; float32 in another order of summation gives about 1e-5

# ------------------------------------------------------------------------------------------------------------------
# ONNX files
# ------------------------------------------------------------------------------------------------------------------


def export_onnx(model, file, size, facts, dynamic=False):
    """Write the network as one ONNX file, whole or not at all. dynamic also frees height and width (multiples of 32)."""
    import onnx
    free = {0: torch.export.Dim.DYNAMIC}
    if dynamic:
        free |= {2: 32 * torch.export.Dim("height", min=1, max=256), 3: 32 * torch.export.Dim("width", min=1, max=256)}
    example = torch.zeros(2, 3, *(size if not dynamic else (64, 96)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export, about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        # opset 18: OpenCV 4.8 reads it. The exporter would fold batch norm too, but for the one behind a transposed convolution.
        program = torch.onnx.export(fold_batch_norm(model).cpu(), (example,), input_names=["image"], output_names=["depth"],
                                    opset_version=18, dynamo=True, verbose=False, dynamic_shapes=(free,))
    proto = program.model_proto
    facts = dict(facts, size=list(facts["size"] if dynamic else size), unit="metres", fixed=not dynamic)
    onnx.helper.set_model_props(proto, {"fastdepth": json.dumps(facts)})
    partial = Path(file).with_suffix(".partial")
    try:
        onnx.save(proto, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def pad_channels(model, to=16):
    """Zero channels for a folded FastDepth, so that every layer has a multiple of `to`: the same numbers. int8 kernels take 16
    channels at a time and the rest one by one: fastdepth-pruned (56, 88, 120, ... channels) runs in 5.9 ms instead of 7.2."""
    model = copy.deepcopy(model)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            cout, cin = (n if n in (1, 3) else -(-n // to) * to for n in conv.weight.shape[:2])  # not the image, nor depth
            missing = (0, 0, 0, 0, 0, cin - conv.weight.shape[1], 0, cout - conv.weight.shape[0])
            conv.weight, conv.bias = nn.Parameter(F.pad(conv.weight, missing)), nn.Parameter(F.pad(conv.bias, missing[-2:]))
            conv.groups = cout if conv.groups > 1 else 1
    return model


def x2_by_copies(x, mode="nearest"):
    """model.x2 as two concatenations, channels last: ONNX Runtime's int8 Resize is slower than that by 1 of 6 ms."""
    batch, channels, height, width = x.shape
    if mode != "nearest" or channels == 1:
        return x2(x, mode)
    x = x.permute(0, 2, 3, 1)
    x = torch.cat([x, x], 3).reshape(-1, height, 2 * width * channels)  #          each column twice
    x = torch.cat([x, x], 2).reshape(-1, 2 * height, 2 * width, channels)  #       each row twice
    return x.permute(0, 3, 1, 2)


def export_int8(model, file, size, facts, images):
    """Write the network with 8-bit weights and activations as an ONNX file; images (N, 3, H, W) say how large activations get."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    model = fold_batch_norm(model)
    if isinstance(model.decoder, NNConv5) and model.decoder.skip != "concat":  # concatenated zeros would move what follows
        model = pad_channels(model)
    feeds = ({"image": image.numpy()} for image in images.split(1))
    reader = types.SimpleNamespace(get_next=lambda: next(feeds, None))
    # model.x2 is replaced while the network is traced, so that its readers never meet this form
    with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder, patch("model.x2", x2_by_copies):
        whole, quantised = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        export_onnx(model, whole, size, facts)
        logging.getLogger().setLevel(logging.ERROR)  # it advises what export_onnx has done
        quantize_static(
            whole, quantised, reader,
            quant_format=QuantFormat.QDQ,  #                  standard operators, which ONNX Runtime fuses; QOperator: the same speed
            per_channel=True,  #                              a scale for each filter: depthwise ones differ by far
            activation_type=QuantType.QUInt8,  #              with QInt8, onnxruntime's default, x86 gains almost nothing (14.0, not 8.1 ms)
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax)  #     percentiles and entropy score the same, and take minutes
        os.replace(quantised, file)


# ------------------------------------------------------------------------------------------------------------------
# Comparison and speed
# ------------------------------------------------------------------------------------------------------------------


def real_input(args, size, geometry, split="val", n=8):
    """(B, 3, H, W) pictures, at most n: of --images, of --data, or of rendered rooms."""
    if args.images:
        files = find_pictures(args.images)[:n]
        return torch.cat([shown(size, geometry)(torch.from_numpy(read_image(f)).permute(2, 0, 1)[None]) for f in files]).float() / 255
    if args.data:
        dataset = open_dataset(args.data, split, size, geometry=geometry, depth_scale=args.depth_scale, limit=n)
        return torch.stack([dataset[i][0] for i in range(len(dataset))])
    return shown(size, geometry)(render(range(4))[0]).float() / 255


def timed(lanes, seconds=2.0):
    """name -> run() becomes name -> (median, p90) milliseconds. Lanes take turns, so that other work on the machine meets all."""
    times, end = {name: [] for name in lanes}, time.perf_counter() + seconds * len(lanes)
    while time.perf_counter() < end or min(map(len, times.values())) < 4:
        for name, run in lanes.items():
            run()  # back in the caches, and the threads of the lane before are asleep
            turn = time.perf_counter()
            for _ in range(4):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1000)
                if time.perf_counter() - turn > 1:
                    break
    return {name: (statistics.median(t), statistics.quantiles(t, n=10)[8]) for name, t in times.items()}


@torch.no_grad()
def bench(model, image, files, threads):
    """Print how fast each way to run the network on `image` (1, 3, H, W) is; files: name -> .onnx."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    folded, last = fold_batch_norm(model), image.to(memory_format=torch.channels_last)
    half, square = copy.deepcopy(folded).bfloat16(), torch.rand(2048, 2048)
    lanes, notes = {"PyTorch": lambda: model(image), "folded, channels last": lambda: folded(last),
                    "the same in bfloat16": lambda: half(last.bfloat16())}, []
    compiled = torch.compile(folded)
    try:
        compiled(last)
        lanes["the same compiled"] = lambda: compiled(last)
    except Exception as error:  # inductor's errors have no common base
        notes.append(f"compiled: skipped, torch.compile found no working compiler ({str(error).strip().splitlines()[0][:80]})")
    for name, file in files.items():
        predict, _ = load_predictor(file, threads=threads)
        lanes[name] = lambda predict=predict: predict(image)
    try:
        import cv2
        cv2.setNumThreads(threads)
        net = cv2.dnn.readNetFromONNX(str(next(iter(files.values()))))
        lanes[f"OpenCV {cv2.__version__}"] = lambda: (net.setInput(image.numpy()), net.forward())
        lanes[f"OpenCV {cv2.__version__}"]()
    except ImportError:
        notes.append("OpenCV: skipped, pip install opencv-python-headless")
    except cv2.error as error:
        lanes.pop(f"OpenCV {cv2.__version__}", None)
        notes.append(f"OpenCV {cv2.__version__}: skipped, it cannot read the file ({str(error).strip().splitlines()[0][:80]})")
    try:
        found = timed(lanes | {"matrix multiply": lambda: square @ square})
    finally:
        torch.set_num_threads(before)
    rate, macs = 2048**3 / found.pop("matrix multiply")[0] / 1e6, count(model, *image.shape[-2:])["macs"]
    print(f"batch 1, {image.shape[2]}x{image.shape[3]}, cpu, {threads} threads; {macs / 1e9:.3f} GMACs; float32 matrices of 2048: {rate:.0f} GMAC/s")
    print(f"{'':24}{'ms median':>10}{'ms p90':>9}{'images/s':>10}{'GMAC/s':>8}{'of matrices':>13}")
    for name, (median, p90) in found.items():
        print(f"{name:24}{median:10.2f}{p90:9.2f}{1000 / median:10.1f}{macs / median / 1e6:8.1f}{macs / median / 1e6 / rate:13.0%}")
    for note in notes:
        print(note)


def main(argv=None):
    parser = Parser(description="Export a checkpoint to ONNX and check the file.")
    parser.add_argument("model", help="a .pt file of train.py")
    parser.add_argument("--out", help="(default: the same name with .onnx)")
    parser.add_argument("--size", type=multiple_of_32, nargs=2, metavar=("H", "W"), help="(default: that of training)")
    parser.add_argument("--dynamic", action="store_true", help="free height and width too (not for OpenCV 4)")
    parser.add_argument("--int8", action="store_true", help="also write NAME-int8.onnx, calibrated on --images or --data's train split")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="pictures to compare on (default: rendered rooms)")
    parser.add_argument("--data", help="data set to compare on; its val split says what int8 loses")
    parser.add_argument("--depth-scale", type=above_0(float), default=1000.0)
    parser.add_argument("--bench", action="store_true", help="also time the ways to run it on one picture")
    parser.add_argument("--threads", type=above_0(int), default=torch.get_num_threads(), help="of --bench and --int8")
    args = parser.parse_args(argv)

    for package in "onnx", "onnxscript", "onnxruntime":
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"exporting needs {package}: pip install onnx onnxscript onnxruntime")
    if args.int8 and (args.dynamic or not (args.images or args.data)):
        parser.error("--int8 needs --data or --images to calibrate on, and one size (no --dynamic)")
    model, facts = load_model(args.model)
    size, out = tuple(args.size or facts["size"]), Path(args.out or Path(args.model).with_suffix(".onnx"))
    if out.suffix != ".onnx":
        parser.error(f"--out must end in .onnx, got {out}")
    image = real_input(args, size, facts["geometry"])
    out.parent.mkdir(parents=True, exist_ok=True)
    tried = out.with_suffix(".partial.onnx")  # a file that is wrong never takes the place of one that was right
    try:
        export_onnx(model, tried, size, facts, args.dynamic)
        predict, _ = load_predictor(tried)
        with torch.no_grad():
            expected = model(image)
            difference = max((predict(image) - expected).abs().max().item(), (predict(image[:1]) - expected[:1]).abs().max().item())
        print(f"largest difference to PyTorch over {len(image)} pictures: {difference:.2g} m")
        if not difference <= TOLERANCE:
            print(f"that is more than {TOLERANCE:g} m: nothing was written to {out}")
            raise SystemExit(1)
        os.replace(tried, out)
    finally:
        tried.unlink(missing_ok=True)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, image (B, 3, {'H, W' if args.dynamic else f'{size[0]}, {size[1]}'}) -> depth in metres")

    files = {"ONNX Runtime": out}
    if args.int8:
        files["ONNX Runtime int8"] = small = out.with_name(out.stem + "-int8.onnx")
        calibration = real_input(args, size, facts["geometry"], "train", 64)
        export_int8(model, small, size, facts, calibration)
        runs = {name: load_predictor(file, threads=args.threads)[0] for name, file in files.items()}
        speed = timed({name: lambda run=run: run(image[:1]) for name, run in runs.items()})
        print(f"{small}: {small.stat().st_size / 2**20:.1f} MiB, calibrated on {len(calibration)} pictures; {args.threads} threads")
        for name, run in runs.items():
            scores = f"{(run(image) - expected).abs().mean():.4f} m from PyTorch on average"
            if args.data:
                dataset = open_dataset(args.data, "val", size, geometry=facts["geometry"], depth_scale=args.depth_scale)
                result, _ = evaluate(run, torch.utils.data.DataLoader(dataset, 8), facts["max_depth"])
                scores = f"rmse {result['rmse']:.4f}  d1 {result['d1']:.4f} over {result['images']} images, " + scores
            print(f"{name:18} {speed[name][0]:7.2f} ms  {scores}")
    if args.bench:
        bench(model, image[:1], files, args.threads)


if __name__ == "__main__":
    run_script(main)
