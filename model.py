"""Networks for monocular depth: one RGB image in, metres per pixel out.

    image (B, 3, H, W) float32 RGB in [0, 1], H and W multiples of 32
    depth (B, 1, H/s, W/s) float32 metres along the optical axis, s = model.output_stride

A network is an encoder (an image -> feature maps at 1/2 ... 1/32) and a decoder (those -> depth). The first
section is FastDepth, complete (Wofk, Ma, Yang, Karaman, Sze: FastDepth: Fast Monocular Depth Estimation on
Embedded Systems, 2019, arXiv:1903.03273). Then come its relatives, the table of names, weights from
elsewhere, counting, and last a faster gradient for training on CPUs. The file needs nothing but torch: copy
it alone.

    python model.py                 # all networks and their sizes
    python model.py fastdepth       # one network, layer by layer
"""
import argparse
import copy
import math
import pickle
import signal
import warnings
from collections import OrderedDict
from functools import partial
from itertools import zip_longest

if __name__ == "__main__":  # no traceback on Ctrl-C during the slow import below, or from `| head -1`
    for name in {"SIGINT", "SIGPIPE"} & set(dir(signal)):  # Windows has no SIGPIPE
        signal.signal(getattr(signal, name), signal.SIG_DFL)

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ModelError(ValueError):
    """A user error, such as a file that is not a checkpoint. The message is one line that says the cure."""


# ------------------------------------------------------------------------------------------------------------
# FastDepth
# ------------------------------------------------------------------------------------------------------------


def conv_bn_act(cin, cout, kernel, stride=1, groups=1, activation=nn.ReLU):
    """Convolution, batch norm, activation: (B, cin, H, W) -> (B, cout, H/stride, W/stride).

    The convolution has no bias, because batch norm would subtract it again.
    """
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        bn=nn.BatchNorm2d(cout),
        act=activation(inplace=True),
    ))


def separable(cin, cout, kernel, stride=1, activation=nn.ReLU):
    """Depthwise separable convolution: one kernel x kernel filter per channel, then a 1x1 mix of channels."""
    return nn.Sequential(OrderedDict(
        depthwise=conv_bn_act(cin, cin, kernel, stride, groups=cin, activation=activation),
        pointwise=conv_bn_act(cin, cout, 1, activation=activation),
    ))


def upsample2x(x, mode="nearest"):
    """(B, C, H, W) -> (B, C, 2H, 2W); "bilinear" is torch's, with half-pixel centres."""
    return F.interpolate(x, scale_factor=2, mode=mode)


# The encoder is MobileNet without its classifier: a dense 3x3 stem, then blocks of a depthwise 3x3 and a
# pointwise 1x1. A row takes the channels of the row above; the stem takes RGB. The pruned widths are what
# NetAdapt left, from the TVM logs that FastDepth's authors released.
#    row       stride  full  pruned  skip       output at 224x224
MOBILENET = (
    ("stem",      2,     32,    16,  ""),      # 112 x 112
    ("block1",    1,     64,    56,  "1/2"),   # 112 x 112  --> skip after decode4
    ("block2",    2,    128,    88,  ""),      #  56 x 56
    ("block3",    1,    128,   120,  "1/4"),   #  56 x 56   --> skip after decode3
    ("block4",    2,    256,   144,  ""),      #  28 x 28
    ("block5",    1,    256,   256,  "1/8"),   #  28 x 28   --> skip after decode2
    ("block6",    2,    512,   408,  ""),      #  14 x 14
    ("block7",    1,    512,   376,  ""),      #  14 x 14
    ("block8",    1,    512,   272,  ""),      #  14 x 14
    ("block9",    1,    512,   288,  ""),      #  14 x 14
    ("block10",   1,    512,   296,  ""),      #  14 x 14
    ("block11",   1,    512,   328,  "1/16"),  #  14 x 14   (NNConv5 takes no skip here)
    ("block12",   2,   1024,   480,  ""),      #   7 x 7
    ("block13",   1,   1024,   512,  "1/32"),  #   7 x 7    --> decode1
)
# The decoder has five 5x5 blocks, each followed by a nearest x2, and a 1x1 head to one channel.
#                 decode1  decode2  decode3  decode4  decode5
#                 14 x 14  28 x 28  56 x 56  112x112  224x224     output at 224x224, after the x2
NNCONV5_FULL   = (    512,     256,     128,      64,      32)
NNCONV5_PRUNED = (    200,     256,     120,      56,      16)


class Encoder(nn.Module):
    """Layers that run one after another. Returns the outputs of those marked as skips, the largest first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict()
        self.skips = []
        self.channels = []  # of the outputs that are returned

    def add(self, row, layer, channels, skip):
        """Append a layer; its output, of that many channels, is returned if `skip` is not empty."""
        self.layers[row] = layer
        if skip:
            self.skips.append(row)
            self.channels.append(channels)

    def forward(self, x):
        features = []
        for row, layer in self.layers.items():
            x = layer(x)
            if row in self.skips:
                features.append(x)
        return features


class MobileNet(Encoder):
    """Howard et al. 2017: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications.

    Takes RGB in [0, 1], not normalised by mean and standard deviation, as in FastDepth.
    """

    def __init__(self, table=MOBILENET, pruned=False, activation=nn.ReLU6):
        super().__init__()
        cin = 3
        for row, stride, *widths, skip in table:
            cout = widths[1] if pruned else widths[0]  # the layer table below has one width
            block = separable if row.startswith("block") else conv_bn_act
            self.add(row, block(cin, cout, 3, stride, activation=activation), cout, skip)
            cin = cout


class NNConv5(nn.Module):
    """FastDepth's decoder: five 5x5 blocks, each followed by a nearest-neighbour x2, and a 1x1 head.

    build_model checks the values of conv, skip and output; this class does not.

    channels: those of the encoder's feature maps at 1/2, 1/4, 1/8, 1/16 and 1/32.
    widths: outputs of the five blocks.
    conv: "depthwise" (5x5 depthwise + 1x1) or "dense" (one 5x5), an ablation of the paper's.
    skip: "add" (the published network), or "concat" or "none", ablations. There is never one at 1/16.
    """
    output_stride = 1

    def __init__(self, channels, output="relu", max_depth=10.0,
                 widths=NNCONV5_FULL, conv="depthwise", skip="add"):
        super().__init__()
        c2, c4, c8, _, c32 = channels
        w1, w2, w3, w4, w5 = widths
        if skip != "concat":
            c8 = c4 = c2 = 0  # only a concatenated skip brings the next block more channels
        block = separable if conv == "depthwise" else conv_bn_act
        self.skip = skip
        self.decode1 = block(c32, w1, 5)
        self.decode2 = block(w1, w2, 5)
        self.decode3 = block(w2 + c8, w3, 5)
        self.decode4 = block(w3 + c4, w4, 5)
        self.decode5 = block(w4 + c2, w5, 5)
        self.head = DepthHead(w5, 1, output, max_depth, batch_norm=True)

    def fuse_skip(self, x, skip):
        """x with the encoder's feature map of its size: their sum, their concatenation, or x alone."""
        if self.skip == "add":
            return x + skip
        if self.skip == "concat":
            return torch.cat([x, skip], 1)
        return x

    def forward(self, features):
        skip2, skip4, skip8, _, x = features                     # x (B, 1024, H/32, W/32)
        x = upsample2x(self.decode1(x))                          #   (B,  512, H/16, W/16)
        x = self.fuse_skip(upsample2x(self.decode2(x)), skip8)   #   (B,  256, H/8, W/8)
        x = self.fuse_skip(upsample2x(self.decode3(x)), skip4)   #   (B,  128, H/4, W/4)
        x = self.fuse_skip(upsample2x(self.decode4(x)), skip2)   #   (B,   64, H/2, W/2)
        # Paper and official code: upsample, then the head. Here: the head, then upsample. The head sees one
        # pixel at a time and nearest x2 only copies pixels, so the output is the same, for a quarter of the
        # head's work. (In training only the head's running variance differs, by its factor n / (n - 1).)
        return upsample2x(self.head(self.decode5(x)))            #   (B,    1, H, W)


class DepthHead(nn.Module):
    """The last layer of every decoder: a convolution to one number y per pixel, and y as metres."""

    def __init__(self, cin, kernel, output, max_depth, batch_norm=False):
        super().__init__()
        self.output = output
        self.max_depth = max_depth
        self.conv = nn.Conv2d(cin, 1, kernel, padding=kernel // 2, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(1) if batch_norm else nn.Identity()
        # A fresh network predicts about 3 m, NYU's mean; at 0, the ReLU would stop half of the gradients.
        offset = self.bn.bias if batch_norm else self.conv.bias
        nn.init.constant_(offset, self.y_of(min(3.0, max_depth / 2)))

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.output == "relu":  # FastDepth; 0 is a possible prediction
            return F.relu(y)
        if self.output == "reciprocal":  # DenseDepth, which learns max_depth / depth; in (0, max_depth)
            return self.max_depth / (1 + F.softplus(y))
        if self.output == "sigmoid":  # in (0, max_depth); may replace any of the others
            return self.max_depth * torch.sigmoid(y)
        return y  # linear, the layer table; may be negative

    def y_of(self, depth):
        """The y that means `depth` metres."""
        ratio = self.max_depth / depth
        if self.output == "reciprocal":
            return ratio - 1 + math.log(1 - math.exp(1 - ratio))  # softplus(y) = ratio - 1
        if self.output == "sigmoid":
            return -math.log(ratio - 1)
        return depth


class DepthNet(nn.Module):
    """An encoder and a decoder: image (B, 3, H, W) -> metres (B, 1, H/s, W/s), s = output_stride.

    Weights start from PyTorch's default, except the head's offset. The official decoder's do too: its own
    initialisation is never applied.
    """

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.output_stride = decoder.output_stride

    def forward(self, image):
        height, width = image.shape[-2:]
        if height % 32 or width % 32:
            raise ModelError(f"height and width must be multiples of 32, got {height}x{width}")
        return self.decoder(self.encoder(image))


# ------------------------------------------------------------------------------------------------------------
# Relatives: of each its table, its encoder, its decoder
# ------------------------------------------------------------------------------------------------------------

# The layer table: this project's own, ReLU throughout. Blocks 1, 3, 5 have the stride of FastDepth's 2, 4, 6,
# so two feature maps are at 1/4 and only the first layer's is at 1/2. MobileNet builds the encoder from it.
#    row       stride   out  skip       output at 224x224
LAYER_TABLE_ENCODER = (
    ("initial",   2,     32,  "1/2"),   # 112 x 112  --> iconv1, upsampled
    ("block1",    2,     64,  "1/4"),   #  56 x 56   --> iconv2, upsampled
    ("block2",    1,    128,  "1/4"),   #  56 x 56   --> iconv3
    ("block3",    2,    128,  ""),      #  28 x 28
    ("block4",    1,    256,  "1/8"),   #  28 x 28   --> iconv4
    ("block5",    2,    256,  ""),      #  14 x 14
    ("block6",    1,    512,  ""),      #  14 x 14
    ("block7",    1,    512,  ""),      #  14 x 14
    ("block8",    1,    512,  ""),      #  14 x 14
    ("block9",    1,    512,  ""),      #  14 x 14
    ("block10",   1,    512,  ""),      #  14 x 14
    ("block11",   1,    512,  "1/16"),  #  14 x 14   --> iconv5
    ("block12",   2,   1024,  ""),      #   7 x 7
    ("block13",   1,   1024,  "1/32"),  #   7 x 7    --> upconv5
)
# upconv: 3x3 transposed convolution of stride 2; iconv: 3x3 convolution over the channels of upconv and skip.
#    row         in   out       output at 224x224
LAYER_TABLE_DECODER = (
    ("upconv5", 1024,  512),  #  14 x 14
    ("iconv5",  1024,  512),  #  14 x 14   <-- block11 (512)
    ("upconv4",  512,  256),  #  28 x 28
    ("iconv4",   512,  256),  #  28 x 28   <-- block4 (256)
    ("upconv3",  256,  128),  #  56 x 56
    ("iconv3",   256,  128),  #  56 x 56   <-- block2 (128)
    ("upconv2",  128,   64),  # 112 x 112
    ("iconv2",   128,   64),  # 112 x 112  <-- block1 (64), upsampled from 56 x 56
    ("upconv1",   64,   32),  # 224 x 224
    ("iconv1",    64,   32),  # 224 x 224  <-- initial (32), upsampled from 112 x 112
    ("depth",     32,    1),  # 224 x 224  1x1
)


class LayerTableDecoder(nn.Module):
    """The second half of the layer table. Takes six feature maps; their `channels` are those of the rows."""
    output_stride = 1

    def __init__(self, channels, output="linear", max_depth=10.0):
        super().__init__()
        self.layers = nn.ModuleDict()
        for row, cin, cout in LAYER_TABLE_DECODER:
            layer = DepthHead(cin, 1, output, max_depth) if row == "depth" else conv_bn_act(cin, cout, 3)
            if row.startswith("upconv"):
                layer.conv = nn.ConvTranspose2d(cin, cout, 3, 2, padding=1, output_padding=1, bias=False)
            self.layers[row] = layer

    def forward(self, features):
        initial, block1, block2, block4, block11, x = features
        # iconv2 needs 64 channels at 1/2 and iconv1 needs 32 at full size, and the encoder has no such
        # feature map. block1 and initial have these channels at half the size, so they are upsampled.
        skips = (block11, block4, block2, upsample2x(block1), upsample2x(initial))
        for level, skip in zip("54321", skips):
            x = self.layers["upconv" + level](x)                          # (B, C, 2h, 2w)
            x = self.layers["iconv" + level](torch.cat([x, skip], 1))     # (B, 2C -> C, 2h, 2w)
        return self.layers["depth"](x)                                    # (B, 1, H, W)


class ImageNetEncoder(Encoder):
    """An encoder that first normalises RGB in [0, 1] as torchvision's ImageNet weights expect it."""

    def __init__(self):
        super().__init__()
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)  # constants, so not in the state dict
        self.register_buffer("std", std, persistent=False)

    def forward(self, image):
        return super().forward((image - self.mean) / self.std)


# MobileNetV2 without its last layer, which is for classes. t, c, n and s are the paper's: expansion inside a
# block, output channels, blocks in a row, stride of the first. The decoder is FastDepth's.
#    row        t     c    n    s    skip      output at 224x224
MOBILENET_V2 = (
    ("stage1",  1,   16,   1,   1,  "1/2"),   # 112 x 112  --> skip after decode4
    ("stage2",  6,   24,   2,   2,  "1/4"),   #  56 x 56   --> skip after decode3
    ("stage3",  6,   32,   3,   2,  "1/8"),   #  28 x 28   --> skip after decode2
    ("stage4",  6,   64,   4,   2,  ""),      #  14 x 14
    ("stage5",  6,   96,   3,   1,  "1/16"),  #  14 x 14
    ("stage6",  6,  160,   3,   2,  ""),      #   7 x 7
    ("stage7",  6,  320,   1,   1,  "1/32"),  #   7 x 7    --> decode1
)
NNCONV5_V2 = (96, 32, 24, 16, 16)  # widths to which its skips can be added


class InvertedResidual(nn.Module):
    """1x1 to t times the channels, depthwise 3x3, 1x1 without activation; plus the input if it fits."""

    def __init__(self, cin, cout, stride, t):
        super().__init__()
        wide = t * cin
        self.expand = conv_bn_act(cin, wide, 1, activation=nn.ReLU6) if t > 1 else nn.Identity()
        self.depthwise = conv_bn_act(wide, wide, 3, stride, groups=wide, activation=nn.ReLU6)
        self.project = conv_bn_act(wide, cout, 1, activation=nn.Identity)
        self.residual = stride == 1 and cin == cout

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(ImageNetEncoder):
    """Sandler et al. 2018: MobileNetV2: Inverted Residuals and Linear Bottlenecks."""

    def __init__(self):
        super().__init__()
        self.add("stem", conv_bn_act(3, 32, 3, 2, activation=nn.ReLU6), 32, skip="")
        cin = 32
        for row, t, cout, n, stride, skip in MOBILENET_V2:
            first = InvertedResidual(cin, cout, stride, t)
            rest = [InvertedResidual(cout, cout, 1, t) for _ in range(n - 1)]
            self.add(row, nn.Sequential(first, *rest), cout, skip)
            cin = cout


# DenseNet-169. A dense block adds 32 channels per layer to all that came before; a transition halves channels
# and size. It ends in 1664 channels; the 1632 found in some texts are what its last layer takes. Before the
# rows come a stem, 240 x 320 --> skip to up4, and a max pooling, 120 x 160 --> skip to up3.
#    row         layers   out  skip       output at 480x640
DENSENET169 = (
    ("dense1",       6,   256,  ""),      # 120 x 160
    ("transition1",  0,   128,  "1/8"),   #  60 x 80   --> skip to up2
    ("dense2",      12,   512,  ""),      #  60 x 80
    ("transition2",  0,   256,  "1/16"),  #  30 x 40   --> skip to up1
    ("dense3",      32,  1280,  ""),      #  30 x 40
    ("transition3",  0,   640,  ""),      #  15 x 20
    ("dense4",      32,  1664,  ""),      #  15 x 20
    ("norm",         0,  1664,  "1/32"),  #  15 x 20   --> bottom
)


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 to 128 channels, BN, ReLU, 3x3 to 32: (B, cin, H, W) -> (B, cin + 32, H, W)."""

    def __init__(self, cin):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, 128, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 32, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return torch.cat([x, y], 1)


def transition(cin, cout):
    """BN, ReLU, 1x1, mean of 2x2 pixels: (B, cin, H, W) -> (B, cout, H/2, W/2)."""
    return nn.Sequential(OrderedDict(
        norm=nn.BatchNorm2d(cin),
        act=nn.ReLU(),
        conv=nn.Conv2d(cin, cout, 1, bias=False),
        pool=nn.AvgPool2d(2),
    ))


class DenseNet169(ImageNetEncoder):
    """Huang et al. 2017: Densely Connected Convolutional Networks."""

    def __init__(self):
        super().__init__()
        self.add("stem", conv_bn_act(3, 64, 7, 2), 64, skip="1/2")
        self.add("pool", nn.MaxPool2d(3, 2, padding=1), 64, skip="1/4")
        cin = 64
        for row, layers, cout, skip in DENSENET169:
            if row.startswith("dense"):
                block = nn.Sequential(*[DenseLayer(cin + 32 * i) for i in range(layers)])
            elif row.startswith("transition"):
                block = transition(cin, cout)
            else:
                block = nn.BatchNorm2d(cout)
            self.add(row, block, cout, skip)
            cin = cout


class DenseDepthDecoder(nn.Module):
    """Alhashim, Wonka 2018: High Quality Monocular Depth Estimation via Transfer Learning.

    A step: bilinear x2, concatenate the skip, twice a 3x3 convolution and LeakyReLU 0.2; no batch norm. The
    authors' Keras code has both LeakyReLUs, their PyTorch code leaves out the first. Unless told otherwise,
    the Keras code halves all widths; its last layer is linear and predicts max_depth / depth.
    """
    output_stride = 2

    def __init__(self, channels, output="reciprocal", max_depth=10.0):
        super().__init__()
        c2, c4, c8, c16, c32 = channels
        self.bottom = nn.Conv2d(c32, c32, 1)
        self.up1 = self.step(c32 + c16, c32 // 2)
        self.up2 = self.step(c32 // 2 + c8, c32 // 4)
        self.up3 = self.step(c32 // 4 + c4, c32 // 8)
        self.up4 = self.step(c32 // 8 + c2, c32 // 16)
        self.head = DepthHead(c32 // 16, 3, output, max_depth)

    @staticmethod
    def step(cin, cout):
        """(B, cin, H, W) -> (B, cout, H, W)."""
        return nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(cout, cout, 3, padding=1),
            nn.LeakyReLU(0.2),
        )

    def forward(self, features):
        skip2, skip4, skip8, skip16, x = features
        x = self.bottom(F.relu(x))                                           # (B, 1664, H/32, W/32)
        x = self.up1(torch.cat([upsample2x(x, "bilinear"), skip16], 1))      # (B,  832, H/16, W/16)
        x = self.up2(torch.cat([upsample2x(x, "bilinear"), skip8], 1))       # (B,  416, H/8, W/8)
        x = self.up3(torch.cat([upsample2x(x, "bilinear"), skip4], 1))       # (B,  208, H/4, W/4)
        x = self.up4(torch.cat([upsample2x(x, "bilinear"), skip2], 1))       # (B,  104, H/2, W/2)
        return self.head(x)                                                  # (B,    1, H/2, W/2)


# ResNet-101. Paper: the stride of a layer in its first 1x1 convolution. Here, as in torchvision: in its 3x3.
#    row      blocks  stride  inside   out  skip       output at 480x640
RESNET101 = (
    ("layer1",   3,     1,      64,    256, "1/4"),   # 120 x 160  --> lateral2
    ("layer2",   4,     2,     128,    512, "1/8"),   #  60 x 80   --> lateral3
    ("layer3",  23,     2,     256,   1024, "1/16"),  #  30 x 40   --> lateral4
    ("layer4",   3,     2,     512,   2048, "1/32"),  #  15 x 20   --> lateral5
)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up; plus the input, through a 1x1 where its shape differs."""

    def __init__(self, cin, inside, cout, stride):
        super().__init__()
        self.reduce = conv_bn_act(cin, inside, 1)
        self.conv3x3 = conv_bn_act(inside, inside, 3, stride)
        self.restore = conv_bn_act(inside, cout, 1, activation=nn.Identity)
        self.shortcut = nn.Identity()
        if stride > 1 or cin != cout:
            self.shortcut = conv_bn_act(cin, cout, 1, stride, activation=nn.Identity)

    def forward(self, x):
        return F.relu(self.restore(self.conv3x3(self.reduce(x))) + self.shortcut(x))


class ResNet101(ImageNetEncoder):
    """He et al. 2016: Deep Residual Learning for Image Recognition."""

    def __init__(self):
        super().__init__()
        self.add("stem", conv_bn_act(3, 64, 7, 2), 64, skip="1/2")
        self.add("pool", nn.MaxPool2d(3, 2, padding=1), 64, skip="")
        cin = 64
        for row, blocks, stride, inside, cout, skip in RESNET101:
            first = Bottleneck(cin, inside, cout, stride)
            rest = [Bottleneck(cout, inside, cout, 1) for _ in range(blocks - 1)]
            self.add(row, nn.Sequential(first, *rest), cout, skip)
            cin = cout


class FeaturePyramid(nn.Module):
    """Lin et al. 2017: Feature Pyramid Networks for Object Detection, with a head that reads depth at 1/4.

    Paper: nearest x2; the sums go on unsmoothed. Here: bilinear x2; each sum is smoothed before it goes on.
    """
    output_stride = 4

    def __init__(self, channels, output="relu", max_depth=10.0, width=256):
        super().__init__()
        _, c4, c8, c16, c32 = channels
        self.lateral2 = nn.Conv2d(c4, width, 1)
        self.lateral3 = nn.Conv2d(c8, width, 1)
        self.lateral4 = nn.Conv2d(c16, width, 1)
        self.lateral5 = nn.Conv2d(c32, width, 1)
        self.smooth2 = nn.Conv2d(width, width, 3, padding=1)
        self.smooth3 = nn.Conv2d(width, width, 3, padding=1)
        self.smooth4 = nn.Conv2d(width, width, 3, padding=1)
        self.reduce = nn.Conv2d(width, width // 4, 3, padding=1)
        self.head = DepthHead(width // 4, 3, output, max_depth)

    def forward(self, features):
        _, x4, x8, x16, x32 = features
        p5 = self.lateral5(x32)                                              # (B, 256, H/32, W/32)
        p4 = self.smooth4(self.lateral4(x16) + upsample2x(p5, "bilinear"))   # (B, 256, H/16, W/16)
        p3 = self.smooth3(self.lateral3(x8) + upsample2x(p4, "bilinear"))    # (B, 256, H/8, W/8)
        p2 = self.smooth2(self.lateral2(x4) + upsample2x(p3, "bilinear"))    # (B, 256, H/4, W/4)
        return self.head(F.relu(self.reduce(p2)))                            # (B,   1, H/4, W/4)


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------

# size and geometry (data.py) are those of training and of the paper's evaluation.
SMALL = dict(size=(224, 224), geometry="fastdepth")
LARGE = dict(size=(480, 640), geometry="full")
OUTPUT = dict(output=("relu", "linear", "reciprocal", "sigmoid"))  # options of the decoders, and their values
NNCONV5 = dict(conv=("depthwise", "dense"), skip=("add", "concat", "none")) | OUTPUT
MODELS = {
    "fastdepth": dict(encoder=MobileNet, decoder=NNConv5, options=NNCONV5, **SMALL),
    "fastdepth-pruned": dict(
        encoder=partial(MobileNet, pruned=True), decoder=partial(NNConv5, widths=NNCONV5_PRUNED),
        options=NNCONV5, **SMALL),
    "fastdepth-table": dict(
        encoder=partial(MobileNet, LAYER_TABLE_ENCODER, activation=nn.ReLU), decoder=LayerTableDecoder,
        options=OUTPUT, **SMALL),
    "mobilenetv2-nnconv5": dict(
        encoder=MobileNetV2, decoder=partial(NNConv5, widths=NNCONV5_V2), options=NNCONV5, **SMALL),
    "densedepth": dict(encoder=DenseNet169, decoder=DenseDepthDecoder, options=OUTPUT, **LARGE),
    "fpn": dict(encoder=ResNet101, decoder=FeaturePyramid, options=OUTPUT, **LARGE),
}


def build_model(name, max_depth=10.0, **options):
    """A freshly initialised network of MODELS. ModelError for an unknown name, option or value.

    max_depth: metres, for the outputs that are bounded by it.
    options: of the decoder: output (see DepthHead), and of NNConv5 also conv and skip.
    """
    if name not in MODELS:
        raise ModelError(f"unknown network {name!r}: choose one of {', '.join(MODELS)}")
    spec = MODELS[name]
    allowed = spec["options"]
    for option, value in options.items():
        if option not in allowed:
            raise ModelError(f"{name} has no option {option!r}, only {', '.join(allowed)}")
        if value not in allowed[option]:
            raise ModelError(f"unknown {option} {value!r}: choose one of {', '.join(allowed[option])}")
    if not 0 < max_depth < math.inf:
        raise ModelError(f"max_depth must be a number of metres above 0, not {max_depth}")
    encoder = spec["encoder"]()
    decoder = spec["decoder"](encoder.channels, max_depth=max_depth, **options)
    return DepthNet(encoder, decoder)


# ------------------------------------------------------------------------------------------------------------
# Weights from elsewhere: checkpoints, torchvision's ImageNet encoders, the FastDepth authors' published files
# ------------------------------------------------------------------------------------------------------------


class Ignored:
    """Stands for the numpy scalars of a best_result: numpy itself would trust any bytes that a file gives."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class StandInUnpickler(pickle.Unpickler):
    """Rebuilds tensors, puts stand-ins for known modules and for numpy, and refuses everything else."""
    CLASSES = ("torch.nn.modules.", "models", "metrics", "imagenet.")  # PyTorch's and the authors'
    ALLOWED = (
        "collections.OrderedDict", "builtins.set", "__builtin__.set", "_codecs.encode", "torch.Size",
        "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter",
        "torch.nn.backends.thnn._get_thnn_function_backend",  # of PyTorch up to 1.2; it returns None
    )

    def find_class(self, module, name):
        """pickle calls this for every class and function that a file names."""
        if f"{module}.{name}" in self.ALLOWED:
            return super().find_class(module, name)
        if module.split(".")[0] == "numpy":
            return Ignored
        if module.startswith(self.CLASSES):
            return type(name, (nn.Module,), {})  # its objects get the file's attributes, and none of its code
        raise pickle.UnpicklingError(f"it names {module}.{name}, no tensor or module; nothing was run")


class StandInPickle:
    """What torch.load needs of the module `pickle`."""
    Unpickler = StandInUnpickler

    @staticmethod
    def load(file, **options):
        """What pickle.load returns, by the unpickler above."""
        return StandInUnpickler(file, **options).load()


def one_line(error):
    """The beginning of an error's text, on one line; torch writes pages."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_file(file):
    """What torch.save wrote, on the CPU. No code in it is run; a pickled module keeps only its tensors.

    The one place that calls torch.load. ModelError names the file if it is missing, cut off or refused.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise ModelError(f"{file}: is a folder: name the file in it, such as best.pt") from None
    except pickle.UnpicklingError:
        pass  # more than tensors and plain values: perhaps one of FastDepth's modules
    except Exception as error:  # cut off, foreign, or TorchScript, which the call below would load
        raise ModelError(f"{file}: not a whole torch.save file ({one_line(error)}): copy it again") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files hold the source of their classes, torch compares it
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=StandInPickle)
    except Exception as error:  # a hostile file may raise anything
        raise ModelError(f"{file}: not a file of weights ({one_line(error)})") from None


def state_dict_of(saved):
    """{name: tensor} of a state dict, alone or under "state_dict", or of a pickled module."""
    if isinstance(saved, nn.Module):
        try:
            saved = saved.state_dict()
        except AttributeError:  # the file left out or replaced what every module has
            saved = {}
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    if not (isinstance(state, dict) and state and all(isinstance(t, torch.Tensor) for t in state.values())):
        raise ModelError("it holds no weights: no state dict and no module")
    return {str(name): tensor for name, tensor in state.items()}


def load_by_order(module, state, unused=()):
    """Load a state dict whose names differ from ours but whose order does not. Returns the names left out.

    Every tensor must fit, but for those whose name starts with one of `unused`; else ModelError.
    """
    counts = "num_batches_tracked"  # not in files from before PyTorch 0.4.1, and of no use here
    ours = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(counts)}
    theirs = {name: tensor for name, tensor in state.items() if not name.endswith(counts)}
    left_out = [name for name in theirs if name.startswith(tuple(unused))]
    pairs = list(zip_longest(ours, (name for name in theirs if name not in left_out)))
    for name, other in pairs:
        wanted = f"{name} {tuple(ours[name].shape)}" if name else "nothing"
        found = f"{other} {tuple(theirs[other].shape)}" if other else "nothing"
        if name is None or other is None or ours[name].shape != theirs[other].shape:
            raise ModelError(f"{wanted} is wanted where the file has {found}")
    module.load_state_dict({name: theirs[other] for name, other in pairs}, strict=False)
    return left_out


def load_model(file, device="cpu"):
    """A file -> the network in eval mode, and its config: model, options, size, geometry, max_depth, frame.

    size is the (H, W) of training, frame that of the images before `geometry` brought them to it. Takes
    checkpoints of train.py, and the modules that FastDepth's authors published (MobileNetSkipAdd, its pruned
    version, and the variants with other skips). ModelError names the file if it is neither.
    """
    saved = read_file(file)
    load = load_checkpoint if isinstance(saved, dict) and "weights" in saved else load_published
    try:
        model, config = load(saved)
    except (ModelError, RuntimeError, TypeError) as error:  # of load_state_dict and of strange options
        raise ModelError(f"{file}: {one_line(error)}") from None
    return model.to(device).eval(), config


FORMAT = 2  # of a checkpoint: dict(format=, config=, weights=, and what train.py needs to go on)
CONFIG = dict(model=str, options=dict, size=(int, int), geometry=str, max_depth=float, frame=(int, int))


def load_checkpoint(saved):
    """The dict of a checkpoint -> the network and its config."""
    if saved.get("format") != FORMAT:
        raise ModelError(f"a checkpoint of format {saved.get('format', 1)}, and this code reads {FORMAT}: "
                         "train it again, or export it to .onnx with the code that wrote it")
    config = saved.get("config")
    for key, kind in CONFIG.items():
        value = config.get(key) if isinstance(config, dict) else None
        found = tuple(map(type, value)) if isinstance(value, tuple) else type(value)
        if found != kind or kind == (int, int) and min(value) < 1:
            raise ModelError(f"not a checkpoint of train.py: the {key} in its config is {value!r:.80}")
    model = build_model(config["model"], config["max_depth"], **config["options"])
    model.load_state_dict(state_dict_of(saved["weights"]))
    return model, config


def load_published(saved):
    """A module that FastDepth's authors pickled, or a dict with one as "model" -> the network, its config."""
    module = saved.get("model", saved) if isinstance(saved, dict) else saved
    kind = type(module).__name__
    options = dict(MobileNetSkipAdd={}, MobileNetSkipConcat=dict(skip="concat"), MobileNet=dict(skip="none"))
    if kind not in options:
        raise ModelError(f"neither a checkpoint of train.py nor a published FastDepth, but {kind}")
    state = state_dict_of(module)
    stem = next(iter(state.values()))  # (filters, 3, 3, 3)
    name = "fastdepth-pruned" if len(stem) == 16 else "fastdepth"
    model = build_model(name, **options[kind])
    load_by_order(model, state)
    return model, dict(model=name, options=options[kind], max_depth=10.0, frame=(480, 640), **SMALL)


# Encoder -> torchvision's file, if it has one, and what an ImageNet file holds beyond the encoder.
IMAGENET = {
    "MobileNet": (None, ("module.fc.", "fc.")),
    "MobileNetV2": ("mobilenet_v2-b0353104.pth", ("features.18.", "classifier.")),
    "DenseNet169": ("densenet169-b2777c0a.pth", ("classifier.",)),
    "ResNet101": ("resnet101-63fe2227.pth", ("fc.",)),
}


def load_encoder(model, file=None):
    """Put ImageNet weights into model.encoder: a file's, or torchvision's, downloaded and checked by hash.

    Returns the names in the file that the encoder does not use. ModelError unless the rest fits exactly.
    """
    kind = type(model.encoder).__name__
    name, unused = IMAGENET[kind]
    if file is not None:
        saved = read_file(file)
        if isinstance(saved, dict) and "weights" in saved:
            raise ModelError(f"{file}: a checkpoint of train.py: give it to --init, not to --encoder-weights")
    elif name is None:
        raise ModelError(f"torchvision has no weights for {kind}: take the FastDepth authors' "
                         "imagenet/model_best.pth.tar, or any of the same order, with --encoder-weights FILE")
    else:
        file = f"https://download.pytorch.org/models/{name}"
        try:
            saved = torch.hub.load_state_dict_from_url(file, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        except Exception as error:  # a damaged file in the cache raises errors of many types
            raise ModelError(f"{file}: cannot be downloaded or read ({one_line(error)}): fetch it elsewhere "
                             "and give it as --encoder-weights FILE") from None
    try:
        return load_by_order(model.encoder, state_dict_of(saved), unused)
    except (ModelError, RuntimeError, TypeError) as error:  # of damaged modules
        raise ModelError(f"{file}: does not fit {kind}: {one_line(error)}") from None


# ------------------------------------------------------------------------------------------------------------
# Counting, folding, and the command
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layers(model, height=224, width=224):
    """Every convolution in the order it runs: (name, output shape, weights, multiply-accumulates) per image.

    Runs a copy on the meta device, where tensors have a shape and no numbers, so that any size is instant.
    """
    rows = []

    def note(name, conv, inputs, output):
        """Record a convolution. Each weight is used once per output pixel; if transposed, per input pixel."""
        grid = inputs[0] if isinstance(conv, nn.ConvTranspose2d) else output
        weights = conv.weight.numel()
        rows.append((name, tuple(output.shape[1:]), weights, grid[0, 0].numel() * weights))

    model = copy.deepcopy(model).to("meta").eval()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(partial(note, name))
    model(torch.empty(1, 3, height, width, device="meta"))
    return rows


def count(model, height=224, width=224):
    """dict(parameters, conv_weights, macs) for one image; macs are multiply-accumulates, as in `layers`.

    conv_weights leaves out biases and batch norm, as FastDepth's figures do.
    """
    _, _, weights, macs = zip(*layers(model, height, width))
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, conv_weights=sum(weights), macs=sum(macs))


@torch.no_grad()
def fold_batch_norm(model):
    """A copy in eval mode, channels last, with each batch norm folded into the convolution before it."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    for block in model.modules():
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            transposed = isinstance(block.conv, nn.ConvTranspose2d)
            block.conv = fuse_conv_bn_eval(block.conv, block.bn, transposed)
            block.bn = nn.Identity()
    return model


def main():
    parser = argparse.ArgumentParser(description="Print the sizes of all networks, or one layer by layer.")
    parser.add_argument("name", nargs="?", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    chosen = parser.parse_args().name
    if chosen:
        print(f"{'layer':44}{'output':>16}{'weights':>12}{'MMACs':>10}")
        for layer, shape, weights, macs in layers(build_model(chosen), *MODELS[chosen]["size"]):
            output = " x ".join(str(n) for n in shape)
            print(f"{layer:44}{output:>16}{weights:12,}{macs / 1e6:10.2f}")
        print()
    print(f"{'network':20}{'input':>10}{'output':>8}{'parameters':>13}{'conv weights':>14}{'GMACs':>10}")
    for name in [chosen] if chosen else MODELS:
        height, width = MODELS[name]["size"]
        with torch.device("meta"):  # sizes need no numbers
            model = build_model(name)
        total = count(model, height, width)
        print(f"{name:20}{height:>6}x{width}{'1/':>7}{model.output_stride}{total['parameters']:13,}"
              f"{total['conv_weights']:14,}{total['macs'] / 1e9:10.4f}")


# ------------------------------------------------------------------------------------------------------------
# A faster gradient for depthwise convolutions on CPUs, with the same state dict. Only train.py uses it
# ------------------------------------------------------------------------------------------------------------


def use_fast_depthwise_gradient(model):
    """Turn every depthwise convolution of FastDepth's kinds, 3x3 and 5x5, into a FastDepthwise, in place.

    Those have no bias, and a padding that keeps the size at stride 1. Call it before compile and DDP.
    """
    for conv in [module for module in model.modules() if type(module) is nn.Conv2d]:
        depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.bias is None
        padded = (conv.kernel_size, conv.padding) in [((3, 3), (1, 1)), ((5, 5), (2, 2))]
        if depthwise and padded and conv.padding_mode == "zeros" and conv.dilation == (1, 1):
            conv.__class__ = FastDepthwise


class FastDepthwise(nn.Conv2d):
    """A depthwise convolution with its own gradient on CPUs; elsewhere, and without gradients, nn.Conv2d."""

    def forward(self, x):
        if x.device.type == "cpu" and torch.is_grad_enabled() and self.bias is None:  # folding adds a bias
            return DepthwiseGradient.apply(x, self.weight, self.stride, self.padding)
        return super().forward(x)


class DepthwiseGradient(torch.autograd.Function):
    """The gradient by operations for which PyTorch has fast CPU kernels (oneDNN, channels last).

    With PyTorch's own, a training step of FastDepth in bfloat16 takes nearly twice as long.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        """x (B, C, H, W), weight (C, 1, k, k) -> (B, C, H/stride, W/stride), rounded up."""
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        """grad (B, C, H/stride, W/stride) -> the gradients of x (B, C, H, W) and of weight (C, 1, k, k)."""
        x, weight = ctx.saved_tensors
        x = x.to(grad.dtype)  # as autocast did
        stride, padding = ctx.options
        channels, _, _, width = weight.shape

        # Of the weight. PyTorch's kernel is fast up to a width of 3, so a width of 5 is computed in two
        # parts: the left three columns and the right three, which share the middle one.
        if width == 5:
            shape = channels, 1, 5, 3  # 5 high, 3 wide
            left = conv2d_weight(F.pad(x, (2, 0, 2, 2)), shape, grad, stride, groups=channels)
            right = conv2d_weight(F.pad(x, (0, 2, 2, 2)), shape, grad, stride, groups=channels)
            grad_weight = torch.cat([left, right[..., 1:]], 3)
        else:
            grad_weight = conv2d_weight(x, weight.shape, grad, stride, padding, groups=channels)

        # Of x. PyTorch's kernel is slow; that of a forward convolution is not. It runs over the gradient,
        # with zeros at the pixels that the stride skipped, and its weights are turned by 180 degrees.
        if stride != (1, 1):
            strided = grad
            grad = torch.zeros_like(x)  # (B, C, H, W)
            grad[:, :, ::stride[0], ::stride[1]] = strided
        grad_x = F.conv2d(grad, weight.flip(2, 3).to(x.dtype), padding=padding, groups=channels)
        return grad_x, grad_weight, None, None


if __name__ == "__main__":
    main()
