"""Export a checkpoint to one self-contained ONNX file, run that file, and compare it with PyTorch.

    python export.py runs/fastdepth-1/best.pt                   # -> runs/fastdepth-1/best.onnx

The network in the file: input `image` (B, 3, H, W) float32 RGB in [0, 1], output `depth` (B, 1, H', W') float32 metres; any
batch, and the height and width of training unless --size or --dynamic say otherwise. Batch norm is folded into the
convolutions. The file's metadata entry `fastdepth` says network, size, geometry, range and unit as JSON.
Exit code 1 when ONNX Runtime's numbers are not PyTorch's.
"""
import copy
import json
import logging
import os
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import Parser, open_dataset, read_image, render, run_script
from eval import find_pictures, load_predictor, shown
from model import count, load_model

TOLERANCE = 1e-3  # metres; float32 in another order of summation gives about 1e-5


@torch.no_grad()
def fold_batch_norm(model):
    """A copy in eval mode without batch norm: its scale and offset are in the convolution before it."""
    model = copy.deepcopy(model).eval()
    for block in model.modules():
        if isinstance(block, nn.Sequential) and hasattr(block, "bn"):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn, transpose=isinstance(block.conv, nn.ConvTranspose2d))
            block.bn = nn.Identity()
    return model


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
        program = torch.onnx.export(fold_batch_norm(model).cpu(), (example,), input_names=["image"], output_names=["depth"],
                                    opset_version=18, dynamo=True, external_data=False, verbose=False, dynamic_shapes=(free,))
    proto = program.model_proto
    facts = dict(facts, size=list(facts["size"] if dynamic else size), unit="metres", fixed=not dynamic)
    onnx.helper.set_model_props(proto, {"fastdepth": json.dumps(facts)})
    partial = Path(file).with_suffix(".partial")
    try:
        onnx.save(proto, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def real_input(args, size, geometry):
    """(B, 3, H, W) pictures to compare on: of --images, of --data, or of one rendered room."""
    if args.images:
        files = find_pictures(args.images)[:8]
        return torch.cat([shown(size, geometry)(torch.from_numpy(read_image(f)).permute(2, 0, 1)[None]) for f in files]).float() / 255
    if args.data:
        dataset = open_dataset(args.data, "val", size, geometry=geometry)
        return torch.stack([dataset[i][0] for i in range(min(8, len(dataset)))])
    return shown(size, geometry)(render(range(4))[0]).float() / 255


def timed(run, seconds=2.0):
    """(median, p90) milliseconds of run(), after a warm-up."""
    for _ in range(5):
        run()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 20:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times), statistics.quantiles(times, n=10)[8]


def main(argv=None):
    parser = Parser(description="Export a checkpoint to ONNX and check the file.")
    parser.add_argument("model", help="a .pt file of train.py")
    parser.add_argument("--out", help="(default: the same name with .onnx)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="(default: that of training)")
    parser.add_argument("--dynamic", action="store_true", help="free height and width too (not for OpenCV 4)")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="pictures to compare on (default: rendered rooms)")
    parser.add_argument("--data", help="data set to compare on")
    parser.add_argument("--bench", action="store_true", help="also time PyTorch and ONNX Runtime on one picture")
    args = parser.parse_args(argv)

    model, facts = load_model(args.model)
    size, out = tuple(args.size or facts["size"]), Path(args.out or Path(args.model).with_suffix(".onnx"))
    if any(n % 32 or n <= 0 for n in size):
        parser.error(f"--size must be multiples of 32, got {size[0]} {size[1]}")
    image = real_input(args, size, facts["geometry"])
    try:
        export_onnx(model, out, size, facts, args.dynamic)
    except ImportError as error:
        raise ValueError(f"{out}: exporting needs {error.name}: pip install -r requirements.txt") from None
    predict, _ = load_predictor(out)  # refuses with one line where onnxruntime is missing
    with torch.no_grad():
        expected = model(image)
        difference = max((predict(image) - expected).abs().max().item(), (predict(image[:1]) - expected[:1]).abs().max().item())
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, image (B, 3, {'H, W' if args.dynamic else f'{size[0]}, {size[1]}'}) -> depth in metres")
    print(f"largest difference to PyTorch over {len(image)} pictures: {difference:.2g} m")
    if args.bench:
        folded, one = fold_batch_norm(model), image[:1]
        print(f"batch 1, {size[0]}x{size[1]}, cpu, {torch.get_num_threads()} threads, {count(model, *size)['macs'] / 1e9:.3f} GMACs")
        with torch.no_grad():
            lanes = {"PyTorch": lambda: model(one), "PyTorch, batch norm folded": lambda: folded(one), "ONNX Runtime": lambda: predict(one)}
            for name, run in lanes.items():
                median, p90 = timed(run)
                print(f"{name:28} {median:7.2f} ms median  {p90:7.2f} ms p90  {1000 / median:6.1f} images/s")
    if not difference <= TOLERANCE:
        print(f"that is more than {TOLERANCE:g} m: do not use the file")
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
