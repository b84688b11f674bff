"""Training in miniature: what a run writes, that it repeats and resumes bit for bit, and how it stops."""
import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from conftest import MINIATURE, full_disk
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import model
import train
from eval import evaluate

ROOT = Path(train.__file__).parent
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
ENV["PYTHONPATH"] = str(ROOT)


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    """Counting is model.py's and takes a third of a miniature run."""
    monkeypatch.setattr(train, "count", lambda *a: dict(parameters=1, macs=1))


@pytest.fixture
def flags(rooms, tmp_path):
    """Of a miniature run into tmp_path/run."""
    return [*MINIATURE, "--data", str(rooms), "--out", str(tmp_path / "run")]


def go(flags, more=""):
    """train.main with more flags."""
    return train.main([*flags, *more.split()])


def resume(out, more=""):
    return train.main(["--resume", str(out), *more.split()])


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def quarter(monkeypatch):
    """The network becomes a single layer, whose output is a quarter as wide and high."""
    class Quarter(torch.nn.Conv2d):
        output_stride = 4

    for where in (train, model):
        monkeypatch.setattr(where, "build_model", lambda *a, **k: Quarter(3, 1, 4, stride=4))


@pytest.fixture
def steps():
    """Of every step of any optimizer: its learning rate, and the norm of the gradient."""
    seen = []

    def note(optimizer, *_):
        group = optimizer.param_groups[0]
        norms = [weight.grad.norm() for weight in group["params"]]
        seen.append((group["lr"], torch.stack(norms).norm().item()))

    hook = register_optimizer_step_pre_hook(note)
    yield seen
    hook.remove()


@pytest.fixture
def refused(refused):
    """refused(argv, more) -> the one line with which train.py refuses."""
    return lambda argv, more="": refused(train, [*argv, *more.split()])


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def load(file):
    return torch.load(file, weights_only=True)


def read_log(out):
    """log.csv without the time that it took."""
    rows = csv.DictReader((out / "log.csv").open())
    return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in rows]


def same(a, b):
    """Bitwise equality of checkpoints, but for times, folders and the number of workers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        other = ("seconds", "workers", "out", "resume")
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in other)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def let_rmse_fall(monkeypatch, factor):
    """Each evaluation finds `factor` times the RMSE of the one before."""
    calls = itertools.count()

    def falling(*args, **kwargs):
        return evaluate(*args, **kwargs)[0] | dict(rmse=factor ** next(calls)), {}

    monkeypatch.setattr(train, "evaluate", falling)


# ------------------------------------------------------------------------------------------------------------
# What a run is
# ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_describes_its_network_and_holds_plain_values_only(finished):
    saved = load(finished / "best.pt")  # refuses everything but tensors and plain values
    assert saved["format"] == 2
    assert saved["config"] == dict(model="fastdepth-pruned", options={}, size=(64, 64), geometry="fastdepth",
                                   max_depth=10.0, frame=(96, 128))
    network, config = model.load_model(finished / "best.pt")
    assert config == saved["config"]
    assert all(type(layer) is not model.FastDepthwise for layer in network.modules())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(flags, finished, tmp_path):
    run = threading.Thread(target=go, args=(flags, "--epochs 2 --workers 2"))  # it does not matter who reads
    run.start()  # the data, nor that this is not the main thread
    run.join()
    go(flags, f"--epochs 2 --seed 1 --out {tmp_path}/other")
    first, again, other = (load(out / "last.pt") for out in (finished, tmp_path / "run", tmp_path / "other"))
    assert same(first, again) and read_log(finished) == read_log(tmp_path / "run")
    assert not same(first["weights"], other["weights"])


def test_an_epoch_of_one_seed_is_no_epoch_of_another(flags):
    drawn = set()
    for seed, epoch in itertools.product(range(4), range(1, 5)):
        args, _ = train.parse([*flags, "--seed", str(seed)])
        train_set, _ = train.open_data(args, rank=0)
        loader = train.epoch_loader(args, epoch, train_set, rank=0, ranks=1)
        drawn.add((*loader.sampler, torch.initial_seed()))
        assert (train_set.seed, train_set.epoch) == (seed, epoch)
    assert len(drawn) == 16


def test_workers_leave_ctrl_c_to_the_main_process():
    class IgnoresCtrlC(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    args, _ = train.parse([*MINIATURE, "--workers", "1"])
    assert list(train.make_loader(args, IgnoresCtrlC(), 1)) == [torch.tensor([True])]


def test_a_run_writes_its_files_and_best_is_the_epoch_of_the_lowest_rmse(rooms, run):
    result = resume(run, "--epochs 3 --schedule none --lr 3")  # spoils it
    assert sorted(os.listdir(run)) == ["best.pt", "curves.png", "last.pt", "log.csv", "samples.png"]
    for file in ("curves.png", "samples.png"):
        assert len(np.unique(Image.open(run / file))) > 20
    log = read_log(run)
    best = min(log, key=lambda row: row["rmse"])
    assert [row["epoch"] for row in log] == [1, 2, 3] and log[2]["rmse"] > 1.5 * best["rmse"]
    assert all(result[name] == pytest.approx(value, rel=1e-5) for name, value in best.items())
    val = data.open_dataset(rooms, "val", (64, 64))
    for file, row in (("best.pt", best), ("last.pt", log[2])):
        network, _ = model.load_model(run / file)
        rmse = evaluate(network, torch.utils.data.DataLoader(val), 10.0)[0]["rmse"]
        assert rmse == pytest.approx(row["rmse"], rel=0.02)


def test_every_epoch_draws_a_new_order_and_only_training_is_augmented(flags, monkeypatch):
    seen, read = [], data.DepthDataset.__getitem__

    def spy(dataset, i):
        seen.append((dataset.augment, dataset.epoch, dataset.samples[i].part, i))
        return read(dataset, i)

    monkeypatch.setattr(data.DepthDataset, "__getitem__", spy)
    go(flags, "--epochs 2 --augment paper")
    first, second = ([i for augment, *at, i in seen if (augment, at[0]) == ("paper", k)] for k in (1, 2))
    assert len(set(first)) == len(set(second)) == 8 and first != second != sorted(second)  # two whole batches
    plain = Counter(part for augment, _, part, _ in seen if augment == "none")
    assert plain == dict(train=10, val=4 * 2)  # by the baseline; by it, two epochs and the sheet


def test_the_loss_gets_metres_in_float32_and_the_mask_of_valid_pixels(flags, tmp_path, monkeypatch):
    calls = []

    def recorder(name, max_depth):
        assert (name, max_depth) == ("silog", 4.0)
        return lambda pred, target, mask: calls.append((pred, target, mask)) or pred.mean()

    monkeypatch.setattr(train, "make_loss", recorder)
    more = "--epochs 1 --loss silog --max-depth 4 --amp bf16 --augment camera"
    go(flags, more)
    for pred, target, mask in calls:
        assert pred.dtype == target.dtype == torch.float32
        assert pred.shape == target.shape == mask.shape == (4, 1, 64, 64)
        assert torch.equal(mask, (target > 0) & (target <= 4))
        assert mask.any() and (target > 4).any() and (target == 0).any()
        assert pred.isfinite().all() and torch.equal(pred, pred.bfloat16().float())  # autocast was on
    losses = [pred.mean().item() for pred, *_ in calls]
    assert read_log(tmp_path / "run")[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_coarser_network_is_compared_at_its_own_resolution(flags, rooms, quarter, monkeypatch):
    targets = []

    def loss(pred, target, mask):
        assert pred.shape == target.shape == mask.shape == (4, 1, 16, 16)
        targets.extend(target)
        return pred.mean()

    monkeypatch.setattr(train, "make_loss", lambda *a: loss)
    go(flags, "--epochs 1 --augment none")
    train_set = data.open_dataset(rooms, "train", (64, 64), limit=10)
    coarse = [train_set[i][1][:, 2::4, 2::4] for i in range(10)]  # pixels, no mixtures
    assert len(targets) == 8 and all(any(map(target.equal, coarse)) for target in targets)


def test_training_uses_channels_last_and_the_fast_depthwise_gradient(flags, monkeypatch):
    seen = []
    forward = model.DepthNet.forward

    def spy(network, image):
        layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
        fast = all((type(layer) is model.FastDepthwise) == (layer.groups > 1) for layer in layers)
        last = [t.is_contiguous(memory_format=torch.channels_last) for t in (image, layers[0].weight)]
        seen.append((network.training, fast, *last))
        return forward(network, image)

    monkeypatch.setattr(model.DepthNet, "forward", spy)
    go(flags, "--epochs 1")
    assert seen[:3] == [(True, True, True, True)] * 2 + [(False, True, True, True)]  # two steps, validation


def test_a_gpu_gets_pinned_batches_and_the_fastest_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    args, _ = train.parse(MINIATURE)
    assert not train.make_loader(args, [0], 1).pin_memory
    for args.device in ("cuda", "cuda:1"):
        assert train.make_loader(args, [0], 1).pin_memory
    train.join_processes(args)
    assert torch.backends.cudnn.benchmark


def test_training_learns_what_can_be_learnt(flags, pairs, tmp_path):
    more = "--epochs 20 --augment none --schedule none --optimizer adam --size 32 32"
    result = go(flags, f"--data {pairs} {more}")
    loss = [row["loss"] for row in read_log(tmp_path / "run")]
    assert loss[-1] < 0.5 * loss[0]
    assert result["rmse"] < 0.7 * 1.398  # the mean depth's: sqrt of the mean of (1.875, 0.625, ...)^2


def test_tensorboard_gets_every_number_of_every_epoch(run, refused, monkeypatch):
    writer = MagicMock()
    package = MagicMock(SummaryWriter=writer)
    package.__spec__ = sys.__spec__  # as if it were installed
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    resume(run, "--epochs 3 --tensorboard")
    resume(run, "--epochs 4")
    log = read_log(run)
    rows = [log[1], log[2], log[2], log[3]]  # a resumed run logs the epoch before once more
    assert writer.call_args_list == [call(run, purge_step=row["epoch"]) for row in rows]
    assert writer.return_value.__exit__.call_count == 4
    scalars = [c.args for c in writer.return_value.__enter__.return_value.add_scalar.call_args_list]
    expected = [(name, pytest.approx(value, rel=1e-5), row["epoch"])
                for row in rows for name, value in row.items()]
    assert [scalar for scalar in scalars if scalar[0] != "seconds"] == expected
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    assert "pip install tensorboard" in refused(["--resume", run], "--epochs 5")


def test_init_starts_from_the_weights_of_another_run(flags, finished, tmp_path):
    go(flags, f"--epochs 1 --lr 1e-12 --init {finished}/best.pt")
    before, after = (load(file)["weights"] for file in (finished / "best.pt", tmp_path / "run" / "last.pt"))
    learnt = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(before[name], after[name]) for name in learnt)


def test_encoder_weights_are_put_in_and_what_is_not_used_is_named(flags, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(train, "load_encoder", lambda network, file: asked.append(file) or ["classifier"])
    for more in (["--encoder-weights", "imagenet.pth"], ["--pretrained"]):
        train.make_model(train.parse([*flags, *more])[0], None)
    assert asked == ["imagenet.pth", None] and capsys.readouterr().out.count("classifier") == 2


def test_the_first_command_of_the_readme_in_miniature(tmp_path):
    argv = "--epochs 1 --data rooms:16 --limit 8 --size 64 64".split()
    result = subprocess.run([sys.executable, ROOT / "train.py", *argv], cwd=tmp_path, env=ENV, text=True,
                            capture_output=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    plan = ("rooms:16 (rooms): 8 train", "64x64", "own is 224x224", "3,960,930 parameters", "0.060 GMACs",
            "1 epochs of 1 steps of 8 images", "baseline  rmse", "results   runs/fastdepth-1", "samples.png",
            "python eval.py runs/fastdepth-1/best.pt --data rooms:16")
    assert not [words for words in plan if words not in result.stdout]
    assert (tmp_path / "runs" / "fastdepth-1" / "samples.png").exists()


@pytest.mark.parametrize("more, size, frames", [
    ("", (128, 128), (144, 192)),
    ("--size 64 96", (64, 96), (144, 192)),
    ("--preset best", (128, 128), (144, 192)),
    ("--preset paper", (224, 224), (240, 320)),
    ("--size 224 224", (224, 224), (240, 320)),
])
def test_the_default_rooms_are_packed_on_first_use(more, size, frames, rooms, tmp_path, monkeypatch):
    packed = []

    def write_pack(file, root, size):
        packed.append((file, root, size))
        Path(file).parent.mkdir(exist_ok=True)
        shutil.copy(rooms, file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "write_pack", write_pack)
    args, _ = train.parse(["--threads", str(torch.get_num_threads()), *more.split()])
    for _ in range(2):
        train_set, _ = train.open_data(args, rank=0)
    Path(args.data).unlink()
    train.open_data(args, rank=0)  # a resumed run renders them again
    name = f"data/rooms-v{data.ROOMS_VERSION}-{train.ROOMS}-{frames[0]}x{frames[1]}.h5"
    assert packed == [(name, f"rooms:{train.ROOMS}", frames)] * 2
    assert args.size == train_set.size == size


def test_a_first_run_that_renders_its_rooms_starts_like_every_later_one(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "ROOMS", 16)
    first, second = (go(flags, f"--data rooms --epochs 1 --out {name}") for name in ("first", "second"))
    assert same(first, second)


def test_another_data_set_is_trained_at_the_networks_own_size_and_crop():
    assert train.parse(["--data", "nyu"])[0].size == (224, 224)
    args, _ = train.parse(["--data", "nyu", "--model", "fpn"])
    assert (args.size, args.geometry) == ((480, 640), "full")


def test_data_that_looks_like_another_unit_or_is_mostly_cropped_is_said(flags, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "check_scale", lambda dataset, max_depth: asked.append(max_depth))
    monkeypatch.setattr(data, "check_crop", lambda dataset, size: asked.append(size))
    args, _ = train.parse([*flags, "--max-depth", "3"])
    for rank in (0, 1):
        train.open_data(args, rank)
    assert asked == [3.0, (64, 64)]


# ------------------------------------------------------------------------------------------------------------
# Presets, the learning rate and the gradient
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, network, recipe", [
    ("paper", "fastdepth", dict(optimizer="sgd", lr=0.01, schedule="step", augment="paper")),
    ("paper", "densedepth",
     dict(optimizer="adam", lr=1e-4, schedule="none", loss="densedepth", weight_decay=0)),
    ("paper", "fpn", dict(lr=0.005, schedule="step")),
    ("best", "fastdepth", dict(optimizer="adam", lr=0.001, schedule="cosine", augment="camera")),
    ("best", "densedepth", dict(optimizer="adam", lr=1e-4, schedule="cosine", augment="camera")),
])
def test_a_preset_is_that_networks_own_and_sets_nothing_else(preset, network, recipe):
    words = ["--model", network, "--preset", preset]
    plain, args = vars(train.parse(words[:2])[0]), vars(train.parse(words)[0])
    own = dict(size=model.MODELS[network]["size"]) if preset == "paper" else {}
    assert args == plain | dict(preset=preset) | recipe | own
    args, _ = train.parse([*words, "--lr", "0.3", "--schedule", "none", "--size", "32", "64"])
    assert (args.lr, args.schedule, args.size) == (0.3, "none", (32, 64))


@pytest.mark.parametrize("network, optimizer, kind, lr", [
    ("fastdepth", "sgd", torch.optim.SGD, 0.05),
    ("fastdepth-table", "adam", torch.optim.Adam, 0.001),
    ("densedepth", "sgd", torch.optim.SGD, 0.005),
    ("fpn", "adamw", torch.optim.AdamW, 1e-4),
])
def test_the_learning_rate_is_the_networks_and_the_optimizers_own(network, optimizer, kind, lr):
    assert train.parse(["--model", network, "--optimizer", optimizer])[0].lr == pytest.approx(lr)
    assert type(train.OPTIMIZERS[optimizer]([torch.zeros(1)])) is kind


@pytest.mark.parametrize("schedule, factor, expected", [
    ("none", 1.0, 3 * [0.01]),
    ("step", 1.0, 5 * [0.01] + [0.001]),
    ("plateau", 1.0, [0.01, 0.01, 0.003, 0.0009]),  # no epoch is better than the first
    ("plateau", 0.995, 3 * [0.01]),  # each is a little better
])
def test_the_learning_rate_follows_its_schedule(schedule, factor, expected, flags, steps, tmp_path,
                                                monkeypatch):
    let_rmse_fall(monkeypatch, factor)
    go(flags, f"--epochs {len(expected)} --schedule {schedule}")
    rates = [lr for lr, _ in steps]
    assert rates[::2] == rates[1::2] == pytest.approx(expected)
    assert [row["lr"] for row in read_log(tmp_path / "run")] == pytest.approx(expected)


def test_the_optimizer_gets_the_weight_decay_and_sgd_has_momentum(flags, tmp_path):
    go(flags, "--epochs 1 --limit 4 --weight-decay 0.02")
    group, = load(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0.02, 0.9)


def test_more_epochs_on_resume_move_the_end_of_the_cosine(flags, steps, tmp_path):
    go(flags, "--epochs 1 --schedule cosine")
    resume(tmp_path / "run", "--epochs 3")
    resume(tmp_path / "run", "--epochs 4 --lr 0.1")
    cosine = [(1 + math.cos(math.pi * t)) / 2 for t in (0, 1 / 2, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 6 / 8, 7 / 8)]
    expected = [lr * factor for lr, factor in zip(6 * [0.01] + 2 * [0.1], cosine)]
    assert [lr for lr, _ in steps] == pytest.approx(expected)


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_clip_bounds_the_norm_of_the_gradient(amp, flags, quarter, steps, monkeypatch):
    scaler = torch.amp.GradScaler  # the usual scale of 65536 overflows at first, and those steps are left out
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=64.0, **k))
    more = f"--epochs 1 --amp {amp}"
    go(flags, more)
    go(flags, f"{more} --clip 0.01 --out {flags[-1]}-clipped")
    assert bool(load(Path(flags[-1]) / "last.pt")["scaler"]) == (amp == "fp16")  # which needs one
    norms = [norm for _, norm in steps]
    assert len(norms) == 4 and min(norms[:2]) > 0.02 and norms[2:] == pytest.approx([0.01, 0.01], rel=1e-2)


def test_compile_trains_the_same_network_under_the_same_names(flags, quarter, tmp_path, monkeypatch):
    calls = []
    compile = torch.compile

    def traced(network):  # for real, but for the machine code, which takes minutes
        compiled = compile(network, backend="eager")
        compiled.register_forward_hook(lambda *_: calls.append(1))
        return compiled

    monkeypatch.setattr(torch, "compile", traced)
    go(flags, "--epochs 1 --compile")
    go(flags, f"--epochs 1 --out {tmp_path}/plain")
    assert len(calls) == 2
    compiled, plain = (load(tmp_path / name / "last.pt")["weights"] for name in ("run", "plain"))
    assert compiled.keys() == plain.keys()
    assert all(torch.allclose(compiled[name], plain[name]) for name in plain)


def test_a_learning_rate_given_on_resume_starts_plateau_again(flags, steps, tmp_path, monkeypatch):
    let_rmse_fall(monkeypatch, 1.0)
    go(flags, "--epochs 3 --limit 4")  # one step an epoch
    for more in ("--epochs 5 --lr 0.003", "--epochs 6 --lr 0.003", "--epochs 7"):  # one new --lr
        resume(tmp_path / "run", more)
    assert [lr for lr, _ in steps] == pytest.approx([0.01, 0.01, 0.003, 0.003, 0.003, 0.0009, 0.00027])


@pytest.mark.parametrize("able, amp", [("avx2", "none"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16")])
def test_bf16_is_the_default_only_where_the_processor_computes_it(able, amp, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True})
    assert train.parse(["--device", "cpu"])[0].amp == amp
    assert train.parse(["--device", "cpu", "--amp", "fp16"])[0].amp == "fp16"


# ------------------------------------------------------------------------------------------------------------
# Stopping and going on
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at, done, more", [
    (3, 1, "--epochs 2 --optimizer adamw --schedule none"),
    (4, 1, "--epochs 2 --optimizer adam --schedule cosine --workers 1 --augment paper"),
    # from here on an epoch has one step
    (4, 3, "--epochs 4 --optimizer sgd --schedule plateau --limit 4"),  # the rate has fallen
    (6, 5, "--epochs 6 --optimizer sgd --schedule step --augment camera --limit 4"),  # likewise
    (2, 1, "--epochs 2 --amp fp16 --clip 1 --augment colour --size 32 32 --limit 2 --batch-size 2"),
])
def test_an_interrupted_run_goes_on_bit_for_bit(stop_at, done, more, flags, tmp_path, monkeypatch, capsys):
    let_rmse_fall(monkeypatch, 1.0)  # so that plateau lowers the rate
    go(flags, f"{more} --out {tmp_path}/whole")
    steps = itertools.count(1)
    add = train.RunningLoss.add

    def interrupted(*step):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        add(*step)

    monkeypatch.setattr(train.RunningLoss, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(flags, more)
    assert f"python train.py --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert len(load(tmp_path / "run" / "last.pt")["history"]) == done  # whole epochs only
    resume(tmp_path / "run")
    for name in ("last.pt", "best.pt"):
        assert same(load(tmp_path / "whole" / name), load(tmp_path / "run" / name))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "run")


# Processes that end in other ways than by themselves: what to do first; they share one start of Python.
KILLED = {
    "before last.pt of epoch 1": 'at_call(os, "replace", 1, kill)',
    "before best.pt of epoch 1": 'at_call(os, "replace", 2, kill)',
    "before last.pt of epoch 2": 'at_call(os, "replace", 5, kill)',  # the first remains the best
    "before log.csv of epoch 2": 'at_call(os, "replace", 6, kill)',
    "before the samples": 'at_call(train, "finish", 1, kill); data.run_script = lambda main, *_: main()',
}
ENDINGS = KILLED | {
    "before the baseline": 'at_call(train, "mean_depth_baseline", 1, kill)',
    "Ctrl-C in epoch 1": 'at_call(train.RunningLoss, "add", 1, ctrl_c)',
    "Ctrl-C in epoch 2": 'at_call(train.RunningLoss, "add", 3, ctrl_c); sys.argv += ["--workers", "1"]',
}
SCRIPT = """
import json, os, signal, sys
import torch._dynamo  # as the first optimizer does; once, not in each process
import data, model, train

train.count = lambda *a: dict(parameters=1, macs=1)

def at_call(owner, name, n, action):
    calls, original = iter(range(1, 999)), getattr(owner, name)
    def counting(*args, **kwargs):
        if next(calls) == n:
            action()
        return original(*args, **kwargs)
    setattr(owner, name, counting)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def ctrl_c():  # as a terminal does: to this process and its workers
    os.killpg(0, signal.SIGINT)

codes = {}
for ending, code in json.loads(sys.argv.pop(1)).items():
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(os.open(ending + ".out", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(ending + ".err", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv += ["--out", ending]
        exec(code)
        sys.exit(data.run_script(train.main, model.ModelError) is None)
    codes[ending] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="session")
def endings(rooms, tmp_path_factory):
    """The folder in which each of ENDINGS has left a run, .out and .err, and their exit codes."""
    folder = tmp_path_factory.mktemp("endings")
    argv = [json.dumps(ENDINGS), *MINIATURE, "--data", rooms, "--epochs", "2"]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, argv)], cwd=folder, env=ENV, text=True,
                            capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


@pytest.mark.parametrize("ending", KILLED)
def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_been(ending, endings, rooms, finished):
    folder, codes = endings
    out = folder / ending
    assert codes[ending] == -signal.SIGKILL
    if (out / "last.pt").exists():
        resume(out)
    else:
        train.main([*MINIATURE, "--data", str(rooms), "--epochs", "2", "--out", str(out)])
    assert {file.name for file in out.iterdir()} == {file.name for file in finished.iterdir()}
    for name in ("last.pt", "best.pt"):
        assert same(load(out / name), load(finished / name))
    assert read_log(out) == read_log(finished)


@pytest.mark.parametrize("ending, last", [
    ("before the baseline", ["network", "training", "2"]),
    ("before the samples", ["epoch", "1", "2"]),
])
def test_every_line_is_in_the_file_at_once(ending, last, endings):
    lines = (endings[0] / f"{ending}.out").read_text().splitlines()
    assert lines[0].startswith("device") and [line.split()[0] for line in lines[-3:]] == last


def test_ctrl_c_ends_quietly_and_says_how_to_go_on(endings):
    folder, codes = endings
    for ending in ("Ctrl-C in epoch 1", "Ctrl-C in epoch 2"):
        assert codes[ending] == 130 and (folder / f"{ending}.err").read_text() == ""
    assert "python train.py --resume 'Ctrl-C in epoch 2'" in (folder / "Ctrl-C in epoch 2.out").read_text()
    assert not (folder / "Ctrl-C in epoch 1").exists()


def test_a_disk_that_is_full_from_the_start_gets_one_line_and_no_folder_stays(flags, refused, tmp_path):
    with full_disk(10**6):
        assert "run/last.pt: cannot be written" in refused(flags, "--epochs 1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["model", "data", "train", "eval", "export"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(9)")
    result = subprocess.run([sys.executable, ROOT / f"{script}.py"], env=ENV | {"PYTHONPATH": str(tmp_path)},
                            text=True, capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # where every step, and every 20 steps are looked at
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(device, run, capsys):
    before = contents(run)
    with pytest.raises(SystemExit) as stop:
        resume(run, f"--epochs 3 --schedule none --lr 1e30 --device {device}")
    message = stop.value.code  # Python prints it and exits with 1
    assert "the loss is nan in epoch 3, step 2" in message and "--lr" in message
    args, _ = train.parse(MINIATURE)
    train_set = data.open_dataset(load(run / "last.pt")["args"]["data"], "train", limit=10)
    batch = train.epoch_loader(args, 3, train_set, rank=0, ranks=1).sampler[4:8]
    assert message.endswith(", ".join(train_set.files[i] for i in batch))
    assert contents(run) == before and "--resume" in capsys.readouterr().out


@pytest.mark.parametrize("device, looks", [("cpu", list(range(1, 25))), ("cuda", [20, 24])])
def test_a_loss_is_looked_at_every_20_steps_so_that_nothing_waits_for_the_device(device, looks):
    losses = train.RunningLoss(SimpleNamespace(device=device, epochs=1), 1, range(24))  # of 24 batches
    looked = []
    for step in range(1, 25):
        losses.add(torch.tensor(float(step)), [])
        if not losses.unread:
            looked.append(step)
    assert looked == looks and losses.total == 24 * 25 / 2  # no loss is left out


def test_a_validation_that_is_not_finite_is_never_the_best(run, refused, monkeypatch):
    before = contents(run)

    def damage(args, epoch, loader, network, *others):
        next(network.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(train, "train_one_epoch", damage)
    assert "epoch 3, validation" in refused(["--resume", run], "--epochs 3")
    assert contents(run) == before


@pytest.mark.parametrize("there", ["best.pt", "last.pt", "notes.txt", ""])
def test_out_must_be_a_new_or_empty_folder(there, flags, refused, tmp_path):
    file = tmp_path / "run" / there  # "": the folder itself is a file
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    assert "run: is not an empty folder" in refused(flags)
    assert contents(tmp_path) == {file: b"mine"}


def test_a_run_never_overwrites_another(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _ = train.parse(flags[:-2])
    folders = [train.claim_folder(args) for _ in range(3)]  # before an epoch has been saved
    assert folders == [Path("runs") / f"fastdepth-pruned-{k}" for k in (1, 2, 3)]
    args.out = out = folders[0]
    assert list(out.iterdir()) == [train.claim(out)]
    assert train.claim_folder(args) == out  # in a container, a killed run may have had the same PID
    train.claim(out).rename(out / f"last.pt.partial-{os.getppid()}")
    with pytest.raises(data.UserError, match="-1: is not an empty folder"):
        train.claim_folder(args)  # the first is still running
    (out / f"last.pt.partial-{os.getppid()}").rename(out / "last.pt.partial-99999999")  # it was killed
    assert train.claim_folder(args) == out


def test_a_folder_runs_that_points_nowhere_is_an_error(flags, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("unmounted/scratch")
    assert "runs" in refused(flags[:-2])


# ------------------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------------------

RANK = """
import json, os, sys, train
from pathlib import Path
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook

# PyTorch lets the processes of one launch meet once; here one launch stands for three.
meet, distributed.destroy_process_group = distributed.init_process_group, lambda: None
distributed.init_process_group = lambda *a, **k: distributed.is_initialized() or meet(*a, **k)
rank, rates, evaluate = int(os.environ["RANK"]), [], train.evaluate
if rank == 1:  # which neither writes nor validates
    train.save = train.log = train.finish = train.evaluate = None
else:  # the RMSE stays where it is, so that plateau lowers the rate
    train.evaluate = lambda *a, **k: (evaluate(*a, **k)[0] | dict(rmse=1.0), {})
train.count = lambda *a: dict(parameters=1, macs=1)
register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))

results = [train.main([*sys.argv[1:], "--epochs", "2"])]
results += [train.main(["--resume", sys.argv[-1], "--epochs", "3"])]  # rank 0 has written what rank 1 reads
loss = train.make_loss("l1")
train.make_loss = lambda *a: lambda pred, *rest: loss(pred * float("nan") if rank == 1 else pred, *rest)
try:
    train.main(["--resume", sys.argv[-1], "--epochs", "4"])
except SystemExit as stop:
    results.append(stop.code)
Path(f"{rank}.json").write_text(json.dumps([rates, results]))
sys.stdout.flush()
os._exit(0)  # PyTorch may abort if Python ends right after an exchange (its pull request 179291)
"""


def test_two_processes_train_as_one_that_normalises_the_halves_of_a_batch_apart(flags, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(RANK)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 script.py".split()
    process = subprocess.run([sys.executable, *torchrun, *flags], cwd=tmp_path, env=ENV, text=True,
                             capture_output=True, timeout=200)
    assert process.returncode == 0, process.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    (rates, results), (rates_1, results_1) = ranks
    assert rates[:6:2] == rates[1:6:2] == pytest.approx([0.01, 0.01, 0.003])  # no epoch beats the first
    assert rates == rates_1 and same(results[:2], results_1[:2])
    assert "the loss is nan in epoch 4, step 1" in results[2] and results[2] != results_1[2]  # each its files
    assert process.stdout.count("2 processes") == 3 and process.stdout.count("best epoch") == 2  # one speaks
    assert not list((tmp_path / "run").glob("*.partial*"))

    forward, l1 = model.DepthNet.forward, train.make_loss("l1")

    def by_halves(network, image):
        if not network.training:
            return forward(network, image)
        return torch.stack([forward(network, image[k::2]) for k in (0, 1)], 1).flatten(0, 1)

    monkeypatch.setattr(model.DepthNet, "forward", by_halves)
    monkeypatch.setattr(train, "make_loss", lambda *a: lambda *tensors: (
        l1(*(t[0::2] for t in tensors)) + l1(*(t[1::2] for t in tensors))) / 2)
    let_rmse_fall(monkeypatch, 1.0)
    go(flags, f"--epochs 3 --out {tmp_path}/one")
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("run", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    one, two = (load(tmp_path / name / "last.pt")["weights"] for name in ("one", "run"))
    start = load(tmp_path / "one" / "best.pt")["weights"]
    for name in one:
        if name.endswith("weight"):  # rounding grows, but not to a part in fifty
            assert (one[name] - two[name]).norm() <= 0.02 * (one[name] - start[name]).norm(), name


# ------------------------------------------------------------------------------------------------------------
# What bad input gets, and what a bug gets
# ------------------------------------------------------------------------------------------------------------


def test_every_flag_has_a_help_text_and_says_its_default():
    parser = train.make_flags()
    text = parser.format_help()
    assert all(action.help for action in parser._actions)
    assert "order and augmentation (default: 0)" in " ".join(text.split())
    assert "None" not in text and "(default: 0.0001)" in text and "(default: the network's)" in text
    assert "adam adds weight decay to the gradient, adamw shrinks the weights" in " ".join(text.split())
    assert re.search(r"--loss \{[^}]*\}\s+see loss.py \(default: l1\)", text)


@pytest.mark.parametrize("wrong, named", [
    ("--lr -1", "-1"),
    ("--epochs 0", "--epochs"),
    ("--batch-size 0", "--batch-size"),
    ("--batch-size 11", "has only 10 training pairs: lower --batch-size"),
    ("--batch-size 1 --size 32 32", "--batch-size 1 with --size 32 32"),
    ("--clip -1", "--clip"),
    ("--workers 100000", "--workers: must be 0 to 256"),
    ("--threads -1", "--threads"),
    ("--weight-decay nan", "--weight-decay: must be 0 or more"),
    ("--seed 99999999999999999999", "--seed: must be of 64 bits"),
    ("--init .", ".: is a folder"),
    ("--init=", "no such file"),
    ("--resume=", "last.pt: no such file"),
    ("--encoder-weights=", "no such file"),
    (f"--resume {ROOT}/train.py", "train.py: give the folder of the run"),
    ("--max-depth inf", "--max-depth"),
    ("--max-depth 0.001", "0.001"),  # nothing is valid
    ("--depth-scale 0", "--depth-scale"),
    ("--size 100 100", "100"),
    ("--model fpn --size 32 64 --loss ssim", "--loss ssim: needs an output of at least 11x11, not 8x16"),
    ("--model fastdeep", "fastdeep"),
    ("--options skip", "KEY=VALUE"),
    ("--options skip=never", "never"),
    ("--options name=fpn", "name=fpn"),
    ("--options max_depth=3", "max_depth=3"),
    ("--loss l3", "l3"),
    ("--optimizer lion", "lion"),
    ("--preset mine", "mine"),
    ("--device meta", "--device meta: PyTorch finds no such device"),
    ("--device hpu", "--device hpu: PyTorch finds no such device"),
    ("--data NOWHERE", "NOWHERE"),
    ("--init NOWHERE.pt --pretrained", "--pretrained"),
])
def test_a_wrong_flag_gets_one_line_and_nothing_is_written(wrong, named, flags, refused, tmp_path,
                                                                  monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in refused(flags, wrong)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_processes_cannot_share_evenly_is_refused(flags, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--batch-size 4: must be a multiple of the 3 processes" in refused(flags)
    assert not (tmp_path / "run").exists()


def test_resume_refuses_to_become_another_run(run, refused):
    before = contents(run)
    for more in ("--model fastdepth", "--options skip=concat", "--optimizer adam", "--batch-size 2",
                 "--loss l2", "--seed 1", "--size 32 32", "--max-depth 5", "--augment none", "--preset best",
                 "--out elsewhere", "--init best.pt", "--pretrained", "--encoder-weights x.pth"):
        line = refused(["--resume", run], f"--epochs 3 {more}")
        assert f"{more.split()[0]} cannot change on --resume" in line
    assert contents(run) == before


@pytest.mark.parametrize("more", ["--model fastdepth", "--options skip=concat"])
def test_init_refuses_the_weights_of_another_network(more, flags, finished, refused):
    line = refused(flags, f"--init {finished}/best.pt {more}")
    assert "best.pt" in line and "--model fastdepth-pruned" in line


def test_resume_refuses_what_is_no_run_of_this_edition(run, finished, refused):
    assert "nope/last.pt" in refused(["--resume", "nope"])
    assert "best.pt" in refused(["--resume", finished / "best.pt"])
    saved = load(run / "last.pt")
    bare = {name: saved[name] for name in ("format", "config", "weights")}
    first_edition = saved["config"] | dict(weights=saved["weights"])
    for wrong in (bare, saved | dict(optimizer=[1]), saved | dict(optimizer={}), saved | dict(history=[1]),
                  saved | dict(args=None), saved | dict(history=[]),
                  first_edition, saved["weights"], [1, 2]):
        torch.save(wrong, run / "last.pt")
        assert "last.pt" in refused(["--resume", run])
    (run / "last.pt").write_bytes((finished / "last.pt").read_bytes()[:100_000])
    assert "last.pt" in refused(["--resume", run])
    saved["history"][0]["rmse"] = 0.0  # the first epoch was the best
    torch.save(saved, run / "last.pt")
    (run / "best.pt").unlink()
    assert "run/best.pt: is missing" in refused(["--resume", run])


@pytest.mark.parametrize("workers", [0, 1])
def test_one_unreadable_sample_stops_the_run_and_is_named(workers, flags, pairs, refused, tmp_path):
    root = tmp_path / "own"
    shutil.copytree(pairs, root)
    (root / "val/grey/3.h5").write_bytes(b"junk")
    line = refused(flags, f"--data {root} --workers {workers}")
    assert "own/val/grey/3.h5" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("place, bug", [
    ("build_model", TypeError), ("make_loss", ValueError), ("epoch_loader", RuntimeError), ("save", KeyError),
])
def test_a_bug_shows_its_traceback_and_is_no_user_error(place, bug, flags, tmp_path, monkeypatch, capfd):
    def broken(*args, **kwargs):
        raise bug("an internal line")

    monkeypatch.setattr(train, place, broken)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(bug, match="an internal line"):  # Python prints the traceback and exits with 1
        data.run_script(train.main, model.ModelError)
    assert capfd.readouterr().err == "" and not (tmp_path / "run").exists()
