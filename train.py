"""Train a depth network: a plain loop over epochs around a plain loop over batches.

    python train.py --epochs 10                       # renders rooms on first use; needs no download
    python train.py --epochs 10 --data nyu            # any data set that data.py knows
    python train.py --resume runs/fastdepth-1         # resume, also after Ctrl-C; bit for bit on a CPU
    torchrun --nproc_per_node=2 train.py --data nyu   # one process per GPU; each gets a share of every batch

Loss, optimizer and batch size are those of FastDepth's published recipe: L1, SGD with momentum 0.9 and weight
decay 1e-4, 8 images per batch. Learning rate, schedule and augmentation were chosen by measurement
(docs/results.md). Every epoch writes last.pt, log.csv and curves.png to --out, and best.pt if its
validation RMSE is the lowest so far. samples.png follows at the end.
"""
import argparse
import copy
import importlib.util
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
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # no traceback on Ctrl-C during the slow imports below
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import data
from data import UserError, by, open_dataset, positive, valid_mask, whole_file
from eval import evaluate, mean_depth_baseline, sample_sheet
from loss import LOSSES, make_loss
from model import (FORMAT, MODELS, ModelError, build_model, count, load_encoder, load_model, read_file,
                   use_fast_depthwise_gradient)

# ------------------------------------------------------------------------------------------------------------
# The two loops
# ------------------------------------------------------------------------------------------------------------


def train_one_epoch(args, epoch, loader, network, autocast, criterion, optimizer, scaler, scheduler):
    """Train on every image once; returns the mean loss of the batches."""
    network.train()
    losses = RunningLoss(args, epoch, loader)
    for image, depth, index in loader:  # (B, 3, H, W) in [0, 1]; (B, 1, H, W) metres
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
        losses.add(loss.detach(), index)  # stops the run if a loss is not finite
    return losses.total / len(loader)


def main(argv=None):
    """Train as the flags say; returns the metrics of the epoch with the lowest validation RMSE."""
    args, saved = parse(argv)
    rank, ranks = join_processes(args)
    with run_folder(args, saved) if rank == 0 else nullcontext() as out:
        train_set, val_loader = open_data(args, rank)
        torch.manual_seed(args.seed)  # after rendering, which draws random numbers on a first run
        model = make_model(args, saved).to(args.device, memory_format=torch.channels_last)
        use_fast_depthwise_gradient(model)
        network = DistributedDataParallel(model) if ranks > 1 else model  # averages gradients
        network = torch.compile(network) if args.compile else network
        kind = torch.device(args.device).type
        autocast = torch.autocast(kind, AMP[args.amp], enabled=args.amp != "none")
        scaler = torch.amp.GradScaler(kind, enabled=args.amp == "fp16")  # otherwise a no-op
        criterion = make_loss(args.loss, args.max_depth)
        fused = args.amp != "fp16"  # faster, but a first step that fp16 skips would leave momentum undefined
        optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr, fused=fused,
                                               weight_decay=args.weight_decay)
        history = saved["history"] if saved else []
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]:  # empty except after --amp fp16
                scaler.load_state_dict(saved["scaler"])
        scheduler = make_scheduler(args, history, optimizer, steps=len(train_set) // args.batch_size)
        if rank == 0:  # the process that prints, validates and writes
            baseline = show_plan(args, out, history, model, train_set, val_loader, ranks)
            if history:  # again: the run may have been killed between last.pt and these files
                log(out, args, history, baseline)

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
                save(out, args, train_set, history, model, optimizer, scaler)
                log(out, args, history, baseline)

        if rank == 0:
            finish(out, args, history, baseline, val_loader.dataset)
        if ranks > 1:
            distributed.barrier()  # until rank 0 has written: gloo may crash a process that exits
            distributed.destroy_process_group()
        return best_of(history)


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------

# Measured with SGD. densedepth and fpn have no batch norm in the decoder and diverge at 0.05.
LEARNING_RATES = dict.fromkeys(MODELS, 0.05) | {"densedepth": 0.005, "fpn": 0.005}
ADAM_RATIO = 0.02  # Adam's learning rate / SGD's

# preset -> network -> defaults for flags that are not given. FastDepth's relatives take its published
# recipe. FPN was published for detection: SGD and the step schedule are its paper's; its learning rate is the
# one above. "best" was measured with fastdepth only; for the others it is a guess.
FASTDEPTH = dict(optimizer="sgd", lr=0.01, batch_size=8, schedule="step", loss="l1", augment="paper")
DENSEDEPTH = dict(optimizer="adam", lr=1e-4, weight_decay=0, batch_size=8, schedule="none", loss="densedepth")
PRESETS = {
    "paper": dict.fromkeys(MODELS, FASTDEPTH) | {"densedepth": DENSEDEPTH, "fpn": dict(schedule="step")},
    "best": dict.fromkeys(MODELS, dict(optimizer="adam", schedule="cosine", augment="camera")),
}

OPTIMIZERS = {"sgd": partial(SGD, momentum=0.9), "adam": Adam, "adamw": AdamW}
AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAY_CHANGE = ("resume", "epochs", "lr", "schedule", "clip", "data", "device", "amp", "compile", "threads",
              "workers", "tensorboard")  # on --resume


def make_flags():
    """Every flag, in groups; the defaults are those of the README's first command."""
    parser = data.make_parser("Train a depth network.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="defaults for flags not given: as published, or as measured best")
    # data
    add("--data", default="rooms", help="a data set, or rooms:N; the default is rendered on first use")
    add("--depth-scale", type=positive(float), default=1000.0, help="16-bit depth / this = metres; KITTI 256")
    add("--max-depth", type=positive(float), default=10.0, help="metres; deeper is ignored (KITTI: 80)")
    add("--augment", default="flip", choices=data.AUGMENTS, help="augmentation, see data.AUGMENTS")
    add("--limit", type=positive(int), metavar="N", help="use only N samples of each split: a smoke run")
    add("--workers", type=data.up_to_256, default=0, metavar="N", help="processes that read images")
    # network
    add("--model", default="fastdepth", choices=MODELS, help="see model.py")
    add("--options", nargs="*", type=key_value, metavar="KEY=VALUE", help="of the decoder, such as skip=none")
    add("--size", type=data.multiple_of_32, nargs=2, metavar=("H", "W"),
        help="of training (default: the network's; 128 128 for the default rooms without --preset paper)")
    add("--geometry", choices=data.GEOMETRIES, help="how a frame becomes that size (default: the network's)")
    add_start = parser.add_mutually_exclusive_group().add_argument
    add_start("--init", metavar="FILE", help="start from a checkpoint, or a file of FastDepth's authors")
    add_start("--pretrained", action="store_true", help="start the encoder from ImageNet weights, downloaded")
    add_start("--encoder-weights", metavar="FILE", help="start the encoder from this ImageNet state dict")
    # optimisation
    add("--loss", default="l1", choices=LOSSES, help="see loss.py")
    add("--epochs", type=positive(int), default=10, help="in total, including those before --resume")
    add("--batch-size", type=positive(int), default=8, help="images per step, over all processes")
    add("--optimizer", default="sgd", choices=OPTIMIZERS,
        help="sgd has momentum 0.9; adam adds weight decay to the gradient, adamw shrinks the weights")
    add("--lr", type=positive(float), help="learning rate (default: the preset's, else train.LEARNING_RATES)")
    add("--weight-decay", type=data.non_negative, default=1e-4, help="pulls the weights towards 0")
    add("--schedule", default="plateau", choices=("plateau", "step", "cosine", "none"),
        help="plateau: lower when validation RMSE stops falling; step: x 0.1 every 5 epochs; cosine: to 0")
    add("--clip", type=positive(float), metavar="NORM", help="clip the gradient to this norm")
    # machine
    fastest = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--device", default=fastest, help="cpu, cuda, cuda:1 or mps")
    add("--amp", choices=AMP, help="autocast (default: bf16 where the hardware has it)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    add("--threads", type=data.up_to_256, default=0, metavar="N", help="CPU threads; 0: PyTorch's choice")
    add("--seed", type=data.int64, default=0, help="for weights, order and augmentation")
    # results
    add("--out", metavar="DIR", help="a new or empty folder (default: the next free runs/MODEL-k)")
    add("--resume", metavar="DIR",
        help="continue the run in DIR with its flags; train.MAY_CHANGE lists those that may change")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="log for TensorBoard too")
    parser.set_defaults(epochs_before_lr=0)  # no flag: how many there were when --resume changed --lr
    return parser


def key_value(text):
    """The argparse type of one of --options."""
    key, equals, value = text.partition("=")
    if not equals or key in ("name", "max_depth"):  # arguments of build_model that are flags of their own
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as skip=none; got {text}")
    return key, value


def computes_bf16(device):
    """Whether the processor multiplies bfloat16 itself; emulated, it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return device == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def parse(argv):
    """The flags, and the checkpoint to resume from or None."""
    parser = make_flags()
    args = parser.parse_args(argv)
    if args.resume and Path(args.resume).is_file():
        raise UserError(f"--resume {args.resume}: give the folder of the run")
    saved = load_run(Path(args.resume)) if args.resume is not None else None
    if saved:
        parser.set_defaults(**saved["args"])
    elif args.preset:
        parser.set_defaults(**PRESETS[args.preset][args.model])
    args = parser.parse_args(argv)  # again: flags on the command line override these defaults

    if not args.size:
        small = args.data == "rooms" and args.preset != "paper"
        args.size = ROOMS_SIZE if small else MODELS[args.model]["size"]
    args.size = tuple(args.size)
    args.geometry = args.geometry or MODELS[args.model]["geometry"]
    args.options = dict(args.options or {})
    args.lr = args.lr or LEARNING_RATES[args.model] * (1 if args.optimizer == "sgd" else ADAM_RATIO)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    data.check_device(device)
    args.amp = args.amp or ("bf16" if computes_bf16(args.device) else "none")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    for name, value in vars(args).items():
        if saved and name not in MAY_CHANGE and value != saved["args"].get(name, value):
            raise UserError(f"--{name.replace('_', '-')} cannot change on --resume: start a new run with "
                            f"--init {args.resume}/last.pt")
    if saved and args.lr != saved["args"].get("lr"):
        args.epochs_before_lr = len(saved["history"])
    return args, saved


def load_run(out):
    """The checkpoint from which --resume continues."""
    file = out / "last.pt"
    load_model(file)  # its errors name the file and the cure
    saved = read_file(file)
    parts = dict(optimizer=dict, scaler=dict, history=list, args=dict)
    if not (isinstance(saved, dict) and saved.get("history")
            and all(isinstance(saved.get(name), kind) for name, kind in parts.items())
            and all(isinstance(row, dict) and "rmse" in row for row in saved["history"])
            and "param_groups" in saved["optimizer"]):
        raise UserError(f"{file}: a network without a run to resume: start a new run with --init {file}")
    best = out / "best.pt"
    if not best.exists() and best_of(saved["history"]) is not saved["history"][-1]:
        raise UserError(f"{best}: is missing: copy the whole folder, or start a new run with --init {file}")
    return saved


# ------------------------------------------------------------------------------------------------------------
# Data, network, optimizer, processes
# ------------------------------------------------------------------------------------------------------------

ROOMS_SIZE = (128, 128)  # not 224x224: in equal time, many small images teach more than few large ones
ROOMS = 7168  # training rooms of the default data


def open_data(args, rank):
    """The training set, and the loader of the validation images."""
    small = max(args.size) <= max(ROOMS_SIZE)
    frame = (144, 192) if small else data.ROOM_SIZE  # FastDepth's crop shows 131x175 of 144x192
    pack = f"data/rooms-v{data.ROOMS_VERSION}-{ROOMS}-{by(frame)}.h5"
    if args.data in ("rooms", pack):  # a checkpoint holds the file's name
        args.data = pack
        if rank == 0 and not Path(pack).exists():
            data.write_pack(pack, f"rooms:{ROOMS}", size=frame)
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
    """Batches of (image, depth, index), in the given order of indices, or from first to last."""
    return torch.utils.data.DataLoader(
        dataset, batch_size, sampler=order, num_workers=args.workers, worker_init_fn=data.worker_init,
        pin_memory=args.device.startswith("cuda"))


def epoch_loader(args, epoch, dataset, rank, ranks):
    """The whole batches of one epoch; of several processes, each gets its share of every batch.

    Everything random follows from (seed, epoch), so a resumed run draws what an uninterrupted one would. The
    two are hashed, not added: epoch 2 of seed 0 must not be epoch 1 of seed 1.
    """
    torch.manual_seed(zlib.crc32(f"{args.seed} {epoch}".encode()))
    dataset.epoch = epoch
    order = torch.randperm(len(dataset))[:len(dataset) // args.batch_size * args.batch_size]
    return make_loader(args, dataset, args.batch_size // ranks, order[rank::ranks].tolist())


def make_model(args, saved):
    """The network, with the weights from which it starts or resumes."""
    model = build_model(args.model, args.max_depth, **args.options)
    output = [n // model.output_stride for n in args.size]
    if args.loss in ("ssim", "mae+grad+ssim", "densedepth") and min(output) < 11:
        raise UserError(f"--loss {args.loss}: needs an output of at least 11x11, not {by(output)}: "
                        "enlarge --size")
    if saved:
        model.load_state_dict(saved["weights"])
    elif args.init is not None:
        initial, config = load_model(args.init)
        if (config["model"], config["options"]) != (args.model, args.options):
            raise UserError(f"{args.init}: holds --model {config['model']}, options {config['options']}")
        model.load_state_dict(initial.state_dict())
    elif args.pretrained or args.encoder_weights is not None:
        unused = load_encoder(model, args.encoder_weights)
        print(f"encoder   {args.encoder_weights or 'ImageNet'}; unused: {', '.join(unused) or 'none'}")
    return model


PLATEAU = dict(factor=0.3, patience=0, threshold=0)  # torch's patience of 10 never acts in 10 epochs


def make_scheduler(args, history, optimizer, steps):
    """The scheduler after the epochs of `history`: plateau steps once an epoch, the others once a batch.

    All follow from the flags and the history, so none is saved, and --epochs moves a resumed cosine's end.
    (CosineAnnealingLR would restore the old end, and rise after it.)
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = args.lr
    if args.schedule == "plateau":
        scheduler = ReduceLROnPlateau(optimizer, **PLATEAU)
        for row in history[args.epochs_before_lr:]:
            scheduler.step(row["rmse"])
        return scheduler
    factors = {
        "none": lambda step: 1.0,
        "step": lambda step: 0.1 ** (step // (5 * steps)),
        "cosine": lambda step: (1 + math.cos(math.pi * step / (args.epochs * steps))) / 2,
    }
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # fp16 skips steps that overflow
    return LambdaLR(optimizer, factors[args.schedule], last_epoch=len(history) * steps - 1)


def join_processes(args):
    """Join the processes that torchrun started; returns this one's rank and their number."""
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {ranks} processes")
    if args.batch_size == ranks and args.size == (32, 32):
        raise UserError(f"--batch-size {ranks} with --size 32 32 leaves batch norm a single pixel")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # from now on "cuda" means this GPU
    torch.backends.cudnn.benchmark = True  # has no effect on a CPU
    if ranks > 1:
        patience = timedelta(hours=6)  # of the others, while rank 0 renders rooms or validates
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=patience)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, ranks


class RunningLoss:
    """The losses of an epoch's steps. Shows progress, and stops the run if one is not finite."""

    def __init__(self, args, epoch, loader):
        self.epoch = epoch
        self.loader = loader
        self.name = f"epoch {epoch}/{args.epochs}, step"
        self.start = time.time()
        self.every = 1 if args.device == "cpu" else 20  # reading a loss waits for the device
        self.unread = []  # (loss, indices of the samples)
        self.step = 0  # of the last loss that was read
        self.total = 0.0

    def add(self, loss, index):
        """Add the loss of the next step, and the indices of its samples. On a GPU, 20 are read at once.
        If one is not finite, all processes exit with code 1, and each names the files that it read."""
        self.unread.append((loss, index))
        if len(self.unread) < self.every and self.step + len(self.unread) < len(self.loader):
            return
        losses = torch.stack([loss for loss, _ in self.unread])
        if distributed.is_initialized():  # their means over all processes
            distributed.all_reduce(losses)
            losses /= distributed.get_world_size()
        for value, (_, index) in zip(losses.tolist(), self.unread):
            self.step += 1
            self.total += value
            if not math.isfinite(value):
                files = ", ".join(self.loader.dataset.files[i] for i in index)
                sys.exit(f"\nthe loss is {value} in epoch {self.epoch}, step {self.step}: "
                         f"lower --lr, set --clip, or look at {files}")
        self.unread.clear()
        mean = f"  loss {self.total / self.step:.3f}"
        data.progress(self.name, self.step, len(self.loader), self.start, mean)


def validate(args, epoch, loader, model, rank):
    """Validation metrics, computed by rank 0 and sent to all: every scheduler must see the same number."""
    results = [None]
    if rank == 0:
        model.eval()
        predict = lambda image: model(image.to(args.device, memory_format=torch.channels_last))
        results[0], _ = evaluate(predict, loader, args.max_depth, name=f"epoch {epoch}, validation")
    if distributed.is_initialized():
        distributed.broadcast_object_list(results)
    return results[0]


# ------------------------------------------------------------------------------------------------------------
# What a run prints and writes
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def run_folder(args, saved):
    """The folder of a run. If the run stops, this says how to resume it, or removes the folder if no epoch
    has been saved."""
    out = Path(args.resume) if saved else claim_folder(args)
    try:
        yield out
    except BaseException:
        if (out / "last.pt").exists():
            more = " and the same flags" if saved else ""
            print(f"\nstopped; resume with: python train.py --resume {shlex.quote(str(out))}{more}",
                  flush=True)
        with suppress(OSError):  # rmdir fails if last.pt is there
            claim(out).unlink(missing_ok=True)
            out.rmdir()
        raise


def claim_folder(args):
    """Make --out, which must be new or empty, or runs/MODEL-k for the first free k."""
    if args.out:
        out = Path(args.out)
        data.clear_partials(out / "last.pt")  # what killed runs left
        if out.exists() and not (out.is_dir() and set(out.iterdir()) <= {claim(out)}):
            raise UserError(f"{out}: is not an empty folder: choose another --out, or --resume the run there")
        out.mkdir(parents=True, exist_ok=True)
    else:
        Path("runs").mkdir(exist_ok=True)
        for k in itertools.count(1):
            out = Path("runs") / f"{args.model}-{k}"
            with suppress(FileExistsError):
                out.mkdir()
                break
    claim(out).touch()
    return out


def claim(out):
    """The file that keeps other runs out of an empty folder until whole_file renames it to last.pt."""
    return out / f"last.pt.partial-{os.getpid()}"


def show_plan(args, out, history, model, train_set, val_loader, ranks):
    """Print the plan of the run; returns the metrics of the mean-depth baseline."""
    size = count(model, *args.size)
    processes = f"{ranks} processes" if ranks > 1 else "1 process"
    print(f"device    {args.device}, {torch.get_num_threads()} threads, amp {args.amp}, {processes}")
    print(f"data      {args.data} ({train_set.layout}): "
          f"{len(train_set)} train, {len(val_loader.dataset)} val")
    own = by(MODELS[args.model]["size"])
    print(f"images    {by(args.size)} ({args.geometry}; the network's own is {own}), augment {args.augment}")
    print(f"network   {args.model}, options {args.options or 'none'}, output 1/{model.output_stride}; "
          f"{size['parameters']:,} parameters, {size['macs'] / 1e9:.3f} GMACs")
    print(f"training  {args.loss}, {args.optimizer}, lr {args.lr:g}, {args.schedule}, seed {args.seed}")
    done = f"; {len(history)} epochs done" if history else ""
    print(f"          {args.epochs} epochs of {len(train_set) // args.batch_size} steps "
          f"of {args.batch_size} images{done}")
    frames = copy.copy(train_set)
    frames.augment = "none"
    mean = mean_depth_baseline(frames, args.max_depth)
    baseline, _ = evaluate(lambda image: mean.expand(len(image), -1, -1, -1), val_loader, args.max_depth)
    print(f"baseline  rmse {baseline['rmse']:.3f}, absrel {baseline['absrel']:.3f}, d1 {baseline['d1']:.3f} "
          "(mean depth of each pixel)")
    print(f"results   {out}\n")
    print("epoch        lr    loss    rmse  absrel      d1      d2      d3  seconds", flush=True)
    return baseline


def best_of(history):
    """The epoch with the lowest validation RMSE."""
    return min(history, key=lambda row: row["rmse"])


def save(out, args, train_set, history, model, optimizer, scaler):
    """Write last.pt."""
    config = dict(model=args.model, options=args.options, size=args.size, geometry=args.geometry,
                  max_depth=args.max_depth, frame=tuple(train_set.read(0)[1].shape))
    memory = io.BytesIO()  # torch.save would hide the error of a full disk
    torch.save(dict(
        format=FORMAT,
        config=config,
        weights=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        history=history,
        args=vars(args),
    ), memory)
    with whole_file(out / "last.pt") as f:
        f.write(memory.getbuffer())


def log(out, args, history, baseline):
    """Print the last epoch, and write what follows from last.pt: best.pt, log.csv and curves.png."""
    row = history[-1]
    if best_of(history) is row:
        with whole_file(out / "best.pt") as f:
            f.write((out / "last.pt").read_bytes())
    print(f"{row['epoch']:5} {row['lr']:9.2g} {row['loss']:7.4f} {row['rmse']:7.4f} {row['absrel']:7.4f} "
          f"{row['d1']:7.4f} {row['d2']:7.4f} {row['d3']:7.4f} {row['seconds']:8.1f}", flush=True)
    lines = [",".join(history[0])] + [",".join(f"{value:.6g}" for value in row.values()) for row in history]
    with whole_file(out / "log.csv") as f:
        f.write("\n".join([*lines, ""]).encode())
    with whole_file(out / "curves.png") as f:
        draw_curves(history, baseline).save(f, "PNG")
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(out, purge_step=row["epoch"]) as writer:
            for name, value in row.items():
                writer.add_scalar(name, value, row["epoch"])


def draw_curves(history, baseline):
    """Training loss, validation RMSE and d1 by epoch."""
    sheet = Image.new("RGB", (1080, 240), "white")
    draw = ImageDraw.Draw(sheet)
    for left, name in ((60, "loss"), (420, "rmse"), (780, "d1")):
        values = [row[name] for row in history]
        levels = [*values, baseline.get(name, values[0])]
        low, high = min(levels), max(levels)
        *heights, trivial = (210 - 170 * (level - low) / max(high - low, 1e-9) for level in levels)
        if name in baseline:
            draw.line([(left, trivial), (left + 285, trivial)], fill="grey")
            below = 4 if trivial < 120 else -14
            draw.text((left + 180, trivial + below), "mean-depth baseline", fill="grey")
        points = list(zip(torch.linspace(left, left + 285, len(values)).tolist(), heights))
        draw.line(points, fill=(182, 54, 122), width=2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(182, 54, 122))
        draw.text((left, 10), f"{name}, epochs 1 to {len(values)}", fill="black")
        draw.text((left - 50, 34), f"{high:.3f}", fill="black")
        draw.text((left - 50, 204), f"{low:.3f}", fill="black")
    return sheet


def finish(out, args, history, baseline, val_set):
    """Show what the best network predicts, and what to do next."""
    network, _ = load_model(out / "best.pt")
    sample_sheet(network, val_set, out / "samples.png", args.max_depth)
    best = best_of(history)
    print(f"best epoch {best['epoch']}: rmse {best['rmse']:.3f} (baseline {baseline['rmse']:.3f}), "
          f"d1 {best['d1']:.3f} ({baseline['d1']:.3f})")
    print(f"see {out}/samples.png and {out}/curves.png; next: python eval.py {shlex.quote(f'{out}/best.pt')} "
          f"--data {shlex.quote(args.data)}", flush=True)


if __name__ == "__main__":
    data.run_script(main, ModelError)
