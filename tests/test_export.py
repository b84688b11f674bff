"""The ONNX file against PyTorch, in ONNX Runtime and in OpenCV, and what is said when they differ."""
import itertools
import json
import logging
import math
import re
import runpy
import shutil
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
from model import build_model, count, load_model
from test_eval import batch_of, blobs, evaluated, predicted, save_network

SIZE = 64, 192  # not square: exchanged height and width would show
WHOLE = 96, 224  # of the file for whole images (a whole frame is exactly 70x210: 64x224 if the size is free)
logging.getLogger("torch.__trace").disabled = True  # or pytest collects thousands of lines of torch.export


def images(n, height=SIZE[0], width=SIZE[1], seed=0):
    return batch_of([blobs(seed + k, height, width) for k in range(n)])


def save_checkpoint(file, name="fastdepth-pruned"):
    """A network with batch norm to fold. Its weights are positive: as after training, and unlike random ones,
    a small error stays small from layer to layer."""
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
        model(images(4, seed=seed))
    return save_network(file, model, model=name, size=SIZE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture(scope="module")
def exported(checkpoint):
    export.main([checkpoint])
    return checkpoint.replace(".pt", ".onnx")


@pytest.fixture(scope="module")
def whole(checkpoint, exported, tmp_path_factory):
    """The same network for whole images: other declared sizes. (A second conversion would take seconds.)"""
    file, network = tmp_path_factory.mktemp("whole") / "whole.onnx", onnx.load(exported)
    config = load_model(checkpoint)[1] | dict(fixed=WHOLE, unit="metres")
    for tensor in *network.graph.input, *network.graph.output:
        tensor.type.tensor_type.shape.dim[2].dim_value = WHOLE[0]
        tensor.type.tensor_type.shape.dim[3].dim_value = WHOLE[1]
    del network.graph.value_info[:]  # the sizes between them
    onnx.helper.set_model_props(network, {"fastdepth": json.dumps(config)})
    onnx.save(network, file)
    return str(file)


@pytest.fixture
def at_once(exported, whole, monkeypatch):
    """Instead of converting, export.py copies the file of the right size."""
    files = {SIZE: exported, WHOLE: whole}
    monkeypatch.setattr(export, "export_onnx", lambda model, file, size, *_: shutil.copy(files[size], file))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Nine small frames in val, ten in train."""
    root = tmp_path_factory.mktemp("frames")
    for part, n in (("val", 9), ("train", 10)):
        for k in range(n):
            image = blobs(n + k, 120, 160)
            save_hdf5(root / part / f"scene/{k}.h5", image, image.sum(2) / np.float32(255) + 1)
    return root


def real_images(frames, size, geometry):
    """Eight of the nine, (8, 3, H, W)."""
    dataset = data.open_dataset(frames, "val", size, geometry=geometry, limit=8)
    return torch.stack([dataset[k][0] for k in range(8)])


@torch.no_grad()
def pytorch(checkpoint, image):
    depth = load_model(checkpoint)[0](image).numpy()
    assert depth.std() > 0.1 and 1 < np.median(depth) < 10  # something to compare
    return depth


def onnx_runtime(file, image):
    session = onnxruntime.InferenceSession(Path(file).read_bytes())  # bytes: nothing beside it is read
    return session.run(["depth"], {"image": image.numpy()})[0]


def opencv(file, image):
    net = cv2.dnn.readNetFromONNX(str(file))
    net.setInput(image.numpy(), "image")
    return net.forward("depth")


# ------------------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------------------


def test_one_file_appears_and_nothing_beside_it(exported):
    assert sorted(file.name for file in Path(exported).parent.iterdir()) == ["best.onnx", "best.pt"]
    onnx.checker.check_model(onnx.load(exported, load_external_data=False), full_check=True)


def test_batch_norm_is_folded_and_the_head_comes_before_the_last_upsampling(exported):
    nodes = onnx.load(exported).graph.node
    kinds = [node.op_type for node in nodes]
    assert "BatchNormalization" not in kinds and kinds.count("Conv") == 38  # 1 + 13 * 2 + 5 * 2 + 1
    assert kinds.count("Resize") == 5 and kinds[-1] == "Resize" and "Conv" not in kinds[-2:]
    for node in nodes:
        if node.op_type == "Resize":
            assert {attribute.name: attribute.s for attribute in node.attribute}["mode"] == b"nearest"


@pytest.mark.parametrize("size", [SIZE, WHOLE])
def test_a_file_takes_any_batch_of_its_size_and_carries_the_config(size, checkpoint, tmp_path):
    file = tmp_path / "best.onnx"
    export.export_onnx(nn.Conv2d(3, 1, 1), file, size, load_model(checkpoint)[1])
    graph = onnx.load(file).graph
    (image,), (depth,) = graph.input, graph.output
    for tensor, name, channels in (image, "image", 3), (depth, "depth", 1):
        batch, *rest = tensor.type.tensor_type.shape.dim
        assert tensor.name == name and tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert batch.dim_param and [d.dim_value for d in rest] == [channels, *size]
    found, expected = load_predictor(file)[1], load_predictor(checkpoint)[1]
    assert found == expected | dict(fixed=size, unit="metres", runs_on="CPUExecutionProvider")


# ------------------------------------------------------------------------------------------------------------
# Its numbers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [onnx_runtime, opencv])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_file_predicts_what_pytorch_does(checkpoint, exported, run, batch):
    image = images(batch)
    np.testing.assert_allclose(run(exported, image), pytorch(checkpoint, image), atol=2e-5)


def test_a_dynamic_layer_table_predicts_what_pytorch_does_at_two_sizes(tmp_path, capsys):
    checkpoint, file = save_checkpoint(tmp_path / "table.pt", "fastdepth-table"), tmp_path / "free.onnx"
    export.main([checkpoint, "--out", str(file), "--dynamic", "--size", "64", "96"])
    assert "not for OpenCV 4" in capsys.readouterr().out
    assert load_predictor(file)[1]["fixed"] is None
    for image in images(1, 96, 64), images(3, 32, 160):
        expected = pytorch(checkpoint, image)
        np.testing.assert_allclose(onnx_runtime(file, image), expected, atol=1e-4)
        if int(cv2.__version__.split(".")[0]) >= 5:  # OpenCV 4 reads no file of free height and width
            np.testing.assert_allclose(opencv(file, image), expected, atol=1e-4)


@pytest.mark.parametrize("which, flags", [
    ("exported", ["--geometry", "fastdepth"]), ("whole", ["--size", *WHOLE])])
def test_eval_predicts_a_folder_of_images_alike_from_both_files(which, flags, checkpoint, request, tmp_path):
    """A static file of training's size crops as training does; one of another size takes whole images."""
    (tmp_path / "photos").mkdir()
    for height, width in ((48, 64), (300, 200)):
        Image.fromarray(blobs(0, height, width)).save(tmp_path / f"photos/{height}.png")
    photos = tmp_path / "photos"
    found = predicted(request.getfixturevalue(which), tmp_path / "onnx", "--images", photos)
    expected = predicted(checkpoint, tmp_path / "pt", "--images", photos, *flags)
    assert set(found) == {"48", "300"}
    for name, depth in found.items():
        assert depth.std() > 0.1
        np.testing.assert_allclose(depth, expected[name], atol=2e-5)


@pytest.mark.parametrize("which, protocol, size", [("exported", "own", SIZE), ("whole", "garg", WHOLE)])
def test_a_protocol_gives_the_same_metrics_for_both_files(which, protocol, size, checkpoint, frames, request,
                                                          tmp_path):
    flags = frames, tmp_path, "--protocol", protocol
    found = evaluated(request.getfixturevalue(which), *flags)
    expected = evaluated(checkpoint, *flags, "--size", *map(str, size))
    for name in eval.METRICS:  # a pixel more within 25 % is 1e-5 of d1
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4)


def test_the_int8_file_is_small_close_and_scored_as_by_eval(checkpoint, at_once, frames, tmp_path, capsys):
    out, size = tmp_path / "new" / "best.onnx", ["--size", *map(str, WHOLE)]  # depth needs a factor there
    export.main([checkpoint, "--out", str(out), "--int8", "--data", str(frames), *size])
    said, small = capsys.readouterr().out, out.with_name("best-int8.onnx")
    assert "int8 calibrated on 10 images" in said  # of train
    assert sorted(file.name for file in out.parent.iterdir()) == ["best-int8.onnx", "best.onnx"]
    assert small.stat().st_size < 0.4 * out.stat().st_size
    predict, config = load_predictor(small)
    assert config == load_predictor(out)[1] and config["fixed"] == WHOLE
    image = real_images(frames, WHOLE, "full")
    expected = pytorch(checkpoint, image)
    difference = abs(predict(image).numpy() - expected).mean()
    assert 1e-4 < difference < 0.03 * expected.std()

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

    for file, lane, distance in ((out, "ONNX Runtime", 0), (small, "ONNX Runtime int8", difference)):
        words = rf"^{lane} +[\d.]+ MiB, (\S+) m from PyTorch, rmse (\S+), d1 (\S+) on 9 images$"
        found, = re.findall(words, said, re.MULTILINE)
        result = evaluated(str(file), frames, tmp_path, "--geometry", "full", *size)
        assert [*map(float, found)] == pytest.approx([distance, result["rmse"], result["d1"]], abs=1e-4)


# ------------------------------------------------------------------------------------------------------------
# The claim fails, or the user erred
# ------------------------------------------------------------------------------------------------------------


def shifted(file, error):
    """The network of a file, its depth off by `error` metres."""
    network = onnx.load(file)
    name = [node for node in network.graph.node if node.op_type == "Conv"][-1].input[2]
    bias, = (tensor for tensor in network.graph.initializer if tensor.name == name)
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(error), name))
    return network


@pytest.mark.parametrize("error", [5e-4, 5e-3, -5e-3, math.nan])
def test_a_file_of_other_numbers_than_pytorch_ends_with_exit_code_1(error, checkpoint, exported, frames,
                                                                    tmp_path, monkeypatch, capsys):
    network, out = shifted(exported, error), tmp_path / "best.onnx"
    monkeypatch.setattr(export, "export_onnx", lambda model, file, *_: onnx.save(network, file))
    out.write_text("an older file")
    argv = [checkpoint, "--out", str(out), "--data", str(frames)]
    if abs(error) <= 1e-3:
        export.main(argv)
        assert out.read_bytes() == network.SerializeToString()
    else:
        with pytest.raises(SystemExit, match="best.onnx was not written$"):  # with a text, the code is 1
            export.main(argv)
        assert out.read_text() == "an older file"
    said = re.search(r"largest difference .*: (\S+) m", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(abs(error), rel=0.02, abs=3e-5, nan_ok=True)
    assert [file.name for file in tmp_path.iterdir()] == ["best.onnx"]


@pytest.mark.parametrize("error", [1.0, math.nan])
@pytest.mark.parametrize("fixed, wrong", [
    ((32, 64), lambda x: len(x) > 1),
    ((32, 64), lambda x: len(x) == 1),
    (None, lambda x: x.shape[2] != 32 and x.shape[3] != 64),
], ids=["all at once", "one by one", "another size"])
def test_the_comparison_is_of_every_batch_size_and_of_another_size_if_that_is_free(fixed, wrong, error,
                                                                                   monkeypatch):
    model = nn.Conv2d(3, 1, 1)
    predict = lambda image: model(image) + (error if wrong(image) else 0)
    monkeypatch.setattr(export, "load_predictor", lambda file: (predict, dict(fixed=fixed)))
    found = export.largest_difference("best.onnx", model, torch.rand(3, 3, 32, 64))
    assert found == pytest.approx(error, nan_ok=True)


@pytest.mark.parametrize("size, geometry", [(SIZE, "fastdepth"), (WHOLE, "full")])
def test_the_comparison_is_on_images_as_the_file_takes_them(size, geometry, checkpoint, at_once, frames,
                                                            tmp_path, monkeypatch, capsys):
    compared = []

    def note(file, model, image):
        compared.append(image)
        return 0.0

    monkeypatch.setattr(export, "largest_difference", note)
    out = str(tmp_path / "best.onnx")
    export.main([checkpoint, "--data", str(frames), "--out", out, "--size", *map(str, size)])
    assert f"takes {size[0]}x{size[1]} ({geometry})" in capsys.readouterr().out
    torch.testing.assert_close(compared, [real_images(frames, size, geometry)])


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
    assert found["fast"][0] == pytest.approx(20) and found["fast"][1] > 21
    assert [name for name, _ in itertools.groupby(calls)][:4] == ["slow", "fast", "slow", "fast"]


@pytest.mark.parametrize("more", [[f"OpenCV {cv2.__version__}"], []])
def test_the_table_of_speeds_has_every_lane(more, checkpoint, exported, tmp_path, monkeypatch, capsys):
    model, offset = load_model(checkpoint)[0], tmp_path / "offset.onnx"
    onnx.save(shifted(exported, 0.5), offset)
    outputs, threads = {}, []

    def timed(lanes):
        outputs.update({name: np.asarray(run()) for name, run in lanes.items()})
        return {name: (20.0, 40.0) for name in lanes}

    monkeypatch.setattr(export, "timed", timed)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(export, "fold_batch_norm", lambda model: lambda image: model(image) + 0.25)
    if not more:
        monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    export.bench(model, images(1), {"ONNX Runtime": exported, "ONNX Runtime int8": offset}, 1)
    table, gmacs = capsys.readouterr().out, count(model, *SIZE)["macs"] / 1e9
    assert f"batch 1, {SIZE[0]}x{SIZE[1]}, CPU, 1 threads, {gmacs:.3f} GMACs" in table and threads == [1]
    assert ("pip install opencv-python-headless" in table) == (not more)
    assert list(outputs) == ["PyTorch", "PyTorch, folded", "ONNX Runtime", "ONNX Runtime int8", *more]
    for lane, depth in outputs.items():
        assert re.search(rf"^{lane} +20\.00 +40\.00 +50\.0 +{gmacs / 0.02:.1f}$", table, re.MULTILINE)
        own = 0.25 * ("folded" in lane) + 0.5 * ("int8" in lane)  # each runs its own network
        np.testing.assert_allclose(depth, outputs["PyTorch"] + own, atol=1e-4)


def test_a_file_that_opencv_cannot_read_is_skipped_in_one_line(tmp_path, capfd):
    (tmp_path / "text.onnx").write_text("hello")
    assert export.opencv_lane(tmp_path / "text.onnx", images(1), 1) == {}
    assert re.fullmatch(r"OpenCV \S+: skipped, it cannot read .*text.onnx .*\n", capfd.readouterr().out)


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path):
    with pytest.raises(data.UserError, match="best.onnx: cannot be written"), full_disk(100):
        export.export_onnx(nn.Conv2d(3, 1, 1), tmp_path / "best.onnx", SIZE, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, flags", [(export, []), (eval, ["--data", "rooms:8"])])
def test_a_cut_off_checkpoint_gives_one_line_exit_code_2_and_no_file(script, flags, checkpoint, tmp_path,
                                                                     monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("best.pt").write_bytes(Path(checkpoint).read_bytes()[:100_000])
    monkeypatch.setattr(sys, "argv", [script.__file__, "best.pt", *flags])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    assert stop.value.code == 2
    assert re.fullmatch(rf"{script.__name__}.py: error: best.pt: .*\n", capfd.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("script, flags, named", [
    (export, "NAN.pt", "NAN.pt: predicts NaN"),
    (export, "FILE.onnx", "FILE.onnx: is exported already"),
    (export, "MODEL --out best.pt", "--out best.pt: must end in .onnx"),
    (export, "./", "./: is a folder"),
    (export, "MODEL --int8 --dynamic", "--int8"),
    (export, "MODEL --data NOWHERE", "NOWHERE: no such"),
    (eval, "FILE.onnx --data FRAMES --protocol garg", "export it with --size 64 224"),
    (eval, "WHOLE.onnx --data FRAMES", f"export it with --size {SIZE[0]} {SIZE[1]}"),
    (eval, "OLD.onnx --images photo.png", "OLD.onnx: was not written by this version of export.py"),
    (eval, "FOREIGN.onnx --images photo.png", "FOREIGN.onnx: was not written by this version")])
def test_a_mistake_gets_one_line_exit_code_2_and_no_file(
        script, flags, named, checkpoint, exported, whole, frames, refused, tmp_path, monkeypatch):
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
    before = sorted(Path().iterdir())
    line = refused(script, [words.get(word, word) for word in flags.split()])
    assert named in line.replace("best.onnx", "FILE.onnx")
    assert sorted(Path().iterdir()) == before
