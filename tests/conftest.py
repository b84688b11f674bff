"""What the tests share: the path to the scripts, two miniature data sets, a finished run, a few helpers."""
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # fastest for miniatures, and sums always in the same order
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # plain `pytest` only puts tests/ there

import h5py
import numpy as np
import pytest
import torch

import data
import train
from model import ModelError

# 2 steps an epoch: the last 2 of 10 images are no whole batch
MINIATURE = ("--model fastdepth-pruned --size 64 64 --batch-size 4 --limit 10 --lr 0.01 --schedule plateau "
             "--augment flip --device cpu --amp none --threads 1").split()


def save_hdf5(file, image, depth):
    """(H, W, 3) uint8 and (H, W) metres as FastDepth's HDF5 folders hold them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as h5:
        h5["rgb"], h5["depth"] = image.transpose(2, 0, 1), depth


@contextmanager
def full_disk(limit):
    """No file may grow beyond `limit` bytes."""
    import resource  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def refused(monkeypatch, capfd):
    """refused(script, words) -> the line with which the command refuses (argparse's after one of usage)."""
    def refuse(script, words):
        name = f"{script.__name__}.py"
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            data.run_script(script.main, ModelError)
        error = capfd.readouterr().err
        assert stop.value.code == 2, error
        before, _, line = error.rpartition(f"{name}: error: ")
        assert re.fullmatch(rf"(usage: {name} \[flags\]; .*\n|note: half of the depth .*\n)?", before), error
        assert line.count("\n") == 1, error
        return line
    return refuse


@pytest.fixture(autouse=True)
def same_start():
    """The same random numbers and threads for every test, whatever --threads the one before set."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A pack of 16 + 2 small rooms."""
    file = tmp_path_factory.mktemp("rooms") / "rooms.h5"
    data.write_pack(file, "rooms:16", size=(96, 128))
    return file


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """8 frames in train and 4 in val: flat grey images, brighter if farther, 1 to 6 m."""
    root = tmp_path_factory.mktemp("pairs") / "grey"
    for part, n in (("train", 8), ("val", 4)):
        for i in range(n):
            level = (i + 0.5) / n
            image = np.full((48, 64, 3), 255 * level, np.uint8)
            save_hdf5(root / part / f"grey/{i}.h5", image, np.full((48, 64), 1 + 5 * level, np.float32))
    return root


@pytest.fixture(scope="session")
def finished(rooms, tmp_path_factory):
    """The folder of a run of two epochs on the rooms. Copy it before adding to it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main([*MINIATURE, "--data", str(rooms), "--out", str(out), "--epochs", "2"])
    return out
