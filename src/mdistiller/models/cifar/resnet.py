"""CIFAR ResNets with three stages (He et al., CVPR 2016, section 4.2), also four times as wide."""

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models.cifar.common import conv, init_convolutions, stage
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + shortcut)


class ResNet(nn.Module):
    """ResNet with three stages of (depth - 2) / 6 basic blocks each.

    The depth counts the layers with weights on the longest path, the widths are those of stem and stages.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        assert depth == 6 * blocks + 2, f"depth must be 6n + 2, got {depth}"
        self.conv1 = conv(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = stage(BasicBlock, blocks, widths[0], widths[1], stride=1)
        self.layer2 = stage(BasicBlock, blocks, widths[1], widths[2], stride=2)
        self.layer3 = stage(BasicBlock, blocks, widths[2], widths[3], stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)
        stages = ["layer1", "layer2", "layer3"]
        preacts = [f"{name}.{blocks - 1}.relu2:input" for name in stages]
        self.tap_points = tap_table(stages, stem="relu", preacts=preacts, last_map="layer3", classifier="fc")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _register(name: str, depth: int, widths: tuple[int, int, int, int]) -> None:
    @register_model(name)
    def build(num_classes: int = 100) -> ResNet:
        return ResNet(depth, widths, num_classes)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    _register(f"resnet{_depth}", _depth, (16, 16, 32, 64))
for _depth in (8, 32):
    _register(f"resnet{_depth}x4", _depth, (32, 64, 128, 256))
