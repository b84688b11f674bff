"""README.md and docs/ are true: their commands run; their names, flags, tests and links exist."""
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
import train
from model import MODELS, build_model
from test_data import frame, save_pair

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "README.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)
ROOMS = train.ROOMS  # of the default run; fewer in the tests
SCRIPTS = ("model", "data", "loss", "train", "eval", "export")
SMALL = ["--limit", "4", "--batch-size", "4", "--size", "64", "64"]  # what makes a training small


def blocks(page):
    """The (language, text) of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """Every `python SCRIPT.py ...` of a page's blocks, in reading order."""
    lines = [line.partition(" #")[0].rpartition("&& ")[2].strip() for _, block in blocks(page)
             for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def in_miniature(command):
    """The script of a command, and its arguments, made small: argparse takes a flag's last value."""
    script, *arguments = shlex.split(command)[1:]
    arguments = [re.sub(r"^rooms:\d+", "rooms:16", argument) for argument in arguments]
    arguments = [argument.replace(f"-{ROOMS}-", "-16-") for argument in arguments]
    if script == "train.py":
        arguments += [*SMALL, "--epochs", "2" if "--resume" in arguments else "1"]
    return script.removesuffix(".py"), arguments


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with what the pages take for granted: weights, an NYU folder and photos; few default rooms."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    for i in range(20):
        save_pair(tmp_path / "nyu", f"{i:05d}", height=48, width=64, seed=i)
    scenes = [f"{i:05d},room_{i // 2:04d}\n" for i in range(20)]
    (tmp_path / "nyu/scenes.csv").write_text("".join(["frame,scene\n", *scenes]))
    (tmp_path / "kitti").symlink_to("nyu")
    (tmp_path / "nyu/dev").mkdir()
    for part, first in (("train", 0), ("val", 12)):
        lines = [f"rgb/{i:05d}.png depth/{i:05d}.png\n" for i in range(first, first + 8)]
        (tmp_path / f"nyu/dev/{part}.txt").write_text("".join(lines))
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/photo.jpg"):
        Image.fromarray(frame(60, 80)[0]).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "ROOMS", 16)
    monkeypatch.setattr(train, "count", lambda *a: dict(parameters=1, macs=1))  # a fifth of a small training
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_as_written_but_smaller(page, home, monkeypatch):
    run_once = lambda lanes: {name: (run(), 1.0, 1.0)[1:] for name, run in lanes.items()}
    monkeypatch.setattr(export, "timed", run_once)
    for command in commands(page):
        script, arguments = in_miniature(command)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        main = importlib.import_module(script).main
        main() if script == "model" else main(arguments)


def test_the_readme_shows_a_command_of_every_script():
    shown = {shlex.split(command)[1] for command in commands(PAGES[0])}
    assert shown == {"model.py", "data.py", "train.py", "eval.py", "export.py"}


def test_the_readme_says_how_many_rooms_the_default_run_trains_on():
    assert f"trains FastDepth on {ROOMS:,} of them" in TEXT


def test_every_python_block_runs(home, monkeypatch):
    """The OpenCV example sees a camera of two images, and what it shows is PyTorch's depth of the crop."""
    torch.manual_seed(0)
    model = build_model("fastdepth-pruned").eval()
    config = dict(model="fastdepth-pruned", options={}, size=(224, 224), geometry="fastdepth", max_depth=10.0,
                  frame=(480, 640))
    export.export_onnx(model, "best.onnx", (224, 224), config)
    images = [np.random.default_rng(k).integers(0, 256, (480, 640, 3), np.uint8) for k in range(2)]
    frames = iter([(True, image) for image in images] + [(False, None)])
    shown = []
    camera = SimpleNamespace(isOpened=lambda: True, read=lambda: next(frames))
    monkeypatch.setattr(cv2, "VideoCapture", lambda device: camera)
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda milliseconds: -1)
    for page in PAGES:
        for language, block in blocks(page):
            if language == "python":
                exec(block, {})
    for image, depth in zip(images, shown, strict=True):
        crop = cv2.cvtColor(image[21:459, 28:612], cv2.COLOR_BGR2RGB)  # 228 of 250 rows, 304 of 333 columns
        small = torch.from_numpy(cv2.resize(crop, (224, 224))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            expected = model(small)[0, 0].numpy() / 10
        assert depth.shape == crop.shape[:2]
        assert np.abs(cv2.resize(expected, crop.shape[1::-1]) - depth).max() < 1e-3


def test_every_name_exists():
    pattern = r"`(model|data|loss|train|eval|export)\.((?!(?:py|txt|csv)\b)[A-Za-z_][\w.]*)"
    names = set(re.findall(pattern, TEXT))
    assert len(names) > 30
    for module, path in names:
        value = importlib.import_module(module)
        for part in path.split("."):
            assert hasattr(value, part), f"{module}.{path} is named in the pages and does not exist"
            value = getattr(value, part)


def test_every_test_that_is_named_exists():
    files = (ROOT / "tests").glob("test_*.py")
    code = "\n".join(file.read_text() for file in files)
    written = set(re.findall(r"^def (test_\w+)", code, re.M))
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 15
    assert named <= written, named - written


def test_every_flag_that_is_named_exists():
    code = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)
    for flag in set(re.findall(r"`(--[a-z0-9-]+)", TEXT)):
        assert f'"{flag}"' in code, flag


def test_every_link_and_image_between_the_pages_exists():
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", page.read_text()):
            file = page.parent / target if target else page
            assert target.startswith("http") or file.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.M) if heading else ()
            anchors = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
            assert heading in ("", *anchors), f"{page.name}: {target}#{heading}"


def test_the_table_of_networks_is_what_model_py_counts(capsys, monkeypatch):
    import model
    monkeypatch.setattr(sys, "argv", ["model.py"])
    model.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counted = {row[0]: row[1:] for row in rows if row and row[0] in MODELS}
    assert counted.keys() == MODELS.keys()
    for name, cells in counted.items():
        row = next(row for row in TEXT.splitlines() if row.startswith(f"| `{name}` |"))
        assert all(f"| {cell} |" in row for cell in cells), row
