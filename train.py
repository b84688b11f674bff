"""Train a depth network: one plain loop.

    python train.py --epochs 10                                  # renders rooms on first use, needs no download
    python train.py --epochs 10 --data nyu                       # any data set that data.py knows
    python train.py --resume runs/fastdepth-1                    # go on after Ctrl-C, bit for bit
    torchrun --nproc_per_node=2 train.py --data nyu              # a process per GPU, each with its share of every batch

Loss, optimizer and batch are those of FastDepth's published recipe: L1, SGD with momentum 0.9 and weight decay 1e-4, 8
pictures. Learning rate, plateau schedule and augmentation were chosen by measurement (README). Everything goes to --out:
last.pt and best.pt (lowest validation RMSE), log.csv, curves.png, samples.png.
"""
import argparse
import copy
import itertools
import math
import os
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import distributed

from data import (AUGMENTS, GEOMETRIES, Parser, above_0, batches, check_device, have_rooms, multiple_of_32, open_dataset, progress, run_script,
                  valid_mask, write_rooms)
from eval import evaluate, sample_sheet
from loss import LOSSES, make_loss
from model import MODELS, build_model, count, load_encoder, load_model

ROOMS = Path("data/rooms")  # rendered on first use
PRESETS = {
    "paper": dict(lr=0.01, schedule="step", augment="paper"),  # FastDepth's
    "best": dict(optimizer="adam", schedule="cosine", augment="colour"),  # of those in docs/results.md
}

# ------------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------------


def make_parser():
    """Every flag, in groups; the defaults are the README's recipe."""
    p = Parser(description="Train a depth network.")
    p.add_argument("--preset", choices=PRESETS, help="a recipe: defaults for the flags that are not given")
    # data
    p.add_argument("--data", default=str(ROOMS), help="data set; the default is rendered on first use")
    p.add_argument("--rooms", type=above_0(int), default=768, help="how many training rooms are rendered for data/rooms")
    p.add_argument("--depth-scale", type=above_0(float), default=1000.0, help="16-bit depth / this = metres (TUM 5000, KITTI 256)")
    p.add_argument("--max-depth", type=above_0(float), default=10.0, help="metres; deeper pixels do not count (KITTI 80)")
    p.add_argument("--augment", default="flip", choices=AUGMENTS, help="colour: also rotation and colour; paper: also zoom")
    p.add_argument("--limit", type=above_0(int), metavar="N", help="use only N samples of each split: a smoke run")
    p.add_argument("--workers", type=above_0(int, or_0=True), default=0, metavar="N", help="processes that read data, for each that trains")
    # network
    p.add_argument("--model", default="fastdepth", choices=list(MODELS))
    p.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="of build_model: skip=none conv=dense output=sigmoid")
    p.add_argument("--size", type=multiple_of_32, nargs=2, metavar=("H", "W"), help="of training (default: the network's)")
    p.add_argument("--geometry", choices=GEOMETRIES, help="how a frame becomes that size (default: the network's)")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--init", metavar="FILE", help="start from a checkpoint, or from a file that FastDepth's authors published")
    start.add_argument("--pretrained", action="store_true", help="start the encoder from torchvision's ImageNet weights, downloaded")
    start.add_argument("--encoder-weights", metavar="FILE", help="start the encoder from this ImageNet state dict")
    # optimisation
    p.add_argument("--loss", default="l1", choices=list(LOSSES))
    p.add_argument("--epochs", type=above_0(int), default=10)
    p.add_argument("--batch-size", type=above_0(int), default=8, help="pictures of a step, of all processes together")
    p.add_argument("--optimizer", default="sgd", choices=("sgd", "adam"))
    p.add_argument("--lr", type=above_0(float), help="learning rate (default: the preset's, or the network's, a fiftieth of it for adam)")
    p.add_argument("--momentum", type=float, default=0.9)
    p.add_argument("--weight-decay", type=float, default=1e-4)
    p.add_argument("--schedule", default="plateau", choices=("plateau", "step", "cosine", "none"),
                   help="plateau: x 0.3 after an epoch without 1 %% less RMSE; step: x 0.1 every 5 epochs; cosine: to 0")
    p.add_argument("--warmup", type=above_0(float, or_0=True), default=0.0, metavar="EPOCHS", help="raise the learning rate from almost 0 over these")
    p.add_argument("--clip", type=above_0(float), metavar="NORM", help="largest norm of the gradient")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    p.add_argument("--amp", choices=("none", "bf16", "fp16"), help="autocast (default: bf16 where the processor computes it)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    p.add_argument("--seed", type=int, default=0)
    # results
    p.add_argument("--out", metavar="DIR", help="(default: the next free runs/MODEL-k)")
    p.add_argument("--resume", metavar="DIR", help="go on from DIR/last.pt with its flags; flags given here replace them")
    p.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="also write for TensorBoard, into --out")
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    return p


def computes_bf16(device):
    """Whether the processor multiplies bfloat16 itself; emulated, it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return can.get("avx512_bf16") or can.get("amx_bf16")


def parse(argv):
    """-> flags, and the checkpoint to go on from or None."""
    parser = make_parser()
    args, saved = parser.parse_args(argv), None
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)
    if args.resume:
        for flag in ("preset", "out", "init", "pretrained", "encoder_weights"):
            if getattr(args, flag):
                parser.error(f"--{flag.replace('_', '-')} is for a new run, not for --resume")
        if Path(args.resume).is_file():
            parser.error(f"--resume takes the folder of a run, and goes on from its last.pt; got {args.resume}")
        file = Path(args.resume) / "last.pt"
        saved = load_checkpoint(file)
        saved["rate"] = args.lr or saved["rate"]  # a rate given now replaces also what plateau has made of the old one
        parser.set_defaults(**saved["args"])  # as before, but for what is given now
        args = parser.parse_args(argv)
        args.out = args.resume
        for name in ("model", "options", "optimizer"):
            if getattr(args, name) != saved["args"][name]:
                raise ValueError(f"{file}: was trained with --{name} {saved['args'][name]}: start a new run to change it")
    elif args.out and (Path(args.out) / "last.pt").exists():
        raise ValueError(f"{args.out}: holds a run already: go on with --resume {shlex.quote(args.out)}, or choose another --out")
    if wrong := [option for option in args.options if "=" not in option]:
        parser.error(f"--options takes KEY=VALUE, got {wrong[0]}")
    spec = MODELS[args.model]
    args.size, args.geometry = tuple(args.size or spec["size"]), args.geometry or spec["geometry"]
    args.lr = args.lr or spec["lr"] * dict(sgd=1, adam=0.02)[args.optimizer]
    check_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device)
    if args.amp is None:
        args.amp = "bf16" if computes_bf16(args.device) else "none"
    return args, saved


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints and the record of a run
# ------------------------------------------------------------------------------------------------------------------


def save_checkpoint(file, state):
    """Write a dict of tensors and plain values whole or not at all."""
    partial = file.with_name("checkpoint.partial")  # one name for all: what a killed process left is gone after the next save
    try:
        torch.save(state, partial)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:
        again = f", then --resume {shlex.quote(str(file.parent))}" if (file.parent / "last.pt").exists() else ""
        raise ValueError(f"{file}: cannot be written ({str(error).splitlines()[0]}): make room{again}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(file):
    """What save_checkpoint wrote, on the CPU."""
    load_model(file)  # names the file and the cure if it is no network
    return torch.load(file, map_location="cpu")


def claim_folder(model):
    """Make and return runs/MODEL-k with the first k that no run has, not even one that starts at this moment."""
    for k in itertools.count(1):
        try:
            (out := Path("runs") / f"{model}-{k}").mkdir(parents=True)
            return out
        except FileExistsError:
            pass


def draw_curves(file, history, constant):
    """Loss, validation RMSE and d1 over the epochs; grey: the constant map."""
    width, height, left, top = 360, 240, 50, 30
    sheet = Image.new("RGB", (3 * width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (name, title) in enumerate((("loss", "training loss"), ("rmse", "validation RMSE, m"), ("d1", "validation d1"))):
        values = [row[name] for row in history]
        level = constant.get(name)
        low, high = min(values + [level or values[0]]), max(values + [level or values[0]])
        low, high = low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6

        def at(epoch, value):
            """The pixel of a point of the curve."""
            return (k * width + left + (width - left - 15) * epoch / max(len(values) - 1, 1),
                    top + (height - top - 25) * (high - value) / (high - low))

        for value in (low + (high - low) * i / 4 for i in range(5)):
            draw.line([at(0, value), at(max(len(values) - 1, 1), value)], fill=(232, 232, 232))
            draw.text((k * width + 8, at(0, value)[1] - 6), f"{value:.3f}", fill="black")
        if level:
            draw.line([at(0, level), at(max(len(values) - 1, 1), level)], fill="grey", width=2)
            draw.text((at(0, level)[0] + 4, at(0, level)[1] + 2), "constant map", fill="grey")
        points = [at(i, value) for i, value in enumerate(values)]
        draw.line(points, fill=(182, 54, 122), width=2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(182, 54, 122))
        draw.text((k * width + left, 8), f"{title}, by epoch 1 to {len(values)}", fill="black")
    sheet.save(file)


def write_record(out, history, constant):
    """log.csv and curves.png of all epochs, written anew each time, so that they are whole after a resume."""
    lines = [",".join(history[0])] + [",".join(f"{v:.6g}" for v in row.values()) for row in history]
    (out / "log.csv").write_text("\n".join(lines) + "\n")
    draw_curves(out / "curves.png", history, constant)


# ------------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------------


def constant_map(dataset, max_depth, most=512):
    """The mean depth of each pixel over at most 512 training frames, (1, 1, H, W): the answer of least squared error without looking."""
    total = seen = 0
    for i in torch.linspace(0, len(dataset) - 1, min(most, len(dataset))).long().tolist():
        depth = dataset[i][1]
        mask = valid_mask(depth, max_depth)
        total, seen = total + torch.where(mask, depth, 0), seen + mask
    overall = total.sum() / seen.sum().clamp(min=1)
    return torch.where(seen > 0, total / seen.clamp(min=1), overall)[None]


def scheduled_lr(args, rate, step, steps):
    """The learning rate of a step, counted from 0 over the whole run of `steps` an epoch. rate: --lr, or where plateau has brought it."""
    factor = min(1, (step + 1) / (args.warmup * steps)) if args.warmup else 1  # + 1: a step at rate 0 would teach nothing
    if args.schedule == "cosine":
        factor *= (1 + math.cos(math.pi * step / (args.epochs * steps))) / 2
    elif args.schedule == "step":
        factor *= 0.1 ** (step // (5 * steps))
    return rate * factor


def join_ranks(args):
    """Meet the processes that torchrun started beside this one, if any: -> the rank of this one, and how many there are."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % ranks:
        raise ValueError(f"--batch-size {args.batch_size} cannot be divided among {ranks} processes: make it a multiple of {ranks}")
    if ranks > 1:
        if rank > 0:
            sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # which "cuda" means from now on
        patience = timedelta(hours=6)  # of the others, while rank 0 renders rooms or validates
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=patience)
    return rank, ranks


def main(argv=None):
    """Train as the flags say; returns the validation metrics of the best epoch."""
    args, saved = parse(argv)
    rank, ranks = join_ranks(args)
    master = rank == 0  # the only one that writes and validates
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    if Path(args.data) == ROOMS and master and not have_rooms(ROOMS, args.rooms):
        if args.dry_run:
            raise ValueError(f"{ROOMS}: does not hold {args.rooms} rooms of this version yet: leave out --dry-run to render them")
        write_rooms(ROOMS, args.rooms)
    if ranks > 1:
        distributed.barrier()  # until the rooms are there
    torch.manual_seed(args.seed)

    # Data
    common = dict(size=args.size, geometry=args.geometry, depth_scale=args.depth_scale, limit=args.limit)
    train_set = open_dataset(args.data, "train", augment=args.augment, seed=args.seed, **common)
    val_set = open_dataset(args.data, "val", **common)
    if len(train_set) < args.batch_size:
        raise ValueError(f"{args.data}: {len(train_set)} training pairs are less than a batch of {args.batch_size}: lower --batch-size")
    loading = dict(num_workers=args.workers, pin_memory=args.device.startswith("cuda"))
    val_loader = torch.utils.data.DataLoader(val_set, args.batch_size, **loading)
    steps = len(train_set) // args.batch_size  # an incomplete last batch is left out: batch norm wants full ones

    # Network, loss, optimizer
    options = dict(option.split("=", 1) for option in args.options)
    model = build_model(args.model, args.max_depth, **options)
    if args.init:
        initial, facts = load_model(args.init)
        if (facts["model"], facts["options"]) != (args.model, options):
            flags = " ".join(f"{key}={value}" for key, value in facts["options"].items())
            raise ValueError(f"{args.init}: holds another network: use --model {facts['model']}{' --options ' * bool(flags)}{flags}")
        model.load_state_dict(initial.state_dict())
    if args.pretrained or args.encoder_weights:
        unused = load_encoder(model, args.encoder_weights)
        print(f"encoder     from {args.encoder_weights or model.encoder.url}; not used: {', '.join(unused) or 'nothing'}")
    size = count(model, *args.size)
    model = model.to(args.device, memory_format=torch.channels_last)
    criterion = make_loss(args.loss, args.max_depth)
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    # PyTorch's patience of 10 epochs would never act in a run of 10; its threshold of 0.01 % takes noise for progress.
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.01)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")
    kind = dict(none=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[args.amp]

    # The state of the loop, fresh or resumed
    history, best, rate = [], None, args.lr
    if saved:
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        plateau.load_state_dict(saved["plateau"])
        if saved["scaler"]:  # empty but after --amp fp16
            scaler.load_state_dict(saved["scaler"])
        history, best = saved["history"], saved["best"]
        rate = saved["rate"]
        for group in optimizer.param_groups:  # flags that may have been given anew
            group["weight_decay"] = args.weight_decay
            if args.optimizer == "sgd":
                group["momentum"] = args.momentum

    network = torch.compile(model) if args.compile else model
    if ranks > 1:  # gradients are averaged over the ranks; batch norm sees a rank's own pictures, and rank 0's statistics are kept
        network = torch.nn.parallel.DistributedDataParallel(network)

    # The plan
    print(f"device      {args.device}, {torch.get_num_threads()} threads, amp {args.amp}{', compiled' * args.compile}"
          + f"; {ranks} processes, each with {args.batch_size // ranks} pictures of a batch and its own batch norm" * (ranks > 1))
    print(f"data        {args.data} ({train_set.layout}): {len(train_set)} train, {len(val_set)} val, "
          f"{args.size[0]}x{args.size[1]} ({args.geometry})")
    print(f"network     {' '.join([args.model, *args.options])}: {size['parameters']:,} parameters, {size['macs'] / 1e9:.3f} GMACs, "
          f"output 1/{model.output_stride}")
    print(f"training    {args.epochs} epochs of {steps} steps of {args.batch_size}{f', {len(history)} done' * bool(history)}; "
          f"{args.loss}, {args.optimizer}, lr {rate:g}, {args.schedule}; seed {args.seed}")
    if master:
        plain = copy.copy(train_set)
        plain.augment = "none"
        constant = constant_map(plain, args.max_depth)
        trivial, _ = evaluate(lambda image: constant.expand(len(image), -1, -1, -1), val_loader, args.max_depth)
        print(f"constant    rmse {trivial['rmse']:.3f}  absrel {trivial['absrel']:.3f}  d1 {trivial['d1']:.3f}: "
              "the mean of each pixel, without looking")
    if args.dry_run:
        return best
    out = Path(args.out or (claim_folder(args.model) if master else "."))  # the other ranks write nothing
    print(f"results     {out}")

    def save(name):
        """Write the state of the loop as OUT/name."""
        once = ("out", "resume", "init", "pretrained", "encoder_weights", "dry_run")  # flags of a start, not of a run
        save_checkpoint(out / name, dict(
            model=args.model, options=options, size=args.size, geometry=args.geometry, max_depth=args.max_depth,
            weights=model.state_dict(), optimizer=optimizer.state_dict(), plateau=plateau.state_dict(),
            scaler=scaler.state_dict(), rate=rate, history=history, best=best,
            args={flag: value for flag, value in vars(args).items() if flag not in once}))

    out.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(out, purge_step=len(history) + 1) if args.tensorboard and master else None
    if not saved and master:
        save("last.pt")  # so that there is always something to go on from, and a full disk shows now
    print("epoch        lr    loss    rmse  absrel      d1      d2      d3  seconds")
    try:
        for epoch in range(len(history), args.epochs):
            # Everything random depends on the seed and the epoch alone, so that a resumed run draws what it would have.
            torch.manual_seed(args.seed + epoch)
            train_set.epoch = epoch
            order = torch.randperm(len(train_set))[:steps * args.batch_size][rank::ranks]  # a rank's share of every batch
            loader = torch.utils.data.DataLoader(train_set, args.batch_size // ranks, sampler=order.tolist(), **loading)
            model.train()
            total, start = 0.0, time.time()
            for step, (image, depth, index) in enumerate(batches(loader)):
                for group in optimizer.param_groups:
                    group["lr"] = scheduled_lr(args, rate, epoch * steps + step, steps)
                image = image.to(args.device, memory_format=torch.channels_last, non_blocking=True)
                depth = depth.to(args.device, non_blocking=True)
                with torch.autocast(args.device.split(":")[0], dtype=kind, enabled=args.amp != "none"):
                    pred = network(image)
                if pred.shape != depth.shape:  # compare at the network's own resolution
                    depth = F.interpolate(depth, pred.shape[-2:], mode="nearest-exact")
                loss = criterion(pred.float(), depth, valid_mask(depth, args.max_depth))  # a mean over this rank's pixels
                value = loss.detach() / ranks
                if ranks > 1:
                    distributed.all_reduce(value)  # to the mean of all: every rank sees, and stops at, what is not finite
                if not math.isfinite(value := value.item()):
                    if not math.isfinite(loss.item()):  # the rank whose pictures these are
                        files = " ".join(train_set.files[i] for i in index)
                        print(f"\nthe loss is {value} in epoch {epoch + 1}, step {step + 1}: lower --lr, or look at these: {files}",
                              file=sys.stderr)
                    raise SystemExit(1)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                if args.clip:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                scaler.step(optimizer)
                scaler.update()
                total += value
                progress(f"epoch {epoch + 1}/{args.epochs}", (step + 1) * args.batch_size, steps * args.batch_size, start, f"  loss {value:.3f}")

            model.eval()
            results = [evaluate(lambda image: model(image.to(args.device, memory_format=torch.channels_last)), val_loader, args.max_depth)[0]
                       if master else None]
            if ranks > 1:  # one number steps the schedulers of all: with numbers of their own their learning rates would drift apart
                distributed.broadcast_object_list(results)
            result = results[0]
            if not math.isfinite(result["rmse"]):
                print(f"\nthe validation RMSE is {result['rmse']} after epoch {epoch + 1}: lower --lr, or set --clip", file=sys.stderr)
                raise SystemExit(1)
            row = dict(epoch=epoch + 1, lr=optimizer.param_groups[0]["lr"], loss=total / steps, **result, seconds=time.time() - start)
            history.append(row)
            if args.schedule == "plateau":
                for group in optimizer.param_groups:
                    group["lr"] = rate  # without the warm-up
                plateau.step(row["rmse"])
                rate = optimizer.param_groups[0]["lr"]
            improved = best is None or row["rmse"] < best["rmse"]
            best = row if improved else best
            if not master:
                continue
            if improved:
                save("best.pt")  # before last.pt: a run killed between the two goes on from last.pt and (on the CPU) comes to this best again
            save("last.pt")
            print(f"{row['epoch']:5} {row['lr']:9.2g} {row['loss']:7.4f} {row['rmse']:7.4f} {row['absrel']:7.4f} {row['d1']:7.4f} {row['d2']:7.4f} "
                  f"{row['d3']:7.4f} {row['seconds']:8.1f}")
            write_record(out, history, trivial)
            if args.tensorboard:
                for name, value in row.items():
                    writer.add_scalar(name, value, row["epoch"])
                writer.flush()
    except KeyboardInterrupt:
        print(f"\nstopped in epoch {len(history) + 1}; go on with: python train.py --resume {shlex.quote(str(out))}")
        raise
    if ranks > 1:
        distributed.destroy_process_group()
    if not master:
        return best
    write_record(out, history, trivial)  # again, for a run that was killed after its last checkpoint
    sample_sheet(load_model(out / "best.pt")[0], val_set, out / "samples.png", args.max_depth)
    if args.tensorboard:
        writer.add_image("samples", np.asarray(Image.open(out / "samples.png")), len(history), dataformats="HWC")
        writer.close()
    print(f"best epoch {best['epoch']}: rmse {best['rmse']:.3f} ({best['rmse'] / trivial['rmse']:.2f} of the constant map's), d1 {best['d1']:.3f}")
    print(f"pictures {out}/samples.png, curves {out}/curves.png; next: python eval.py {shlex.quote(f'{out}/best.pt')} --data {shlex.quote(args.data)}")
    return best


if __name__ == "__main__":
    run_script(main)
