"""ShuffleNet with three groups (Zhang et al., CVPR 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models.cifar.common import channel_shuffle, conv
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table

_GROUPS = 3
_STEM = 24


class Bottleneck(nn.Module):
    """Grouped 1x1 convolution, channel shuffle, depthwise 3x3 and grouped 1x1 convolution.

    With stride 1 the input is added; with stride 2 it is average-pooled and concatenated after the output.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        # The stem has too few channels to group.
        self.groups = 1 if inputs == _STEM else _GROUPS
        self.conv1 = conv(inputs, width, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3, stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, outputs, 1, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to the same shape, or to [B, outputs + inputs, H / 2, W / 2]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(channel_shuffle(out, self.groups))))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1))


class ShuffleNet(nn.Module):
    """ShuffleNet with stages of 4, 8 and 4 blocks with 240, 480 and 960 channels, after a 1x1 stem."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, _STEM, 1)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        inputs = _STEM
        stages = []
        counts, widths = (4, 8, 4), (240, 480, 960)
        for count, width in zip(counts, widths, strict=True):
            first = Bottleneck(inputs, width - inputs, stride=2)
            stages.append(nn.Sequential(first, *(Bottleneck(width, width, 1) for _ in range(count - 1))))
            inputs = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(inputs, num_classes)
        self.tap_points = tap_table(
            ["layer1", "layer2", "layer3"],
            stem="relu",
            preacts=[f"layer{i}.{count - 1}.relu3:input" for i, count in enumerate(counts, 1)],
            last_map="layer3",
            pooled="linear:input",
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [B, 3, H, W] to logits [B, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


@register_model
def ShuffleV1(num_classes: int = 100) -> ShuffleNet:  # noqa: N802
    """Builds ShuffleNet 1x with three groups for small images."""
    return ShuffleNet(num_classes)
