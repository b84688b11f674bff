"""What the tests share: the path to the scripts, two miniature data sets and a finished run."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # fastest for miniatures, and sums always in the same order
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # plain `pytest` only puts tests/ there

import numpy as np
import pytest
from PIL import Image

import data
import train

# 2 steps an epoch: the last 2 of 10 images are no whole batch
MINIATURE = ("--model fastdepth-pruned --size 64 64 --batch-size 4 --limit 10 --lr 0.01 --schedule plateau "
             "--augment flip --device cpu --amp none --threads 1").split()


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A pack of 16 + 2 small rooms."""
    file = tmp_path_factory.mktemp("rooms") / "rooms.h5"
    data.write_pack(file, "rooms:16", size=(96, 128))
    return file


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Paired folders, 8 pairs in train and 4 in val: flat grey images, brighter if farther, 1 to 6 m."""
    root = tmp_path_factory.mktemp("pairs") / "grey"
    for part, n in (("train", 8), ("val", 4)):
        for i in range(n):
            level = (i + 0.5) / n
            for kind, array in (("rgb", np.full((48, 64, 3), 255 * level, np.uint8)),
                                ("depth", np.full((48, 64), 1000 + 5000 * level, np.uint16))):
                file = root / part / kind / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(file)
    return root


@pytest.fixture(scope="session")
def finished(rooms, tmp_path_factory):
    """The folder of a run of two epochs on the rooms. Copy it before adding to it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main([*MINIATURE, "--data", str(rooms), "--out", str(out), "--epochs", "2"])
    return out
