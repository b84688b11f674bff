"""Networks for monocular depth: one RGB picture in, metres per pixel out.

    image (B, 3, H, W) float32 in [0, 1]  ->  depth (B, 1, H/s, W/s) float32 in metres, s = model.output_stride
    H and W are multiples of 32.

A network is an encoder (a picture -> feature maps at 1/2 ... 1/32) and a decoder (those maps -> depth):

    FastDepth   Wofk, Ma, Yang, Karaman, Sze: FastDepth: Fast Monocular Depth Estimation on Embedded Systems, 2019 (arXiv:1903.03273)
    MobileNet   Howard et al.: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, 2017 (arXiv:1704.04861)

The file needs nothing but torch, so it can be copied alone. Read it bottom-up or top-down: blocks, tables, encoder,
decoders, the named networks.

    python model.py                 all networks with their sizes
    python model.py fastdepth       one network, layer by layer
"""
import argparse
import copy
import pickle
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------------------------
# Blocks. A convolution that batch norm follows has no bias: batch norm would subtract it again.
# ------------------------------------------------------------------------------------------------------------------


class Depthwise(nn.Conv2d):
    """A convolution of each channel by itself, with a gradient that a CPU computes fast; elsewhere a plain Conv2d."""

    def __init__(self, channels, kernel, stride):
        super().__init__(channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False)

    def forward(self, x):
        if x.device.type == "cpu" and torch.is_grad_enabled() and self.bias is None:  # export.py folds batch norm into a bias
            return DepthwiseOnCPU.apply(x, self.weight, self.stride, self.padding)
        return super().forward(x)


class DepthwiseOnCPU(torch.autograd.Function):
    """The depthwise convolution, and its gradient in pieces for which PyTorch has fast CPU kernels (oneDNN, channels
    last). Without this, two thirds of a training step of FastDepth in bfloat16 are the weight gradients of five 5x5 layers."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        y = F.conv2d(x, weight, None, stride, padding, groups=len(weight))
        ctx.save_for_backward(x.to(y.dtype), weight)  # autocast may have cast x
        ctx.stride, ctx.padding = stride, padding
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        kernel, channels = weight.shape[-1], len(weight)

        def gradient(x, weight, grad, stride, padding, wanted):  # wanted: of x, weight, bias
            return torch.ops.aten.convolution_backward(grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), channels, wanted)

        # x: in bfloat16 the kernel for stride 2 is slow, the one for float32 is not.
        kind = torch.promote_types(x.dtype, torch.float32) if ctx.stride != (1, 1) else x.dtype
        of_x = gradient(x.to(kind), weight.to(kind), grad.to(kind), ctx.stride, ctx.padding, (True, False, False))[0].to(x.dtype)
        if kernel != 5 or ctx.stride != (1, 1):
            of_weight = gradient(x, weight.to(x.dtype), grad, ctx.stride, ctx.padding, (False, True, False))[1]
            return of_x, of_weight.to(weight.dtype), None, None
        # weight: the kernel for 3x3 is fast, that for 5x5 is not. Each corner 3x3 of a 5x5 gradient is the gradient of
        # a 3x3 convolution over the picture moved to that corner; together the four cover it.
        of_weight, padded, corner = torch.empty_like(weight), F.pad(x, (2, 2, 2, 2)), weight[:, :, :3, :3].to(x.dtype)
        for i in (0, 2):
            for j in (0, 2):
                moved = padded[:, :, i:i + x.shape[2] + 2, j:j + x.shape[3] + 2].contiguous(memory_format=torch.channels_last)
                of_weight[:, :, i:i + 3, j:j + 3] = gradient(moved, corner, grad, (1, 1), (0, 0), (False, True, False))[1]
        return of_x, of_weight, None, None


def conv_bn(cin, cout, kernel, stride=1, act=nn.ReLU):
    """Convolution + batch norm + activation: (B, cin, H, W) -> (B, cout, H/stride, W/stride)."""
    conv = nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(cout), act=act(inplace=True)))


def separable(cin, cout, kernel, stride=1, act=nn.ReLU):
    """Depthwise separable convolution (MobileNet): one kernel x kernel filter a channel, then a 1x1 mix of channels."""
    return nn.Sequential(OrderedDict(
        depthwise=nn.Sequential(OrderedDict(conv=Depthwise(cin, kernel, stride), bn=nn.BatchNorm2d(cin), act=act(inplace=True))),
        pointwise=conv_bn(cin, cout, 1, act=act)))


def x2(x):
    """Nearest-neighbour enlargement: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Metres(nn.Module):
    """The last step of every decoder: an unbounded number y -> metres.

    relu        max(y, 0)                        FastDepth; 0 is a possible answer
    linear      y                                the layer table; may be negative
    sigmoid     max_depth * sigmoid(y)           bounded to (0, max_depth); may replace any of the others
    """
    NAMES = ("relu", "linear", "sigmoid")

    def __init__(self, name, max_depth):
        super().__init__()
        if name not in self.NAMES:
            raise ValueError(f"unknown output {name!r}: choose one of {', '.join(self.NAMES)}")
        self.name, self.max_depth = name, max_depth

    def forward(self, y):
        if self.name == "sigmoid":
            return self.max_depth * torch.sigmoid(y)
        return F.relu(y) if self.name == "relu" else y

    def start(self, depth=3.0):
        """The y at which a network should start so that it first answers `depth` metres (NYU's mean is near 3 m)."""
        p = depth / self.max_depth
        return torch.logit(torch.tensor(p)).item() if self.name == "sigmoid" else depth

    def extra_repr(self):
        return f"{self.name}, max_depth={self.max_depth}"


# ------------------------------------------------------------------------------------------------------------------
# Tables. One row a layer, as the papers print them. "map" marks the rows whose output the encoder hands on.
# ------------------------------------------------------------------------------------------------------------------

# The FastDepth encoder: MobileNet without its classifier. The stem is one dense convolution; every block is a
# depthwise 3x3 and a pointwise 1x1. The pruned widths are what NetAdapt left (FastDepth's released TVM logs).
#    row        kernel stride    in    out     in   out    map      output at 224x224
#                                   (full)      (pruned)
MOBILENET = (
    ("stem",      3,     2,       3,    32,     3,   16,   ""),     # 112 x 112
    ("block1",    3,     1,      32,    64,    16,   56,   "1/2"),  # 112 x 112  --> skip to decode4
    ("block2",    3,     2,      64,   128,    56,   88,   ""),     #  56 x 56
    ("block3",    3,     1,     128,   128,    88,  120,   "1/4"),  #  56 x 56   --> skip to decode3
    ("block4",    3,     2,     128,   256,   120,  144,   ""),     #  28 x 28
    ("block5",    3,     1,     256,   256,   144,  256,   "1/8"),  #  28 x 28   --> skip to decode2
    ("block6",    3,     2,     256,   512,   256,  408,   ""),     #  14 x 14
    ("block7",    3,     1,     512,   512,   408,  376,   ""),     #  14 x 14
    ("block8",    3,     1,     512,   512,   376,  272,   ""),     #  14 x 14
    ("block9",    3,     1,     512,   512,   272,  288,   ""),     #  14 x 14
    ("block10",   3,     1,     512,   512,   288,  296,   ""),     #  14 x 14
    ("block11",   3,     1,     512,   512,   296,  328,   "1/16"),  # 14 x 14   (NNConv5 takes no skip here)
    ("block12",   3,     2,     512,  1024,   328,  480,   ""),     #   7 x 7
    ("block13",   3,     1,    1024,  1024,   480,  512,   "1/32"),  #  7 x 7    --> decoder
)
FULL = [(row, k, s, i, o, m) for row, k, s, i, o, _, _, m in MOBILENET]
PRUNED = [(row, k, s, i, o, m) for row, k, s, _, _, i, o, m in MOBILENET]

# This project's own table, with ReLU throughout. Its strides come one block earlier than FastDepth's, so it has two maps at 1/4 and only the
# stem's at 1/2.
#    row       kernel stride    in    out    map      output at 224x224
LAYER_TABLE_ENCODER = (
    ("initial",   3,    2,       3,    32,  "1/2"),   # 112 x 112  --> iconv1, enlarged
    ("block1",    3,    2,      32,    64,  "1/4"),   #  56 x 56   --> iconv2, enlarged
    ("block2",    3,    1,      64,   128,  "1/4"),   #  56 x 56   --> iconv3
    ("block3",    3,    2,     128,   128,  ""),      #  28 x 28
    ("block4",    3,    1,     128,   256,  "1/8"),   #  28 x 28   --> iconv4
    ("block5",    3,    2,     256,   256,  ""),      #  14 x 14
    ("block6",    3,    1,     256,   512,  ""),      #  14 x 14
    ("block7",    3,    1,     512,   512,  ""),      #  14 x 14
    ("block8",    3,    1,     512,   512,  ""),      #  14 x 14
    ("block9",    3,    1,     512,   512,  ""),      #  14 x 14
    ("block10",   3,    1,     512,   512,  ""),      #  14 x 14
    ("block11",   3,    1,     512,   512,  "1/16"),  #  14 x 14   --> iconv5
    ("block12",   3,    2,     512,  1024,  ""),      #   7 x 7
    ("block13",   3,    1,    1024,  1024,  "1/32"),  #   7 x 7    --> upconv5
)
#    row       kernel stride    in    out             output at 224x224
LAYER_TABLE_DECODER = (
    ("upconv5",   3,    2,    1024,   512),           #  14 x 14
    ("iconv5",    3,    1,    1024,   512),           #  14 x 14   upconv5 + block11 (512)
    ("upconv4",   3,    2,     512,   256),           #  28 x 28
    ("iconv4",    3,    1,     512,   256),           #  28 x 28   upconv4 + block4 (256)
    ("upconv3",   3,    2,     256,   128),           #  56 x 56
    ("iconv3",    3,    1,     256,   128),           #  56 x 56   upconv3 + block2 (128)
    ("upconv2",   3,    2,     128,    64),           # 112 x 112
    ("iconv2",    3,    1,     128,    64),           # 112 x 112  upconv2 + block1 (64), enlarged from 56 x 56
    ("upconv1",   3,    2,      64,    32),           # 224 x 224
    ("iconv1",    3,    1,      64,    32),           # 224 x 224  upconv1 + initial (32), enlarged from 112 x 112
    ("depth",     1,    1,      32,     1),           # 224 x 224
)

# ------------------------------------------------------------------------------------------------------------------
# Encoder
# ------------------------------------------------------------------------------------------------------------------


class MobileNet(nn.Module):
    """MobileNet (Howard et al. 2017) expanded from one of the tables above: no bias, no classifier.

    Takes RGB / 255 without mean and standard deviation, as FastDepth does. forward returns the marked rows' maps in
    order; `channels` states their channels, e.g. (64, 128, 256, 512, 1024) at 1/2 ... 1/32.
    """

    def __init__(self, table, act=nn.ReLU6):
        super().__init__()
        self.layers, self.maps, self.channels = nn.ModuleDict(), [], []
        for row, kernel, stride, cin, cout, map in table:
            block = separable if row.startswith("block") else conv_bn
            self.layers[row] = block(cin, cout, kernel, stride, act=act)
            if map:
                self.maps.append(row)
                self.channels.append(cout)

    def forward(self, x):
        maps = []
        for row, layer in self.layers.items():
            x = layer(x)  # (B, out, H/stride, W/stride)
            if row in self.maps:
                maps.append(x)
        return maps


# ------------------------------------------------------------------------------------------------------------------
# Decoders
# ------------------------------------------------------------------------------------------------------------------


class NNConv5(nn.Module):
    """FastDepth's decoder: five 5x5 convolutions, each followed by a nearest-neighbour x2, and a 1x1 head.

    channels: of the encoder's five maps at 1/2, 1/4, 1/8, 1/16, 1/32.
    widths: outputs of the five convolutions; by default what adding the skips asks for.
    conv: "depthwise" (5x5 depthwise + 1x1) or "dense" (one 5x5): the paper's ablation.
    skip: "add" (the published network), "concat" or "none": the paper's ablation. There is no skip at 1/16.

    The head is a 1x1 convolution with batch norm, so it and the nearest x2 after decode5 commute. Paper and official
    code: x2, then head. Here: head, then x2, which gives the same numbers for a quarter of the head's work and without
    the largest map of the network. (Only the running variance's n/(n-1) differs, in training.)
    """
    output_stride = 1

    def __init__(self, channels, output, widths=None, conv="depthwise", skip="add"):
        super().__init__()
        c1, c2, c3, c4, c5 = channels
        w1, w2, w3, w4, w5 = widths or (c4, c3, c2, c1, c1 // 2)
        if conv not in ("depthwise", "dense") or skip not in ("add", "concat", "none"):
            raise ValueError(f"NNConv5 takes conv depthwise or dense and skip add, concat or none, not {conv!r}, {skip!r}")
        if skip == "add" and (w2, w3, w4) != (c3, c2, c1):
            raise ValueError(f"skips of {c3}, {c2}, {c1} channels cannot be added to {w2}, {w3}, {w4}")
        block = separable if conv == "depthwise" else conv_bn
        also = (c3, c2, c1) if skip == "concat" else (0, 0, 0)  # channels that a concatenated skip adds to the next block
        self.skip = skip
        self.decode1 = block(c5, w1, 5)
        self.decode2 = block(w1, w2, 5)
        self.decode3 = block(w2 + also[0], w3, 5)
        self.decode4 = block(w3 + also[1], w4, 5)
        self.decode5 = block(w4 + also[2], w5, 5)
        self.head = nn.Sequential(OrderedDict(conv=nn.Conv2d(w5, 1, 1, bias=False), bn=nn.BatchNorm2d(1), metres=output))

    def offset(self):
        """The parameter that shifts every answer."""
        return self.head.bn.bias

    def join(self, x, skip):
        if self.skip == "none":
            return x
        return x + skip if self.skip == "add" else torch.cat([x, skip], 1)

    def forward(self, maps):
        m2, m4, m8, _, x = maps  #                     x (B, 1024, H/32, W/32)
        x = x2(self.decode1(x))  #                       (B,  512, H/16, W/16)
        x = self.join(x2(self.decode2(x)), m8)  #        (B,  256, H/8, W/8)
        x = self.join(x2(self.decode3(x)), m4)  #        (B,  128, H/4, W/4)
        x = self.join(x2(self.decode4(x)), m2)  #        (B,   64, H/2, W/2)
        return x2(self.head(self.decode5(x)))  #         (B,    1, H, W)


class LayerTableDecoder(nn.Module):
    """The layer table's decoder: transposed convolutions, each followed by a convolution over [upconv, skip]."""
    output_stride = 1

    def __init__(self, channels, output):
        super().__init__()
        self.layers = nn.ModuleDict()
        for row, kernel, stride, cin, cout in LAYER_TABLE_DECODER:
            if row.startswith("upconv"):  # padding 1 and output_padding 1: exactly twice the size
                conv = nn.ConvTranspose2d(cin, cout, kernel, stride, padding=1, output_padding=1, bias=False)
                self.layers[row] = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(cout), act=nn.ReLU(inplace=True)))
            elif row.startswith("iconv"):
                self.layers[row] = conv_bn(cin, cout, kernel, stride)
            else:
                self.layers[row] = nn.Sequential(OrderedDict(conv=nn.Conv2d(cin, cout, kernel, stride), metres=output))

    def offset(self):
        """The parameter that shifts every answer."""
        return self.layers["depth"].conv.bias

    def forward(self, maps):
        m2, m4a, m4b, m8, m16, x = maps
        # iconv2 needs 64 channels at 1/2 and iconv1 needs 32 at full size, and the table's encoder has no such map:
        # block1 and the initial convolution have the channels at half the size, so they are enlarged to their place.
        for level, skip in zip("54321", (m16, m8, m4b, x2(m4a), x2(m2))):
            x = self.layers["upconv" + level](x)  #                          (B, C, 2h, 2w)
            x = self.layers["iconv" + level](torch.cat([x, skip], 1))  #     (B, 2C -> C, 2h, 2w)
        return self.layers["depth"](x)  #                                    (B, 1, H, W)


# ------------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------------

# size and geometry (data.py) are those of training and of the paper's evaluation; whole_size is the nearest legal size
# at which a whole 4:3 picture has the scale of training (480 rows -> 250 -> crop 228 -> 224: a whole one is 246 x 246).
MODELS = {
    "fastdepth": dict(
        encoder=lambda: MobileNet(FULL), decoder=NNConv5, widths=(512, 256, 128, 64, 32), output="relu",
        size=(224, 224), geometry="fastdepth", whole_size=(256, 256)),
    "fastdepth-pruned": dict(
        encoder=lambda: MobileNet(PRUNED), decoder=NNConv5, widths=(200, 256, 120, 56, 16), output="relu",
        size=(224, 224), geometry="fastdepth", whole_size=(256, 256)),
    "fastdepth-table": dict(
        encoder=lambda: MobileNet(LAYER_TABLE_ENCODER, nn.ReLU), decoder=LayerTableDecoder, output="linear",
        size=(224, 224), geometry="fastdepth", whole_size=(256, 256)),
}


class DepthNet(nn.Module):
    """An encoder and a decoder. image (B, 3, H, W) in [0, 1] -> depth (B, 1, H/output_stride, W/output_stride) in metres."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder, self.output_stride = encoder, decoder, decoder.output_stride

    def forward(self, image):
        height, width = image.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"height and width must be multiples of 32, got {height}x{width}")
        return self.decoder(self.encoder(image))


def build_model(name, max_depth=10.0, output=None, **options):
    """A freshly initialised network of MODELS. Raises ValueError for an unknown name or option.

    max_depth: metres, for outputs that are bounded by it.  output: replaces the last activation (see Metres).
    options: what the decoder takes, e.g. conv="dense", skip="none" for FastDepth's ablations.
    """
    if name not in MODELS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(MODELS)}")
    spec = MODELS[name]
    encoder, metres = spec["encoder"](), Metres(output or spec["output"], max_depth)
    if "widths" in spec:
        options = {"widths": spec["widths"], **options}
    try:
        model = DepthNet(encoder, spec["decoder"](encoder.channels, metres, **options))
    except TypeError:
        raise ValueError(f"{name} does not take the options {', '.join(options)}") from None
    return initialise(model, metres)


def initialise(model, metres):
    """The one place that sets starting weights.

    Convolutions keep PyTorch's default (uniform, variance 1 / (3 fan_in)), as the official decoder does: its own
    initialisation is never applied. Under batch norm the size of the weights only sets how fast they turn: after 6 epochs
    on rooms, SGD at 0.05, RMSE was 0.76 of the constant map's with this, and 0.84 with He's larger normal of fan_out.
    """
    nn.init.constant_(model.decoder.offset(), metres.start())
    return model


def load_model(file, device="cpu"):
    """A checkpoint of train.py -> the network in eval mode, and the facts that it was saved with: model, options, size,
    geometry, max_depth. ValueError names the file when it is not one."""
    try:
        saved = torch.load(file, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: not a file of torch.save with tensors and plain values alone: train it again or copy it again") from None
    except Exception as error:  # whatever a cut-off or foreign file makes the reader stumble over
        raise ValueError(f"{file}: not a whole file of torch.save ({first_line(error)}): train it again or copy it again") from None
    try:
        facts = {key: saved[key] for key in ("model", "options", "size", "geometry", "max_depth")}
        model = build_model(facts["model"], facts["max_depth"], **facts["options"])
        model.load_state_dict(saved["weights"])
    except (KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: not a checkpoint of this project ({first_line(error)})") from None
    return model.to(device).eval(), facts


def first_line(error):
    return f"{type(error).__name__} {error}".strip().split("\n")[0]


# ------------------------------------------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layers(model, height=224, width=224):
    """Every convolution in the order it runs: (name, output shape, weights, multiply-accumulates) for one picture.

    Runs a copy on the meta device, where tensors have a shape and no numbers: any size is instant.
    """
    rows, model = [], copy.deepcopy(model).to("meta").eval()

    def hook(name, conv, args, out):
        grid = args[0] if isinstance(conv, nn.ConvTranspose2d) else out  # each weight is used once per pixel of this map
        rows.append((name, tuple(out.shape[1:]), conv.weight.numel(), grid[0, 0].numel() * conv.weight.numel()))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda conv, args, out, name=name: hook(name, conv, args, out))
    model(torch.empty(1, 3, height, width, device="meta"))
    return rows


def count(model, height=224, width=224):
    """dict(parameters, conv_weights, macs): all parameters, those of convolutions without biases and batch norm (what
    FastDepth counts), and the multiply-accumulates of the convolutions for one height x width picture."""
    rows = layers(model, height, width)
    return dict(parameters=sum(p.numel() for p in model.parameters()),
                conv_weights=sum(weights for _, _, weights, _ in rows), macs=sum(macs for *_, macs in rows))


def main():
    parser = argparse.ArgumentParser(description="Print the networks, or one network layer by layer.")
    parser.add_argument("name", nargs="?", choices=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    name = parser.parse_args().name
    if name is None:
        print(f"{'network':18}{'input':>10}{'output':>9}{'parameters':>13}{'conv weights':>14}{'GMACs':>9}")
        for name, spec in MODELS.items():
            (height, width), model = spec["size"], build_model(name)
            n = count(model, height, width)
            print(f"{name:18}{f'{height}x{width}':>10}{f'1/{model.output_stride}':>9}{n['parameters']:13,}"
                  f"{n['conv_weights']:14,}{n['macs'] / 1e9:9.4f}")
        return
    (height, width), model = MODELS[name]["size"], build_model(name)
    print(f"{'layer':42}{'output':>16}{'weights':>12}{'MMACs':>10}")
    for layer, shape, weights, macs in layers(model, height, width):
        print(f"{layer:42}{' x '.join(map(str, shape)):>16}{weights:12,}{macs / 1e6:10.2f}")
    n = count(model, height, width)
    print(f"{n['parameters']:,} parameters, {n['conv_weights']:,} of them convolution weights; {n['macs']:,} MACs")


if __name__ == "__main__":
    main()
