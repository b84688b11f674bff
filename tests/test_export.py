"""The ONNX file against PyTorch, in ONNX Runtime and in OpenCV, and what is said when they differ."""
import itertools
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import full_disk, save_hdf5
from PIL import Image
from torch import nn

import data
import eval
import export
from eval import load_predictor
from model import build_model, load_model

SIZE = 64, 192  # not square: exchanged height and width would show
WHOLE = 96, 224  # of the file for whole images (a whole frame is exactly 70x210: 64x224 if the size is free)
logging.getLogger("torch.__trace").disabled = True  # or pytest collects thousands of lines of torch.export


def save_checkpoint(file, name="fastdepth-pruned"):
    """A network with batch norm to fold, in a file as train.py writes it. Its weights are positive: as after
    training, and unlike random ones, a small error stays small from layer to layer."""
    torch.manual_seed(0)
    model = build_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 3.0 if layer.num_features == 1 else 0.0, 0.3)
            layer.momentum = 0.5
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.weight.data.abs_()
    for seed in range(7):  # running statistics follow
        model(blobs(4, *SIZE, seed))
    config = dict(model=name, options={}, size=SIZE, geometry="fastdepth", max_depth=10.0, frame=(480, 640))
    torch.save(dict(format=2, config=config, weights=model.state_dict()), file)
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture(scope="module")
def exported(checkpoint):
    export.main([str(checkpoint)])
    return checkpoint.with_suffix(".onnx")


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The same network for whole images."""
    file = tmp_path_factory.mktemp("whole") / "whole.onnx"
    export.main([str(checkpoint), "--out", str(file), "--size", *map(str, WHOLE)])
    return file


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Five frames in val, eight in train."""
    root = tmp_path_factory.mktemp("frames")
    for part, n in (("val", 5), ("train", 8)):
        for k, image in enumerate(blobs(n, 480, 640, seed=n)):
            rgb = (image * 255).byte().permute(1, 2, 0).numpy()
            save_hdf5(root / part / f"scene/{k}.h5", rgb, image.sum(0).numpy() + 1)
    return root


def blobs(batch, height=SIZE[0], width=SIZE[1], seed=0):
    """Images of soft random blobs, (B, 3, H, W)."""
    coarse = torch.rand(batch, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear")


@torch.no_grad()
def pytorch(checkpoint, image):
    depth = load_model(checkpoint)[0](image).numpy()
    assert depth.std() > 0.1 and 1 < np.median(depth) < 10  # something to compare
    return depth


def onnx_runtime(file, image):
    session = onnxruntime.InferenceSession(file.read_bytes())  # bytes: nothing beside it is read
    return session.run(["depth"], {"image": image.numpy()})[0]


def opencv(file, image):
    net = cv2.dnn.readNetFromONNX(str(file))
    net.setInput(image.numpy(), "image")
    return net.forward("depth")


# ------------------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------------------


def test_one_file_appears_and_nothing_beside_it(checkpoint, exported):
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["best.onnx", "best.pt"]
    onnx.checker.check_model(onnx.load(exported, load_external_data=False), full_check=True)


def test_the_file_takes_any_batch_at_the_size_of_training(exported):
    graph = onnx.load(exported).graph
    (image,), (depth,) = graph.input, graph.output
    assert (image.name, depth.name) == ("image", "depth")
    for tensor, channels in (image, 3), (depth, 1):
        batch, *rest = tensor.type.tensor_type.shape.dim
        assert batch.dim_param and [d.dim_value for d in rest] == [channels, *SIZE]
        assert tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_batch_norm_is_folded_and_the_head_comes_before_the_last_upsampling(exported):
    nodes = onnx.load(exported).graph.node
    kinds = [node.op_type for node in nodes]
    assert "BatchNormalization" not in kinds and kinds.count("Conv") == 38  # 1 + 13 * 2 + 5 * 2 + 1
    assert kinds.count("Resize") == 5 and kinds[-1] == "Resize" and "Conv" not in kinds[-2:]
    for node in nodes:
        if node.op_type == "Resize":
            assert {attribute.name: attribute.s for attribute in node.attribute}["mode"] == b"nearest"


@pytest.mark.parametrize("which, fixed", [("exported", SIZE), ("whole", WHOLE)])
def test_the_file_carries_the_config_of_the_checkpoint(which, fixed, checkpoint, request):
    file = request.getfixturevalue(which)
    written = json.loads({p.key: p.value for p in onnx.load(file).metadata_props}["fastdepth"])
    assert written["unit"] == "metres" and written["size"] == list(SIZE)
    (_, ours), (_, theirs) = load_predictor(file), load_predictor(checkpoint)
    assert ours.pop("fixed") == fixed and theirs.pop("fixed") is None and ours.pop("unit")
    assert ours.pop("runs_on") == "CPUExecutionProvider" and theirs.pop("runs_on") == "cpu"
    assert ours == theirs


# ------------------------------------------------------------------------------------------------------------
# Its numbers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [onnx_runtime, opencv])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_file_predicts_what_pytorch_does(checkpoint, exported, run, batch):
    image = blobs(batch)
    np.testing.assert_allclose(run(exported, image), pytorch(checkpoint, image), atol=2e-5)


def test_a_dynamic_layer_table_predicts_what_pytorch_does_at_two_sizes(tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "table.pt", "fastdepth-table")
    file = tmp_path / "free.onnx"
    export.main([str(checkpoint), "--out", str(file), "--dynamic", "--size", "64", "96"])
    assert "not for OpenCV 4" in capsys.readouterr().out
    assert load_predictor(file)[1]["fixed"] is None
    for image in blobs(1, 96, 64), blobs(3, 32, 160):
        expected = pytorch(checkpoint, image)
        np.testing.assert_allclose(onnx_runtime(file, image), expected, atol=1e-4)
        if int(cv2.__version__.split(".")[0]) >= 5:  # OpenCV 4 reads no file of free height and width
            np.testing.assert_allclose(opencv(file, image), expected, atol=1e-4)


@pytest.mark.parametrize("which, flags", [
    ("exported", ["--geometry", "fastdepth"]), ("whole", ["--size", *map(str, WHOLE)])])
def test_eval_predicts_a_folder_of_images_alike_from_both_files(which, flags, checkpoint, request, tmp_path):
    """A static file of training's size crops as training does; one of another size takes whole images."""
    (tmp_path / "photos").mkdir()
    for name, shape in (("small", (48, 64)), ("large", (1500, 2000))):
        image = (blobs(1, *shape)[0] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(image).save(tmp_path / "photos" / f"{name}.png")
    images = ["--images", str(tmp_path / "photos"), "--device", "cpu", "--out"]
    eval.main([str(request.getfixturevalue(which)), *images, str(tmp_path / "onnx")])
    eval.main([str(checkpoint), *images, str(tmp_path / "pt"), *flags])
    for name in ("small", "large"):
        ours, theirs = (np.load(tmp_path / kind / f"{name}.npy") for kind in ("onnx", "pt"))
        assert ours.std() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_both_files_are_evaluated_to_the_same_numbers(checkpoint, exported, whole, frames, tmp_path):
    for protocol, file, size in (("own", exported, SIZE), ("eigen", whole, WHOLE)):
        found = []
        for model, flags in ((checkpoint, ["--size", *map(str, size)]), (file, [])):
            eval.main([str(model), "--data", str(frames), "--device", "cpu", "--protocol", protocol, "--json",
                       str(tmp_path / "r.json"), "--sheet", str(tmp_path / "sheet.png"), *flags])
            images = json.loads((tmp_path / "r.json").read_text())["per_image"]
            found.append([[image[name] for name in eval.METRICS] for image in images])
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)  # a pixel more within 25 % is 8e-5 of d1


def test_the_int8_file_is_8_bit_and_close_to_the_float_file_and_both_are_scored_as_by_eval(
        checkpoint, whole, frames, tmp_path, monkeypatch, capsys):
    convert_at_once(monkeypatch, whole)  # at its size the focal length is not that of training
    out, size = tmp_path / "new" / "best.onnx", ["--size", *map(str, WHOLE)]
    export.main([str(checkpoint), "--out", str(out), "--int8", "--data", str(frames), *size])
    said, small = capsys.readouterr().out, out.with_name("best-int8.onnx")
    assert "int8 calibrated on 8 images" in said  # of train
    assert sorted(p.name for p in out.parent.iterdir()) == ["best-int8.onnx", "best.onnx"]
    assert small.stat().st_size < 0.4 * out.stat().st_size
    (predict, config), (_, expected_config) = load_predictor(small), load_predictor(out)
    assert config == expected_config and config["fixed"] == WHOLE
    dataset = data.open_dataset(frames, "val", WHOLE, geometry="full")
    image = torch.stack([dataset[i][0] for i in range(5)])
    expected = pytorch(checkpoint, image)
    difference = abs(predict(image).numpy() - expected)
    assert 1e-4 < difference.mean() < 0.03 * expected.std()

    network = onnx.load(small)
    produced = {output: node for node in network.graph.node for output in node.output}
    convolutions = [node for node in network.graph.node if node.op_type == "Conv"]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in network.graph.initializer}
    assert len(convolutions) == 38
    for node in convolutions:
        activation, weight = (produced[name] for name in node.input[:2])
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert values[activation.input[2]].dtype == np.uint8 and values[weight.input[2]].dtype == np.int8
        assert values[weight.input[1]].size == len(values[weight.input[0]])  # a scale for each filter

    row = r"^(ONNX Runtime(?: int8)?) +[\d.]+ MiB, ([\d.]+) m from PyTorch, rmse (\S+), d1 (\S+) on 5 images$"
    rows = re.findall(row, said, re.MULTILINE)
    assert [row[0] for row in rows] == ["ONNX Runtime", "ONNX Runtime int8"]
    assert float(rows[1][1]) == pytest.approx(difference.mean(), abs=1e-4) and float(rows[0][1]) < 1e-4
    for file, row in ((out, rows[0]), (small, rows[1])):
        eval.main([str(file), "--data", str(frames), "--geometry", "full", *size, "--sheet",
                   str(tmp_path / "s.png"), "--json", str(tmp_path / "r.json")])
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["rmse"], result["d1"]) == pytest.approx((float(row[2]), float(row[3])), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------
# The claim fails, or the user erred
# ------------------------------------------------------------------------------------------------------------


def shifted(file, error):
    """The network of a file, its depth off by `error` metres."""
    network = onnx.load(file)
    bias = [node for node in network.graph.node if node.op_type == "Conv"][-1].input[2]
    for tensor in network.graph.initializer:
        if tensor.name == bias:
            value = onnx.numpy_helper.to_array(tensor) + np.float32(error)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, bias))
    return network


def convert_at_once(monkeypatch, file, error=0.0):
    """Instead of converting, which takes seconds, write the file that is there, its depth off by `error`."""
    network = shifted(file, error)
    monkeypatch.setattr(export, "export_onnx", lambda model, file, *_: onnx.save(network, file))


@pytest.mark.parametrize("error, code", [(0.0, None), (5e-4, None), (5e-3, 1), (-5e-3, 1)])
def test_a_file_of_other_numbers_than_pytorch_ends_with_exit_code_1(checkpoint, exported, tmp_path,
                                                                    monkeypatch, capsys, error, code):
    convert_at_once(monkeypatch, exported, error)
    (tmp_path / "best.onnx").write_text("an older file")
    try:
        export.main([str(checkpoint), "--out", str(tmp_path / "best.onnx")])
    except SystemExit as stop:  # Python prints the text and exits with 1
        assert code == 1 and stop.code.endswith("best.onnx was not written")
    else:
        assert code is None
    said = re.search(r"largest difference .*: (\S+) m", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(abs(error), abs=2e-5 + 0.02 * abs(error))
    assert ((tmp_path / "best.onnx").read_bytes() == b"an older file") == (code == 1)
    assert [file.name for file in tmp_path.iterdir()] == ["best.onnx"]


@pytest.mark.parametrize("fixed, wrong", [
    ((32, 64), lambda x: len(x) > 1),
    ((32, 64), lambda x: len(x) == 1),
    (None, lambda x: x.shape[2] != 32 and x.shape[3] != 64),
], ids=["all at once", "one by one", "another size"])
def test_the_comparison_is_of_every_batch_size_and_of_another_size_if_that_is_free(fixed, wrong, monkeypatch):
    model = nn.Conv2d(3, 1, 1)
    loaded = lambda x: model(x) + float(wrong(x)), dict(fixed=fixed)
    monkeypatch.setattr(export, "load_predictor", lambda file: loaded)
    assert export.largest_difference("best.onnx", model, torch.rand(3, 3, 32, 64)) == pytest.approx(1)
    loaded = lambda x: model(x) + (math.nan if wrong(x) else 0), dict(fixed=fixed)
    assert math.isnan(export.largest_difference("best.onnx", model, torch.rand(3, 3, 32, 64)))


@pytest.mark.parametrize("which, size, geometry", [("exported", SIZE, "fastdepth"), ("whole", WHOLE, "full")])
def test_the_comparison_is_on_real_images_as_the_file_takes_them(which, size, geometry, checkpoint, frames,
                                                                 request, tmp_path, monkeypatch, capsys):
    convert_at_once(monkeypatch, request.getfixturevalue(which))
    seen = []

    def spying(file, **options):
        predict, config = load_predictor(file, **options)
        return lambda image: predict(seen.append(image) or image), config

    monkeypatch.setattr(export, "load_predictor", spying)
    flags = ["--out", str(tmp_path / "best.onnx"), "--size", *map(str, size)]
    for source in ("rooms:72", str(frames)):
        export.main([str(checkpoint), *flags, "--data", source])
    assert f"takes {size[0]}x{size[1]} ({geometry})" in capsys.readouterr().out
    rooms, _, stored, _ = seen
    assert rooms.shape == (8, 3, *size)  # of nine
    assert 0 <= rooms.min() and 0.5 < rooms.max() <= 1 and rooms.std() > 0.05
    expected = data.open_dataset(frames, "val", size, geometry=geometry)
    torch.testing.assert_close(stored, torch.stack([expected[i][0] for i in range(5)]))


def test_lanes_take_turns_and_their_times_are_milliseconds(monkeypatch):
    clock, calls = [0.0], []

    def run(name, seconds):
        cold = not calls or calls[-1] != name
        calls.append(name)
        clock[0] += 0.9 if cold else seconds  # a first run in a row is not counted

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    found = export.timed({"slow": lambda: run("slow", 0.2),
                          "fast": lambda: run("fast", 0.05 if len(calls) % 10 == 7 else 0.02)})
    assert found["slow"] == pytest.approx((200, 200))
    assert found["fast"][0] == pytest.approx(20) and found["fast"][1] > 20
    assert [name for name, _ in itertools.groupby(calls)][:4] == ["slow", "fast", "slow", "fast"]


@pytest.mark.parametrize("opencv_is_there", [True, False])
def test_the_table_of_speeds_has_every_lane(opencv_is_there, checkpoint, exported, tmp_path, monkeypatch,
                                            capsys):
    model, offset = load_model(checkpoint)[0], tmp_path / "offset.onnx"
    onnx.save(shifted(exported, 0.5), offset)
    outputs, threads, runs = {}, [], []

    def timed(lanes):
        outputs.update({name: np.asarray(run()) for name, run in lanes.items()})
        return {name: (20.0, 40.0) for name in lanes}

    monkeypatch.setattr(export, "timed", timed)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    if not opencv_is_there:
        monkeypatch.setitem(sys.modules, "cv2", None)
    model.decoder.register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr(export, "count", lambda model, *size: dict(macs=2e9 if size == SIZE else 0))
    monkeypatch.setattr(export, "fold_batch_norm", lambda model: load_predictor(checkpoint)[0])
    export.bench(model, blobs(1), {"ONNX Runtime": exported, "ONNX Runtime int8": offset}, 1)
    table = capsys.readouterr().out
    lanes = ["PyTorch", "PyTorch, folded", "ONNX Runtime", "ONNX Runtime int8"]
    assert list(outputs) == lanes + [f"OpenCV {cv2.__version__}"] * opencv_is_there
    assert ("pip install opencv-python-headless" in table) == (not opencv_is_there)
    assert threads == [1] and len(runs) == 1  # the folded lane runs the folded network
    assert f"batch 1, {SIZE[0]}x{SIZE[1]}, CPU, 1 threads, 2.000 GMACs" in table
    for lane, depth in outputs.items():
        assert re.search(rf"^{lane} +20\.00 +40\.00 +50\.0 +100\.0$", table, re.MULTILINE)
        expected = outputs["PyTorch"] + (0.5 if "int8" in lane else 0)
        np.testing.assert_allclose(depth, expected, atol=1e-4)  # each runs its own file


def test_a_file_that_opencv_cannot_read_is_skipped_in_one_line(tmp_path, capfd):
    (tmp_path / "text.onnx").write_text("hello")
    assert export.opencv_lane(tmp_path / "text.onnx", blobs(1), 1) == {}
    assert re.fullmatch(r"OpenCV \S+: skipped, it cannot read .*text.onnx .*\n", capfd.readouterr().out)


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path):
    with pytest.raises(data.UserError, match="best.onnx: cannot be written"), full_disk(100):
        export.export_onnx(nn.Conv2d(3, 1, 1), tmp_path / "best.onnx", SIZE, {})
    assert not list(tmp_path.iterdir())


def test_a_cut_off_checkpoint_gives_one_line_exit_code_2_and_no_file(checkpoint, tmp_path):
    (tmp_path / "best.pt").write_bytes(checkpoint.read_bytes()[:100_000])
    command = sys.executable, export.__file__, "best.pt"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("export.py: error: best.pt: ")
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("script, flags, named", [
    (export, "NOWHERE.pt", "NOWHERE.pt: no such file"),
    (export, "NAN.pt", "NAN.pt: predicts NaN"),
    (export, "FILE.onnx", "FILE.onnx: is exported already"),
    (export, "MODEL --out best.pt", "--out best.pt: must end in .onnx"),
    (export, ".", ".: is a folder"),
    (export, "FOLDER/", "FOLDER/: is a folder"),
    (export, "MODEL --int8 --dynamic", "--int8"),
    (export, "MODEL --data NOWHERE", "NOWHERE: no such"),
    (eval, "FILE.onnx --data FRAMES --protocol eigen", "export it with --size 64 224"),
    (eval, "WHOLE.onnx --data FRAMES", f"export it with --size {SIZE[0]} {SIZE[1]}"),
    (eval, "OLD.onnx --images photo.png", "OLD.onnx: was not written by this version of export.py"),
    (eval, "FOREIGN.onnx --images photo.png", "FOREIGN.onnx: was not written by this version")])
def test_a_mistake_gets_one_line_exit_code_2_and_no_file(script, flags, named, checkpoint, exported, whole,
                                                         frames, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"MODEL": checkpoint, "FILE.onnx": exported, "WHOLE.onnx": whole, "FRAMES": frames}
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("photo.png")
    damaged = torch.load(checkpoint, weights_only=True)
    next(iter(damaged["weights"].values())).fill_(np.nan)
    torch.save(damaged, "NAN.pt")
    network = onnx.load(exported)
    for name, facts in (("FOREIGN", {}), ("OLD", {"fastdepth": '{"size": [64, 192], "fixed": true}'})):
        onnx.helper.set_model_props(network, facts)  # instead of those that it had
        onnx.save(network, f"{name}.onnx")
    Path("FOLDER").mkdir()
    before = sorted(Path().iterdir())
    line = refused(script, [words.get(word, word) for word in flags.split()])
    assert named in line.replace("best.onnx", "FILE.onnx")
    assert sorted(Path().iterdir()) == before
