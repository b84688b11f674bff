"""The ONNX file against PyTorch, in ONNX Runtime and in OpenCV, and what is said when they differ."""
import itertools
import json
import logging
import re
import subprocess
import sys

import cv2
import h5py
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import eval
import export
from eval import load_predictor
from model import build_model, count, load_model

SIZE = 64, 96  # not square: exchanged height and width would show
logging.getLogger("torch.__trace").propagate = False  # or pytest collects thousands of lines of torch.export


def save_checkpoint(file, name="fastdepth-pruned"):
    """A network as after training, which has batch norm to fold, in a file as train.py writes it."""
    torch.manual_seed(0)
    model = build_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 3.0 if layer.num_features == 1 else 0.0, 0.3)
            layer.momentum = 0.5
    for _ in range(7):  # running statistics follow
        model(torch.rand(2, 3, *SIZE))
    torch.save(dict(model=name, options={}, size=SIZE, geometry="full", max_depth=10.0, weights=model.state_dict()), file)
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture(scope="module")
def exported(checkpoint):
    export.main([str(checkpoint)])
    return checkpoint.with_suffix(".onnx")


def pictures(batch, height=SIZE[0], width=SIZE[1]):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def pytorch(checkpoint, image):
    depth = load_model(checkpoint)[0](image).numpy()
    assert depth.std() > 0.1 and 1 < np.median(depth) < 10  # something to compare
    return depth


def onnx_runtime(file, image):
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])  # bytes: nothing beside it
    return session.run(["depth"], {"image": image.numpy()})[0]


def opencv(file, image):
    net = cv2.dnn.readNetFromONNX(str(file))
    net.setInput(image.numpy(), "image")
    return net.forward("depth")


# ------------------------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------------------------


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


def test_batch_norm_is_folded_and_the_head_comes_before_the_last_enlargement(exported):
    nodes = onnx.load(exported).graph.node
    kinds = [node.op_type for node in nodes]
    assert "BatchNormalization" not in kinds and kinds.count("Conv") == 38  # 1 + 13 * 2 + 5 * 2 + 1
    assert kinds.count("Resize") == 5 and kinds[-1] == "Resize" and "Conv" not in kinds[-2:]
    for node in nodes:
        if node.op_type == "Resize":
            assert {attribute.name: attribute.s for attribute in node.attribute}["mode"] == b"nearest"


def test_the_file_says_what_it_is(exported):
    facts = json.loads({p.key: p.value for p in onnx.load(exported).metadata_props}["fastdepth"])
    expected = dict(model="fastdepth-pruned", size=list(SIZE), geometry="full", max_depth=10.0, unit="metres", fixed=True)
    assert expected.items() <= facts.items()


# ------------------------------------------------------------------------------------------------------------------
# Its numbers
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [onnx_runtime, opencv])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_file_answers_as_pytorch_does(checkpoint, exported, run, batch):
    image = pictures(batch)
    np.testing.assert_allclose(run(exported, image), pytorch(checkpoint, image), atol=1e-4)


def test_a_dynamic_layer_table_answers_as_pytorch_does_at_two_sizes(tmp_path):
    checkpoint, file, photo = save_checkpoint(tmp_path / "table.pt", "fastdepth-table"), tmp_path / "free.onnx", tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(photo)
    export.main([str(checkpoint), "--out", str(file), "--dynamic", "--images", str(photo)])
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(file).graph.node]
    for image in pictures(1, 96, 64), pictures(3, 32, 160):
        expected = pytorch(checkpoint, image)
        np.testing.assert_allclose(onnx_runtime(file, image), expected, atol=3e-4)
        if int(cv2.__version__.split(".")[0]) >= 5:  # OpenCV 4 reads no file of free height and width
            np.testing.assert_allclose(opencv(file, image), expected, atol=3e-4)


def test_a_static_file_refuses_another_size(exported):
    with pytest.raises(Exception, match="(?i)dimension"):
        onnx_runtime(exported, pictures(1, *SIZE[::-1]))


def test_the_predictor_of_the_file_is_the_predictor_of_the_checkpoint(checkpoint, exported):
    (ours, facts), (theirs, known), image = load_predictor(exported), load_predictor(checkpoint), pictures(2)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), atol=1e-4, rtol=0)
    assert all(facts[key] == (list(value) if isinstance(value, tuple) else value) for key, value in known.items()
               if key not in ("fixed", "runs_on"))
    assert facts["fixed"] and not known["fixed"]


def test_both_files_are_evaluated_to_the_same_numbers_at_any_batch_size(checkpoint, exported, tmp_path):
    generator = np.random.default_rng(0)
    for k in range(5):
        (tmp_path / "val" / "scene").mkdir(parents=True, exist_ok=True)
        with h5py.File(tmp_path / "val" / "scene" / f"{k}.h5", "w") as h5:
            h5["rgb"], h5["depth"] = generator.integers(0, 256, (3, 48, 64), np.uint8), generator.uniform(0.5, 9, (48, 64)).astype(np.float32)
    found = []
    for file, batch in (checkpoint, 1), (checkpoint, 4), (exported, 1), (exported, 5):
        eval.main([str(file), "--data", str(tmp_path), "--device", "cpu", "--batch-size", str(batch), "--sheet", str(tmp_path / "sheet.png"),
                   "--json", str(tmp_path / "result.json")])
        result = json.loads((tmp_path / "result.json").read_text())
        found.append(np.array([[image[name] for name in eval.METRICS] for image in result["per_image"]]))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3, atol=1e-4)  # one pixel more or less within 25 % is 2e-4 of d1


# ------------------------------------------------------------------------------------------------------------------
# The claim fails, or the user erred
# ------------------------------------------------------------------------------------------------------------------


def convert_at_once(monkeypatch, exported, error=0.0):
    """Instead of converting, which takes seconds, write the file that is there, its head off by `error` metres."""
    network = onnx.load(exported)
    bias = [node for node in network.graph.node if node.op_type == "Conv"][-1].input[2]
    for tensor in network.graph.initializer:
        if tensor.name == bias:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.float32(error), bias))
    monkeypatch.setattr(export, "export_onnx", lambda model, file, *_: onnx.save(network, file))


@pytest.mark.parametrize("error, code", [(0.0, None), (1e-4, None), (5e-3, 1), (-5e-3, 1), (np.nan, 1)])
def test_a_file_of_other_numbers_than_pytorch_ends_with_exit_code_1(checkpoint, exported, tmp_path, monkeypatch, capsys, error, code):
    convert_at_once(monkeypatch, exported, error)
    (tmp_path / "best.onnx").write_text("an older file")
    try:
        export.main([str(checkpoint), "--out", str(tmp_path / "best.onnx")])
    except SystemExit as stop:
        assert stop.code == code == 1
    else:
        assert code is None
    assert "largest difference" in capsys.readouterr().out
    assert ((tmp_path / "best.onnx").read_bytes() == b"an older file") == (code == 1)  # nothing wrong takes the place of what was right
    assert [file.name for file in tmp_path.iterdir()] == ["best.onnx"]


def test_an_export_that_is_interrupted_while_it_compares_leaves_nothing(checkpoint, exported, tmp_path, monkeypatch):
    def interrupted(file):
        assert file.is_file()
        raise KeyboardInterrupt

    convert_at_once(monkeypatch, exported)
    monkeypatch.setattr(export, "load_predictor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.main([str(checkpoint), "--out", str(tmp_path / "best.onnx")])
    assert not list(tmp_path.iterdir())


def test_the_comparison_is_on_real_pictures(checkpoint, exported, tmp_path, monkeypatch):
    convert_at_once(monkeypatch, exported)
    photo, seen = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8), []
    Image.fromarray(photo).save(tmp_path / "photo.png")

    def spying(file, **options):
        predict, facts = load_predictor(file, **options)
        return lambda image: predict(seen.append(image) or image), facts

    monkeypatch.setattr(export, "load_predictor", spying)
    for source in [], ["--images", str(tmp_path / "photo.png")]:
        export.main([str(checkpoint), "--out", str(tmp_path / "best.onnx"), *source])
    rooms, mine = seen[0], seen[-1]
    assert rooms.shape[1:] == (3, *SIZE) and len(rooms) > 1 and rooms.min() >= 0 and 0.5 < rooms.max() <= 1 and rooms.std() > 0.05
    np.testing.assert_array_equal((mine[0] * 255).round().byte().permute(1, 2, 0), photo)


def test_lanes_take_turns_and_their_times_are_milliseconds(monkeypatch):
    clock, calls = [0.0], []

    def run(name, seconds):
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    found = export.timed({"slow": lambda: run("slow", 0.2), "fast": lambda: run("fast", 0.02 if len(calls) % 10 else 0.05)})
    assert found["slow"] == pytest.approx((200, 200)) and found["fast"][0] == pytest.approx(20) and found["fast"][1] > 20
    assert [name for name, _ in itertools.groupby(calls)][:4] == ["slow", "fast", "slow", "fast"]


def test_the_table_of_speeds_has_every_lane_and_says_what_is_missing(checkpoint, exported, tmp_path, monkeypatch, capsys):
    def no_compiler(model):
        raise RuntimeError("no g++ here\nsecond line")

    convert_at_once(monkeypatch, exported)
    monkeypatch.setattr(torch, "compile", lambda model: lambda image: no_compiler(model))
    monkeypatch.setattr(export, "timed", lambda lanes: {name: (run() is None, (20.0, 40.0))[1] for name, run in lanes.items()})
    monkeypatch.setitem(sys.modules, "cv2", None)
    export.main([str(checkpoint), "--out", str(tmp_path / "best.onnx"), "--bench", "--threads", "1"])
    table = capsys.readouterr().out
    macs = count(load_model(checkpoint)[0], *SIZE)["macs"]
    for lane in "PyTorch", "folded, channels last", "the same in bfloat16", "ONNX Runtime":
        row = re.search(rf"^{lane} +20\.00 +40\.00 +50\.0 +([\d.]+) +(\d+)%$", table, re.MULTILINE)
        assert float(row[1]) == pytest.approx(macs / 0.02 / 1e9, abs=0.051)
        assert float(row[2]) == pytest.approx(100 * macs / 2048**3, abs=0.51)  # the matrix multiply took 20 ms too
    assert "no g++ here" in table and "second line" not in table and "pip install opencv-python-headless" in table
    assert "1 threads" in table


# ------------------------------------------------------------------------------------------------------------------
# int8
# ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastdepth-pruned", "fastdepth-v2"])
def test_padded_channels_and_copied_pixels_change_no_number(name, tmp_path):
    model, image = eval.fold_batch_norm(load_model(save_checkpoint(tmp_path / "best.pt", name))[0]), pictures(2)
    padded = export.pad_channels(model)
    for conv in padded.modules():
        if isinstance(conv, nn.Conv2d):
            assert all(n in (1, 3) or n % 16 == 0 for n in conv.weight.shape[:2])
    torch.testing.assert_close(padded(image), model(image), atol=1e-5, rtol=1e-5)
    assert any(a.shape != b.shape for a, b in zip(model.parameters(), padded.parameters()))
    few = torch.rand(2, 3, 4, 5)
    assert torch.equal(export.x2_by_copies(few), few.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_int8_file_is_8_bit_throughout_and_close_to_the_float_file(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "timed", lambda lanes: {name: (run() is None, (20.0, 40.0))[1] for name, run in lanes.items()})
    out, data = tmp_path / "new" / "best.onnx", tmp_path / "data"
    generator = np.random.default_rng(0)
    for part, k in itertools.product(("train", "val"), range(4)):
        (data / part / "scene").mkdir(parents=True, exist_ok=True)
        with h5py.File(data / part / "scene" / f"{k}.h5", "w") as h5:
            h5["rgb"], h5["depth"] = generator.integers(0, 256, (3, 48, 64), np.uint8), generator.uniform(2, 5, (48, 64)).astype(np.float32)
    export.main([str(checkpoint), "--out", str(out), "--int8", "--data", str(data)])
    said, small = capsys.readouterr().out, out.with_name("best-int8.onnx")
    assert sorted(p.name for p in out.parent.iterdir()) == ["best-int8.onnx", "best.onnx"]
    assert small.stat().st_size < 0.4 * out.stat().st_size
    predict, facts = load_predictor(small)
    assert facts["model"] == "fastdepth-pruned" and facts["size"] == list(SIZE) and facts["fixed"]
    with h5py.File(data / "val" / "scene" / "0.h5") as h5:
        image = torch.from_numpy(h5["rgb"][:])[None].float() / 255
    image = nn.functional.interpolate(image, SIZE)
    expected = pytorch(checkpoint, image)
    assert abs(predict(image).numpy() - expected).mean() < 0.3 * expected.std()
    network = onnx.load(small)
    produced = {output: node.op_type for node in network.graph.node for output in node.output}
    convolutions = [node for node in network.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 38 and all(produced[name] == "DequantizeLinear" for node in convolutions for name in node.input[:2])
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in network.graph.initializer}
    weights = {node.output[0]: node for node in network.graph.node if node.op_type == "DequantizeLinear"}
    assert scales[weights[convolutions[3].input[1]].input[1]].size > 1  # a scale a filter
    rows = re.findall(r"^(ONNX Runtime(?: int8)?) +[\d.]+ ms  rmse ([\d.]+)  d1 ([\d.]+)", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["ONNX Runtime", "ONNX Runtime int8"]
    eval.main([str(small), "--data", str(data), "--sheet", str(tmp_path / "s.png"), "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["rmse"] == pytest.approx(float(rows[1][1]), abs=1e-4)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_what_to_install_before_anything_is_done(checkpoint, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(export, "export_onnx", lambda *_: pytest.fail("worked in vain"))
    with pytest.raises(ValueError, match=rf"\b{package}\b.*pip install") as error:
        export.main([str(checkpoint), "--out", str(tmp_path / "new" / "best.onnx")])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flaw", ["missing", "cut off"])
def test_a_wrong_checkpoint_gives_one_line_exit_code_2_and_no_file(checkpoint, tmp_path, flaw):
    file = tmp_path / "best.pt"
    if flaw == "cut off":
        file.write_bytes(checkpoint.read_bytes()[:100_000])
    before = list(tmp_path.iterdir())
    done = subprocess.run([sys.executable, export.__file__, str(file)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and str(file) in done.stderr
    assert list(tmp_path.iterdir()) == before


def test_wrong_flags_are_refused_before_anything_is_written(checkpoint, tmp_path):
    out = ["--out", str(tmp_path / "best.onnx")]
    with pytest.raises(ValueError, match="--size: must be a multiple of 32, got 60"):
        export.main([str(checkpoint), *out, "--size", "60", "96"])
    with pytest.raises(ValueError, match="must end in .onnx"):
        export.main([str(checkpoint), "--out", str(checkpoint)])
    with pytest.raises(ValueError, match="nowhere"):
        export.main([str(checkpoint), *out, "--images", str(tmp_path / "nowhere")])
    for flags, named in ((["--int8"], "--data"), (["--int8", "--dynamic", "--data", "x"], "--dynamic"), (["--threads", "0"], "--threads")):
        with pytest.raises(ValueError, match=named):
            export.main([str(checkpoint), *out, *flags])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def half(network, file):
        file.write_bytes(network.SerializeToString()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", half)
    with pytest.raises((OSError, ValueError), match="No space left"):
        export.export_onnx(nn.Conv2d(3, 1, 1), tmp_path / "best.onnx", SIZE, {})
    assert not list(tmp_path.iterdir())
