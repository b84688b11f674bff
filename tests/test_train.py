"""Training on a miniature of the rooms: what a run writes, that it repeats and resumes bit for bit, and how it stops."""
import csv
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import data
import model
import train
from eval import evaluate

ROOT = Path(train.__file__).parent
# 2 steps an epoch: the last 2 of 10 pictures are no whole batch
MINIATURE = "--size 64 64 --batch-size 4 --limit 10 --model fastdepth-pruned --amp none --device cpu --lr 0.01".split()


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "rooms"
    data.write_rooms(folder, 16)
    return folder


@pytest.fixture
def flags(rooms, tmp_path):
    """Of a run into tmp_path/run."""
    return [*MINIATURE, "--data", str(rooms), "--out", str(tmp_path / "run")]


@pytest.fixture(scope="session")
def finished(rooms, tmp_path_factory):
    """A run of two epochs: its folder and what main returned. Copy it before adding to it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, train.main([*MINIATURE, "--data", str(rooms), "--out", str(out), "--epochs", "2"])


def copy_of(folder, place):
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read_log(out):
    """log.csv without the time that it took."""
    return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader((out / "log.csv").open())]


def same(a, b):
    """Bitwise equality of checkpoints, but for times and the number of workers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "workers"))
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.fixture
def every_step():
    """Call every_step(f) to have f(optimizer) called before each step of any optimizer."""
    hooks = []
    yield lambda f: hooks.append(register_optimizer_step_pre_hook(lambda optimizer, *_: f(optimizer)))
    for hook in hooks:
        hook.remove()


def let_rmse_fall(monkeypatch, factor):
    """Each evaluation finds `factor` times the RMSE of the one before."""
    calls = itertools.count()
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: ({**evaluate(*a, **k)[0], "rmse": factor ** next(calls)}, None))


# ------------------------------------------------------------------------------------------------------------------
# What a run is
# ------------------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_files_and_returns_the_metrics_of_its_best_epoch(finished):
    out, result = finished
    assert {file.name for file in out.iterdir()} == {"last.pt", "best.pt", "log.csv", "curves.png", "samples.png"}
    log = read_log(out)
    assert [row["epoch"] for row in log] == [1, 2]
    best = min(log, key=lambda row: row["rmse"])
    assert all(result[name] == pytest.approx(value, rel=1e-5) for name, value in best.items())
    for picture in ("curves.png", "samples.png"):
        assert len(np.unique(Image.open(out / picture))) > 20


def test_a_checkpoint_is_a_dict_of_plain_values_that_torch_loads_by_default(finished):
    saved = torch.load(finished[0] / "best.pt")  # weights_only by default: refuses everything but tensors and plain values
    assert saved["model"] == "fastdepth-pruned" and tuple(saved["size"]) == (64, 64) and saved["geometry"] == "fastdepth"
    assert saved["options"] == {} and saved["max_depth"] == 10
    model.build_model("fastdepth-pruned").load_state_dict(saved["weights"])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(flags, finished, tmp_path):
    train.main([*flags, "--epochs", "2", "--workers", "2"])  # and it does not matter who reads the data
    train.main([*flags, "--epochs", "2", "--out", str(tmp_path / "other"), "--seed", "1"])
    first, again, other = (torch.load(out / "last.pt") for out in (finished[0], tmp_path / "run", tmp_path / "other"))
    assert same(first, again) and read_log(finished[0]) == read_log(tmp_path / "run")
    assert not same(first["weights"], other["weights"])


def test_best_is_the_epoch_of_the_lowest_rmse_and_last_the_last(rooms, finished, tmp_path):
    out = copy_of(finished[0], tmp_path / "run")
    result = train.main(["--resume", str(out), "--epochs", "3", "--schedule", "none", "--lr", "3"])  # spoils the weights
    log = read_log(out)
    assert log[2]["rmse"] > 1.5 * min(log[0]["rmse"], log[1]["rmse"])
    val = data.open_dataset(rooms, "val", (64, 64))
    for file, row in (("best.pt", min(log, key=lambda row: row["rmse"])), ("last.pt", log[2])):
        network, _ = model.load_model(out / file)
        assert evaluate(network, torch.utils.data.DataLoader(val), 10.0)[0]["rmse"] == pytest.approx(row["rmse"], rel=0.02)
    assert result["epoch"] == min(log, key=lambda row: row["rmse"])["epoch"]


def test_every_epoch_draws_a_new_order_and_new_pictures_but_the_validation_stays(flags, monkeypatch):
    seen, read = [], data.DepthDataset.__getitem__

    def spy(dataset, index):
        image, depth, _ = sample = read(dataset, index)
        seen.append(("train/" in dataset.files[index], dataset.augment, index, image.sum().item(), depth.sum().item()))
        return sample

    monkeypatch.setattr(data.DepthDataset, "__getitem__", spy)
    train.main([*flags, "--epochs", "2", "--augment", "paper"])
    drawn = [key[2:] for key in seen if key[0] and key[1] == "paper"]
    orders = [[index for index, *_ in epoch] for epoch in (drawn[:8], drawn[8:])]
    assert len(drawn) == 16 and all(len(set(order)) == 8 for order in orders)  # two whole batches
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0]) and len(set(drawn)) == 16
    validation = [key for key in seen if not key[0]]
    assert {augment for _, augment, *_ in validation} == {"none"}
    assert len(set(validation)) == 2 and validation.count(validation[0]) >= 3  # the constant map and two epochs


def test_the_loss_gets_metres_in_float32_and_the_mask_of_valid_pixels(flags, monkeypatch):
    calls = []

    def recorder(name, max_depth):
        def loss(pred, target, mask):
            calls.append((pred, target, mask))
            return pred.mean()
        assert (name, max_depth) == ("silog", 2.5)
        return loss

    monkeypatch.setattr(train, "make_loss", recorder)
    train.main([*flags, "--epochs", "1", "--loss", "silog", "--max-depth", "2.5", "--amp", "bf16"])
    for pred, target, mask in calls:
        assert pred.dtype == target.dtype == torch.float32 and pred.shape == target.shape == mask.shape == (4, 1, 64, 64)
        assert torch.equal(mask, (target > 0) & (target <= 2.5)) and mask.any() and (target > 2.5).any() and (target == 0).any()
        assert pred.isfinite().all() and torch.equal(pred, pred.bfloat16().float())  # autocast was on


def test_a_coarser_network_is_compared_at_its_own_resolution(flags, monkeypatch):
    class Quarter(torch.nn.Conv2d):
        output_stride = 4

    read, depths, targets = data.DepthDataset.__getitem__, [], []

    def spy(dataset, index):
        depths.append((sample := read(dataset, index))[1])
        return sample

    def loss(pred, target, mask):
        assert pred.shape == target.shape == mask.shape == (4, 1, 16, 16)
        targets.append((torch.stack(depths[-4:]), target))
        return pred.mean()

    for where in (train, model):
        monkeypatch.setattr(where, "build_model", lambda *a, **k: Quarter(3, 1, 4, stride=4))
    monkeypatch.setattr(train, "make_loss", lambda *a: loss)
    monkeypatch.setattr(data.DepthDataset, "__getitem__", spy)
    train.main([*flags, "--epochs", "1"])
    assert len(targets) == 2 and all(torch.equal(target, depth[..., 2::4, 2::4]) for depth, target in targets)  # real pixels, no mixtures


def test_training_learns_what_can_be_learnt(tmp_path):
    for part, n in (("train", 8), ("val", 4)):
        (tmp_path / "grey" / part / "scene").mkdir(parents=True)
        for i in range(n):
            level = (i + 0.5) / n  # the brighter, the farther
            with h5py.File(tmp_path / "grey" / part / "scene" / f"{i}.h5", "w") as h5:
                h5["rgb"] = np.full((3, 64, 64), 255 * level, np.uint8)
                h5["depth"] = np.full((64, 64), 1 + 5 * level, np.float32)
    result = train.main([*MINIATURE, "--data", str(tmp_path / "grey"), "--out", str(tmp_path / "run"), "--epochs", "12", "--augment", "none",
                         "--schedule", "none", "--optimizer", "adam"])
    loss = [row["loss"] for row in read_log(tmp_path / "run")]
    assert loss[-1] < 0.5 * loss[0]
    assert result["rmse"] < 0.7 * 1.398  # what the mean depth scores: sqrt of the mean of (1.875, 0.625, ...)^2


def test_tensorboard_gets_every_number_of_every_epoch_and_the_pictures(flags, tmp_path, monkeypatch, capfd):
    events = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            events.append((str(folder), purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def add_image(self, name, image, step, dataformats):
            events.append((name, image.shape, step, dataformats))

        flush = close = lambda self: None

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("module", (), dict(SummaryWriter=SummaryWriter)))
    train.main([*flags, "--epochs", "1", "--tensorboard"])
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "2"])
    run, log = tmp_path / "run", read_log(tmp_path / "run")
    pictures = ("samples", np.asarray(Image.open(run / "samples.png")).shape)
    for epoch, row in enumerate(log, 1):
        of_epoch = events[:events.index((*pictures, epoch, "HWC")) + 1]
        del events[:len(of_epoch)]
        assert of_epoch[0] == (str(run), epoch)
        scalars = {name: value for name, value, _ in of_epoch[1:-1] if name != "seconds"}
        assert scalars == pytest.approx(row, rel=1e-5) and all(step == epoch for *_, step in of_epoch[1:-1])
    assert not events
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    assert "pip install tensorboard" in refused(["--resume", str(run), "--epochs", "3"], monkeypatch, capfd)


def test_init_starts_from_the_weights_of_another_run(flags, finished, tmp_path):
    train.main([*flags, "--epochs", "1", "--init", str(finished[0] / "best.pt"), "--lr", "1e-12"])
    before, after = (torch.load(file)["weights"] for file in (finished[0] / "best.pt", tmp_path / "run" / "last.pt"))
    assert all(torch.allclose(before[name], after[name]) for name in before if "running" not in name and "num_batches" not in name)


def test_the_constant_map_is_the_mean_of_each_measured_pixel():
    depth = np.random.default_rng(0).uniform(0, 6, (7, 5, 4))
    depth[depth < 2] = 0
    depth[:, 1, 2] = 0  # never measured: there stands the mean of all others
    valid = (depth > 0) & (depth <= 5)
    expected = np.full((5, 4), depth[valid].mean())
    for y, x in np.ndindex(5, 4):
        if valid[:, y, x].any():
            expected[y, x] = depth[:, y, x][valid[:, y, x]].mean()
    samples = [(None, torch.tensor(d, dtype=torch.float32)[None], i) for i, d in enumerate(depth)]
    constant = train.constant_map(samples, 5.0)
    assert constant.shape == (1, 1, 5, 4)
    np.testing.assert_allclose(constant[0, 0], expected, rtol=1e-5)


def test_a_dry_run_prints_the_plan_and_writes_nothing(rooms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*MINIATURE, "--data", str(rooms), "--dry-run"])
    plan = capsys.readouterr().out
    assert all(word in plan for word in ("cpu", "fastdepth-pruned", "1,360,786", "10 train", "2 steps of 4", "rmse"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", train.PRESETS)
def test_a_preset_sets_the_flags_that_are_not_given(preset):
    plain, _ = train.parse([])
    args, _ = train.parse(["--preset", preset, "--momentum", "0.5"])
    recipe = dict(train.PRESETS[preset], preset=preset, momentum=0.5)
    assert all(getattr(args, name) == value for name, value in recipe.items())
    assert {name for name in vars(args) if getattr(args, name) != getattr(plain, name)} - {"lr"} == set(recipe) - {"lr"}
    name = next(iter(train.PRESETS[preset]))
    assert getattr(train.parse(["--preset", preset, f"--{name}", str(getattr(plain, name))])[0], name) == getattr(plain, name)


def test_the_papers_preset_zooms_and_the_best_does_not():
    zooms = [data.DepthDataset("", [], None, "", train.PRESETS[preset]["augment"], 0, 1).draw(0)[0]["zoom"] for preset in ("paper", "best")]
    assert zooms[0] > 1 and zooms[1] == 1


# ------------------------------------------------------------------------------------------------------------------
# The learning rate and the gradient
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, epochs, expected", [
    ("step", 6, lambda t: 0.01 if t < 5 else 0.001),
    ("cosine --warmup 1", 3, lambda t: min(t + 0.5, 1) * (0.005 + 0.005 * math.cos(math.pi * t / 3))),
    ("none --warmup 1.5", 2, lambda t: 0.01 * min((t + 0.5) / 1.5, 1)),  # a third at the first of three steps, not 0
])
def test_the_learning_rate_follows_its_formula_at_every_step(schedule, epochs, expected, flags, every_step):
    rates = []
    every_step(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    train.main([*flags, "--epochs", str(epochs), "--schedule", *schedule.split()])
    assert rates == pytest.approx([expected(step / 2) for step in range(2 * epochs)], abs=1e-9)


@pytest.mark.parametrize("factor, warmup, expected", [
    (1.0, "0", [0.01, 0.01, 0.003, 0.0009]),  # no epoch is better than the first
    (0.9, "0", 4 * [0.01]),
    (1.0, "4", [0.0025, 0.005, 0.00225, 0.0009]),  # the rate of the last step of an epoch
])
def test_plateau_lowers_the_rate_where_the_rmse_stays_and_not_where_it_falls(factor, warmup, expected, flags, tmp_path, monkeypatch):
    let_rmse_fall(monkeypatch, factor)
    train.main([*flags, "--epochs", str(len(expected)), "--warmup", warmup])
    assert [row["lr"] for row in read_log(tmp_path / "run")] == pytest.approx(expected)


def test_clip_bounds_the_norm_of_the_gradient(flags, every_step):
    norms = []
    every_step(lambda optimizer: norms.append(sum(p.grad.square().sum() for g in optimizer.param_groups for p in g["params"]).sqrt().item()))
    train.main([*flags, "--epochs", "1"])
    train.main([*flags, "--epochs", "1", "--out", flags[-1] + "-clipped", "--clip", "0.01"])
    assert min(norms[:2]) > 0.02 and norms[2:] == pytest.approx([0.01, 0.01], rel=1e-3)


def test_compile_trains_the_same_network_and_saves_it_under_its_own_names(flags, finished, tmp_path, monkeypatch):
    compile, calls = torch.compile, []

    def traced(network):  # for real, but for the machine code, which takes minutes
        compiled = compile(network, backend="eager")
        compiled.register_forward_hook(lambda *_: calls.append(1))
        return compiled

    monkeypatch.setattr(torch, "compile", traced)
    train.main([*flags, "--epochs", "1", "--compile"])
    assert len(calls) == 2
    weights = torch.load(tmp_path / "run" / "last.pt")["weights"]
    assert read_log(tmp_path / "run")[0] == pytest.approx(read_log(finished[0])[0], rel=1e-3)
    model.build_model("fastdepth-pruned").load_state_dict(weights)


def test_flags_reach_the_optimizer_and_those_given_on_resume_replace_the_old(flags, tmp_path, every_step):
    groups = []
    every_step(lambda optimizer: groups.append([optimizer.param_groups[0][name] for name in ("lr", "weight_decay", "momentum")]))
    train.main([*flags, "--epochs", "1", "--weight-decay", "0.02", "--momentum", "0.8"])
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "2", "--weight-decay", "0.03", "--lr", "0.004"])
    assert groups == 2 * [[0.01, 0.02, 0.8]] + 2 * [[0.004, 0.03, 0.8]]
    assert len(read_log(tmp_path / "run")) == 2


# ------------------------------------------------------------------------------------------------------------------
# Stopping and going on
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at, more", [
    (2, "--epochs 1 --optimizer adam --schedule none"),  # in the first epoch
    (8, "--epochs 5 --optimizer sgd --schedule plateau --warmup 4.5"),  # in the fourth, the rate has fallen and is warming up
    (4, "--epochs 3 --optimizer adam --schedule cosine --workers 2 --augment paper"),
    (12, "--epochs 6 --optimizer sgd --schedule step --augment paper"),  # in the sixth, where the rate has fallen
])
def test_an_interrupted_run_goes_on_bit_for_bit(stop_at, more, flags, tmp_path, monkeypatch, every_step):
    let_rmse_fall(monkeypatch, 1.0)  # so that plateau lowers the rate
    whole = [*flags, *more.split()]
    train.main([*whole, "--out", str(tmp_path / "whole")])
    steps = []

    def interrupt(optimizer):
        steps.append(optimizer)
        if len(steps) == stop_at:
            raise KeyboardInterrupt

    every_step(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.main(whole)
    assert len(torch.load(tmp_path / "run" / "last.pt")["history"]) == (stop_at - 1) // 2  # whole epochs only
    train.main(["--resume", str(tmp_path / "run")])
    assert same(torch.load(tmp_path / "whole" / "last.pt"), torch.load(tmp_path / "run" / "last.pt"))
    assert same(torch.load(tmp_path / "whole" / "best.pt")["weights"], torch.load(tmp_path / "run" / "best.pt")["weights"])
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "run")


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_been(flags, finished, tmp_path):
    script = """
import os, signal, sys, torch, train
from pathlib import Path

class Fatal:  # its n-th call ends the process
    def __init__(self, call, n, last_words=lambda *a: None):
        self.call, self.n, self.last_words = call, n, last_words

    def __call__(self, *args):
        self.n -= 1
        if self.n == 0:
            self.last_words(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.call(*args)

whole = torch.save
def half(state, file):
    whole(state, file)
    os.truncate(file, Path(file).stat().st_size // 2)

for moment in sys.argv[1].split():
    what, n = moment.split(":")
    if not os.fork():
        if what == "save":
            torch.save = Fatal(torch.save, int(n), half)
        else:
            train.write_record = Fatal(train.write_record, int(n))
        train.main([*sys.argv[2:], "--epochs", "2", "--out", "run-" + moment])
    assert os.wait()[1] == signal.SIGKILL, moment
"""
    # In the first checkpoint, in the best of epoch 1, in the last of epoch 1 (best.pt is an epoch ahead), and before the last log
    moments = ["save:1", "save:2", "save:3", "record:2"]
    subprocess.run([sys.executable, "-c", script, " ".join(moments), *flags], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})
    for moment in moments:
        out = tmp_path / f"run-{moment}"
        assert len(list(out.glob("*.partial"))) == moment.startswith("save")
        train.main([*flags, "--epochs", "2", "--out", str(out)] if moment == "save:1" else ["--resume", str(out)])
        assert {file.name for file in out.iterdir()} == {file.name for file in finished[0].iterdir()}
        for name in ("last.pt", "best.pt"):
            assert same(torch.load(out / name), torch.load(finished[0] / name)), (moment, name)
        assert read_log(out) == read_log(finished[0])


def test_a_rate_given_on_resume_replaces_the_one_that_plateau_has_lowered_also_where_it_is_the_old_one(flags, tmp_path, monkeypatch, capsys):
    let_rmse_fall(monkeypatch, 1.0)  # so that plateau lowers the rate
    train.main([*flags, "--epochs", "3", "--schedule", "plateau", "--lr", "0.01"])
    for given, rate in (["0.01"], 0.01), ([], 0.003):
        capsys.readouterr()
        train.main(["--resume", str(tmp_path / "run"), "--epochs", str(4 + (not given)), *(["--lr", *given] if given else [])])
        assert f"lr {rate:g}," in capsys.readouterr().out and read_log(tmp_path / "run")[-1]["lr"] == pytest.approx(rate)


def test_fp16_goes_on_bit_for_bit_with_the_scale_of_its_loss_and_may_begin_on_resume(flags, finished, tmp_path):
    whole = [*flags, *"--amp fp16 --clip 1 --schedule none".split()]
    train.main([*whole, "--epochs", "3", "--out", str(tmp_path / "whole")])
    train.main([*whole, "--epochs", "2"])
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "3"])
    assert same(*(torch.load(tmp_path / out / "last.pt") for out in ("whole", "run")))
    out = copy_of(finished[0], tmp_path / "begun")
    train.main(["--resume", str(out), "--epochs", "3", "--amp", "fp16"])
    assert torch.load(out / "last.pt")["scaler"]["scale"] > 0 and not torch.load(finished[0] / "last.pt")["scaler"]


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    out = copy_of(finished[0], tmp_path / "run")
    before = contents(out)
    assert train.main(["--resume", str(out)]) == pytest.approx(finished[1])
    assert contents(out) == before


def test_ctrl_c_keeps_the_last_epoch_and_prints_the_command_that_goes_on(flags, tmp_path):
    out = tmp_path / "a run"  # which a shell must be told in quotes

    def in_the_foreground():  # processes in the background ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, "-u", str(ROOT / "train.py"), *flags, "--out", str(out), "--epochs", "300"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=in_the_foreground)
    lines = iter(process.stdout.readline, "")
    assert any(line.split()[:1] == ["1"] for line in lines)  # the first epoch is done
    process.send_signal(signal.SIGINT)
    said, err = process.communicate()
    assert process.returncode == 130 and err == ""
    epochs = len(torch.load(out / "last.pt")["history"])
    words = shlex.split(said.rpartition("python train.py ")[2])
    train.main([*words, "--epochs", str(epochs + 1)])
    assert len(read_log(out)) == epochs + 1
    assert not list(out.glob("*partial*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked here")
def test_ctrl_c_while_workers_start_is_as_quiet_as_at_any_other_time(flags, tmp_path):
    # A terminal sends Ctrl-C to the whole group: here it meets every worker before its first line, and their parent in the third fork.
    script = """
import os, signal, sys, threading, time, train
from data import run_script
from multiprocessing.util import register_after_fork

signal.signal(signal.SIGINT, signal.default_int_handler)  # even where the tests run in the background
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # the signal may reach any thread
fork, n = os.fork, 0

def counting_fork():
    global n
    n, pid = n + 1, fork()
    if n == 3 and pid:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        except KeyboardInterrupt:
            print("half the workers are there: too early to stop", file=sys.stderr)
            raise
    return pid

os.fork = counting_fork
register_after_fork(train, lambda _: n >= 3 and signal.raise_signal(signal.SIGINT))
run_script(train.main)
"""
    result = subprocess.run([sys.executable, "-c", script, *flags, "--workers", "2", "--epochs", "2"], cwd=ROOT, text=True, capture_output=True)
    assert (result.returncode, result.stderr) == (130, "")
    assert f"--resume {tmp_path / 'run'}" in result.stdout


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(finished, tmp_path, capsys):
    out = copy_of(finished[0], tmp_path / "run")
    before = contents(out)
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(out), "--epochs", "3", "--schedule", "none", "--lr", "1e30"])  # the second step is NaN
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "epoch 3" in message and "step 2" in message
    files = {word for word in message.split() if word.endswith(".h5")}
    assert len(files) == 4 and all(Path(file).is_file() and "/train/" in file for file in files)
    assert contents(out) == before


def test_a_validation_that_is_not_finite_stops_the_run_and_never_becomes_the_best(finished, tmp_path, monkeypatch, capsys):
    out = copy_of(finished[0], tmp_path / "run")
    before = contents(out)
    values = iter([1.0, float("nan")])  # of the constant map, and of the network
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: ({**evaluate(*a, **k)[0], "rmse": next(values)}, None))
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(out), "--epochs", "3"])
    assert stop.value.code == 1 and "nan after epoch 3" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize("error, becomes", [(RuntimeError("PytorchStreamWriter failed writing file"), ValueError),
                                            (OSError(28, "No space left on device"), ValueError),
                                            (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one_whole(error, becomes, finished, tmp_path, monkeypatch):
    out = copy_of(finished[0], tmp_path / "run")
    before = contents(out)

    def half(state, file):
        Path(file).write_bytes(before[out / "last.pt"][:1000])
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(becomes) as caught:
        train.main(["--resume", str(out), "--epochs", "3"])
    assert becomes is KeyboardInterrupt or str(out) in str(caught.value)
    assert contents(out) == before


def test_a_run_that_cannot_write_its_first_checkpoint_does_not_offer_to_resume(flags, tmp_path, monkeypatch, capfd):
    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    line = refused(flags, monkeypatch, capfd)
    assert "No space left on device" in line and line.endswith("make room\n")


def test_a_run_never_overwrites_another(rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started, once = [*MINIATURE, "--data", str(rooms), "--epochs", "1"], [True]

    def another_starts_meanwhile(*a, **k):
        if once and once.pop():
            train.main(started)
        return evaluate(*a, **k)

    monkeypatch.setattr(train, "evaluate", another_starts_meanwhile)
    train.main(started)
    train.main(started)
    runs = [tmp_path / "runs" / f"fastdepth-pruned-{k}" for k in (1, 2, 3)]
    assert sorted((tmp_path / "runs").iterdir()) == runs and all((out / "samples.png").exists() for out in runs)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="--resume"):
        train.main([*started, "--out", str(runs[0])])
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_that_normalises_the_halves_of_a_batch_apart(flags, tmp_path, monkeypatch):
    script = """
import itertools, json, os, sys, time, train
from pathlib import Path
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook

# PyTorch lets the processes of one launch meet once; here one launch stands for three.
meet, distributed.destroy_process_group = distributed.init_process_group, lambda: None
distributed.init_process_group = lambda *a, **k: distributed.is_initialized() or meet(*a, **k)
rank, rates, evaluate, calls = int(os.environ["RANK"]), [], train.evaluate, itertools.count()
if rank == 1:  # which writes nothing
    train.save_checkpoint = train.write_record = train.sample_sheet = None
register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))

def wait(what):  # rank 0 has still to write when the others are done
    if rank == 0:
        Path(what).touch()
    while not Path(what).exists():
        time.sleep(0.05)

# the RMSE stays where it is, so that plateau lowers the rate; that of rank 1, should anybody ask, falls
train.evaluate = lambda *a, **k: ({**evaluate(*a, **k)[0], "rmse": 0.5 ** (rank * next(calls))}, None)
results = [train.main([*sys.argv[1:], "--epochs", "3"])]
wait("first")
results += [train.main(["--resume", sys.argv[-1], "--epochs", "4"])]
wait("second")
loss = train.make_loss("l1")
train.make_loss = lambda *a: lambda pred, *rest: loss(pred * float("nan") if rank == 1 else pred, *rest)
try:
    train.main(["--resume", sys.argv[-1], "--epochs", "5"])
except SystemExit as stop:
    results.append(stop.code)
Path(f"{rank}.json").write_text(json.dumps([rates, results]))
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"]
    process = subprocess.run([*command, *flags], cwd=tmp_path, text=True, capture_output=True, timeout=300,
                             env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())})  # torchrun's is 1
    assert process.returncode == 0, process.stderr
    (rates, results), (rates_1, results_1) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert rates == rates_1 == pytest.approx(4 * [0.01] + 2 * [0.003] + 2 * [0.0009])  # no epoch was better than the first
    assert same(results, results_1) and results[2] == 1 and process.stderr.count("the loss is nan in epoch 5, step 1") == 1
    assert process.stdout.count("2 processes") == 3 and process.stdout.count("best epoch") == 2  # one speaks
    assert not list((tmp_path / "run").glob("*.partial"))

    forward, l1 = model.DepthNet.forward, train.make_loss("l1")

    def by_halves(network, image):
        return torch.stack([forward(network, image[k::2]) for k in (0, 1)], 1).flatten(0, 1) if network.training else forward(network, image)

    monkeypatch.setattr(model.DepthNet, "forward", by_halves)
    monkeypatch.setattr(train, "make_loss", lambda *a: lambda *tensors: sum(l1(*(t[k::2] for t in tensors)) for k in (0, 1)) / 2)
    let_rmse_fall(monkeypatch, 1.0)
    train.main([*flags, "--epochs", "4", "--out", str(tmp_path / "one")])
    assert [row["loss"] for row in read_log(tmp_path / "run")] == pytest.approx([row["loss"] for row in read_log(tmp_path / "one")], rel=1e-3)
    one, two = (torch.load(tmp_path / out / "last.pt")["weights"] for out in ("one", "run"))
    start = torch.load(tmp_path / "one" / "best.pt")["weights"]
    for name in (name for name in one if name.endswith("weight")):  # rounding grows from step to step, but not to a part in fifty
        assert (one[name] - two[name]).norm() <= 0.02 * (one[name] - start[name]).norm(), name


# ------------------------------------------------------------------------------------------------------------------
# What bad input gets
# ------------------------------------------------------------------------------------------------------------------


def refused(argv, monkeypatch, capfd):
    """The one line with which the command refuses argv."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as stop:
        data.run_script(train.main)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith("train.py: error: ") and error.count("\n") == 1, error
    return error


def test_help_says_the_default_of_every_flag_that_has_one():
    text = train.make_parser().format_help()
    assert "None" not in text and "(default: 0.0001)" in text and "(default: the network's)" in text
    assert re.search(r"--loss \{[^}]*\}\s+\(default: l1\)", text) and re.search(r"--seed SEED\s+\(default: 0\)", text)


@pytest.mark.parametrize("wrong, named", [
    ("--lr -1", "-1"),
    ("--lr fast", "fast"),
    ("--epochs 0", "--epochs"),
    ("--batch-size 0", "--batch-size"),
    ("--batch-size 11", "11"),
    ("--clip -1", "--clip"),
    ("--warmup -1 --schedule none", "--warmup: must be 0 or above 0, got -1"),
    ("--warmup nan", "--warmup"),
    ("--workers -1", "--workers: must be 0 or above 0, got -1"),
    ("--size 100 100", "100"),
    ("--size 0 64", "--size"),
    ("--model fastdeep", "fastdeep"),
    ("--options skip", "skip"),
    ("--options skip=never", "never"),
    ("--options sky=none", "sky"),
    ("--loss l3", "l3"),
    ("--device tpu9", "tpu9"),
    ("--data NOWHERE", "NOWHERE"),
    ("--init NOWHERE.pt", "NOWHERE.pt"),
    ("--init NOWHERE.pt --pretrained", "--pretrained"),
    ("--max-depth 0.001", "--max-depth"),  # nothing is valid
])
def test_a_wrong_flag_gets_one_line_and_nothing_is_written(wrong, named, flags, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert named in refused([*flags, *wrong.split()], monkeypatch, capfd)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_processes_cannot_share_evenly_is_refused(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "multiple of 3" in refused(flags, monkeypatch, capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--preset best", "--out elsewhere", "--init best.pt", "--pretrained", "--encoder-weights x.pth"])
def test_flags_of_a_new_run_are_refused_on_resume(finished, flag):
    with pytest.raises(ValueError, match=f"{flag.split()[0]} is for a new run"):
        train.main(["--resume", str(finished[0]), *flag.split()])


def test_a_dry_run_renders_no_rooms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data/rooms: does not hold 8 rooms"):
        train.main(["--rooms", "8", "--dry-run"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", ["--model fastdepth", "--options skip=concat", "--optimizer adam"])
def test_resume_refuses_to_become_another_network_or_optimizer(more, finished, tmp_path, monkeypatch, capfd):
    out = copy_of(finished[0], tmp_path / "run")
    before = contents(out)
    refused(["--resume", str(out), "--epochs", "3", *more.split()], monkeypatch, capfd)
    assert contents(out) == before


@pytest.mark.parametrize("more", ["--model fastdepth", "--options skip=concat"])
def test_init_refuses_the_weights_of_another_network(more, flags, finished, monkeypatch, capfd):
    assert "best.pt" in refused([*flags, "--init", str(finished[0] / "best.pt"), *more.split()], monkeypatch, capfd)


def test_resume_refuses_a_folder_without_a_run_and_a_checkpoint_cut_off(finished, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    out.mkdir()
    assert str(out) in refused(["--resume", str(out)], monkeypatch, capfd)
    (out / "last.pt").write_bytes((finished[0] / "last.pt").read_bytes()[:100_000])
    assert str(out / "last.pt") in refused(["--resume", str(out)], monkeypatch, capfd)
    assert "takes the folder of a run" in refused(["--resume", str(finished[0] / "best.pt")], monkeypatch, capfd)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_unreadable_sample_stops_the_run_and_is_named(workers, flags, rooms, tmp_path, monkeypatch, capfd):
    bad = copy_of(rooms / "val" / "rooms", tmp_path / "val") / "00001.h5"
    bad.write_bytes(bad.read_bytes()[:5000])
    (tmp_path / "own" / "val").mkdir(parents=True)
    (tmp_path / "val").rename(tmp_path / "own" / "val" / "rooms")
    (tmp_path / "own" / "train").symlink_to(rooms / "train")
    line = refused([*flags, "--data", str(tmp_path / "own"), "--workers", str(workers)], monkeypatch, capfd)
    assert "own/val/rooms/00001.h5" in line
