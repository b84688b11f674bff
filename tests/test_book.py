"""The README is true: its commands run, its names and tests exist, its figures are those of the code."""
import importlib
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import export
from model import build_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = ("model", "data", "loss", "train", "eval", "export")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)


def commands():
    """Every `python SCRIPT.py ...` of the README's blocks, in reading order."""
    lines = [line.partition(" #")[0].rpartition("&& ")[2].strip() for _, block in BLOCKS for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def in_miniature(command):
    """The script of a command, and its arguments with what makes it small; argparse takes the last of a flag that is given twice."""
    script, *arguments = shlex.split(command)[1:]
    small = {"train.py": "--rooms 16 --limit 8 --batch-size 4 --size 64 64 --epochs".split() + ["2" if "--resume" in arguments else "1"],
             "data.py": ["--rooms", "8"] if "--rooms" in arguments else []}
    return script.removesuffix(".py"), [*arguments, *small.get(script, [])]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder with what the README takes for granted: somebody's NYU folder and photos."""
    rng = np.random.default_rng(0)
    for folder in ("nyu/rgb", "nyu/depth", "photos"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(tmp_path / f"nyu/rgb/{i:05d}.jpg")
        Image.fromarray(rng.integers(800, 8000, (48, 64)).astype(np.uint16)).save(tmp_path / f"nyu/depth/{i:05d}.png")
    (tmp_path / "nyu/scenes.csv").write_text("frame,scene\n" + "".join(f"{i:05d},room_{i // 2:04d}\n" for i in range(20)))
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(tmp_path / "photos/photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs_as_written_but_smaller(home, monkeypatch):
    monkeypatch.setattr(export, "timed", lambda lanes: {name: (run(), 1.0, 1.0)[1:] for name, run in lanes.items()})
    monkeypatch.setattr(torch, "compile", lambda model: model)  # half a minute
    found = [in_miniature(command) for command in commands()]
    assert {script for script, _ in found} == set(SCRIPTS) - {"loss"}
    for script, arguments in found:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        main = importlib.import_module(script).main
        main() if script == "model" else main(arguments)


def test_every_python_block_runs(home, monkeypatch):
    """The OpenCV recipe on a camera of two pictures, with what it shows caught."""
    torch.manual_seed(0)
    model, facts = build_model("fastdepth-pruned").eval(), dict(size=(224, 224), geometry="fastdepth", max_depth=10.0, model="fastdepth-pruned")
    export.export_onnx(model, "best.onnx", (224, 224), facts)
    pictures = [np.random.default_rng(k).integers(0, 256, (240, 320, 3), np.uint8) for k in range(2)]
    frames, shown = iter([(True, picture) for picture in pictures] + [(False, None)]), []
    monkeypatch.setattr(cv2, "VideoCapture", lambda device: SimpleNamespace(isOpened=lambda: True, read=lambda: next(frames)))
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda milliseconds: -1)
    for block in [block for language, block in BLOCKS if language == "python"]:
        exec(block, {})
    for picture, depth in zip(pictures, shown, strict=True):
        image = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), (224, 224))
        with torch.no_grad():
            expected = model(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0, 0].numpy() / 10
        assert depth.shape == (240, 320) and np.abs(cv2.resize(expected, (320, 240)) - depth).max() < 1e-3


def test_every_name_exists():
    names = set(re.findall(r"`(model|data|loss|train|eval|export)\.((?!(?:py|txt|csv)\b)[A-Za-z_][\w.]*)", README))
    assert len(names) > 40
    for module, path in names:
        value = importlib.import_module(module)
        for part in path.split("."):
            assert hasattr(value, part), f"{module}.{path} is named in the README and does not exist"
            value = getattr(value, part)


def test_every_test_that_proves_something_exists():
    written = {name for file in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 15 and named <= written, named - written


def test_the_table_of_networks_is_what_model_py_counts(capsys, monkeypatch):
    import model
    monkeypatch.setattr(sys, "argv", ["model.py"])
    model.main()
    for line in capsys.readouterr().out.splitlines()[1:]:
        name, size, stride, parameters, weights, gmacs = line.split()
        row = next(row for row in README.splitlines() if row.startswith(f"| `{name}` |"))
        assert all(f"| {cell} |" in row for cell in (size, stride, parameters, weights, gmacs)), row


def test_every_flag_that_is_named_exists():
    text = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert f'"{flag}"' in text, flag
