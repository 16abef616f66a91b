"""Wide residual networks, `wrn_DEPTH_FACTOR` (Zagoruyko and Komodakis, BMVC 2016)."""

from collections import OrderedDict
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models.cifar.common import conv, global_pool, init_convolutions, stage
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table


class BasicBlock(nn.Module):
    """Two convolutions, each after batch norm and ReLU, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv(outputs, outputs)
        self.dropout = dropout
        # As in the published code, only a change of width needs a projection, of the activated input.
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        active = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(active)))
        if self.dropout > 0:
            out = F.dropout(out, self.dropout, self.training)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(out)


class WideResNet(nn.Module):
    """Wide residual network with three stages of (depth - 4) / 6 pre-activation blocks each.

    A stage ends in a sum; the batch norm and ReLU after it belong to the first block of the next stage. The
    tap `stageN` is the sum, and `stageN.preact` is the output of that batch norm. The stages have 16, 32 and
    64 times `widen_factor` channels. `dropout` acts between the two convolutions of a block.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        assert depth == 6 * blocks + 4, f"depth must be 6n + 4, got {depth}"
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv(3, widths[0])
        block = partial(BasicBlock, dropout=dropout)
        # The published state dict has the name `layer` between the stage and its blocks.
        self.block1, self.block2, self.block3 = (
            nn.Sequential(OrderedDict(layer=stage(block, blocks, widths[i], widths[i + 1], stride)))
            for i, stride in enumerate((1, 2, 2))
        )
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)
        stages, preacts = ["block1", "block2", "block3"], ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
        self.tap_points = tap_table(stages, stem="conv1", preacts=preacts, last_map="relu", classifier="fc")

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(global_pool(self.relu(self.bn1(x))))


def _register(depth: int, widen_factor: int) -> None:
    @register_model(f"wrn_{depth}_{widen_factor}")
    def build(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
        return WideResNet(depth, widen_factor, num_classes, dropout)


for _depth, _factor in ((16, 1), (16, 2), (16, 4), (28, 2), (28, 4), (40, 1), (40, 2)):
    _register(_depth, _factor)
