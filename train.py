"""Train a depth network: a plain loop over epochs around a plain loop over batches.

    python train.py --epochs 10                       # renders rooms on first use; needs no download
    python train.py --epochs 10 --data nyu            # any data set that data.py knows
    python train.py --resume runs/fastdepth-1         # go on after Ctrl-C; on a CPU to the last bit
    torchrun --nproc_per_node=2 train.py --data nyu   # a process per GPU, each with its share of every batch

Loss, optimizer and batch size are those of FastDepth's published recipe: L1, SGD with momentum 0.9 and weight
decay 1e-4, 8 images a batch. Learning rate, schedule and augmentation were chosen by measurement
(docs/results.md). Written to --out: last.pt after every epoch, best.pt after each with the lowest validation
RMSE so far, log.csv, curves.png, and samples.png at the end.
"""
import argparse
import copy
import io
import itertools
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the slow imports below ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import data
from data import UserError, open_dataset, positive, valid_mask, whole_file
from eval import evaluate, mean_depth_baseline, sample_sheet
from loss import LOSSES, make_loss
from model import (FORMAT, MODELS, ModelError, build_model, count, load_encoder, load_model, read_file,
                   use_fast_depthwise_gradient)

# ------------------------------------------------------------------------------------------------------------
# The two loops
# ------------------------------------------------------------------------------------------------------------


def train_one_epoch(args, epoch, loader, network, autocast, criterion, optimizer, scaler, scheduler):
    """Show the network every training image once; returns the mean loss of the batches."""
    network.train()
    start = time.time()
    check_every = 1 if args.device == "cpu" else 20  # to look at a loss is to wait for the device
    unchecked = []
    total = 0.0
    for step, (image, depth, index) in enumerate(loader, 1):  # (B, 3, H, W) in [0, 1]; (B, 1, H, W) metres
        image = image.to(args.device, memory_format=torch.channels_last, non_blocking=True)
        depth = depth.to(args.device, non_blocking=True)
        with autocast:
            pred = network(image)
        depth = F.interpolate(depth, pred.shape[-2:], mode="nearest-exact")  # the network's own resolution
        loss = criterion(pred.float(), depth, valid_mask(depth, args.max_depth))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if args.clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), args.clip)
        scaler.step(optimizer)
        scaler.update()
        if args.schedule != "plateau":  # which main steps, after validation
            scheduler.step()
        unchecked.append((step, loss.detach(), index))
        if len(unchecked) == check_every or step == len(loader):
            total += finite_sum(unchecked, epoch, loader.dataset)
            unchecked.clear()
            name = f"epoch {epoch}/{args.epochs}, step"
            data.progress(name, step, len(loader), start, f"  loss {total / step:.3f}")
    return total / len(loader)


def main(argv=None):
    """Train as the flags say; returns the metrics of the epoch with the lowest validation RMSE."""
    args, saved = parse(argv)
    rank, ranks = join_processes(args)
    with run_folder(args, saved, rank) as out:
        torch.manual_seed(args.seed)
        train_set, val_loader = open_data(args, rank)
        model = make_model(args).to(args.device, memory_format=torch.channels_last)
        use_fast_depthwise_gradient(model)
        network = DistributedDataParallel(model) if ranks > 1 else model  # averages the gradients of all
        network = torch.compile(network) if args.compile else network
        kind = torch.device(args.device).type
        autocast = torch.autocast(kind, AMP[args.amp], enabled=args.amp != "none")
        scaler = torch.amp.GradScaler(kind, enabled=args.amp == "fp16")  # else it does nothing
        criterion = make_loss(args.loss, args.max_depth)
        optimizer = make_optimizer(args, model)
        history = restore(args, saved, model, optimizer, scaler) if saved else []
        scheduler = make_scheduler(args, saved, optimizer, steps=len(train_set) // args.batch_size)
        if rank == 0:  # the process that prints, validates and writes
            baseline = show_plan(args, out, history, model, train_set, val_loader, ranks)

        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.time()
            lr = optimizer.param_groups[0]["lr"]
            loader = epoch_loader(args, epoch, train_set, rank, ranks)
            loss = train_one_epoch(args, epoch, loader, network, autocast, criterion, optimizer, scaler,
                                   scheduler)
            result = validate(args, epoch, val_loader, model, rank)
            if args.schedule == "plateau":
                scheduler.step(result["rmse"])
            history.append(dict(epoch=epoch, lr=lr, loss=loss, **result, seconds=time.time() - start))
            if rank == 0:
                save(out, args, train_set, history, model, optimizer, scaler, scheduler)
                log(out, args, history, baseline)

        if rank == 0:
            finish(out, args, history, baseline, val_loader.dataset)
        if ranks > 1:
            distributed.destroy_process_group()
        return best_of(history)


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------

# By measurement, for SGD. densedepth and fpn have no batch norm in the decoder: 0.05 diverges there.
LEARNING_RATES = dict.fromkeys(MODELS, 0.05) | {"densedepth": 0.005, "fpn": 0.005}
ADAM = 0.02  # Adam's learning rate / SGD's

# A preset: network -> defaults of the flags that are not given. FastDepth's relatives take its published
# recipe. FPN was published for detection: SGD in steps is that paper's, the learning rate the one from above.
FASTDEPTH = dict(optimizer="sgd", lr=0.01, batch_size=8, schedule="step", loss="l1", augment="paper")
DENSEDEPTH = dict(optimizer="adam", lr=1e-4, weight_decay=0, batch_size=8, schedule="none", loss="densedepth")
PRESETS = {
    "paper": dict.fromkeys(MODELS, FASTDEPTH) | {"densedepth": DENSEDEPTH, "fpn": dict(schedule="step")},
    "best": dict.fromkeys(MODELS, dict(optimizer="adam", schedule="cosine", augment="camera")),
}

AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
START = ("preset", "out", "resume", "init", "pretrained", "encoder_weights")  # flags of a start, not of a run


def make_flags():
    """Every flag, in groups; the defaults are those of the README's first command."""
    parser = data.make_parser("Train a depth network.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="defaults for flags not given: as published, or as measured best")
    # data
    add("--data", default="rooms", help="a data set, or rooms:N; the default is rendered on first use")
    add("--depth-scale", type=positive(float), default=1000.0, help="16-bit depth / this = metres; KITTI 256")
    add("--max-depth", type=positive(float), default=10.0, help="metres; deeper never counts; KITTI 80")
    add("--augment", default="flip", choices=data.AUGMENTS, help="random changes: see data.DepthDataset")
    add("--limit", type=positive(int), metavar="N", help="use only N samples of each split: a smoke run")
    add("--workers", type=data.workers, default=0, metavar="N", help="processes that read images")
    # network
    add("--model", default="fastdepth", choices=MODELS, help="see model.py")
    add("--options", nargs="*", type=key_value, metavar="KEY=VALUE",
        help="of build_model: skip=none conv=dense")
    add("--size", type=data.multiple_of_32, nargs=2, metavar=("H", "W"),
        help="of training (default: the network's, but 128 128 for the default rooms without --preset paper)")
    add("--geometry", choices=data.GEOMETRIES, help="how a frame becomes that size (default: the network's)")
    weights = parser.add_mutually_exclusive_group().add_argument
    weights("--init", metavar="FILE", help="start from a checkpoint, or a file of FastDepth's authors")
    weights("--pretrained", action="store_true", help="start the encoder from ImageNet weights, downloaded")
    weights("--encoder-weights", metavar="FILE", help="start the encoder from this ImageNet state dict")
    # optimisation
    add("--loss", default="l1", choices=LOSSES, help="see loss.py")
    add("--epochs", type=positive(int), default=10, help="in all, those before a --resume included")
    add("--batch-size", type=positive(int), default=8, help="images of a step, of all processes together")
    add("--optimizer", default="sgd", choices=("sgd", "adam", "adamw"),
        help="torch's: its Adam adds weight decay to the gradient, AdamW shrinks the weights")
    add("--lr", type=positive(float), help="learning rate (default: the preset's, else train.LEARNING_RATES)")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=1e-4, help="pull of the weights towards 0")
    add("--schedule", default="plateau", choices=("plateau", "step", "cosine", "none"),
        help="plateau: lower where the validation RMSE stays; step: a tenth every 5 epochs; cosine: to 0")
    add("--clip", type=positive(float), metavar="NORM", help="largest norm of the gradient")
    # machine
    add("--device", default=default_device(), help="cpu, cuda, cuda:1 or mps")
    add("--amp", choices=AMP, help="autocast (default: bf16 where the processor computes it)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    add("--threads", type=data.non_negative, default=0, metavar="N", help="of the CPU; 0: as PyTorch chooses")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    # results
    add("--out", metavar="DIR", help="a new or empty folder (default: the next free runs/MODEL-k)")
    add("--resume", metavar="DIR", help="go on from DIR/last.pt with its flags, or those given here")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
        help="write for TensorBoard too, into --out")
    return parser


def key_value(text):
    """The argparse type of one of --options."""
    key, equals, value = text.partition("=")
    if not equals or key in ("name", "max_depth"):  # arguments of build_model that are flags of their own
        raise argparse.ArgumentTypeError(f"takes KEY=VALUE, as skip=none; got {text}")
    return key, value


def default_device():
    """The fastest device that PyTorch finds."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def computes_bf16(device):
    """Whether the processor multiplies bfloat16 itself; emulated, it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return device == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def parse(argv):
    """-> the flags, and the checkpoint to go on from or None."""
    parser = make_flags()
    args = parser.parse_args(argv)
    saved = load_run(args) if args.resume else None
    if saved:
        parser.set_defaults(**saved["args"])
    elif args.preset:
        parser.set_defaults(**PRESETS[args.preset][args.model])
    args = parser.parse_args(argv)  # again: what is given now wins

    if not args.size:
        small = args.data == "rooms" and args.preset != "paper"
        args.size = SMALL if small else MODELS[args.model]["size"]
    args.size = tuple(args.size)
    if args.data == "rooms":
        args.data = default_rooms((144, 192) if max(args.size) <= max(SMALL) else data.ROOM_SIZE)
    args.geometry = args.geometry or MODELS[args.model]["geometry"]
    args.options = dict(args.options or {})
    args.lr = args.lr or LEARNING_RATES[args.model] * (1 if args.optimizer == "sgd" else ADAM)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    data.check_device(device)
    args.amp = args.amp or ("bf16" if computes_bf16(args.device) else "none")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tensorboard:
        summary_writer()
    for name in ("model", "options", "optimizer"):
        if saved and getattr(args, name) != saved["args"].get(name):
            raise UserError(f"{args.resume}: was trained with another --{name}: start a new run to change it")
    return args, saved


def load_run(args):
    """The checkpoint from which --resume goes on."""
    for name in START:
        if getattr(args, name) and name != "resume":
            raise UserError(f"--{name.replace('_', '-')} is for a new run, not for --resume")
    file = Path(args.resume) / "last.pt"
    load_model(file)  # its errors name the file and the cure
    saved = read_file(file)
    parts = dict(optimizer=dict, scheduler=dict, scaler=dict, history=list, best=dict, args=dict)
    if not (isinstance(saved, dict) and all(isinstance(saved.get(name), parts[name]) for name in parts)
            and saved["history"]):
        raise UserError(f"{file}: holds a network but no run to go on with: start one with --init {file}")
    if args.lr:  # replaces also what plateau has made of the old one
        for group in saved["optimizer"]["param_groups"]:
            group["lr"] = args.lr
    return saved


# ------------------------------------------------------------------------------------------------------------
# Data, network, optimizer
# ------------------------------------------------------------------------------------------------------------

SMALL = (128, 128)  # ten minutes on two cores are better spent on many small images than on few large ones
ROOMS = 4096  # of the default data


def default_rooms(frame):
    """The pack of the default rooms in frames of that (H, W)."""
    return f"data/rooms-v{data.ROOMS_VERSION}-{ROOMS}-{frame[0]}x{frame[1]}.h5"


def open_data(args, rank):
    """-> the training set, and the loader of the validation images."""
    for frame in ((144, 192), data.ROOM_SIZE):  # the first is enough for training at SMALL
        if args.data == default_rooms(frame) and not Path(args.data).exists() and rank == 0:
            data.write_pack(args.data, f"rooms:{ROOMS}", size=frame)
    if distributed.is_initialized():
        distributed.barrier()  # until the file is there
    common = dict(size=args.size, geometry=args.geometry, depth_scale=args.depth_scale, limit=args.limit)
    train_set = open_dataset(args.data, "train", augment=args.augment, seed=args.seed, **common)
    val_set = open_dataset(args.data, "val", **common)
    if len(train_set) < args.batch_size:
        raise UserError(f"{args.data}: has only {len(train_set)} training pairs: lower --batch-size to that")
    if rank == 0:
        data.check_scale(train_set, args.max_depth)
        data.check_crop(train_set, args.size)
    return train_set, make_loader(args, val_set, args.batch_size)


def make_loader(args, dataset, batch_size, order=None):
    """Batches of (image, depth, index), in the order of the indices given or from first to last."""
    return torch.utils.data.DataLoader(
        dataset, batch_size, sampler=order, num_workers=args.workers, worker_init_fn=data.worker_init,
        pin_memory=args.device.startswith("cuda"))


def epoch_loader(args, epoch, dataset, rank, ranks):
    """The batches of one epoch; of several processes, each gets its share of every batch.

    All that is random follows from seed and epoch, so that a resumed run draws what it would have. They are
    mixed, not added: epoch 2 of seed 0 is not epoch 1 of seed 1. An incomplete last batch is left out.
    """
    torch.manual_seed(zlib.crc32(f"{args.seed} {epoch}".encode()))
    dataset.epoch = epoch
    order = torch.randperm(len(dataset))[:len(dataset) // args.batch_size * args.batch_size]
    return make_loader(args, dataset, args.batch_size // ranks, order[rank::ranks].tolist())


def make_model(args):
    """The network with the weights that it starts from."""
    model = build_model(args.model, args.max_depth, **args.options)
    if args.init:
        initial, config = load_model(args.init)
        if (config["model"], config["options"]) != (args.model, args.options):
            options = " ".join(f"{key}={value}" for key, value in config["options"].items()) or "none"
            raise UserError(f"{args.init}: is of --model {config['model']} with --options: {options}")
        model.load_state_dict(initial.state_dict())
    if args.pretrained or args.encoder_weights:
        unused = load_encoder(model, args.encoder_weights)
        print(f"encoder   {args.encoder_weights or 'ImageNet'}; not used: {', '.join(unused) or 'nothing'}")
    return model


def make_optimizer(args, model):
    """SGD, Adam or AdamW."""
    common = dict(params=model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "sgd":
        return torch.optim.SGD(momentum=args.momentum, **common)
    return torch.optim.Adam(**common) if args.optimizer == "adam" else torch.optim.AdamW(**common)


PLATEAU = dict(factor=0.3, patience=0, threshold=0)  # torch's patience of 10 never acts in 10 epochs


def make_scheduler(args, saved, optimizer, steps):
    """plateau takes a step after each epoch, the others after each of the `steps` of an epoch.

    The others follow from --lr and the steps done, so nothing of them is restored, and --epochs moves the end
    of a resumed cosine. (CosineAnnealingLR would restore the old end, and rise after it.)
    """
    if args.schedule == "plateau":
        scheduler = ReduceLROnPlateau(optimizer, **PLATEAU)
        if saved and saved["args"]["schedule"] == "plateau":
            scheduler.load_state_dict(saved["scheduler"])
        return scheduler
    factors = {
        "none": lambda step: 1.0,
        "step": lambda step: 0.1 ** (step // (5 * steps)),
        "cosine": lambda step: (1 + math.cos(math.pi * step / (args.epochs * steps))) / 2,
    }
    for group in optimizer.param_groups:
        group["initial_lr"] = args.lr
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # fp16 skips steps that overflow
    done = len(saved["history"]) * steps if saved else 0
    return LambdaLR(optimizer, factors[args.schedule], last_epoch=done - 1)


def restore(args, saved, model, optimizer, scaler):
    """Put a checkpoint into model, optimizer and scaler; returns its history."""
    model.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    for group in optimizer.param_groups:  # flags that may have been given anew
        group["weight_decay"] = args.weight_decay
        if args.optimizer == "sgd":
            group["momentum"] = args.momentum
    if saved["scaler"]:  # empty but after --amp fp16
        scaler.load_state_dict(saved["scaler"])
    return saved["history"]


# ------------------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------------------


def join_processes(args):
    """Meet the processes that torchrun started beside this one: -> the rank of this one, and how many."""
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {ranks} processes")
    if args.batch_size == ranks and args.size == (32, 32):
        raise UserError(f"--batch-size {ranks} with --size 32 32 leaves batch norm one pixel: raise either")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # which "cuda" means from now on
        torch.backends.cudnn.benchmark = True
    if ranks > 1:
        patience = timedelta(hours=6)  # of the others, while rank 0 renders rooms or validates
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=patience)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, ranks


def finite_sum(unchecked, epoch, dataset):
    """The sum of the losses of (step, loss, indices), each the mean over all processes.

    One that is not finite ends all processes with exit code 1; the one that read the batch names its files.
    """
    losses = torch.stack([loss for _, loss, _ in unchecked])
    if distributed.is_initialized():
        distributed.all_reduce(losses)
        losses /= distributed.get_world_size()
    losses = losses.tolist()
    for value, (step, loss, index) in zip(losses, unchecked):
        if not math.isfinite(value):
            if math.isfinite(loss):
                sys.exit(1)
            files = ", ".join(dataset.files[i] for i in index)
            sys.exit(f"\nthe loss is {value} in epoch {epoch}, step {step}: "
                     f"lower --lr, set --clip, or look at {files}")
    return sum(losses)


def validate(args, epoch, loader, model, rank):
    """Metrics of the validation images, by rank 0 for all: one number must step every process's scheduler."""
    def predict(image):
        return model(image.to(args.device, memory_format=torch.channels_last))

    results = [None]
    if rank == 0:
        model.eval()
        results[0], _ = evaluate(predict, loader, args.max_depth, name=f"epoch {epoch}, validation")
        if not math.isfinite(results[0]["rmse"]):
            raise UserError(f"epoch {epoch}, validation: the RMSE is infinite: lower --lr, or set --clip")
    if distributed.is_initialized():
        distributed.broadcast_object_list(results)
    return results[0]


# ------------------------------------------------------------------------------------------------------------
# What a run prints and writes
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def run_folder(args, saved, rank):
    """The folder of a run. If the run stops, says how to go on; without a whole epoch, no folder remains."""
    if rank > 0:
        yield None
        return
    out = Path(args.resume) if saved else claim_folder(args)
    if saved:
        keep_best(out, saved["history"])  # for a run killed between its two checkpoints
    try:
        yield out
    except BaseException as error:
        if (out / "last.pt").exists():
            print(f"\nstopped; go on with: python train.py --resume {shlex.quote(str(out))}", flush=True)
        elif isinstance(error, KeyboardInterrupt):
            print("\nstopped before the first epoch was complete: nothing is kept", flush=True)
        with suppress(OSError):  # not empty
            out.rmdir()
        raise


def claim_folder(args):
    """Make --out, which must be new or empty, or runs/MODEL-k with the first k that no run has taken."""
    if args.out:
        out = Path(args.out)
        if out.exists() and not (out.is_dir() and all(".partial-" in file.name for file in out.iterdir())):
            raise UserError(f"{out}: is not an empty folder: choose another --out, or --resume the run there")
        out.mkdir(parents=True, exist_ok=True)
        return out
    for k in itertools.count(1):
        out = Path("runs") / f"{args.model}-{k}"
        with suppress(FileExistsError):
            out.mkdir(parents=True)
            return out


def show_plan(args, out, history, model, train_set, val_loader, ranks):
    """Print what is going to happen; returns the metrics of the mean-depth baseline."""
    size = count(model, *args.size)
    height, width = args.size
    options = "".join(f" {key}={value}" for key, value in args.options.items())
    print(f"device    {args.device}, {torch.get_num_threads()} threads, amp {args.amp}, {ranks} processes")
    print(f"data      {args.data} ({train_set.layout}): "
          f"{len(train_set)} train, {len(val_loader.dataset)} val")
    print(f"images    {height}x{width} ({args.geometry}), augment {args.augment}")
    if args.size != MODELS[args.model]["size"]:
        print("          the network's own size is --size {} {}".format(*MODELS[args.model]["size"]))
    print(f"network   {args.model}{options}: {size['parameters']:,} parameters, "
          f"{size['macs'] / 1e9:.3f} GMACs, output 1/{model.output_stride}")
    print(f"training  {args.loss}, {args.optimizer}, lr {args.lr:g}, {args.schedule}, seed {args.seed}")
    print(f"          {args.epochs} epochs of {len(train_set) // args.batch_size} steps "
          f"of {args.batch_size} images; {len(history)} epochs done")
    frames = copy.copy(train_set)
    frames.augment = "none"
    mean = mean_depth_baseline(frames, args.max_depth)
    baseline, _ = evaluate(lambda image: mean.expand(len(image), -1, -1, -1), val_loader, args.max_depth)
    print(f"baseline  rmse {baseline['rmse']:.3f}, absrel {baseline['absrel']:.3f}, d1 {baseline['d1']:.3f}: "
          "the mean depth of each pixel, without looking")
    print(f"results   {out}\n")
    print("epoch        lr    loss    rmse  absrel      d1      d2      d3  seconds", flush=True)
    return baseline


def best_of(history):
    """The epoch with the lowest validation RMSE."""
    return min(history, key=lambda row: row["rmse"])


def save(out, args, train_set, history, model, optimizer, scaler, scheduler):
    """Write last.pt, and best.pt after the best epoch so far."""
    frame = train_set.read(0)[1].shape
    config = dict(model=args.model, options=args.options, size=args.size, geometry=args.geometry,
                  max_depth=args.max_depth, frame=tuple(frame))
    memory = io.BytesIO()  # torch.save itself hides the error of a full disk
    torch.save(dict(
        format=FORMAT,
        config=config,
        weights=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict() if args.schedule == "plateau" else {},
        scaler=scaler.state_dict(),
        history=history,
        best=best_of(history),
        args={name: value for name, value in vars(args).items() if name not in START},
    ), memory)
    with whole_file(out / "last.pt") as f:
        f.write(memory.getbuffer())
    keep_best(out, history)


def keep_best(out, history):
    """Copy last.pt to best.pt if its epoch is the best."""
    if best_of(history) is history[-1]:
        with whole_file(out / "best.pt") as f:
            f.write((out / "last.pt").read_bytes())


def log(out, args, history, baseline):
    """The last epoch as a line, all of them as log.csv and curves.png."""
    row = history[-1]
    print(f"{row['epoch']:5} {row['lr']:9.2g} {row['loss']:7.4f} {row['rmse']:7.4f} {row['absrel']:7.4f} "
          f"{row['d1']:7.4f} {row['d2']:7.4f} {row['d3']:7.4f} {row['seconds']:8.1f}", flush=True)
    write_record(out, history, baseline)
    if args.tensorboard:
        with summary_writer()(out, purge_step=row["epoch"]) as writer:
            for name, value in row.items():
                writer.add_scalar(name, value, row["epoch"])


def summary_writer():
    """TensorBoard's SummaryWriter, if it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def write_record(out, history, baseline):
    """log.csv and curves.png of all epochs, written anew each time, so that they are whole after a resume."""
    lines = [",".join(history[0])] + [",".join(f"{value:.6g}" for value in row.values()) for row in history]
    with whole_file(out / "log.csv") as f:
        f.write("\n".join([*lines, ""]).encode())
    with whole_file(out / "curves.png") as f:
        draw_curves(history, baseline).save(f, "PNG")


def draw_curves(history, baseline):
    """Training loss, validation RMSE and d1 by epoch; the grey line is the mean-depth baseline."""
    sheet = Image.new("RGB", (1080, 240), "white")
    draw = ImageDraw.Draw(sheet)
    for left, name in ((60, "loss"), (420, "rmse"), (780, "d1")):
        values = [row[name] for row in history]
        levels = [*values, baseline.get(name, values[0])]
        low, high = min(levels), max(levels)
        heights = [210 - 170 * (level - low) / max(high - low, 1e-9) for level in levels]
        points = list(zip(torch.linspace(left, left + 285, len(values)).tolist(), heights))
        if name in baseline:
            draw.line([(left, heights[-1]), (left + 285, heights[-1])], fill="grey")
        draw.line(points, fill=(182, 54, 122), width=2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(182, 54, 122))
        for corner, text in (((left, 10), f"{name}, epochs 1 to {len(values)}"),
                             ((left - 50, 34), f"{high:.3f}"), ((left - 50, 204), f"{low:.3f}")):
            draw.text(corner, text, fill="black")
    return sheet


def finish(out, args, history, baseline, val_set):
    """Show what the best network sees, and what to do next."""
    write_record(out, history, baseline)  # again, for a run that was killed before it did
    network, _ = load_model(out / "best.pt")
    sample_sheet(network, val_set, out / "samples.png", args.max_depth)
    best = best_of(history)
    print(f"best epoch {best['epoch']}: rmse {best['rmse']:.3f} (baseline {baseline['rmse']:.3f}), "
          f"d1 {best['d1']:.3f} ({baseline['d1']:.3f})")
    print(f"see {out}/samples.png and {out}/curves.png; next: python eval.py {shlex.quote(f'{out}/best.pt')} "
          f"--data {shlex.quote(args.data)}", flush=True)


if __name__ == "__main__":
    data.run_script(main, ModelError)
