"""The CIFAR ResNets of three stages (He et al., CVPR 2016, section 4.2), also four times as wide."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from mdistiller.models.cifar.common import conv, global_pool, init_convolutions
from mdistiller.models.places import tap_table
from mdistiller.models.registry import register_model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is projected where the shape changes."""

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
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + shortcut)


class ResNet(nn.Module):
    """Three stages of (depth - 2) / 6 basic blocks each.

    depth: 6n + 2; the layers with weights on the longest path.
    widths: the channels of the stem and of the three stages.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        assert depth == 6 * blocks + 2, f"depth must be 6n + 2, got {depth}"
        self.conv1 = conv(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages = []
        for (inputs, outputs), stride in zip(pairwise(widths), (1, 2, 2), strict=True):
            first = BasicBlock(inputs, outputs, stride)
            stages.append(nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)
        self.tap_points = tap_table(
            ["layer1", "layer2", "layer3"],
            stem="relu",
            preacts=[f"layer{i}.{blocks - 1}.relu2:input" for i in (1, 2, 3)],
            last_map="layer3",
            pooled="fc:input",
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(global_pool(x))


_THIN = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)


@register_model
def resnet8(num_classes: int = 100) -> ResNet:
    """ResNet-8, 16 to 64 channels."""
    return ResNet(8, _THIN, num_classes)


@register_model
def resnet14(num_classes: int = 100) -> ResNet:
    """ResNet-14, 16 to 64 channels."""
    return ResNet(14, _THIN, num_classes)


@register_model
def resnet20(num_classes: int = 100) -> ResNet:
    """ResNet-20, 16 to 64 channels."""
    return ResNet(20, _THIN, num_classes)


@register_model
def resnet32(num_classes: int = 100) -> ResNet:
    """ResNet-32, 16 to 64 channels."""
    return ResNet(32, _THIN, num_classes)


@register_model
def resnet44(num_classes: int = 100) -> ResNet:
    """ResNet-44, 16 to 64 channels."""
    return ResNet(44, _THIN, num_classes)


@register_model
def resnet56(num_classes: int = 100) -> ResNet:
    """ResNet-56, 16 to 64 channels."""
    return ResNet(56, _THIN, num_classes)


@register_model
def resnet110(num_classes: int = 100) -> ResNet:
    """ResNet-110, 16 to 64 channels."""
    return ResNet(110, _THIN, num_classes)


@register_model
def resnet8x4(num_classes: int = 100) -> ResNet:
    """ResNet-8 with four times the channels: 64 to 256, after a stem of 32."""
    return ResNet(8, _WIDE, num_classes)


@register_model
def resnet32x4(num_classes: int = 100) -> ResNet:
    """ResNet-32 with four times the channels: 64 to 256, after a stem of 32."""
    return ResNet(32, _WIDE, num_classes)
