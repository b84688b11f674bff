"""Networks for monocular depth: one RGB picture in, metres per pixel out.

    image (B, 3, H, W) float32 in [0, 1]  ->  depth (B, 1, H/s, W/s) float32 in metres, s = model.output_stride
    H and W are multiples of 32.

A network is an encoder (a picture -> feature maps at 1/2 ... 1/32) and a decoder (those maps -> depth):

    FastDepth   Wofk, Ma, Yang, Karaman, Sze: FastDepth: Fast Monocular Depth Estimation on Embedded Systems, 2019 (arXiv:1903.03273)
    MobileNet   Howard et al.: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, 2017 (arXiv:1704.04861)
    MobileNetV2 Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018 (arXiv:1801.04381)
    DenseDepth  Alhashim, Wonka: High Quality Monocular Depth Estimation via Transfer Learning, 2018 (arXiv:1812.11941)
    FPN         Lin et al.: Feature Pyramid Networks for Object Detection, 2017 (arXiv:1612.03144), on ResNet-101

The file needs nothing but torch, so it can be copied alone. Read it bottom-up or top-down: blocks, tables, encoder,
decoders, the named networks.

    python model.py                 all networks with their sizes
    python model.py fastdepth       one network, layer by layer
"""
import argparse
import copy
import math
import pickle
import warnings
from collections import OrderedDict
from functools import partial
from itertools import zip_longest

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
    last). Without this, the weight gradients of five 5x5 layers take most of a training step of FastDepth in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        y = F.conv2d(x, weight, None, stride, padding, groups=len(weight))
        ctx.save_for_backward(x.to(y.dtype), weight)  # autocast may have cast x
        ctx.stride, ctx.padding = stride, padding
        return y

    @staticmethod
    def backward(ctx, grad):
        """The gradients of x and weight, from that of y."""
        x, weight = ctx.saved_tensors
        kernel, channels = weight.shape[-1], len(weight)

        def gradient(x, weight, grad, stride, padding, wanted):
            """The library's gradients; wanted says which, of x, weight, bias."""
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
    """Convolution, batch norm and activation: (B, cin, H, W) -> (B, cout, H/stride, W/stride)."""
    return followed(nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=False), act)


def followed(conv, act):
    """conv, its batch norm and its activation, which may be None."""
    steps = OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels))
    return nn.Sequential(steps | (OrderedDict(act=act(inplace=True)) if act else {}))


def separable(cin, cout, kernel, stride=1, act=nn.ReLU):
    """Depthwise separable convolution (MobileNet): one kernel x kernel filter a channel, then a 1x1 mix of channels."""
    return nn.Sequential(OrderedDict(depthwise=followed(Depthwise(cin, kernel, stride), act), pointwise=conv_bn(cin, cout, 1, act=act)))


def x2(x, mode="nearest"):
    """Enlargement, "nearest" or "bilinear" with half-pixel centres: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode=mode)


class Metres(nn.Module):
    """The last step of every decoder: an unbounded number y -> metres.

    relu        max(y, 0)                        FastDepth; 0 is a possible answer
    linear      y                                the layer table; may be negative
    reciprocal  max_depth / (1 + softplus(y))    DenseDepth, which learns max_depth / depth; bounded to (0, max_depth)
    sigmoid     max_depth * sigmoid(y)           bounded to (0, max_depth); may replace any of the others
    """
    NAMES = ("relu", "linear", "reciprocal", "sigmoid")

    def __init__(self, name, max_depth):
        super().__init__()
        if name not in self.NAMES:
            raise ValueError(f"unknown output {name!r}: choose one of {', '.join(self.NAMES)}")
        self.name, self.max_depth = name, max_depth

    def forward(self, y):
        if self.name == "sigmoid":
            return self.max_depth * torch.sigmoid(y)
        if self.name == "reciprocal":
            return self.max_depth / (1 + F.softplus(y))
        return F.relu(y) if self.name == "relu" else y

    def start(self, depth=3.0):
        """The y at which a network should start so that it first answers `depth` metres (NYU's mean is near 3 m)."""
        share = min(depth / self.max_depth, 0.5)  # of a shorter range, its middle
        if self.name == "sigmoid":
            return math.log(share / (1 - share))
        return math.log(math.expm1(1 / share - 1)) if self.name == "reciprocal" else share * self.max_depth

    def extra_repr(self):
        """What print(model) says of it."""
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

# This project's own table, with ReLU throughout. Its strides come one block earlier than FastDepth's, so it has two maps at
# 1/4 and only the stem's at 1/2.
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

# MobileNetV2 (Sandler et al.) up to its last 320 channels: t expands the channels, c of them leave, n repetitions, s is the
# stride of the first.
#    row         t     c    n    s    map      output at 224x224
MOBILENET_V2 = (
    ("stage1",   1,   16,   1,   1,  "1/2"),   # 112 x 112  --> skip to decode4
    ("stage2",   6,   24,   2,   2,  "1/4"),   #  56 x 56   --> skip to decode3
    ("stage3",   6,   32,   3,   2,  "1/8"),   #  28 x 28   --> skip to decode2
    ("stage4",   6,   64,   4,   2,  ""),      #  14 x 14
    ("stage5",   6,   96,   3,   1,  "1/16"),  #  14 x 14
    ("stage6",   6,  160,   3,   2,  ""),      #   7 x 7
    ("stage7",   6,  320,   1,   1,  "1/32"),  #   7 x 7    --> decoder
)
# DenseNet-169 (Huang et al.): each dense layer adds 32 channels to all before it; each transition halves channels and size.
#    row       layers  channels in, out        output at 480x640
DENSENET169 = (
    ("dense1",    6,     64,  256),          # 120 x 160, transition to 128 at 60 x 80 (1/8)   --> skip
    ("dense2",   12,    128,  512),          #  60 x 80,  transition to 256 at 30 x 40 (1/16)  --> skip
    ("dense3",   32,    256, 1280),          #  30 x 40,  transition to 640 at 15 x 20
    ("dense4",   32,    640, 1664),          #  15 x 20 (1/32)                                 --> decoder
)
# ResNet-101 (He et al.): bottlenecks of 1x1, 3x3 and 1x1.
#    row       blocks  stride  channels inside, out    output at 480x640
RESNET101 = (
    ("layer1",    3,     1,      64,  256),  # 120 x 160 (1/4)   --> C2
    ("layer2",    4,     2,     128,  512),  #  60 x 80  (1/8)   --> C3
    ("layer3",   23,     2,     256, 1024),  #  30 x 40  (1/16)  --> C4
    ("layer4",    3,     2,     512, 2048),  #  15 x 20  (1/32)  --> C5
)

# ------------------------------------------------------------------------------------------------------------------
# Encoders: each returns its maps from the largest to the smallest and states their `channels`
# ------------------------------------------------------------------------------------------------------------------


class MobileNet(nn.Module):
    """MobileNet (Howard et al. 2017) expanded from one of the tables above: no bias, no classifier.

    Takes RGB / 255 without mean and standard deviation, as FastDepth does. forward returns the marked rows' maps in
    order; `channels` states their channels, e.g. (64, 128, 256, 512, 1024) at 1/2 ... 1/32.
    """
    url, unused = None, ("module.fc.", "fc.")  # torchvision has no MobileNet

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


TORCHVISION = "https://download.pytorch.org/models/"


class ImageNetScale(nn.Module):
    """RGB in [0, 1] -> the scale of torchvision's ImageNet weights. Constants, so not in the state dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, image):
        return (image - self.mean) / self.std


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 to t times the channels, depthwise 3x3, 1x1 down without activation, plus the input."""

    def __init__(self, cin, cout, stride, t):
        super().__init__()
        self.expand = conv_bn(cin, t * cin, 1, act=nn.ReLU6) if t > 1 else nn.Identity()
        self.depthwise = followed(Depthwise(t * cin, 3, stride), nn.ReLU6)
        self.project = conv_bn(t * cin, cout, 1, act=None)
        self.residual = stride == 1 and cin == cout

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al. 2018), without its last 1280 channels."""
    url, unused = TORCHVISION + "mobilenet_v2-b0353104.pth", ("features.18.", "classifier.")

    def __init__(self):
        super().__init__()
        self.scale, self.stem = ImageNetScale(), conv_bn(3, 32, 3, 2, act=nn.ReLU6)
        self.layers, self.maps, self.channels, cin = nn.ModuleDict(), [], [], 32
        for row, t, c, n, s, map in MOBILENET_V2:
            blocks = [InvertedResidual(cin, c, s, t)] + [InvertedResidual(c, c, 1, t) for _ in range(n - 1)]
            self.layers[row], cin = nn.Sequential(*blocks), c
            if map:
                self.maps.append(row)
                self.channels.append(c)

    def forward(self, x):
        x, maps = self.stem(self.scale(x)), []  # (B, 32, H/2, W/2)
        for row, layer in self.layers.items():
            x = layer(x)
            if row in self.maps:
                maps.append(x)
        return maps


class Bottleneck(nn.Module):
    """ResNet's block: 1x1 down, 3x3, 1x1 up, plus the input, through a 1x1 where its shape differs."""

    def __init__(self, cin, inside, cout, stride):
        super().__init__()
        self.reduce, self.conv = conv_bn(cin, inside, 1), conv_bn(inside, inside, 3, stride)
        self.restore = conv_bn(inside, cout, 1, act=None)
        self.shortcut = conv_bn(cin, cout, 1, stride, act=None) if stride > 1 or cin != cout else nn.Identity()

    def forward(self, x):
        return F.relu(self.restore(self.conv(self.reduce(x))) + self.shortcut(x))


class ResNet101(nn.Module):
    """Deep Residual Learning for Image Recognition (He et al. 2016), stride in the 3x3 as in torchvision."""
    url, unused = TORCHVISION + "resnet101-63fe2227.pth", ("fc.",)
    channels = (64, 256, 512, 1024, 2048)

    def __init__(self):
        super().__init__()
        self.scale, self.stem, self.pool = ImageNetScale(), conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)
        self.layers, cin = nn.ModuleDict(), 64
        for row, blocks, stride, inside, cout in RESNET101:
            rest = [Bottleneck(cout, inside, cout, 1) for _ in range(blocks - 1)]
            self.layers[row], cin = nn.Sequential(Bottleneck(cin, inside, cout, stride), *rest), cout

    def forward(self, x):
        maps = [self.stem(self.scale(x))]  # (B, 64, H/2, W/2)
        x = self.pool(maps[0])  #            (B, 64, H/4, W/4)
        for layer in self.layers.values():
            x = layer(x)
            maps.append(x)
        return maps


class DenseLayer(nn.Module):
    """DenseNet's layer: BN, ReLU, 1x1 to 128, BN, ReLU, 3x3 to 32 channels, concatenated to its input."""

    def __init__(self, cin, growth=32):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)  # (B, cin + 32, H, W)


class Transition(nn.Module):
    """Between dense blocks: BN, ReLU, 1x1 to half the channels, mean of 2x2: (B, C, H, W) -> (B, C/2, H/2, W/2)."""

    def __init__(self, cin):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(cin), nn.Conv2d(cin, cin // 2, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet169(nn.Module):
    """Densely Connected Convolutional Networks (Huang et al. 2017). It ends in 1664 channels: 1632 enter its last layer."""
    url, unused = TORCHVISION + "densenet169-b2777c0a.pth", ("classifier.",)
    channels = (64, 64, 128, 256, 1664)

    def __init__(self):
        super().__init__()
        self.scale, self.stem, self.pool = ImageNetScale(), conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)
        self.layers = nn.ModuleDict()
        for row, layers, cin, cout in DENSENET169:
            self.layers[row] = nn.Sequential(*(DenseLayer(cin + 32 * i) for i in range(layers)))
            self.layers["norm" if row == "dense4" else row.replace("dense", "transition")] = \
                nn.BatchNorm2d(cout) if row == "dense4" else Transition(cout)

    def forward(self, x):
        relu0 = self.stem(self.scale(x))  #                                      (B,   64, H/2,  W/2)
        pool0 = self.pool(relu0)  #                                              (B,   64, H/4,  W/4)
        step = self.layers
        transition1 = step["transition1"](step["dense1"](pool0))  #              (B,  128, H/8,  W/8)
        transition2 = step["transition2"](step["dense2"](transition1))  #        (B,  256, H/16, W/16)
        x = step["dense4"](step["transition3"](step["dense3"](transition2)))
        return [relu0, pool0, transition1, transition2, step["norm"](x)]  #      (B, 1664, H/32, W/32)


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
    output_stride, options = 1, ("conv", "skip")

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
        """x with the encoder's map of the same size: sum, concatenation, or x alone."""
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
    output_stride, options = 1, ()

    def __init__(self, channels, output):
        super().__init__()
        self.layers = nn.ModuleDict()
        for row, kernel, stride, cin, cout in LAYER_TABLE_DECODER:
            if row.startswith("upconv"):  # padding 1 and output_padding 1: exactly twice the size
                conv = nn.ConvTranspose2d(cin, cout, kernel, stride, padding=1, output_padding=1, bias=False)
                self.layers[row] = followed(conv, nn.ReLU)
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


class DenseDepthDecoder(nn.Module):
    """DenseDepth's decoder: bilinear to the skip's size, concatenate, two 3x3 convolutions; no batch norm.

    Both convolutions of a step have their LeakyReLU 0.2, as in the authors' code; a widely copied port leaves out the first.
    """
    output_stride, options = 2, ()

    def __init__(self, channels, output):
        super().__init__()
        c1, c2, c3, c4, c5 = channels
        self.bottom = nn.Conv2d(c5, c5, 1)
        self.up1 = self.step(c5 + c4, c5 // 2)
        self.up2 = self.step(c5 // 2 + c3, c5 // 4)
        self.up3 = self.step(c5 // 4 + c2, c5 // 8)
        self.up4 = self.step(c5 // 8 + c1, c5 // 16)
        self.head, self.metres = nn.Conv2d(c5 // 16, 1, 3, padding=1), output

    @staticmethod
    def step(cin, cout):
        """(B, cin, H, W) -> (B, cout, H, W)."""
        return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.LeakyReLU(0.2),
                             nn.Conv2d(cout, cout, 3, padding=1), nn.LeakyReLU(0.2))

    def offset(self):
        """The parameter that shifts every answer."""
        return self.head.bias

    def forward(self, maps):
        m2, m4, m8, m16, x = maps
        x = self.bottom(F.relu(x))  #                                   (B, 1664, H/32, W/32)
        x = self.up1(torch.cat([x2(x, "bilinear"), m16], 1))  #           (B,  832, H/16, W/16)
        x = self.up2(torch.cat([x2(x, "bilinear"), m8], 1))  #             (B,  416, H/8, W/8)
        x = self.up3(torch.cat([x2(x, "bilinear"), m4], 1))  #             (B,  208, H/4, W/4)
        x = self.up4(torch.cat([x2(x, "bilinear"), m2], 1))  #             (B,  104, H/2, W/2)
        return self.metres(self.head(x))  #                             (B,    1, H/2, W/2)


class FeaturePyramid(nn.Module):
    """Feature Pyramid Networks for Object Detection (Lin et al. 2017), and a head that reads depth from its largest map."""
    output_stride, options = 4, ()

    def __init__(self, channels, output, width=256):
        super().__init__()
        _, c2, c3, c4, c5 = channels
        self.lateral2, self.lateral3 = nn.Conv2d(c2, width, 1), nn.Conv2d(c3, width, 1)
        self.lateral4, self.lateral5 = nn.Conv2d(c4, width, 1), nn.Conv2d(c5, width, 1)
        self.smooth2, self.smooth3, self.smooth4 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.head = nn.Sequential(nn.Conv2d(width, width // 4, 3, padding=1), nn.ReLU(inplace=True),
                                  nn.Conv2d(width // 4, 1, 3, padding=1))
        self.metres = output

    def offset(self):
        """The parameter that shifts every answer."""
        return self.head[2].bias

    def forward(self, maps):
        _, m2, m3, m4, m5 = maps
        p5 = self.lateral5(m5)  #                                       (B, 256, H/32, W/32)
        # Paper: nearest x2, and only the finished maps are smoothed. Here: bilinear, smoothed before it goes on.
        p4 = self.smooth4(self.lateral4(m4) + x2(p5, "bilinear"))  #       (B, 256, H/16, W/16)
        p3 = self.smooth3(self.lateral3(m3) + x2(p4, "bilinear"))  #       (B, 256, H/8, W/8)
        p2 = self.smooth2(self.lateral2(m2) + x2(p3, "bilinear"))  #       (B, 256, H/4, W/4)
        return self.metres(self.head(p2))  #                            (B,   1, H/4, W/4)


# ------------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------------

# size and geometry (data.py) are those of training and of the paper's evaluation; lr is where SGD starts. A decoder without
# batch norm wants less: fpn at 0.05 was not finite after one short epoch.
MODELS = {
    "fastdepth": dict(
        encoder=lambda: MobileNet(FULL), decoder=partial(NNConv5, widths=(512, 256, 128, 64, 32)), output="relu",
        size=(224, 224), geometry="fastdepth", lr=0.05),
    "fastdepth-pruned": dict(
        encoder=lambda: MobileNet(PRUNED), decoder=partial(NNConv5, widths=(200, 256, 120, 56, 16)), output="relu",
        size=(224, 224), geometry="fastdepth", lr=0.05),
    "fastdepth-table": dict(
        encoder=lambda: MobileNet(LAYER_TABLE_ENCODER, nn.ReLU), decoder=LayerTableDecoder, output="linear",
        size=(224, 224), geometry="fastdepth", lr=0.05),
    "fastdepth-v2": dict(
        encoder=MobileNetV2, decoder=partial(NNConv5, widths=(96, 32, 24, 16, 16)), output="relu",
        size=(224, 224), geometry="fastdepth", lr=0.05),
    "densedepth": dict(
        encoder=DenseNet169, decoder=DenseDepthDecoder, output="reciprocal",
        size=(480, 640), geometry="full", lr=0.005),
    "fpn": dict(
        encoder=ResNet101, decoder=FeaturePyramid, output="relu",
        size=(480, 640), geometry="full", lr=0.005),
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
    known = getattr(spec["decoder"], "func", spec["decoder"]).options
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{name} does not take the option {unknown[0]}, only {', '.join((*known, 'output'))}")
    return initialise(DepthNet(encoder, spec["decoder"](encoder.channels, metres, **options)), metres)


def initialise(model, metres):
    """The one place that sets starting weights.

    Convolutions keep PyTorch's default (uniform, variance 1 / (3 fan_in)), as the official decoder does: its own
    initialisation is never applied. Under batch norm the size of the weights only sets how fast they turn: after 6 epochs
    on rooms, SGD at 0.05, RMSE was 0.76 of the constant map's with this, and 0.84 with He's larger normal of fan_out.
    """
    nn.init.constant_(model.decoder.offset(), metres.start())
    return model


# ------------------------------------------------------------------------------------------------------------------
# Weights: our checkpoints, torchvision's ImageNet encoders, FastDepth's published files
# ------------------------------------------------------------------------------------------------------------------


class StandIn:
    """What a pickled object of somebody's class becomes here: its attributes, and none of its code."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state)


class StandInUnpickler(pickle.Unpickler):
    """Reads pickled modules without their classes: tensors are rebuilt, modules become StandIns, all else is refused.

    FastDepth's files are whole pickled modules: torch.load refuses them, and pickle would import and run what they name.
    """
    MODULES = ("torch.nn.modules.", "models", "metrics", "imagenet.")  # classes of PyTorch and of the authors' scripts
    TENSORS = ("collections.OrderedDict", "builtins.set", "__builtin__.set", "_codecs.encode", "torch.Size",
               "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
               "torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter",
               "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # numbers of best_result

    def find_class(self, module, name):
        """What pickle calls for every class or function that a file names; UnpicklingError for what is not known as harmless."""
        if f"{module}.{name}" in self.TENSORS or module == "torch" and name.endswith("Storage"):
            return super().find_class(module, name)
        if module.startswith(self.MODULES):
            return type(name, (StandIn,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither a tensor nor a module: nothing was run")


def stand_in_state(module, prefix=""):
    """The state dict of a module of StandIns, in the order of Module.state_dict."""
    state = {prefix + name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    for name, child in module._modules.items():
        state |= stand_in_state(child, f"{prefix}{name}.")
    return state


def place(module, state, unused=()):
    """Load a state dict whose names differ from ours but whose order does not: every tensor is placed or, where its name
    starts with one of `unused`, left out. ValueError at the first that does not fit. Returns the names left out."""
    counts = "num_batches_tracked"  # not in files from before PyTorch 0.4.1, and of no use here
    ours = {name: t for name, t in module.state_dict().items() if not name.endswith(counts)}
    given = {name: t for name, t in state.items() if not name.endswith(counts)}
    left_out = [name for name in given if name.startswith(unused)] if unused else []
    pairs = list(zip_longest(ours, (name for name in given if name not in left_out)))
    for name, other in pairs:
        if name is None or other is None or ours[name].shape != given[other].shape:
            shapes = [f"{key} {tuple(source[key].shape)}" if key else "nothing" for key, source in ((name, ours), (other, given))]
            raise ValueError(f"{shapes[0]} is wanted where the file has {shapes[1]}")
    module.load_state_dict({name: given[other] for name, other in pairs}, strict=False)
    return left_out


def read_file(file):
    """What torch.save wrote to file, on the CPU, as safely as torch.load's weights_only. Whole modules become StandIns."""
    try:
        return torch.load(file, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except pickle.UnpicklingError:
        pass  # not tensors and plain values alone: perhaps one of FastDepth's
    except Exception as error:  # whatever a cut-off or foreign file makes the reader stumble over
        raise ValueError(f"{file}: not a whole file of torch.save ({first_line(error)}): train it again or copy it again") from None
    reader = type("reader", (), dict(Unpickler=StandInUnpickler, load=staticmethod(lambda f, **k: StandInUnpickler(f, **k).load())))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files carry the source of their classes, which nobody needs
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader)
    except Exception as error:  # whatever a hostile or broken pickle makes the reader stumble over
        raise ValueError(f"{file}: refused ({first_line(error)})") from None


def first_line(error):
    """What went wrong, in one line. (load_state_dict says it in its second.)"""
    lines = [line.strip() for line in str(error).split("\n")]
    return f"{type(error).__name__} {lines[lines[0].startswith('Error(s) in loading') and len(lines) > 1]}".strip()


def load_model(file, device="cpu"):
    """A file -> the network in eval mode, and its facts: model, options, size, geometry, max_depth.

    Takes checkpoints of train.py, and the modules that FastDepth's authors published (MobileNetSkipAdd, its pruned version
    and the variants without skips), alone or in a dict under "model". ValueError names the file when it is neither.
    """
    saved = read_file(file)
    try:
        if isinstance(saved, dict) and "weights" in saved:
            facts = {key: saved[key] for key in ("model", "options", "size", "geometry", "max_depth")}
            model = build_model(facts["model"], facts["max_depth"], **facts["options"])
            model.load_state_dict(saved["weights"])
            return model.to(device).eval(), facts
        module = saved["model"] if isinstance(saved, dict) else saved
        state, kind = stand_in_state(module), type(module).__name__
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: not a checkpoint of this project and not a published FastDepth ({first_line(error)})") from None
    options = {} if kind.endswith("SkipAdd") else dict(skip="concat" if kind.endswith("SkipConcat") else "none")
    for name in ("fastdepth", "fastdepth-pruned"):
        model = build_model(name, **(options if name == "fastdepth" else {}))
        try:
            place(model, state)
        except ValueError as error:
            reason = error
            continue
        spec = MODELS[name]
        facts = dict(model=name, options=options if name == "fastdepth" else {}, max_depth=10.0)
        return model.to(device).eval(), facts | {key: spec[key] for key in ("size", "geometry")}
    raise ValueError(f"{file}: a pickled {kind} that is none of FastDepth's networks ({reason})")


def load_encoder(model, file=None):
    """Put ImageNet weights into model.encoder: of a file, or torchvision's, downloaded and checked. Returns unused names."""
    encoder = model.encoder
    if file:
        state = read_file(file)
        state = state.get("state_dict", state) if isinstance(state, dict) else stand_in_state(state)
    elif encoder.url is None:
        raise ValueError("torchvision has no weights for MobileNet: the FastDepth authors' imagenet/model_best.pth.tar is one; "
                         "give it, or any of the same order, as --encoder-weights FILE")
    else:
        try:
            state = torch.hub.load_state_dict_from_url(encoder.url, map_location="cpu", check_hash=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{encoder.url}: cannot be downloaded ({first_line(error)}): fetch it elsewhere and give "
                             "--encoder-weights FILE") from None
    try:
        return place(encoder, state, encoder.unused)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file or encoder.url}: does not fit {type(encoder).__name__}: {error}") from None


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
        """Note one convolution as it runs."""
        grid = args[0] if isinstance(conv, nn.ConvTranspose2d) else out  # each weight is used once per pixel of this map
        rows.append((name, tuple(out.shape[1:]), conv.weight.numel(), grid[0, 0].numel() * conv.weight.numel()))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(partial(hook, name))
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
            with torch.device("meta"):  # sizes need no numbers
                (height, width), model = spec["size"], build_model(name)
            n = count(model, height, width)
            print(f"{name:18}{f'{height}x{width}':>10}{f'1/{model.output_stride}':>9}{n['parameters']:13,}"
                  f"{n['conv_weights']:14,}{n['macs'] / 1e9:9.4f}")
        return
    with torch.device("meta"):
        (height, width), model = MODELS[name]["size"], build_model(name)
    print(f"{'layer':42}{'output':>16}{'weights':>12}{'MMACs':>10}")
    for layer, shape, weights, macs in layers(model, height, width):
        print(f"{layer:42}{' x '.join(map(str, shape)):>16}{weights:12,}{macs / 1e6:10.2f}")
    n = count(model, height, width)
    print(f"{n['parameters']:,} parameters, {n['conv_weights']:,} of them convolution weights; {n['macs']:,} MACs")


if __name__ == "__main__":
    main()
