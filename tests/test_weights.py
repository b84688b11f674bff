"""Weights from elsewhere: checkpoints, torchvision's encoders, the FastDepth authors' pickled modules."""
import multiprocessing
import os
import re
import subprocess
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.backends.thnn
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import data
import model
from eval import evaluate, mean_depth_baseline
from model import ModelError, build_model, load_encoder, load_model
from test_model import draw_fastdepth, on_meta, season


def complaint(call, file):
    """The message with which a call refuses a file: one line that names it."""
    with pytest.raises(ModelError) as error:
        call(file)
    line = str(error.value)
    assert str(file) in line and "\n" not in line and len(line) < 400
    assert "weights_only" not in line  # torch's advice is to run whatever code the file holds
    return line


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


def checkpoint(name="fastdepth-pruned", weights=None, **changes):
    """As train.py writes it; changes are of its config."""
    config = dict(model=name, options={}, size=(64, 96), geometry="full", max_depth=10.0, frame=(480, 640))
    weights = weights or build_model(name).state_dict()
    return dict(format=2, config=config | changes, weights=weights, history=[])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_gives_back_the_network_and_its_config(tmp_path, dtype):
    options = dict(output="sigmoid", skip="concat")
    network, image = season(build_model("fastdepth-pruned", 80.0, **options)), torch.rand(1, 3, 64, 96)
    weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in network.state_dict().items()}
    saved = checkpoint(weights=weights, options=options, max_depth=80.0, data="rooms:8")
    torch.save(saved, tmp_path / "best.pt")
    model, config = load_model(tmp_path / "best.pt")
    assert config == saved["config"] and not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    tolerance = 0 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(image), network(image), rtol=0, atol=tolerance)


def write(saved):
    return lambda file: torch.save(saved(), file)


@pytest.mark.parametrize("make, said", [
    (lambda file: None, "no such file"),
    (lambda file: file.mkdir(), "is a folder: name the file in it"),
    (lambda file: file.write_text("Depth, in metres\n"), "not a file of weights"),
    (lambda file: file.write_text("epoch,lr,loss\n1,0.05,0.7\n"), "copy it again"),
    (write(lambda: build_model("fastdepth-pruned").state_dict()), "neither a checkpoint.*OrderedDict"),
    (write(lambda: build_model("fastdepth-pruned")), "it names model.DepthNet"),
    (write(lambda: nn.Sequential(nn.Conv2d(3, 4, 1))), "Sequential"),
    (write(lambda: dict(model="fastdepth", weights={})), "format 1.*train it again, or export"),
    (write(lambda: dict(format=2, weights={})), "model.*None"),
    (write(lambda: dict(checkpoint(), weights=dict(a=1))), "no weights"),
    (write(lambda: checkpoint(weights=dict(a=torch.ones(1)))), "Missing key"),
    (write(lambda: checkpoint(model="resnet")), "resnet.*fastdepth"),
    (write(lambda: checkpoint(model=["fastdepth"])), r"model.*\['fastdepth'\]"),
    (write(lambda: checkpoint(options=dict(max_depth=3.0))), "max_depth"),
    (write(lambda: checkpoint(options="skip")), "options.*skip"),
    (write(lambda: checkpoint(size=(64,))), "size.*64"),
    (write(lambda: checkpoint(frame=(0, 640))), r"frame.*\(0, 640\)"),
    (write(lambda: checkpoint(geometry=None)), "geometry.*None"),
    (write(lambda: checkpoint(max_depth="10")), "max_depth.*'10'"),
])
@pytest.mark.filterwarnings("ignore")  # of torch.load, about texts
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(tmp_path, make, said):
    make(tmp_path / "best.pt")
    line = complaint(load_model, tmp_path / "best.pt")
    assert re.search(said, line), line


# ------------------------------------------------------------------------------------------------------------
# torchvision's encoders
# ------------------------------------------------------------------------------------------------------------

IMAGENET = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ENCODERS = {  # our network: torchvision's, the layers whose outputs are wanted, a name that is not used
    "mobilenetv2-nnconv5": (
        "mobilenet_v2", "features.1 features.3 features.6 features.13 features.17", "classifier.1.bias"),
    "densedepth": ("densenet169", "features.relu0 features.pool0 features.transition1 features.transition2 "
                   "features.norm5", "classifier.bias"),
    "fpn": ("resnet101", "relu layer1 layer2 layer3 layer4", "fc.bias"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_torchvisions_weights_gives_torchvisions_features(name, tmp_path):
    theirs, wanted, unused = ENCODERS[name]
    theirs = season(torchvision.models.get_model(theirs, weights=None))
    ours = build_model(name)
    torch.save(theirs.state_dict(), tmp_path / "imagenet.pth")
    assert unused in load_encoder(ours, tmp_path / "imagenet.pth")
    image = torch.rand(2, 3, 64, 96)
    extract = create_feature_extractor(theirs, wanted.split())
    for training in (False, True):
        extract.train(training)
        ours.train(training)
        with torch.no_grad():
            got, expected = ours.encoder(image), extract(IMAGENET(image)).values()
        assert list(ours.encoder.channels) == [x.shape[1] for x in got]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def tampered(part, content):
    """A module as only a damaged or hostile file holds it."""
    module = nn.Sequential()
    vars(module)[part]["x"] = module if content == "itself" else content
    return module


@pytest.mark.parametrize("saved, said", [
    (lambda: torchvision.models.resnet18().state_dict(), "MobileNetV2.*is wanted where the file has"),
    (lambda: torchvision.models.mobilenet_v2().features[:17].state_dict(), "is wanted where .* has nothing"),
    (lambda: torchvision.models.mobilenet_v2().state_dict() | dict(extra=torch.zeros(3)),
     "nothing is wanted where the file has extra"),
    (lambda: [1], "no weights"),
    (lambda: dict(state_dict=[1]), "no weights"),
    (lambda: nn.CrossEntropyLoss(), "no weights"),
    (lambda: tampered("_modules", [1]), "no weights"),
    (lambda: tampered("_modules", "itself"), "recursion"),
    (lambda: tampered("_state_dict_hooks", 5), "not callable"),
    (lambda: checkpoint("mobilenetv2-nnconv5"), "--init"),
])
def test_weights_that_are_not_the_encoders_are_refused_and_change_nothing(saved, said, tmp_path):
    torch.save(saved(), tmp_path / "wrong.pth")
    model = build_model("mobilenetv2-nnconv5")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    line = complaint(lambda file: load_encoder(model, file), tmp_path / "wrong.pth")
    assert re.search(said, line), line
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("damaged", [b"", b"<html>", b"hello"])
def test_a_damaged_file_in_the_cache_of_downloads_is_refused_in_one_line(damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mobilenet_v2-b0353104.pth").write_bytes(damaged)
    with pytest.raises(ModelError, match="^[^\n]*or read[^\n]*--encoder-weights FILE$"):
        load_encoder(on_meta("mobilenetv2-nnconv5"))


@pytest.mark.parametrize("name", [*ENCODERS, "fastdepth"])
def test_pretrained_asks_for_a_hash_and_says_in_one_line_that_there_is_no_network(name, monkeypatch):
    asked = []

    def offline(url, check_hash, weights_only, **options):
        asked.append((url.rpartition("/")[0], check_hash, weights_only))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ModelError, match="^[^\n]*--encoder-weights FILE$"):
        load_encoder(on_meta(name))
    wanted = "https://download.pytorch.org/models", True, True
    assert asked == ([] if name == "fastdepth" else [wanted])  # torchvision has no such file


# ------------------------------------------------------------------------------------------------------------
# FastDepth's published files: modules of classes that only the authors have, pickled whole
# ------------------------------------------------------------------------------------------------------------

FULL = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024), (512, 256, 128, 64, 32)
PRUNED = (16, 56, 88, 120, 144, 256, 408, 376, 272, 288, 296, 328, 480, 512), (200, 256, 120, 56, 16)


def conv(cin, cout, kernel, stride, act, groups=1):
    layer = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(cout), act(inplace=True)]


class Published(nn.Module):
    """Laid out as the authors' networks: conv0 ... conv13, decode_conv1 ... decode_conv6."""

    def __init__(self, encoder, decoder):
        super().__init__()
        concat = type(self).__name__ == "MobileNetSkipConcat"
        self.conv0 = nn.Sequential(*conv(3, encoder[0], 3, 2, nn.ReLU6))
        for i, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), 1):
            cin, cout = encoder[i - 1:i + 1]
            depthwise = conv(cin, cin, 3, stride, nn.ReLU6, groups=cin)
            setattr(self, f"conv{i}", nn.Sequential(*depthwise, *conv(cin, cout, 1, 1, nn.ReLU6)))
        for i, (cin, cout) in enumerate(zip((encoder[-1], *decoder), decoder), 1):
            cin *= 2 if concat and i in (3, 4, 5) else 1
            depthwise = nn.Sequential(*conv(cin, cin, 5, 1, nn.ReLU, groups=cin))
            pointwise = nn.Sequential(*conv(cin, cout, 1, 1, nn.ReLU))
            setattr(self, f"decode_conv{i}", nn.Sequential(depthwise, pointwise))
        self.decode_conv6 = nn.Sequential(*conv(decoder[-1], 1, 1, 1, nn.ReLU))


class Call:
    """Reading it from a file calls a function, and may set the state of what that returns."""

    def __init__(self, call, *args, state=None):
        self.reduced = call, args, state

    def __reduce__(self):
        return self.reduced


class Result:
    """The authors' record of a validation, saved beside the network."""

    def __init__(self):
        self.rmse, self.delta1 = np.float64(0.6), 0.77


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(kind, widths) -> a network of that class, and its file as the authors would write it."""
    def publish(kind, widths, zip_format=True, wrapped=True):
        classes = dict(models=type(kind, (Published,), dict(__module__="models")), metrics=Result)
        monkeypatch.setattr(Result, "__module__", "metrics")
        network = season(classes["models"](*widths))
        for layer in network.modules():
            layer._backend = Call(torch.nn.backends.thnn._get_thnn_function_backend)  # of PyTorch up to 1.2
        with monkeypatch.context() as patch:
            for name, cls in classes.items():
                patch.setitem(sys.modules, name, types.SimpleNamespace(**{cls.__name__: cls}))
            content = dict(epoch=9, best_result=Result(), model=network) if wrapped else network
            torch.save(content, tmp_path / "published.pth", _use_new_zipfile_serialization=zip_format)
        return network, tmp_path / "published.pth"
    return publish


@pytest.mark.parametrize("kind, widths, name, options, zip_format, wrapped", [
    ("MobileNetSkipAdd", FULL, "fastdepth", {}, True, True),
    ("MobileNetSkipAdd", PRUNED, "fastdepth-pruned", {}, True, False),
    ("MobileNetSkipConcat", FULL, "fastdepth", dict(skip="concat"), False, True),
    ("MobileNet", FULL, "fastdepth", dict(skip="none"), False, True),
])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # of a test's class, for the old format
def test_a_published_network_is_read_without_its_code_and_predicts_the_same(
        kind, widths, name, options, zip_format, wrapped, publish):
    network, file = publish(kind, widths, zip_format, wrapped)
    model, config = load_model(file)
    assert (config.pop("model"), config.pop("options")) == (name, options)
    assert config == dict(size=(224, 224), geometry="fastdepth", max_depth=10.0, frame=(480, 640))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = draw_fastdepth(network, image, **options)
        assert expected.unique().numel() > 100
        torch.testing.assert_close(model(image), expected)


def test_a_published_network_of_other_layers_is_refused(publish):
    _, file = publish("MobileNetSkipAdd", (PRUNED[0], FULL[1]))
    assert "is wanted where the file has" in complaint(load_model, file)


def test_the_authors_imagenet_file_fills_the_encoder(tmp_path):
    network = season(Published(*FULL))
    layers = [network.get_submodule(f"conv{i}") for i in range(14)]
    classifier = nn.ModuleDict(dict(model=nn.Sequential(*layers), fc=nn.Linear(1024, 10)))
    state = {f"module.{name}": t for name, t in classifier.state_dict().items()}
    torch.save(dict(epoch=3, state_dict=state), tmp_path / "imagenet.pth.tar")
    ours, image = build_model("fastdepth").eval(), torch.rand(1, 3, 64, 64)
    assert load_encoder(ours, tmp_path / "imagenet.pth.tar") == ["module.fc.weight", "module.fc.bias"]
    with torch.no_grad():
        assert torch.equal(ours.encoder(image)[-1], nn.Sequential(*layers)(image))


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("call", [
    (os.system, "touch pwned"), (subprocess.call, ["touch", "pwned"]), (eval, "open('pwned', 'w')"),
    (getattr, "", "upper"), (torch.load, "x"), (torch.hub.load, "x", "y"),
], ids=lambda call: call[0].__name__)
def test_a_malicious_file_is_refused_by_name_and_not_run(call, zip_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(epoch=1, model=Call(*call)), "evil.pth", _use_new_zipfile_serialization=zip_format)
    for load in (load_model, lambda file: load_encoder(on_meta("mobilenetv2-nnconv5"), file)):
        line = complaint(load, "evil.pth")
        assert call[0].__name__ in line and "nothing was run" in line
    assert not Path("pwned").exists()


def test_a_file_cannot_make_numpy_follow_an_address(tmp_path):
    """The dtype is one of objects that says it holds none: numpy would take the bytes for their address."""
    dtype = Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))
    address = (4096).to_bytes(8, "little")
    torch.save(dict(model=Call(np._core.multiarray.scalar, dtype, address)), tmp_path / "evil.pth")
    reader = multiprocessing.get_context("fork").Process(
        target=complaint, args=(load_model, tmp_path / "evil.pth"))
    reader.start()
    reader.join(60)
    assert reader.exitcode == 0  # refused, and no segmentation fault


def test_no_file_is_loaded_in_a_way_that_runs_its_code():
    calls = []
    for file in Path(model.__file__).parent.glob("*.py"):
        calls += re.findall(r"torch\.(?:load|hub\.load_state_dict_from_url)\([^)]*\)", file.read_text())
    assert len(calls) == 3
    assert all("weights_only=True" in call or "pickle_module=StandInPickle" in call for call in calls), calls
    assert (len(model.StandInUnpickler.ALLOWED), len(model.StandInUnpickler.CLASSES)) == (10, 4)


def test_the_shipped_network_is_small_says_what_it_is_and_knows_a_room():
    file = Path(model.__file__).parent / "weights" / "fastdepth.pt"
    network, config = load_model(file)
    assert file.stat().st_size <= 8 * 2**20 and config["model"] == "fastdepth"
    assert all(config[name] for name in ("data", "command", "date", "score"))
    stored = torch.load(file, weights_only=True)["weights"].values()
    assert all(value.dtype == torch.half for value in stored if value.is_floating_point())
    rooms = data.open_dataset("rooms:64", "val", size=config["size"])
    loader = torch.utils.data.DataLoader(rooms)
    result, _ = evaluate(network, loader, config["max_depth"])
    baseline = mean_depth_baseline(rooms, config["max_depth"])  # of these very rooms
    trivial, _ = evaluate(lambda image: baseline, loader)
    assert result["rmse"] < trivial["rmse"] and result["d1"] > 0.4
