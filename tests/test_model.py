"""Networks against the published tables, the papers drawn in plain functions, and PyTorch's own counter."""
import ast
import copy
import functools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model as script
from model import MODELS, FastDepthwise, ModelError, build_model, count, fold_batch_norm

FOLDER = Path(script.__file__).parent


def season(model):
    """Numbers as after training: batch norm far from its start, so that a misplaced value shows."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 3 if layer.num_features == 1 else 0, 0.3)  # a head predicts 3 m
    return model.eval()


@functools.cache
def on_meta(name):
    """A network without numbers: built in no time, shared by the tests that only look."""
    with torch.device("meta"):
        return build_model(name).eval()


# ------------------------------------------------------------------------------------------------------------
# Tables and sizes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table, name", [
    ("MOBILENET", "fastdepth"), ("MOBILENET_V2", "mobilenetv2-nnconv5"),
    ("DENSENET169", "densedepth"), ("RESNET101", "fpn"),
    ("LAYER_TABLE_ENCODER", "fastdepth-table"), ("LAYER_TABLE_DECODER", "fastdepth-table")])
def test_the_output_sizes_in_the_comments_of_the_tables_are_those_that_run(table, name):
    text = (FOLDER / "model.py").read_text().split(f"\n{table} = (\n")[1].split("\n)\n")[0]
    stated = re.findall(r'"(\w+)",.*# +(\d+) x +(\d+)', text)
    assert [row for row, _, _ in stated] == [row for row, *_ in getattr(script, table)]
    model = copy.deepcopy(on_meta(name))
    rows = (model.decoder if table == "LAYER_TABLE_DECODER" else model.encoder).layers
    found = []

    def note(row, layer, inputs, output):
        found.append((row, *[str(n) for n in output.shape[2:]]))

    for row, _, _ in stated:
        rows[row].register_forward_hook(functools.partial(note, row))
    model(torch.empty(1, 3, *MODELS[name]["size"], device="meta"))
    assert found == stated


@pytest.mark.parametrize("conv, skip, million_parameters, billion_macs", [
    ("dense", "none", 20.668, 3.781),
    ("depthwise", "none", 3.961, 0.737),
    ("depthwise", "add", 3.961, 0.737),
    ("depthwise", "concat", 4.016, 0.849),
])
def test_ablations_have_the_sizes_of_the_paper(conv, skip, million_parameters, billion_macs):
    """The papers put the head after the last x2. `count` counts what runs: a quarter of the drawn head."""
    with torch.device("meta"):
        model = build_model("fastdepth", conv=conv, skip=skip)
    n = count(model)
    macs = n["macs"] + 3 / 4 * model.decoder.head.conv.in_channels * 224 * 224
    assert (round(n["parameters"] / 1e6, 3), round(macs / 1e9, 3)) == (million_parameters, billion_macs)


def test_counting_agrees_with_pytorch_and_changes_nothing():
    model = build_model("fastdepth-table").train()
    before = copy.deepcopy(model.state_dict())
    n = count(model, 96, 160)
    with FlopCounterMode(display=False) as counter:
        on_meta("fastdepth-table")(torch.empty(1, 3, 96, 160, device="meta"))
    assert 2 * n["macs"] == counter.get_total_flops()  # a multiply-accumulate is two operations
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------
# The same networks as the papers draw them, in plain functions
# ------------------------------------------------------------------------------------------------------------


def plain_layers(model):
    """layer(x, stride, act, up) applies the model's next convolution and batch norm, in their order."""
    kinds = nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d
    ahead = [module for module in model.modules() if isinstance(module, kinds)]

    def layer(x, stride=1, act=F.relu, up=False):
        conv = ahead.pop(0)
        weight, bias = conv.weight, conv.bias
        if up:
            x = F.conv_transpose2d(x, weight, None, stride=2, padding=1, output_padding=1)
        else:
            x = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])
        if ahead and isinstance(ahead[0], nn.BatchNorm2d):
            bn = ahead.pop(0)
            statistics = bn.running_mean, bn.running_var
            x = F.batch_norm(x, *statistics, bn.weight, bn.bias, bn.training, momentum=1.0)
        return act(x) if act else x

    return layer


def double(x, mode="nearest"):
    return F.interpolate(x, scale_factor=2, mode=mode)


def draw_fastdepth(model, image, skip="add", conv="depthwise"):
    """Wofk et al. 2019, with the head after the last x2."""
    layer = plain_layers(model)
    x, block = layer(image, 2, F.relu6), [None]
    for stride in (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1):
        x = layer(layer(x, stride, F.relu6), 1, F.relu6)
        block.append(x)
    for other in (None, block[5], block[3], block[1], None):
        x = double(layer(x) if conv == "dense" else layer(layer(x)))
        if other is not None and skip != "none":
            x = x + other if skip == "add" else torch.cat([x, other], 1)
    return layer(x)


def draw_layer_table(model, image):
    """The 21 rows, ReLU throughout, with the last two skips upsampled."""
    layer = plain_layers(model)
    initial = x = layer(image, 2)
    block = []
    for stride in (2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1):
        x = layer(layer(x, stride), 1)
        block.append(x)
    for other in (block[10], block[3], block[1], double(block[0]), double(initial)):
        x = layer(torch.cat([layer(x, up=True), other], 1))
    return layer(x, act=None)


def draw_densedepth(decoder, features):
    """Alhashim and Wonka 2018, before the head's last function."""
    x2, x4, x8, x16, x = features
    layer = plain_layers(decoder)
    x = layer(x.clamp(min=0), act=None)
    for skip in (x16, x8, x4, x2):
        x = torch.cat([double(x, "bilinear"), skip], 1)
        for _ in range(2):
            x = layer(x, act=lambda y: torch.where(y > 0, y, 0.2 * y))
    return layer(x, act=None)


def draw_fpn(decoder, features):
    """A feature pyramid whose sums are smoothed before they go on, and a head of two convolutions."""
    _, c2, c3, c4, c5 = features
    parameters = list(decoder.parameters())

    def conv(i, x):
        weight, bias = parameters[2 * i:2 * i + 2]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    p4 = conv(6, conv(2, c4) + double(conv(3, c5), "bilinear"))
    p3 = conv(5, conv(1, c3) + double(p4, "bilinear"))
    p2 = conv(4, conv(0, c2) + double(p3, "bilinear"))
    return conv(8, conv(7, p2).clamp(min=0))


@pytest.mark.parametrize("options", [dict(), dict(skip="none"), dict(skip="concat"), dict(conv="dense")])
@torch.no_grad()
def test_fastdepth_gives_bitwise_what_the_paper_draws_though_its_head_comes_before_the_last_x2(options):
    model, image = season(build_model("fastdepth-pruned", **options)), torch.rand(2, 3, 64, 96)
    depth = model(image)
    assert depth.unique().numel() > 100  # not all cut off at 0
    assert torch.equal(depth, draw_fastdepth(model, image, **options))


@pytest.mark.parametrize("kind, channels, draw", [
    (script.DenseDepthDecoder, (4, 6, 8, 10, 32), draw_densedepth),
    (functools.partial(script.FeaturePyramid, width=8), (3, 4, 5, 6, 7), draw_fpn),
])
@torch.no_grad()
def test_the_larger_decoders_give_what_their_papers_draw(kind, channels, draw):
    decoder = kind(channels, output="linear")
    features = [torch.randn(1, c, 32 // 2**i, 48 // 2**i) for i, c in enumerate(channels)]
    torch.testing.assert_close(decoder(features), draw(decoder, features))


@pytest.mark.parametrize("name, draw", [
    ("fastdepth-pruned", draw_fastdepth), ("fastdepth-table", draw_layer_table)])
def test_training_has_the_gradients_and_batch_statistics_of_the_drawing(name, draw):
    ours = season(build_model(name)).double().train()
    for layer in ours.modules():
        layer.momentum = 1.0  # of batch norm: the running statistics become those of this batch
    theirs, image = copy.deepcopy(ours), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    depths = ours(image), draw(theirs, image)
    torch.testing.assert_close(*depths)
    slope = torch.randn_like(depths[0])
    for depth in depths:
        depth.backward(slope)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm(), key
    for (key, p), q in zip(ours.named_buffers(), theirs.buffers()):
        if key == "decoder.head.bn.running_var":  # n/(n-1) of n values here, of four times as many there
            n = 2 * 32 * 32
            p, q = p * (n - 1) / n, q * (4 * n - 1) / (4 * n)
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(p, q, msg=key)


# ------------------------------------------------------------------------------------------------------------
# What goes in and what comes out
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastdepth-pruned", "mobilenetv2-nnconv5", "densedepth", "fpn"])
def test_any_encoder_goes_with_any_decoder_of_five_feature_maps(name):
    nnconv5 = functools.partial(script.NNConv5, skip="concat")
    with torch.device("meta"):
        encoder = on_meta(name).encoder
        features = encoder(torch.empty(2, 3, 64, 96))
        for decoder, stride in (nnconv5, 1), (script.DenseDepthDecoder, 2), (script.FeaturePyramid, 4):
            network = script.DepthNet(encoder, decoder(encoder.channels))
            assert network.output_stride == stride
            assert network.decoder(features).shape == (2, 1, 64 // stride, 96 // stride)


@pytest.mark.parametrize("height, width", [(48, 64), (64, 100), (1, 1)])
def test_a_size_that_is_no_multiple_of_32_is_refused_with_the_numbers(height, width):
    with pytest.raises(ModelError, match=f"32.*{height}x{width}"):
        on_meta("fastdepth")(torch.empty(1, 3, height, width, device="meta"))


@pytest.mark.parametrize("name, options, said", [
    ("resnet", {}, "resnet.*fastdepth-pruned"),
    ("fastdepth", dict(output="tanh"), "tanh.*sigmoid"),
    ("fastdepth", dict(colour=1), "colour.*conv, skip, output"),
    ("fastdepth-table", dict(skip="none"), "fastdepth-table.*skip.*only output"),
    ("fastdepth", dict(max_depth=0), "max_depth.*0"),
    ("fastdepth", dict(max_depth=float("inf")), "max_depth.*inf"),
    ("fastdepth", dict(max_depth=float("nan")), "max_depth.*nan"),
])
def test_an_unknown_network_or_option_is_refused_by_name(name, options, said):
    with torch.device("meta"), pytest.raises(ModelError, match=said):
        build_model(name, **options)


@pytest.mark.parametrize("name, own", [
    ("fastdepth", "relu"), ("fastdepth-table", "linear"), ("densedepth", "reciprocal"), ("fpn", "relu")])
def test_the_output_of_a_network_is_its_own_or_the_one_that_is_asked_for(name, own):
    for options, output in ({}, own), (dict(output="sigmoid"), "sigmoid"):
        with torch.device("meta"):
            layers = build_model(name, 80.0, **options).modules()
        head, = [layer for layer in layers if isinstance(layer, script.DepthHead)]
        assert (head.output, head.max_depth) == (output, 80.0)


@pytest.mark.parametrize("output, metres", [
    ("relu", lambda y, max_depth: y.clamp(min=0)),
    ("linear", lambda y, max_depth: y),
    ("sigmoid", lambda y, max_depth: max_depth / (1 + torch.exp(-y))),
    ("reciprocal", lambda y, max_depth: max_depth / (1 + F.softplus(y))),
])
@pytest.mark.parametrize("max_depth, start", [(10.0, 3.0), (80.0, 3.0), (4.0, 2.0), (3000.0, 3.0)])
@pytest.mark.parametrize("batch_norm", [False, True])
@torch.no_grad()
def test_a_head_means_metres_and_starts_at_3_or_the_middle_of_a_shorter_range(
        output, metres, max_depth, start, batch_norm):
    head = script.DepthHead(1, 1, output, max_depth, batch_norm).eval()
    assert head(torch.zeros(1, 1, 1, 1)).item() == pytest.approx(start, rel=1e-4)
    x = torch.linspace(-9, 9, 7).view(1, 1, 1, 7)
    torch.testing.assert_close(head(x), metres(head.bn(head.conv(x)), max_depth))


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_network_predicts_metres_and_every_weight_can_learn(name):
    model, image = build_model(name), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert 1.5 < model.eval()(image).median() < 6
    depth = model.train()(image)
    depth.backward(torch.randn_like(depth))
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


# ------------------------------------------------------------------------------------------------------------
# What is done with a network: folding, tracing, exporting, differentiating
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastdepth-pruned", "fastdepth-table", "mobilenetv2-nnconv5", "fpn"])
@torch.no_grad()
def test_folding_keeps_the_numbers_and_leaves_no_batch_norm(name):
    model, image = season(build_model(name)), torch.rand(2, 3, 64, 64)
    keys = list(model.state_dict())
    folded = fold_batch_norm(model.train())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules()) and not folded.training
    weights = [p for p in folded.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert list(model.state_dict()) == keys and model.training  # the original stays as it is
    expected = model.eval()(image)
    torch.testing.assert_close(folded(image), expected, rtol=1e-3, atol=1e-3 * expected.max().item())


@pytest.mark.filterwarnings("ignore")  # of tracing, about the check of the size
def test_a_built_network_can_be_traced_exported_and_differentiated_by_torch_func():
    model = season(build_model("fastdepth-pruned")).double()
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = model(image)
    assert torch.equal(torch.jit.trace(model, image)(image), expected)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)
    weights = dict(model.named_parameters())

    def total(weights, image):
        return torch.func.functional_call(model, weights, image[None]).sum()

    images = torch.cat([image, image.flip(-1)])
    slopes = torch.func.vmap(torch.func.grad(total), (None, 0))(weights, images)  # a gradient per image
    expected.sum().backward()
    for key, p in weights.items():
        assert (slopes[key][0] - p.grad).norm() <= 1e-9 * p.grad.norm(), key


STRIDES = [  # size of the image, stride; at 1x1 and stride 2, PyTorch's own bfloat16 gradient errs
    ((14, 10), 1), ((14, 10), 2), ((7, 5), 1), ((7, 5), 2), ((7, 5), (2, 1)), ((2, 2), 2), ((1, 1), 1)]
OTHERS = [  # changes to the default of `depthwise`
    dict(groups=1), dict(groups=2), dict(out_channels=12), dict(bias=True), dict(dilation=2), dict(padding=0),
    dict(kernel_size=(3, 5), padding=(1, 2)), dict(kernel_size=7, padding=3),
    dict(padding_mode="reflect"), dict(padding="same")]


def depthwise(**options):
    default = dict(in_channels=6, out_channels=6, kernel_size=3, padding=1, groups=6, bias=False)
    return nn.Conv2d(**default | options)


def gradients(layer, x, slope, amp=False):
    """The output of a layer, the gradient of its input and that of its weight."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = layer(x)
    return y, *torch.autograd.grad(y, (x, layer.weight), slope.to(y.dtype))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size, stride", STRIDES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype, amp, tolerance", [
    (torch.float64, False, 1e-12),
    (torch.float32, False, 1e-6),
    (torch.float32, True, 1e-2),  # bfloat16 has 8 bits: 2^-9 = 0.002 a rounding
], ids=["float64", "float32", "autocast"])
def test_the_fast_gradient_is_a_plain_convolutions(kernel, size, stride, layout, dtype, amp, tolerance):
    plain = depthwise(kernel_size=kernel, padding=kernel // 2, stride=stride).to(dtype)
    x = torch.randn(2, 6, *size, dtype=dtype).to(memory_format=layout)
    slope = torch.randn(plain(x).shape, dtype=dtype).to(memory_format=layout)
    fast = nn.Sequential(copy.deepcopy(plain))
    script.use_fast_depthwise_gradient(fast)
    assert type(fast[0]) is FastDepthwise
    ours, theirs = gradients(fast[0], x, slope, amp), gradients(plain, x, slope)
    assert [t.dtype for t in ours] == [torch.bfloat16 if amp else dtype, dtype, dtype]
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_only_depthwise_convolutions_like_fastdepths_get_the_fast_gradient(options):
    model = nn.Sequential(depthwise(**options))
    script.use_fast_depthwise_gradient(model)
    assert type(model[0]) is nn.Conv2d


def test_a_network_with_the_fast_gradient_keeps_its_keys_copies_pickles_and_folds():
    plain = season(build_model("fastdepth-pruned"))
    fast = copy.deepcopy(plain)
    script.use_fast_depthwise_gradient(fast)
    assert sum(type(layer) is FastDepthwise for layer in fast.modules()) == 13 + 5
    assert list(fast.state_dict()) == list(plain.state_dict())
    image = torch.rand(2, 3, 64, 64)
    expected = plain(image)
    for same in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(same(image), expected)
    torch.testing.assert_close(fold_batch_norm(fast)(image), fold_batch_norm(plain)(image))
    assert fast.to("meta")(image.to("meta")).shape == expected.shape


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_with_the_fast_gradient_compiles_under_autocast(stride):
    block, x = script.separable(4, 4, 5, stride), torch.rand(2, 4, 8, 8)
    script.use_fast_depthwise_gradient(block)
    found = []
    for run in (block, torch.compile(block, backend="aot_eager")):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.sum().backward()
        found.append([p.grad for p in block.parameters()])
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------------------------------
# Alone in a folder
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.py", "loss.py"])
def test_a_file_needs_nothing_but_torch(file):
    tree = ast.parse((FOLDER / file).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


def test_model_py_runs_alone_in_a_folder_and_a_reader_who_closes_the_pipe_sees_no_traceback(tmp_path):
    shutil.copy(FOLDER / "model.py", tmp_path)
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does; what is printed goes out at the end
    command = [sys.executable, "-E", "model.py", "fastdepth"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_the_command_prints_a_network_layer_by_layer_and_refuses_an_unknown_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", "fastdepth-table"])
    script.main()
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("15,781,601", "6.2465", "512 x 14 x 14", "1 x 224 x 224"))
    monkeypatch.setattr(sys, "argv", ["model.py", "resnet"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "resnet" in capsys.readouterr().err
