"""Networks against the tables as printed, against drawings of them in plain functions, and against PyTorch's own counter."""
import copy
import functools
import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model as script
from model import MODELS, Depthwise, build_model, count, load_model

every_network = pytest.mark.parametrize("name", MODELS)


def seasoned(name, **options):
    """A network as after training: batch norm far from its start, values beyond 6 inside, some answers below 0."""
    torch.manual_seed(0)
    model = build_model(name, **options)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 1, 4)
            nn.init.normal_(layer.bias)
            layer.momentum = 1.0  # running statistics become those of the last batch
    model(torch.rand(4, 3, 64, 96))
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------
# The tables. size: of the row's output at 224x224, for decode1 to decode5 and the head before the x2
# ------------------------------------------------------------------------------------------------------------------

TABLES = {
    "fastdepth": """
        row       type         in   out  kernel stride size
        stem      conv          3    32     3      2    112
        block1    separable    32    64     3      1    112
        block2    separable    64   128     3      2     56
        block3    separable   128   128     3      1     56
        block4    separable   128   256     3      2     28
        block5    separable   256   256     3      1     28
        block6    separable   256   512     3      2     14
        block7    separable   512   512     3      1     14
        block8    separable   512   512     3      1     14
        block9    separable   512   512     3      1     14
        block10   separable   512   512     3      1     14
        block11   separable   512   512     3      1     14
        block12   separable   512  1024     3      2      7
        block13   separable  1024  1024     3      1      7
        decode1   separable  1024   512     5      1      7
        decode2   separable   512   256     5      1     14
        decode3   separable   256   128     5      1     28
        decode4   separable   128    64     5      1     56
        decode5   separable    64    32     5      1    112
        head      conv         32     1     1      1    112""",
    "fastdepth-pruned": """
        row       type         in   out  kernel stride size
        stem      conv          3    16     3      2    112
        block1    separable    16    56     3      1    112
        block2    separable    56    88     3      2     56
        block3    separable    88   120     3      1     56
        block4    separable   120   144     3      2     28
        block5    separable   144   256     3      1     28
        block6    separable   256   408     3      2     14
        block7    separable   408   376     3      1     14
        block8    separable   376   272     3      1     14
        block9    separable   272   288     3      1     14
        block10   separable   288   296     3      1     14
        block11   separable   296   328     3      1     14
        block12   separable   328   480     3      2      7
        block13   separable   480   512     3      1      7
        decode1   separable   512   200     5      1      7
        decode2   separable   200   256     5      1     14
        decode3   separable   256   120     5      1     28
        decode4   separable   120    56     5      1     56
        decode5   separable    56    16     5      1    112
        head      conv         16     1     1      1    112""",
    "fastdepth-table": """
        row       type         in   out  kernel stride size
        initial   conv          3    32     3      2    112
        block1    separable    32    64     3      2     56
        block2    separable    64   128     3      1     56
        block3    separable   128   128     3      2     28
        block4    separable   128   256     3      1     28
        block5    separable   256   256     3      2     14
        block6    separable   256   512     3      1     14
        block7    separable   512   512     3      1     14
        block8    separable   512   512     3      1     14
        block9    separable   512   512     3      1     14
        block10   separable   512   512     3      1     14
        block11   separable   512   512     3      1     14
        block12   separable   512  1024     3      2      7
        block13   separable  1024  1024     3      1      7
        upconv5   transposed 1024   512     3      2     14
        iconv5    conv       1024   512     3      1     14
        upconv4   transposed  512   256     3      2     28
        iconv4    conv        512   256     3      1     28
        upconv3   transposed  256   128     3      2     56
        iconv3    conv        256   128     3      1     56
        upconv2   transposed  128    64     3      2    112
        iconv2    conv        128    64     3      1    112
        upconv1   transposed   64    32     3      2    224
        iconv1    conv         64    32     3      1    224
        depth     conv         32     1     1      1    224""",
}


def printed(name):
    """{row: its convolutions as (type, in, out, kernel, stride, groups, size)}; a separable row has two."""
    rows = {}
    for line in TABLES[name].splitlines()[2:]:
        row, kind, *numbers = line.split()
        cin, cout, kernel, stride, size = map(int, numbers)
        rows[row] = [(kind, cin, cout, kernel, stride, 1, size)] if kind != "separable" else \
            [("conv", cin, cin, kernel, stride, cin, size), ("conv", cin, cout, 1, 1, 1, size)]
    return rows


@functools.cache
def built(name):
    """The convolutions in the order in which they run on a 224x224 picture, written as above."""
    with torch.device("meta"):  # shapes without numbers
        model, found = build_model(name).eval(), []

        def note(conv, args, out):
            kind = "transposed" if isinstance(conv, nn.ConvTranspose2d) else "conv"
            found.append((kind, args[0].shape[1], out.shape[1], conv.weight.shape[-1], conv.stride[0], conv.groups, out.shape[-1]))

        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return found


@pytest.mark.parametrize("name, row", [(name, row) for name in TABLES for row in printed(name)])
def test_every_row_is_built_as_printed(name, row):
    rows = printed(name)
    before = sum(len(rows[other]) for other in list(rows)[:list(rows).index(row)])
    assert built(name)[before:before + len(rows[row])] == rows[row]


@pytest.mark.parametrize("name", TABLES)
def test_nothing_is_built_that_is_not_printed(name):
    assert len(built(name)) == sum(map(len, printed(name).values()))


# ------------------------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------------------------


def sizes(name, **options):
    """(parameters, conv weights, MACs at 224x224 as the papers draw the network).

    The papers put the 1x1 head after the last x2. `count` counts what runs, the head before it: at a quarter of the
    pixels, so that three quarters of the drawn head's multiplications are missing, and are added here.
    """
    n = count(build_model(name, **options), 224, 224)
    head = {"fastdepth": 32, "fastdepth-pruned": 16}.get(name, 0) * 224 * 224
    return n["parameters"], n["conv_weights"], n["macs"] + head * 3 // 4


def test_sizes_are_those_of_the_design():
    assert sizes("fastdepth") == (3_960_930, 3_933_088, 736_658_944)
    assert sizes("fastdepth-pruned") == (1_360_786, 1_343_664, 366_393_384)
    assert sizes("fastdepth-table") == (15_781_601, 15_755_744, 6_246_485_504)


@pytest.mark.parametrize("conv, skip, million_parameters, billion_macs", [
    ("dense", "none", 20.668, 3.781),
    ("depthwise", "none", 3.961, 0.737),
    ("depthwise", "add", 3.961, 0.737),
    ("depthwise", "concat", 4.016, 0.849),
])
def test_ablations_have_the_sizes_of_the_paper(conv, skip, million_parameters, billion_macs):
    parameters, _, macs = sizes("fastdepth", conv=conv, skip=skip)
    assert (round(parameters / 1e6, 3), round(macs / 1e9, 3)) == (million_parameters, billion_macs)


@every_network
def test_counting_agrees_with_pytorch_and_changes_nothing(name):
    model = build_model(name).train()
    before = copy.deepcopy(model.state_dict())
    n = count(model, 96, 160)
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, 3, 96, 160, device="meta"))
    assert 2 * n["macs"] == counter.get_total_flops()  # a multiply-accumulate is two operations
    assert n["conv_weights"] == sum(p.numel() for p in model.parameters() if p.dim() == 4)
    assert model.training and all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


# ------------------------------------------------------------------------------------------------------------------
# The same networks as the papers draw them, in plain functions
# ------------------------------------------------------------------------------------------------------------------


def plain_layers(model):
    """layer(x, stride, act, up) applies the model's next convolution and batch norm, in the order of its weights."""
    groups = []
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.dim() == 4:
            groups.append([])
        if tensor.dim() > 0:  # not num_batches_tracked
            groups[-1].append(tensor)
    groups = iter(groups)

    def layer(x, stride=1, act=F.relu, up=False):
        weight, *norm = next(groups)
        if up:
            x = F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1)
        else:
            x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])
        if len(norm) == 1:
            return x + norm[0].view(-1, 1, 1)
        scale, offset, mean, variance = norm
        return act(F.batch_norm(x, mean, variance, scale, offset, model.training, momentum=1.0))

    return layer


def double(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


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
    """The 21 rows, ReLU throughout, with the last two skips enlarged to their place."""
    layer = plain_layers(model)
    x, block = layer(image, 2), []
    initial = x
    for stride in (2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1):
        x = layer(layer(x, stride), 1)
        block.append(x)
    for other in (block[10], block[3], block[1], double(block[0]), double(initial)):
        x = layer(torch.cat([layer(x, up=True), other], 1))
    return layer(x)


@pytest.mark.parametrize("name, options", [
    ("fastdepth", {}), ("fastdepth-pruned", {}), ("fastdepth", dict(skip="none")), ("fastdepth", dict(skip="concat")),
    ("fastdepth", dict(skip="none", conv="dense"))])
@torch.no_grad()
def test_fastdepth_gives_bitwise_what_the_paper_draws_though_its_head_comes_before_the_last_x2(name, options):
    model, image = seasoned(name, **options), torch.rand(2, 3, 64, 96)
    answer = model(image)
    assert answer.unique().numel() > 100  # not all cut to 0
    assert torch.equal(answer, draw_fastdepth(model, image, **options))


@torch.no_grad()
def test_the_layer_table_gives_what_its_rows_say():
    model, image = seasoned("fastdepth-table"), torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(model(image), draw_layer_table(model, image))


@pytest.mark.parametrize("name, draw", [("fastdepth-pruned", draw_fastdepth), ("fastdepth-table", draw_layer_table)])
def test_training_has_the_gradients_and_batch_statistics_of_the_drawing(name, draw):
    ours = seasoned(name).double().train()
    theirs, image = copy.deepcopy(ours), torch.rand(2, 3, 64, 96, dtype=torch.float64)
    answers = ours(image), draw(theirs, image)
    torch.testing.assert_close(*answers)
    slope = torch.randn_like(answers[0])
    for answer in answers:
        answer.backward(slope)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm(), key
    for (key, p), q in zip(ours.named_buffers(), theirs.buffers()):
        if "head" in key and key.endswith("running_var"):  # n/(n-1) of n = 2*32*48 answers here, four times as many there
            n = 2 * 32 * 48
            p, q = p * (n - 1) / n, q * (4 * n - 1) / (4 * n)
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(p, q, msg=key)


# ------------------------------------------------------------------------------------------------------------------
# What goes in and what comes out
# ------------------------------------------------------------------------------------------------------------------


@every_network
@torch.no_grad()
def test_shapes_are_those_that_encoder_and_output_stride_state(name):
    model, image = build_model(name).eval(), torch.rand(2, 3, 64, 96)
    depth, s = model(image), model.output_stride
    assert s in (1, 2, 4) and depth.shape == (2, 1, 64 // s, 96 // s) and depth.dtype == torch.float32
    maps = model.encoder(image)
    assert [m.shape[1] for m in maps] == list(model.encoder.channels)
    assert sorted({(m.shape[2], m.shape[3]) for m in maps}) == [(64 // k, 96 // k) for k in (32, 16, 8, 4, 2)]


@every_network
@pytest.mark.parametrize("height, width", [(48, 64), (64, 100), (1, 1)])
def test_a_size_that_is_no_multiple_of_32_is_refused_with_the_numbers(name, height, width):
    with torch.device("meta"), pytest.raises(ValueError, match=f"32.*{height}x{width}"):
        build_model(name)(torch.empty(1, 3, height, width))


@pytest.mark.parametrize("name, options, said", [
    ("resnet", {}, "resnet.*fastdepth-pruned"),
    ("fastdepth", dict(output="tanh"), "tanh.*sigmoid"),
    ("fastdepth", dict(skip="maybe"), "maybe"),
    ("fastdepth", dict(conv="sparse"), "sparse"),
    ("fastdepth", dict(colour=1), "colour"),
    ("fastdepth-table", dict(skip="none"), "skip"),
    ("fastdepth", dict(widths=(512, 200, 100, 50, 25)), "widths"),
])
def test_an_unknown_network_or_option_is_refused_by_name(name, options, said):
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        build_model(name, **options)


@pytest.mark.parametrize("name", TABLES)
@torch.no_grad()
def test_outputs_are_three_readings_of_one_number(name):
    model, image, max_depth = seasoned(name, output="linear"), torch.rand(2, 3, 64, 96), 80.0
    y = model(image)
    assert y.min() < 0 < y.max()

    def read(**options):
        other = build_model(name, max_depth=max_depth, **options).eval()
        other.load_state_dict(model.state_dict())
        return other(image)

    bounded = read(output="sigmoid")
    torch.testing.assert_close(read(), y if name == "fastdepth-table" else y.clamp(min=0))  # the network's own
    torch.testing.assert_close(read(output="relu"), y.clamp(min=0))
    torch.testing.assert_close(bounded, max_depth / (1 + torch.exp(-y)))
    assert 0 <= bounded.min() and bounded.max() <= max_depth


@pytest.mark.parametrize("name, options", [(name, {}) for name in MODELS] + [
    ("fastdepth", dict(output="sigmoid", max_depth=max_depth)) for max_depth in (10, 80)])
@pytest.mark.parametrize("seed", range(3))
def test_a_fresh_network_answers_metres_and_every_weight_can_learn(name, options, seed):
    torch.manual_seed(seed)
    model, image = build_model(name, **options), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert 1.5 < model.eval()(image).median() < 6
    answer = model.train()(image)
    answer.backward(torch.randn_like(answer))
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


# ------------------------------------------------------------------------------------------------------------------
# The depthwise convolution's own gradient
# ------------------------------------------------------------------------------------------------------------------


def depthwise_and_plain(kernel, stride, dtype, layout):
    """Output, gradient of the input and gradient of the weights: of Depthwise, which may be under autocast, and of PyTorch."""
    torch.manual_seed(0)
    layer = Depthwise(6, kernel, stride).to(dtype)
    x = torch.randn(2, 6, 14, 10, dtype=dtype).to(memory_format=layout).requires_grad_()
    y = layer(x)
    slope = torch.randn(y.shape, dtype=dtype)
    with torch.autocast("cpu", enabled=False):
        z = F.conv2d(x, layer.weight, None, stride, kernel // 2, groups=6)
    return [y, *torch.autograd.grad(y, (x, layer.weight), slope.to(y.dtype))], [z, *torch.autograd.grad(z, (x, layer.weight), slope)]


every_depthwise = pytest.mark.parametrize(
    "kernel, stride, layout", [*itertools.product((3, 5), (1, 2), (torch.contiguous_format, torch.channels_last))], ids=str)


@every_depthwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_depthwise_has_the_gradient_of_a_plain_convolution(kernel, stride, dtype, layout):
    for ours, theirs in zip(*depthwise_and_plain(kernel, stride, dtype, layout)):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@every_depthwise
def test_depthwise_under_autocast_differs_by_the_rounding_of_bfloat16(kernel, stride, layout):
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = depthwise_and_plain(kernel, stride, torch.float32, layout)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32]  # gradients in the kind of what they are of
    for a, b in zip(ours, theirs):
        assert 0 < (a - b).norm() < 0.01 * b.norm()  # 8 bits: 2^-9 = 0.002 a rounding


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------------


def checkpoint(name, max_depth=10.0, **options):
    """As train.py writes it."""
    weights = seasoned(name, max_depth=max_depth, **options).state_dict()
    return dict(model=name, options=options, size=(64, 96), geometry="full", max_depth=max_depth, weights=weights, history=[])


def test_a_checkpoint_gives_back_the_network_and_its_facts(tmp_path):
    saved, image = checkpoint("fastdepth-pruned", 80.0, output="sigmoid", skip="concat"), torch.rand(1, 3, 64, 96)
    torch.save(saved, tmp_path / "best.pt")
    model, facts = load_model(tmp_path / "best.pt")
    assert facts == {key: saved[key] for key in ("model", "options", "size", "geometry", "max_depth")}
    original = build_model("fastdepth-pruned", 80.0, output="sigmoid", skip="concat").eval()
    original.load_state_dict(saved["weights"])
    assert not model.training and torch.equal(model(image), original(image))


def written(saved):
    return lambda file: torch.save(saved(), file)


def cut_off(file, rest):
    torch.save(checkpoint("fastdepth-pruned"), file)
    file.write_bytes(file.read_bytes()[:rest])


WRONG = {
    "missing": lambda file: None,
    "empty": lambda file: file.write_bytes(b""),
    "cut off early": lambda file: cut_off(file, 1000),
    "cut off late": lambda file: cut_off(file, -1),
    "a list": written(lambda: [1]),
    "a tensor": written(lambda: torch.ones(3)),
    "weights without facts": written(lambda: build_model("fastdepth-pruned").state_dict()),
    "a pickled module": written(lambda: build_model("fastdepth-pruned")),
    "of another network": written(lambda: dict(checkpoint("fastdepth-pruned"), model="fastdepth")),
    "of an unknown network": written(lambda: dict(checkpoint("fastdepth-pruned"), model="resnet")),
    "with an unknown option": written(lambda: dict(checkpoint("fastdepth-pruned"), options=dict(colour=1))),
    "a text": lambda file: file.write_text("Depth, in metres\n"),
    "a log": lambda file: file.write_text("epoch,lr,loss\n1,0.05,0.7\n"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.filterwarnings("ignore")  # of torch.load, about texts
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(tmp_path, what):
    file = tmp_path / "best.pt"
    WRONG[what](file)
    with pytest.raises(ValueError) as error:
        load_model(file)
    line = str(error.value)
    assert str(file) in line and "\n" not in line
    assert "weights_only" not in line  # torch's advice is to run whatever code the file holds


# ------------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, said", [
    ([], [f"{name} " for name in MODELS] + ["3,960,930", "1,343,664", "15,755,744"]),
    (["fastdepth-table"], ["15,781,601", "6,246,485,504", "512 x 14 x 14", "1 x 224 x 224"]),
], ids=["all networks", "one network"])
def test_model_py_runs_alone_in_an_empty_folder(tmp_path, arguments, said):
    shutil.copy(script.__file__, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "model.py", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(text in done.stdout for text in said)


def test_an_unknown_name_is_the_users_mistake(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", "resnet"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "resnet" in capsys.readouterr().err
