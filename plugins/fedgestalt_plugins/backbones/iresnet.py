"""The improved ResNet of the ArcFace family.

Deng et al. 2019, "ArcFace", section 3.1: BN-Conv-BN-PReLU-Conv-BN blocks (Duta et al. 2020 call
the family iResNet), a stem that keeps the resolution, and BN-Dropout-FC-BN at the end. Parameter
names are those of published checkpoints (``conv1``, ``layer1.0.bn1``, ..., ``fc``,
``features``), so that a checkpoint of width 64 loads unchanged.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fedgestalt.contracts import BackboneModules, InputSpec, StageCut
from fedgestalt_plugins.backbones.neck import Neck
from fedgestalt_plugins.backbones.weights_file import load_weights

if TYPE_CHECKING:
    from fedgestalt_plugins.backbones import IResNetOptions

BLOCKS: Final = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
PRELU_START: Final = 0.25


class RowPReLU(nn.PReLU):
    """PReLU that treats a row of a channels-last image as one vector.

    The result is the same. Over fewer than 32 channels torch's bfloat16 kernel falls back to one
    number at a time, 30 times slower, more than all convolutions of a narrow network together.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, channels, h, w) to the same shape."""
        n, channels, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1)
        if channels % 32 == 0 or not pixels.is_contiguous():
            return super().forward(x)
        rows = pixels.view(n * height, width * channels)
        result = torch.prelu(rows, self.weight.repeat(width))
        return result.view(n, height, width, channels).permute(0, 3, 1, 2)


class IBasicBlock(nn.Module):
    """Residual block without an activation after the sum.

    Args:
        inputs: channels that come in.
        channels: channels that go out.
        stride: of the second convolution; with 2 the map shrinks by half.
    """

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = RowPReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != channels:
            shortcut = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, inputs, h, w) to (n, channels, h / stride, w / stride), rounded up."""
        inner: torch.Tensor = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        inner = self.bn3(self.conv2(inner))
        outer: torch.Tensor = x if self.downsample is None else self.downsample(x)
        return outer + inner

    def fold_norms(self) -> None:
        """See :class:`~fedgestalt.contracts.FoldsNorms`; the first one precedes a padding."""
        _fold(self, "conv1", "bn2")
        _fold(self, "conv2", "bn3")


class IResNetTrunk(nn.Module):
    """Stem and four stages; every stage halves the map, rounding up.

    Args:
        depth: a key of :data:`BLOCKS`.
        width: channels of the first stage; the last has eight times as many.
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = RowPReLU(width)
        stages, inputs = [], width
        for stage, blocks in enumerate(BLOCKS[depth]):
            channels = width << stage
            rest = [IBasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(IBasicBlock(inputs, channels, 2), *rest))
            inputs = channels
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn2 = nn.BatchNorm2d(inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, 3, s, s) to (n, 8 * width, t, t) with t = s / 16, rounded up."""
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        feature: torch.Tensor = self.bn2(x)
        return feature

    def fold_norms(self) -> None:
        """See :class:`~fedgestalt.contracts.FoldsNorms`."""
        _fold(self, "conv1", "bn1")

    def cut(self, input_size: int) -> StageCut:
        """The trunk before its fourth stage, and the stage with the BatchNorm behind it."""
        before = ("conv1", "bn1", "prelu", "layer1", "layer2", "layer3")
        early, last = (
            nn.Sequential(OrderedDict((name, getattr(self, name)) for name in names))
            for names in (before, ("layer4", "bn2"))
        )
        side = math.ceil(input_size / 8)
        return StageCut(early, last, (self.bn2.num_features // 2, side, side))


def _fold(module: nn.Module, convolution: str, norm: str) -> None:
    """Fold a norm into the convolution before it; both are attributes of ``module``."""
    fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
    setattr(module, convolution, fused)
    setattr(module, norm, nn.Identity())


def build_iresnet(options: IResNetOptions, seed: int) -> BackboneModules:
    """Build the network, with random weights that depend on ``seed`` alone or from a file.

    Raises:
        ConfigError: the weights file cannot be read or does not fit the network.
    """
    side = math.ceil(options.input_size / 16)
    feature_shape = (8 * options.width, side, side)
    with torch.device("meta"):
        trunk = IResNetTrunk(options.depth, options.width)
        neck = Neck(math.prod(feature_shape), options.embedding_size, dropout=options.dropout)
    for module in (trunk, neck):
        module.to_empty(device="cpu")
    if options.weights is None:
        _start(trunk, neck, seed)
    else:
        remedy = "set depth, width, embedding_size and input_size to those of the file"
        load_weights(options.weights, trunk, neck, remedy=remedy)
    trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return BackboneModules(
        trunk=trunk.eval().requires_grad_(False),
        neck=neck.eval(),
        input=InputSpec(size=options.input_size, channels=options.channels),
        feature_shape=feature_shape,
        embedding_size=options.embedding_size,
        weights_licence=options.weights_licence if options.weights else "",
        cut=trunk.cut(options.input_size),
    )


def _start(trunk: IResNetTrunk, neck: Neck, seed: int) -> None:
    """Random start weights that keep the scale of activations (He et al. 2015).

    The last BatchNorm of each block starts at 1 / sqrt(blocks of its stage): the sum over residual
    branches stays bounded even in evaluation mode, where nothing is normalised yet.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in (*trunk.modules(), *neck.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, PRELU_START)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        for block in stage:
            if isinstance(block, IBasicBlock):
                nn.init.constant_(block.bn3.weight, 1 / math.sqrt(len(stage)))
