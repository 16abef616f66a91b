"""Wide residual networks, `wrn_DEPTH_FACTOR` (Zagoruyko and Komodakis, BMVC 2016)."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models.cifar.common import conv, global_pool, init_convolutions
from mdistiller.models.places import tap_table
from mdistiller.models.registry import register_model


class BasicBlock(nn.Module):
    """Batch norm and ReLU come before each of the two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv(outputs, outputs)
        self.dropout = dropout
        # Only where the width changes, as published: a projection also reads the activated input.
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        active = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(active)))
        if self.dropout > 0:
            out = F.dropout(out, self.dropout, self.training)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(out)


class NetworkBlock(nn.Module):
    """One stage; its name and that of its only child are part of the state dict."""

    def __init__(self, layers: list[BasicBlock]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The blocks in order."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 pre-activation blocks each.

    A stage ends in a sum, before any batch norm; the batch norm and ReLU that follow belong to the next
    stage's first block. So `stageN` is that sum and `stageN.preact` is it after the next batch norm.

    depth: 6n + 4.
    widen_factor: the channels are 16, 32 and 64 times this.
    dropout: probability of dropping a value between the two convolutions of a block.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        assert depth == 6 * blocks + 4, f"depth must be 6n + 4, got {depth}"
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv(3, widths[0])
        stages = []
        for (inputs, outputs), stride in zip(pairwise(widths), (1, 2, 2), strict=True):
            first = BasicBlock(inputs, outputs, stride, dropout)
            rest = [BasicBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)]
            stages.append(NetworkBlock([first, *rest]))
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)
        self.tap_points = tap_table(
            ["block1", "block2", "block3"],
            stem="conv1",
            preacts=["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"],
            last_map="relu",
            pooled="fc:input",
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, classes]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(global_pool(self.relu(self.bn1(x))))


@register_model
def wrn_16_1(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """WRN-16-1: depth 16, 16 to 64 channels."""
    return WideResNet(16, 1, num_classes, dropout)


@register_model
def wrn_16_2(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """WRN-16-2: depth 16, 32 to 128 channels."""
    return WideResNet(16, 2, num_classes, dropout)


@register_model
def wrn_16_4(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """WRN-16-4: depth 16, 64 to 256 channels."""
    return WideResNet(16, 4, num_classes, dropout)


@register_model
def wrn_28_2(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """WRN-28-2: depth 28, 32 to 128 channels."""
    return WideResNet(28, 2, num_classes, dropout)


@register_model
def wrn_28_4(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """WRN-28-4: depth 28, 64 to 256 channels."""
    return WideResNet(28, 4, num_classes, dropout)


@register_model
def wrn_40_1(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """WRN-40-1: depth 40, 16 to 64 channels."""
    return WideResNet(40, 1, num_classes, dropout)


@register_model
def wrn_40_2(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """WRN-40-2: depth 40, 32 to 128 channels."""
    return WideResNet(40, 2, num_classes, dropout)
