"""Weights from elsewhere: torchvision's ImageNet encoders, and the modules that FastDepth's authors pickled whole."""
import os
import subprocess
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import model as networks
import train
from data import write_rooms
from eval import load_predictor
from model import MODELS, build_model, count, load_encoder, load_model

ROOT = Path(networks.__file__).parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def season(module):
    """Running statistics as after training, so that a misplaced one shows."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
    return module


# ------------------------------------------------------------------------------------------------------------------
# torchvision's encoders
# ------------------------------------------------------------------------------------------------------------------

IMAGENET = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def stages(steps, x):
    """The outputs of (name, module) steps; copies, because some steps work in place."""
    found = {}
    for name, step in steps:
        x = step(x)
        found[name] = x.clone()
    return found


def mobilenet_v2_maps(net, x):
    found = stages(list(net.features.named_children())[:18], x)
    return [found[i] for i in ("1", "3", "6", "13", "17")]


def resnet_maps(net, x):
    found = stages(list(net.named_children())[:8], x)
    return [found[i] for i in ("relu", "layer1", "layer2", "layer3", "layer4")]


def densenet_maps(net, x):
    found = stages(net.features.named_children(), x)
    return [found[i] for i in ("relu0", "pool0", "transition1", "transition2", "norm5")]


ENCODERS = [
    ("fastdepth-v2", torchvision.models.mobilenet_v2, mobilenet_v2_maps, "classifier.1.bias"),
    ("densedepth", torchvision.models.densenet169, densenet_maps, "classifier.bias"),
    ("fpn", torchvision.models.resnet101, resnet_maps, "fc.bias"),
]


@pytest.mark.parametrize("name, build, maps, unused", ENCODERS)
def test_an_encoder_with_torchvisions_weights_gives_torchvisions_maps(name, build, maps, unused, tmp_path):
    theirs, ours = season(build(weights=None)), build_model(name)
    torch.save(theirs.state_dict(), tmp_path / "imagenet.pth")
    assert unused in load_encoder(ours, tmp_path / "imagenet.pth")
    image = torch.rand(2, 3, 64, 96)
    for training in (False, True):
        theirs.train(training), ours.train(training)
        with torch.no_grad():
            got, expected = ours.encoder(image), maps(theirs, IMAGENET(image))
        assert [m.shape for m in got] == [m.shape for m in expected] and list(ours.encoder.channels) == [m.shape[1] for m in got]
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_weights_of_another_encoder_or_a_tensor_too_many_or_too_few_are_refused(tmp_path):
    state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    short = {name: t for name, t in state.items() if name != "features.17.conv.3.running_var"}
    for wrong in (torchvision.models.resnet18(weights=None).state_dict(), short, dict(state, extra=torch.zeros(3)), {}):
        torch.save(wrong, tmp_path / "wrong.pth")
        model = build_model("fastdepth-v2")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match="wrong.pth.*MobileNetV2") as caught:
            load_encoder(model, tmp_path / "wrong.pth")
        assert "\n" not in str(caught.value)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_pretrained_asks_for_a_hash_and_fails_with_one_line_without_network(monkeypatch):
    def offline(url, **options):
        assert options["check_hash"] and url.startswith("https://download.pytorch.org/models/")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for name in ("fastdepth-v2", "densedepth", "fpn", "fastdepth"):
        with pytest.raises(ValueError, match="--encoder-weights") as caught:
            load_encoder(build_model(name))
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------
# The networks around them
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, height, width, parameters, conv_weights, macs", [
    ("fastdepth-v2", 224, 224, 1_860_474, 1_827_576, 0.2957e9),
    ("densedepth", 480, 640, 42_657_689, 42_494_504, 122.677e9),
    ("fpn", 480, 640, 45_402_561, 45_295_360, 67.816e9),
])
def test_the_larger_networks_have_the_known_sizes(name, height, width, parameters, conv_weights, macs):
    n = count(build_model(name), height, width)
    assert (n["parameters"], n["conv_weights"]) == (parameters, conv_weights)
    head = 3 / 4 * 16 * 224 * 224 if name == "fastdepth-v2" else 0  # its 1x1 head stands before the last x2
    assert n["macs"] + head == pytest.approx(macs, rel=2e-4)


@pytest.mark.parametrize("encoder", ["fastdepth-pruned", "fastdepth-v2", "densedepth", "fpn"])
@pytest.mark.parametrize("decoder", [networks.NNConv5, networks.DenseDepthDecoder, networks.FeaturePyramid])
def test_any_encoder_goes_with_any_decoder_of_five_maps(encoder, decoder):
    parts = MODELS[encoder]["encoder"]()
    network = networks.DepthNet(parts, decoder(parts.channels, networks.Metres("relu", 10.0)))
    depth = network.eval()(torch.rand(1, 3, 64, 96))
    assert depth.shape == (1, 1, 64 // network.output_stride, 96 // network.output_stride)


def test_densedepth_answers_metres_though_it_learns_their_reciprocal():
    y = torch.tensor([-60.0, 0, 60]).view(1, 1, 1, 3)
    assert torch.allclose(networks.Metres("reciprocal", 80.0)(y).flatten(), torch.tensor([80, 80 / (1 + np.log(2)), 80 / 61]).float())
    depth = build_model("densedepth", max_depth=80.0).eval()(torch.rand(1, 3, 64, 64))
    assert 0.5 < depth.min() and depth.max() < 20  # starts near 3 m, whatever the range


# ------------------------------------------------------------------------------------------------------------------
# FastDepth's published files: modules of classes that only the authors have, pickled whole
# ------------------------------------------------------------------------------------------------------------------

FULL = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024), (512, 256, 128, 64, 32)
PRUNED = (16, 56, 88, 120, 144, 256, 408, 376, 272, 288, 296, 328, 480, 512), (200, 256, 120, 56, 16)


def conv(cin, cout, kernel, stride, act, groups=1):
    return [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout), act(inplace=True)]


class Published(nn.Module):
    """Laid out as the authors' networks: conv0 ... conv13, decode_conv1 ... decode_conv6."""
    join = staticmethod(lambda x, skip: x)

    def __init__(self, encoder, decoder):
        super().__init__()
        self.conv0, extra = nn.Sequential(*conv(3, encoder[0], 3, 2, nn.ReLU6)), 2 if "Concat" in type(self).__name__ else 1
        for i, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), 1):
            cin, cout = encoder[i - 1:i + 1]
            setattr(self, f"conv{i}", nn.Sequential(*conv(cin, cin, 3, stride, nn.ReLU6, cin), *conv(cin, cout, 1, 1, nn.ReLU6)))
        for i, cin in enumerate((encoder[-1], *decoder), 1):
            cin *= extra if i in (3, 4, 5) else 1
            depthwise, pointwise = conv(cin, cin, 5, 1, nn.ReLU, cin), conv(cin, ([*decoder, 1])[i - 1], 1, 1, nn.ReLU)
            setattr(self, f"decode_conv{i}", nn.Sequential(nn.Sequential(*depthwise), nn.Sequential(*pointwise)) if i < 6 else nn.Sequential(*pointwise))

    def forward(self, x):
        maps = []
        for i in range(14):
            maps.append(x := getattr(self, f"conv{i}")(x))
        for i in range(1, 6):
            x = F.interpolate(getattr(self, f"decode_conv{i}")(x), scale_factor=2)
            x = self.join(x, maps[{2: 5, 3: 3, 4: 1}[i]]) if i in (2, 3, 4) else x
        return self.decode_conv6(x)


class MobileNetSkipAdd(Published):
    join = staticmethod(lambda x, skip: x + skip)


class MobileNetSkipConcat(Published):
    join = staticmethod(lambda x, skip: torch.cat([x, skip], 1))


class MobileNet(Published):
    pass


class Result:
    """The authors' record of a validation, saved beside the network."""

    def __init__(self):
        self.rmse, self.delta1 = np.float64(0.6), 0.77


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(network) pickles it as the authors did, and takes the classes away again."""
    def publish(network, zip_format, wrapped):
        for cls, name in ((type(network), "models"), (Result, "metrics")):
            monkeypatch.setattr(cls, "__module__", name)
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{cls.__name__: cls}))
        content = dict(epoch=9, best_result=Result(), model=network) if wrapped else network
        with pytest.warns() if not zip_format else monkeypatch.context():  # torch cannot store the source of a test's class
            torch.save(content, tmp_path / "published.pth.tar", _use_new_zipfile_serialization=zip_format)
        for name in ("models", "metrics"):
            monkeypatch.delitem(sys.modules, name)
        return tmp_path / "published.pth.tar"
    return publish


@pytest.mark.parametrize("kind, widths, name, options", [
    (MobileNetSkipAdd, FULL, "fastdepth", {}),
    (MobileNetSkipAdd, PRUNED, "fastdepth-pruned", {}),
    (MobileNetSkipConcat, FULL, "fastdepth", dict(skip="concat")),
    (MobileNet, FULL, "fastdepth", dict(skip="none")),
])
@pytest.mark.parametrize("zip_format, wrapped", [(True, True), (False, True), (True, False), (False, False)])
def test_a_published_network_is_read_without_its_code_and_answers_the_same(kind, widths, name, options, zip_format, wrapped, publish):
    network, image = season(kind(*widths)).eval(), torch.rand(1, 3, 64, 96)
    predict, facts = load_predictor(publish(network, zip_format, wrapped))
    assert (facts["model"], facts["options"]) == (name, options)
    with torch.no_grad():
        torch.testing.assert_close(predict(image), network(image), rtol=1e-4, atol=1e-5)  # batch norm is folded


def test_training_starts_from_a_published_file(publish, tmp_path):
    write_rooms(tmp_path / "rooms", 8)
    file = publish(season(MobileNetSkipAdd(*PRUNED)), True, True)
    train.main(["--model", "fastdepth-pruned", "--init", str(file), "--data", str(tmp_path / "rooms"), "--out", str(tmp_path / "run"),
                "--size", "64", "64", "--batch-size", "4", "--epochs", "1", "--lr", "1e-12", "--device", "cpu", "--amp", "none"])
    before, after = (dict(load_model(f)[0].named_parameters()) for f in (file, tmp_path / "run" / "last.pt"))
    assert all(torch.allclose(t, after[name]) for name, t in before.items())


def test_the_authors_imagenet_file_fills_the_encoder(tmp_path):
    network = season(MobileNetSkipAdd(*FULL)).eval()
    layers = [getattr(network, f"conv{i}") for i in range(14)]
    classifier = nn.ModuleDict(dict(module=nn.ModuleDict(dict(model=nn.Sequential(*layers), fc=nn.Linear(1024, 10)))))
    torch.save(dict(epoch=3, state_dict=classifier.state_dict()), tmp_path / "imagenet.pth.tar")
    ours, image = build_model("fastdepth").eval(), torch.rand(1, 3, 64, 64)
    assert load_encoder(ours, tmp_path / "imagenet.pth.tar") == ["module.fc.weight", "module.fc.bias"]
    with torch.no_grad():
        assert torch.equal(ours.encoder(image)[-1], nn.Sequential(*layers)(image))


class Malicious:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("call", [(os.system, "touch pwned"), (eval, "open('pwned', 'w')"), (exec, "open('pwned', 'w')"),
                                  (subprocess.call, ["touch", "pwned"]), (torch.hub.load, "x", "y"), (getattr, "", "upper")])
def test_a_malicious_file_is_refused_by_name_and_not_run(call, zip_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(epoch=1, model=Malicious(*call)), "evil.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match=f"evil.pth: .*{call[0].__name__}.*nothing was run"):
        load_model("evil.pth")
    assert not Path("pwned").exists()


def test_a_pickled_module_that_is_no_fastdepth_is_refused(tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth.*Sequential"):
        load_model(tmp_path / "other.pth")
