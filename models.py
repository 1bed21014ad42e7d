"""Backbones: images in, embeddings out. The networks of the homework and of face recognition's history.

    model = models.make("iresnet50", dim=512, size=112)   # (B,3,112,112) float -> (B,512), not normalised
    print(models.table())                                 # name, parameters, multiply-adds, description
    folded = models.fold(model)                           # batch norms folded away, for inference

A network is a trunk and a neck. The trunk is the published layers up to the last feature map; the neck turns
that map into the embedding. The file begins with the blocks that families share, goes through the families,
oldest idea first, and ends with what the other scripts call: make, macs, table, fold, synchronise_batch_norms.
A family is a table of depths and widths and a function of (variant, dim, size).

Three rules hold throughout. Modules are registered in the order in which they run: so torchvision's weights fit
by position, and fold sees from the order alone which batch norm follows which layer. Trunks are fully
convolutional, and a neck that flattens its map first pools it to the side it was built for: so a network also
runs on other sizes than its own (training may start on small images). Dropout and drop-path draw from torch's
global generator and keep no state: so seeding that generator seeds the step.

Counts in the docstrings are of the network as published, with its ImageNet head where it has one; a MAC is
one multiply-add of a convolution or linear layer. The test suite recomputes them.
"""
import copy
import difflib
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.flop_counter import FlopCounterMode


# ------------------------------------------------------------------------------------- blocks and necks

class FaceNet(nn.Module):
    """Trunk and neck: images (B, 3, H, H) -> embeddings (B, dim). Images below smallest pixels are enlarged."""

    folded = False                                          # fold() sets it on its copy, and so works once
    size = None                                             # side of the images it was made for, set by make()

    def __init__(self, trunk, neck, smallest=1):
        super().__init__()
        self.trunk = nn.Sequential(*trunk)
        self.neck = nn.Sequential(*neck)
        self.smallest = smallest

    def forward(self, x):
        if x.shape[-1] < self.smallest:
            x = F.interpolate(x, size=self.smallest, mode="bilinear")
        return self.neck(self.trunk(x))


class Residual(nn.Module):
    """act(body(x) + shortcut(x)): the sum that every residual family but ConvNeXt is made of."""

    def __init__(self, body, shortcut=(), act=None):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*shortcut)            # empty: the identity
        self.act = act or nn.Identity()

    def forward(self, x):
        y = self.body(x)
        y += self.shortcut(x)                               # in place: saves a map's memory
        return self.act(y)


class SqueezeExcite(nn.Module):
    """A gate on each channel, computed from the means of all (Hu et al., arXiv 1709.01507, section 3)."""

    def __init__(self, channels):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 16)
        self.excite = nn.Linear(channels // 16, channels)

    def forward(self, x):
        means = x.mean((2, 3))                              # (B,C)
        hidden = F.relu(self.squeeze(means))                # (B,C/16)
        gate = torch.sigmoid(self.excite(hidden))           # (B,C)
        return x * gate[..., None, None]


class PoolTo(nn.AdaptiveAvgPool2d):
    """Average-pools a map to side x side; a map of that side passes untouched."""

    def forward(self, x):
        if x.shape[-1] == self.output_size:
            return x
        return super().forward(x)


def conv_bn(cin, cout, kernel=3, stride=1, groups=1, act=nn.ReLU, eps=1e-5):
    """Convolution, batch norm and, unless act is None, activation, as a list of layers."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(cout, eps)]
    if act is nn.PReLU:
        layers.append(act(cout))                            # a slope for each channel
    elif act:
        layers.append(act(inplace=True))
    return layers


def conv_relu(cin, cout, kernel=3):
    """Convolution with bias and ReLU, as a list of layers: how networks were before batch norm (2015)."""
    return [nn.Conv2d(cin, cout, kernel, padding=kernel // 2), nn.ReLU(True)]


def stages(block, cin, rows):
    """For each row (cout, depth, stride, ...): depth blocks to cout channels, the first one with stride."""
    layers = []
    for cout, depth, stride, *options in rows:
        for _ in range(depth):
            layers.append(block(cin, cout, stride, *options))
            cin, stride = cout, 1
    return layers


def map_side(size, stride):
    """Side of the feature map of images of size pixels where each halving rounds up; stride is 2^halvings."""
    return -(-size // stride)


def linear_neck(channels, side, dim, bias=True):
    """The flattened map and a linear layer."""
    return [PoolTo(side), nn.Flatten(), nn.Linear(channels * side * side, dim, bias)]


def flat_neck(channels, dim, side, max_side=4):
    """The flattened map, linear, batch norm: the neck of the ImageNet families, side the map's side.

    A face is aligned, so a place of the map means a part of the face; the global average of the published
    heads throws that away. Measured on synthetic faces, 5 epochs: EER 4.0 % flattened, 7.6 % with
    MobileFaceNet's depthwise filter, 26 % averaged. More than 512 channels are first narrowed, and more than
    max_side x max_side places averaged: with 4 x 4 the layer has at most 4.2M parameters for 512-d. The batch
    norm centres the embedding.
    """
    layers = []
    if channels > 512:
        layers = conv_bn(channels, 512, 1, act=None)
        channels = 512
    side = max(1, min(side, max_side))
    layers += linear_neck(channels, side, dim, bias=False)
    return layers + [nn.BatchNorm1d(dim)]


def initialise(layers, rule):
    """Apply rule to the weights of all convolutions and linear layers, zero their biases; returns layers."""
    for module in nn.ModuleList(layers).modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or module.weight.is_meta:
            continue                                        # on the meta device there are no values to draw
        rule(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return layers


he_normal = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")   # arXiv 1502.01852, section 2.2
xavier_uniform = partial(nn.init.kaiming_uniform_, nonlinearity="linear")           # as in Caffe: variance 1/fan_in
normal_001 = partial(nn.init.normal_, std=0.01)


# ------------------------------------------------------------------------- before the residual networks

def lenetpp(dim, size):
    """LeNet++ of the centre loss (Wen, Zhang, Li, Qiao, ECCV 2016, table 1), FC on the flattened map.

    799,394 parameters for 28-pixel digits of one channel and a 2-d embedding, pools rounding up as in Caffe.
    """
    layers, cin = [], 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(cin, width, 5, padding=2), nn.PReLU(width)]
        layers += [nn.Conv2d(width, width, 5, padding=2), nn.PReLU(width)]
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        cin = width
    neck = linear_neck(128, map_side(size, 8), dim)
    return FaceNet(initialise(layers, xavier_uniform), initialise(neck, xavier_uniform))


def alexnet(dim, size):
    """AlexNet in its one-column form (Krizhevsky, arXiv 1404.5997), the trunk as torchvision's.

    2,469,696 parameters in the trunk; the published FC layers are ImageNet's and are left out. The first
    paper draws weights from N(0, 0.01), fit for pixels up to 255; He's rule fits inputs near 1. The trunk
    shrinks fewer than 63 pixels to nothing, so smaller images are enlarged to 63.
    """
    layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2)]
    layers += conv_relu(64, 192, 5) + [nn.MaxPool2d(3, 2)]
    layers += conv_relu(192, 384) + conv_relu(384, 256) + conv_relu(256, 256)
    layers.append(nn.MaxPool2d(3, 2))
    side = (size - 63) // 32 + 1
    return FaceNet(initialise(layers, he_normal), flat_neck(256, dim, side), smallest=63)


VGG = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


def vgg(variant, dim, size):
    """VGG configurations A and D (Simonyan, Zisserman, arXiv 1409.1556, table 1), without batch norm.

    Parameters in the trunk: VGG-11 9,220,480, VGG-16 14,714,688; the published FC layers are ImageNet's and
    are left out. The paper trains A first and starts D from it; He's rule spares that.
    """
    layers, cin = [], 3
    for width, depth in zip((64, 128, 256, 512, 512), VGG[variant]):
        for _ in range(depth):
            layers += conv_relu(cin, width)
            cin = width
        layers.append(nn.MaxPool2d(2))
    return FaceNet(initialise(layers, he_normal), flat_neck(512, dim, size // 32))


GOOGLENET = (               # Inception: 1x1; reduce, 3x3; reduce, "5x5"; after the pool. A number: max-pool
    3,
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    3,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    2,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128))


class Inception(nn.Module):
    """Four branches side by side, their channels concatenated."""

    def __init__(self, cin, one, reduce3, three, reduce5, five, pool):
        super().__init__()
        conv = partial(conv_bn, eps=1e-3)
        branches = (
            conv(cin, one, 1),
            conv(cin, reduce3, 1) + conv(reduce3, three),
            conv(cin, reduce5, 1) + conv(reduce5, five),
            [nn.MaxPool2d(3, 1, 1)] + conv(cin, pool, 1))
        self.branches = nn.ModuleList(nn.Sequential(*layers) for layers in branches)
        self.channels = one + three + five + pool

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def googlenet(dim, size):
    """GoogLeNet (Szegedy et al., arXiv 1409.4842, table 1) as in torchvision: with batch norm, with 3x3 where
    the paper has 5x5, and without the auxiliary classifiers. 6,624,904 parameters, 1.50G MACs at 224.
    """
    conv = partial(conv_bn, eps=1e-3)
    layers = conv(3, 64, 7, 2) + [nn.MaxPool2d(3, 2, ceil_mode=True)]
    layers += conv(64, 64, 1) + conv(64, 192)
    cin = 192
    for row in GOOGLENET:
        if isinstance(row, int):
            layers.append(nn.MaxPool2d(row, 2, ceil_mode=True))
        else:
            layers.append(Inception(cin, *row))
            cin = layers[-1].channels
    side = ((size + 1) // 16 + 1) // 2                      # pools that round up may drop a last column
    return FaceNet(initialise(layers, he_normal), flat_neck(cin, dim, side))


class MaxFeatureMap(nn.Module):
    """The larger of the two halves of the channels: an activation by competition."""

    def forward(self, x):
        one, other = x.chunk(2, 1)
        return torch.maximum(one, other)                    # (B,2C,...) -> (B,C,...)


LIGHTCNN = {9: (0, 0, 0, 0), 29: (1, 2, 3, 4)}              # residual blocks before each widening


def lightcnn(variant, dim, size):
    """Light CNN (Wu, He, Sun, Tan, arXiv 1511.02683, section 3), FC and MFM on the flattened map.

    Parameters for 128-pixel images of one channel and a 256-d embedding, by the layers of the authors'
    light_cnn.py: LightCNN-9 5,480,864, LightCNN-29 12,573,280. Their dropout behind the embedding belongs to
    their softmax: the losses here compare embeddings, which stay whole. Plain layers start from Xavier's
    rule, residual bodies near zero as in SphereFace: with Xavier's, every sum doubles the signal's power.
    """
    def mfm(cin, cout, kernel):
        return [nn.Conv2d(cin, 2 * cout, kernel, padding=kernel // 2), MaxFeatureMap()]

    layers = mfm(3, 48, 5) + [nn.MaxPool2d(2, ceil_mode=True)]
    widths = (48, 96, 192, 128, 128)
    for depth, cin, cout in zip(LIGHTCNN[variant], widths, widths[1:]):
        for _ in range(depth):
            layers.append(Residual(mfm(cin, cin, 3) + mfm(cin, cin, 3)))
        layers += mfm(cin, cin, 1) + mfm(cin, cout, 3)
        if cin != 192:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
    neck = linear_neck(128, map_side(size, 16), 2 * dim) + [MaxFeatureMap()]
    for layer in layers + neck:
        rule = xavier_uniform
        if isinstance(layer, Residual):
            rule = normal_001
        initialise([layer], rule)
    return FaceNet(layers, neck)


# ----------------------------------------------------------------------------------- residual networks

def shortcut(cin, cout, stride):
    """A projection where the sum's shapes differ, else nothing: the identity."""
    if stride > 1 or cin != cout:
        return conv_bn(cin, cout, 1, stride, act=None)
    return []


def basic(cin, cout, stride, se=False):
    body = conv_bn(cin, cout, 3, stride) + conv_bn(cout, cout, act=None)
    if se:
        body.append(SqueezeExcite(cout))
    return Residual(body, shortcut(cin, cout, stride), nn.ReLU(True))


def bottleneck(cin, cout, stride, se):
    """The stride is in the 3x3, as in torchvision; the paper has it in the first 1x1."""
    width = cout // 4
    body = conv_bn(cin, width, 1) + conv_bn(width, width, 3, stride)
    body += conv_bn(width, cout, 1, act=None)
    if se:
        body.append(SqueezeExcite(cout))
    return Residual(body, shortcut(cin, cout, stride), nn.ReLU(True))


RESNET = {                                                  # block, width of the first stage, depths
    18: (basic, 64, (2, 2, 2, 2)),
    34: (basic, 64, (3, 4, 6, 3)),
    50: (bottleneck, 256, (3, 4, 6, 3)),
    101: (bottleneck, 256, (3, 4, 23, 3)),
    152: (bottleneck, 256, (3, 8, 36, 3))}


def resnet(variant, dim, size, se=False):
    """ResNet (He, Zhang, Ren, Sun, arXiv 1512.03385, table 1); with se, SE-ResNet (arXiv 1709.01507).

    Parameters: 18 11.69M, 34 21.80M, 50 25.56M, 101 44.55M, 152 60.19M (torchvision); SE-ResNet-50 28.09M,
    SE-ResNet-101 49.33M (mmpretrain's model list).
    """
    block, width, depths = RESNET[variant]
    layers = conv_bn(3, 64, 7, 2, act=None)
    layers += [nn.MaxPool2d(3, 2, 1), nn.ReLU(True)]        # pooled first: fewer values to clip
    widths = (width, 2 * width, 4 * width, 8 * width)
    layers += stages(partial(block, se=se), 64, zip(widths, depths, (1, 2, 2, 2)))
    return FaceNet(initialise(layers, he_normal), flat_neck(8 * width, dim, map_side(size, 32)))


SPHERE = {                                                  # residual blocks of each stage
    4: (0, 0, 0, 0),
    10: (0, 1, 2, 0),
    20: (1, 2, 4, 1),
    36: (2, 4, 8, 2),
    64: (3, 8, 16, 3)}


def sphere(variant, dim, size):
    """SphereFace's networks (Liu, Wen, Yu, Li, Raj, Song, arXiv 1704.08063, table 2): no batch norm, FC neck.

    sphere20 has 22,666,944 parameters for 112x96 faces and 512-d, by the layers of the authors'
    make_spherenet.py; from there too the residual convolutions' missing bias and start from N(0, 0.01).
    """
    def conv(cin, cout, stride, bias, rule):
        layer = nn.Conv2d(cin, cout, 3, stride, 1, bias=bias)
        return initialise([layer], rule) + [nn.PReLU(cout)]

    layers, cin = [], 3
    for width, depth in zip((64, 128, 256, 512), SPHERE[variant]):
        layers += conv(cin, width, 2, True, xavier_uniform)
        for _ in range(depth):
            body = conv(width, width, 1, False, normal_001)
            body += conv(width, width, 1, False, normal_001)
            layers.append(Residual(body))
        cin = width
    neck = linear_neck(512, map_side(size, 16), dim)
    return FaceNet(layers, initialise(neck, xavier_uniform))


def face_block(cin, cout, stride, se):
    body = [nn.BatchNorm2d(cin)] + conv_bn(cin, cout, act=nn.PReLU)
    body += conv_bn(cout, cout, 3, stride, act=None)
    if se:
        body.append(SqueezeExcite(cout))
    return Residual(body, shortcut(cin, cout, stride))


IRESNET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


def iresnet(variant, dim, size, se=False):
    """The face ResNet of ArcFace (Deng, Guo, Xue, Zafeiriou, arXiv 1801.07698, section 3.1): a stem of full
    resolution, blocks BN-conv-BN-PReLU-conv-BN, neck BN-dropout-FC-BN on the flattened map.

    Parameters at 112 pixels and 512-d, by the layers of the authors' arcface_torch/backbones/iresnet.py: 18
    24,025,600, 34 34,139,328, 50 43,590,848, 100 65,156,160; MACs 2.6G, 4.5G, 6.3G, 12.1G (2.6, 6.3 and 12.1
    in their README). As there, convolutions start from N(0, 0.1) and the last batch norm's scale stays 1.
    Dropout is 0.2: the paper has 0.4, that code 0. With se, a squeeze-excite ends each body.
    """
    rows = zip((64, 128, 256, 512), IRESNET[variant], (2, 2, 2, 2))
    layers = conv_bn(3, 64, act=nn.PReLU) + stages(partial(face_block, se=se), 64, rows)
    side = map_side(size, 16)
    neck = [PoolTo(side), nn.BatchNorm2d(512), nn.Flatten(), nn.Dropout(0.2)]
    neck += [nn.Linear(512 * side * side, dim), nn.BatchNorm1d(dim)]
    neck[-1].weight.requires_grad_(False)
    return FaceNet(initialise(layers, partial(nn.init.normal_, std=0.1)), neck)


# ------------------------------------------------------------------------------------ mobile networks

MOBILENETV2 = (                                             # width, depth, stride, expansion
    (16, 1, 1, 1),
    (24, 2, 2, 6),
    (32, 3, 2, 6),
    (64, 4, 2, 6),
    (96, 3, 1, 6),
    (160, 3, 2, 6),
    (320, 1, 1, 6))
MOBILEFACENET = (                                           # likewise
    (64, 5, 2, 2),
    (128, 1, 2, 4),
    (128, 6, 1, 2),
    (128, 1, 2, 4),
    (128, 2, 1, 2))


def inverted(cin, cout, stride, expand, act):
    """Widen (1x1), filter each channel (3x3), narrow (1x1, no activation); a sum where shapes agree."""
    width = cin * expand
    body = []
    if expand > 1:
        body += conv_bn(cin, width, 1, act=act)
    body += conv_bn(width, width, 3, stride, groups=width, act=act)
    body += conv_bn(width, cout, 1, act=None)
    if stride == 1 and cin == cout:
        return Residual(body)
    return nn.Sequential(*body)


def mobilenetv2(dim, size):
    """MobileNetV2 (Sandler, Howard, Zhu, Zhmoginov, Chen, arXiv 1801.04381, table 2).

    3,504,872 parameters, 0.30G MACs at 224 (torchvision).
    """
    layers = conv_bn(3, 32, 3, 2, act=nn.ReLU6)
    layers += stages(partial(inverted, act=nn.ReLU6), 32, MOBILENETV2)
    layers += conv_bn(320, 1280, 1, act=nn.ReLU6)
    return FaceNet(initialise(layers, he_normal), flat_neck(1280, dim, map_side(size, 32)))


def mobilefacenet(dim, size):
    """MobileFaceNet (Chen, Liu, Gao, Han, arXiv 1804.07573, table 1): the same blocks with PReLU, and a neck
    that learns to weigh the places of the map: a depthwise filter as large as the map, then a linear layer.

    1,003,136 parameters at 112 pixels and 128-d, 995,584 without the slopes of PReLU (the paper: 0.99M);
    0.221G MACs (arXiv 1908.09124 counts 221M).
    """
    layers = conv_bn(3, 64, 3, 2, act=nn.PReLU)
    layers += conv_bn(64, 64, groups=64, act=nn.PReLU)        # depthwise
    layers += stages(partial(inverted, act=nn.PReLU), 64, MOBILEFACENET)
    layers += conv_bn(128, 512, 1, act=nn.PReLU)
    side = map_side(size, 16)
    neck = [PoolTo(side), nn.Conv2d(512, 512, side, groups=512, bias=False)]        # (B,512,1,1)
    neck += [nn.BatchNorm2d(512), nn.Flatten(), nn.Linear(512, dim, bias=False), nn.BatchNorm1d(dim)]
    return FaceNet(initialise(layers, he_normal), neck)


# ------------------------------------------------------------------------------------------- ConvNeXt

CONVNEXT = {                                                # depths, width of the first stage, largest drop-path rate
    "atto": ((2, 2, 6, 2), 40, 0.1),
    "femto": ((2, 2, 6, 2), 48, 0.1),
    "pico": ((2, 2, 6, 2), 64, 0.1),
    "nano": ((2, 2, 8, 2), 80, 0.1),
    "tiny": ((3, 3, 9, 3), 96, 0.1),
    "small": ((3, 3, 27, 3), 96, 0.4),
    "base": ((3, 3, 27, 3), 128, 0.5),
    "large": ((3, 3, 27, 3), 192, 0.5)}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map; in channels_last memory the permutes move nothing."""

    def forward(self, x):
        y = super().forward(x.permute(0, 2, 3, 1))          # (B,H,W,C)
        return y.permute(0, 3, 1, 2)                        # (B,C,H,W)


class ConvNeXtBlock(nn.Module):
    """x + drop_path(scale * mlp(norm(depthwise(x))))."""

    def __init__(self, channels, drop):
        super().__init__()
        self.drop = drop
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels))

    def forward(self, x):
        y = self.depthwise(x).permute(0, 2, 3, 1)           # (B,H,W,C)
        y = self.mlp(self.norm(y)).permute(0, 3, 1, 2)      # (B,C,H,W)
        y = self.scale * y
        if self.training and self.drop:                     # for a part of the images, only x
            keep = y.new_empty(len(y), 1, 1, 1).bernoulli_(1 - self.drop)
            y = y * (keep / (1 - self.drop))                # the mean stays what it is without drop-path
        return x + y


def convnext(variant, dim, size):
    """ConvNeXt (Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, arXiv 2201.03545, section 3); below tiny, timm's
    sizes. The rate of drop-path grows linearly from block to block.

    Parameters and MACs at 224: atto 3.7M 0.5G, femto 5.2M 0.8G, pico 9.0M 1.4G, nano 15.6M 2.4G (timm's cards
    give atto 0.6G, nano 2.5G); tiny 28,589,128, small 50,223,688, base 88,591,464, large 197,767,336
    (torchvision).
    """
    depths, width, max_drop = CONVNEXT[variant]
    layers = [nn.Conv2d(3, width, 4, 4), ChannelNorm(width, eps=1e-6)]
    blocks = 0
    for stage, depth in enumerate(depths):
        if stage > 0:
            layers += [ChannelNorm(width, eps=1e-6), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        for _ in range(depth):
            drop = max_drop * blocks / (sum(depths) - 1)
            layers.append(ConvNeXtBlock(width, drop))
            blocks += 1
    neck = [ChannelNorm(width, eps=1e-6)] + flat_neck(width, dim, size // 32)
    rule = partial(nn.init.normal_, std=0.02)               # the authors truncate at +-2, a hundred deviations away
    return FaceNet(initialise(layers, rule), initialise(neck, rule))


# -------------------------------------------------------------------------------- small and fast: our own

SWIFT = {                                                   # width of the stem; width, depth, stride of each stage
    "": (16, ((32, 1, 1), (64, 1, 2), (128, 1, 2))),
    "_l": (32, ((64, 1, 1), (128, 2, 2), (256, 2, 2)))}


def swiftface(variant, dim, size):
    """For CPUs and quick experiments, and for small images: 48 pixels are enough, 64 for swiftface_l.

    The residual blocks of ResNet-18, few and narrow, behind one 3x3 stem of stride 2. The neck sees the whole
    map, whose side is an eighth of the image's. A CPU is fast at dense 3x3 convolutions and slow at depthwise
    filters and squeeze-excite, so there are none.
    """
    stem, rows = SWIFT[variant]
    layers = conv_bn(3, stem, 3, 2) + stages(basic, stem, rows)
    neck = flat_neck(rows[-1][0], dim, map_side(size, 8), max_side=8)
    return FaceNet(initialise(layers, he_normal), neck)


# ---------------------------------------------------------------------- what the other scripts call

ARCHS = {                                                   # name: (function of dim and size, description)
    "lenetpp": (lenetpp, "LeNet++ of the centre loss (2016), six 5x5 convolutions"),
    "alexnet": (alexnet, "AlexNet (2012), where it began; enlarges images below 63 pixels"),
    **{f"vgg{n}": (partial(vgg, n), f"VGG-{n} (2014), plain stack of 3x3 convolutions") for n in VGG},
    "googlenet": (googlenet, "GoogLeNet (2014), four branches a block, with batch norm"),
    **{f"lightcnn{n}": (partial(lightcnn, n), f"Light CNN-{n} (2015), max-feature-map") for n in LIGHTCNN},
    **{f"resnet{n}": (partial(resnet, n), f"ResNet-{n} (2015), ImageNet stem") for n in RESNET},
    **{f"seresnet{n}": (partial(resnet, n, se=True), f"SE-ResNet-{n} (2017)") for n in RESNET},
    **{f"sphere{n}": (partial(sphere, n), f"SphereFace's {n} layers (2017), no batch norm") for n in SPHERE},
    **{f"iresnet{n}": (partial(iresnet, n), f"ArcFace's face ResNet-{n} (2018)") for n in IRESNET},
    **{f"iresnet_se{n}": (partial(iresnet, n, se=True), f"face ResNet-{n} with SE") for n in IRESNET},
    "mobilenetv2": (mobilenetv2, "MobileNetV2 (2018), inverted residuals"),
    "mobilefacenet": (mobilefacenet, "MobileFaceNet (2018), a learned weight for each place of the map"),
    **{f"convnext_{n}": (partial(convnext, n), f"ConvNeXt-{n} (2022), drop-path") for n in CONVNEXT},
    "swiftface": (partial(swiftface, ""), "our own: three residual blocks, 48-pixel images, quick on CPUs"),
    "swiftface_l": (partial(swiftface, "_l"), "our own, larger: five wider blocks, 64-pixel images"),
}


def make(arch, dim=512, size=112):
    """A newly initialised FaceNet for images (B, 3, size, size), normalised, and embeddings (B, dim).

    Raises ValueError for an unknown arch, a size outside 32..256, or dim below 1.
    """
    if arch not in ARCHS:
        nearest = difflib.get_close_matches(str(arch), ARCHS, 1, 0)[0]
        raise ValueError(f"no architecture {arch!r}; the nearest name is {nearest!r}")
    if not 32 <= size <= 256:
        raise ValueError(f"image size {size} is outside 32..256")
    if dim < 1:
        raise ValueError(f"embedding dimension {dim} is below 1")
    model = ARCHS[arch][0](dim=dim, size=size)
    model.size = size
    return model


def macs(model, size=112):
    """Multiply-adds of one image in convolutions and linear layers; only shapes are computed."""
    shapes = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2                   # torch counts a multiply-add as two operations


def table(dim=512, size=112):
    """One line for every architecture: name, parameters, multiply-adds, description."""
    lines = [f"{'name':<15} {'params':>8} {f'MACs at {size}':>12}  description"]
    for arch, (_, about) in ARCHS.items():
        with torch.device("meta"):
            model = make(arch, dim, size)
        params = sum(p.numel() for p in model.parameters())
        lines.append(f"{arch:<15} {params / 1e6:7.2f}M {macs(model, size) / 1e9:11.3f}G  {about}")
    return "\n".join(lines)


FUSIONS = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def fold(model):
    """A copy in eval mode with each batch norm folded into the convolution or linear layer right before it.

    Exact up to rounding. A batch norm in front of a convolution (iresnet's) has to stay: the convolution's
    padding is zero only after it. A folded model is returned as it is.
    """
    if getattr(model, "folded", False):
        return model
    model = copy.deepcopy(model).eval()
    model.folded = True
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, layer), (norm_name, norm) in itertools.pairwise(children):
            fuse = FUSIONS.get((type(layer), type(norm)))
            if fuse and len(layer.weight) == norm.num_features:
                setattr(parent, name, fuse(layer, norm))
                setattr(parent, norm_name, nn.Identity())
    return model


# ---------------------------------------------------------------------------------- several processes

class SyncedStatistics(torch.autograd.Function):
    """The sum of x over all processes; in backward, the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return SyncedStatistics.apply(grad)


def synced_forward(norm, x):
    """Forward of a batch norm, x (B, C, ...), with mean and variance over the batches of all processes."""
    if not norm.training:
        return type(norm).forward(norm, x)
    if x.dtype != torch.float64:
        x = x.float()                                       # sums in half precision would be too coarse
    dims = [0, *range(2, x.ndim)]                           # all but the channels
    count = x.new_full((1,), x[:, 0].numel())               # filled there: copying from the host would wait
    sums = SyncedStatistics.apply(torch.cat([x.sum(dims), count]))
    total, n = sums.split([norm.num_features, 1])
    mean = total / n
    shape = [-1] + [1] * (x.ndim - 2)                       # of (C,), to go with (B,C,...)
    x = x - mean.view(shape)
    var = SyncedStatistics.apply(x.square().sum(dims)) / n
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * n / (n - 1), norm.momentum)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return x * scale.view(shape) + norm.bias.view(shape)


def synchronise_batch_norms(net):
    """Let every batch norm of net, in training, use the statistics of all processes of torch.distributed.

    Works on any device; torch.nn.SyncBatchNorm is for GPUs only, and waits for them. All processes must call
    net equally often. State dict, types of the modules and evaluation stay as they are.
    """
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.forward = partial(synced_forward, module)
