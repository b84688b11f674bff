"""Export a checkpoint to one self-contained ONNX file, run that file, and compare it with PyTorch.

    python export.py runs/fastdepth-1/best.pt                       # -> runs/fastdepth-1/best.onnx
    python export.py runs/fastdepth-1/best.pt --int8 --data nyu     # best-int8.onnx too, a quarter the size
    python export.py runs/fastdepth-1/best.pt --bench --threads 2   # how fast each way to run it is here

The file takes `image` (B, 3, H, W), float32 RGB in [0, 1], and gives `depth` (B, 1, H', W'), float32 metres.
Any batch size; H and W are those of training, for images cropped as in training. --size 256 256 exports
fastdepth for whole images (see data.whole_image_size), --dynamic for all multiples of 32. Batch norm is
folded. The metadata entry `fastdepth` is the network's config as JSON, with the unit of depth.
Exit code 1, and no file, if ONNX Runtime and PyTorch disagree.
"""
import json
import logging
import signal
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F

import data
from data import UserError, by, whole_file
from eval import at_training_scale, check_finite, evaluate, load_predictor
from model import ModelError, count, fold_batch_norm, load_model

TOLERANCE = 1e-4  # of max_depth: 1 mm of 10 m. Summing float32 in another order changes a hundredth of that


def export_onnx(model, file, size, config, dynamic=False):
    """Write the network as one ONNX file. dynamic also frees height and width (multiples of 32)."""
    import onnx
    free = {0: torch.export.Dim.DYNAMIC}
    if dynamic:
        free[2] = 32 * torch.export.Dim("height", min=1, max=256)
        free[3] = 32 * torch.export.Dim("width", min=1, max=256)
    example = torch.zeros(2, 3, *((64, 96) if dynamic else size))
    model = fold_batch_norm(model).cpu()
    for layer in model.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # torch.onnx.export would spend nearly half its time undoing it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model, (example,), input_names=["image"], output_names=["depth"],
            opset_version=18,  # OpenCV 4.8 reads it
            verbose=False, dynamic_shapes=(free,))
    proto = program.model_proto
    facts = config | dict(fixed=None if dynamic else size, unit="metres")
    onnx.helper.set_model_props(proto, {"fastdepth": json.dumps(facts)})
    with whole_file(file) as f:
        f.write(proto.SerializeToString())


def export_int8(model, file, size, config, images):
    """Write the network with 8-bit weights and activations; images (N, 3, H, W) calibrate their ranges."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    feeds = ({"image": image.numpy()} for image in images.split(1))
    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        export_onnx(model, wide, size, config)
        logging.getLogger().setLevel(logging.ERROR)  # onnxruntime advises steps already taken
        quantize_static(
            wide, narrow, SimpleNamespace(get_next=lambda: next(feeds, None)),
            quant_format=QuantFormat.QDQ,  # standard operators, which ONNX Runtime fuses
            per_channel=True,  # a scale for each filter: those of depthwise convolutions differ widely
            activation_type=QuantType.QUInt8,  # with QInt8, the default, x86 gains almost nothing
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax)  # the others take minutes and gain nothing
        with whole_file(file) as f:
            f.write(narrow.read_bytes())


def real_input(args, size, geometry, split, n):
    """At most n images (N, 3, H, W) of a split of --data."""
    dataset = data.open_dataset(args.data, split, size, geometry=geometry, depth_scale=args.depth_scale,
                                limit=n)
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


@torch.no_grad()
def largest_difference(file, model, image):
    """Run an .onnx file on image (B, 3, H, W) -> the largest difference from model(image), in metres."""
    predict, config = load_predictor(file)
    batches = [image, image[:1]]
    if config["fixed"] is None:
        batches.append(F.pad(image, (0, 64, 0, 32)))  # another size, not square
    differences = [(predict(batch) - model(batch)).abs().max() for batch in batches]
    return torch.stack(differences).max().item()  # keeps NaN, unlike Python's max


def timed(lanes, seconds=2.0):
    """name -> run() becomes name -> (median, p90) milliseconds. Lanes take turns, so that other load on
    the machine hits them all alike."""
    times = {name: [] for name in lanes}
    end = time.perf_counter() + seconds * len(lanes)
    while time.perf_counter() < end or min(map(len, times.values())) < 4:
        for name, run in lanes.items():
            run()  # warm up: the last lane filled the caches
            for _ in range(4):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: (statistics.median(t), statistics.quantiles(t, n=10)[8]) for name, t in times.items()}


@torch.no_grad()
def bench(model, image, files, threads):
    """Print how fast each way to run the network on image (1, 3, H, W) is; files: name -> .onnx file."""
    torch.set_num_threads(threads)
    folded = fold_batch_norm(model)
    lanes = {"PyTorch": lambda: model(image), "PyTorch, folded": lambda: folded(image)}
    for name, file in files.items():
        predict, _ = load_predictor(file, threads=threads)
        lanes[name] = lambda predict=predict: predict(image)
    lanes |= opencv_lane(files["ONNX Runtime"], image, threads)
    macs = count(model, *image.shape[-2:])["macs"]
    print(f"batch 1, {by(image.shape[-2:])}, CPU, {threads} threads, {macs / 1e9:.3f} GMACs")
    print(f"{'':20}{'median ms':>10}{'p90 ms':>10}{'images/s':>10}{'GMAC/s':>10}")
    for name, (median, p90) in timed(lanes).items():
        print(f"{name:20}{median:10.2f}{p90:10.2f}{1000 / median:10.1f}{macs / median / 1e6:10.1f}")


def opencv_lane(file, image, threads):
    """{name: run()} with OpenCV's DNN module; {} and a line if it is missing or cannot read the file."""
    try:
        import cv2
        net = cv2.dnn.readNetFromONNX(str(file))
    except ImportError:
        print("OpenCV: skipped (pip install opencv-python-headless)")
        return {}
    except cv2.error as error:  # OpenCV 4 and a --dynamic file
        print(f"OpenCV {cv2.__version__}: skipped, it cannot read {file} ({str(error).splitlines()[0]})")
        return {}
    cv2.setNumThreads(threads)

    def run():
        """The prediction for `image`, (1, 1, H', W')."""
        net.setInput(image.numpy(), "image")
        return net.forward("depth")
    return {f"OpenCV {cv2.__version__}": run}


def make_parser():
    """The flags."""
    parser = data.make_parser("Export a checkpoint to ONNX and check the file.")
    add = parser.add_argument
    add("model", help="a .pt file of train.py")
    add("--out", metavar="FILE", help="(default: the same name with .onnx)")
    add("--size", type=data.multiple_of_32, nargs=2, metavar=("H", "W"),
        help="what the file takes (default: that of training, for images cropped as in training)")
    add("--dynamic", action="store_true", help="free height and width: for ONNX Runtime and OpenCV 5 only")
    add("--int8", action="store_true", help="also write NAME-int8.onnx, calibrated on 64 images")
    add("--data", default="rooms:64", metavar="PATH", help="to compare on (val) and calibrate on (train)")
    add("--depth-scale", type=data.positive(float), default=1000.0, help="16-bit depth / this = metres")
    add("--bench", action="store_true", help="time the ways to run it")
    add("--threads", type=data.positive(int), default=torch.get_num_threads(), help="of --bench")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    out = Path(args.out or str(Path(args.model)).removesuffix(".pt") + ".onnx")
    if Path(args.model).suffix == ".onnx":
        raise UserError(f"{args.model}: is exported already: give the .pt file that it comes from")
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: must end in .onnx")
    if args.int8 and args.dynamic:
        raise UserError("--int8: needs a fixed size; drop --dynamic")
    model, config = load_model(args.model)
    size = tuple(args.size or config["size"])
    geometry = config["geometry"] if size == config["size"] else "full"
    image = real_input(args, size, geometry, "val", 8)
    check_finite(model(image), args.model)

    with tempfile.TemporaryDirectory() as folder:  # a wrong file never replaces a good one
        draft = Path(folder, out.name)
        export_onnx(model, draft, size, config, args.dynamic)
        difference = largest_difference(draft, model, image)
        print(f"largest difference from PyTorch over {len(image)} images: {difference:.2g} m")
        if not difference <= TOLERANCE * config["max_depth"]:
            sys.exit(f"that is more than {TOLERANCE * config['max_depth']:g} m: {out} was not written")
        with whole_file(out) as f:
            f.write(draft.read_bytes())
    takes = "any multiple of 32 (not for OpenCV 4)" if args.dynamic else f"{by(size)} ({geometry})"
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, takes {takes}")

    files = {"ONNX Runtime": out}
    if args.int8:
        files["ONNX Runtime int8"] = out.with_name(out.stem + "-int8.onnx")
        images = real_input(args, size, geometry, "train", 64)
        export_int8(model, files["ONNX Runtime int8"], size, config, images)
        print(f"int8 calibrated on {len(images)} images")
        for name, file in files.items():
            print(f"{name:20}{score(args, model, file, size, geometry, image)}")
    if args.bench:
        bench(model, image[:1], files, args.threads)


@torch.no_grad()
def score(args, model, file, size, geometry, image):
    """What int8 costs, in words: size, distance from PyTorch, and metrics on --data's val split."""
    predict, config = load_predictor(file)
    distance = (predict(image) - model(image)).abs().mean()
    dataset = data.open_dataset(args.data, "val", None, geometry=geometry, depth_scale=args.depth_scale)
    predict_frames = at_training_scale(predict, config, size, geometry)
    loader = torch.utils.data.DataLoader(dataset)
    result, _ = evaluate(predict_frames, loader, config["max_depth"], grid=(size, geometry))
    return (f"{file.stat().st_size / 2**20:.1f} MiB, {distance:.4f} m from PyTorch, "
            f"rmse {result['rmse']:.4f}, d1 {result['d1']:.4f} on {result['images']} images")


if __name__ == "__main__":
    data.run_script(main, ModelError)
