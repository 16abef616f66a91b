"""ShuffleNet with three groups (Zhang et al., CVPR 2018)."""

import torch
from torch import Tensor, nn

from mdistiller.models.cifar.common import channel_shuffle, conv, global_pool, stage
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table

_GROUPS = 3
_STEM = 24


class Bottleneck(nn.Module):
    """Grouped 1x1 convolution, channel shuffle, depthwise 3x3 and grouped 1x1 convolution.

    With stride 1 the input is added; with stride 2 it is average-pooled and concatenated at the end.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        computed = outputs - inputs if stride == 2 else outputs
        width = computed // 4
        # The stem has too few channels to group.
        self.groups = 1 if inputs == _STEM else _GROUPS
        self.conv1 = conv(inputs, width, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3, stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, computed, 1, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(computed)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(channel_shuffle(out, self.groups))))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + x if self.pool is None else torch.cat([out, self.pool(x)], 1))


@register_model("ShuffleV1")
class ShuffleNet(nn.Module):
    """ShuffleNet with stages of 4, 8 and 4 blocks with 240, 480 and 960 channels, after a 1x1 stem."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv(3, _STEM, 1)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = stage(Bottleneck, 4, _STEM, 240, stride=2)
        self.layer2 = stage(Bottleneck, 8, 240, 480, stride=2)
        self.layer3 = stage(Bottleneck, 4, 480, 960, stride=2)
        self.linear = nn.Linear(960, num_classes)
        stages = ["layer1", "layer2", "layer3"]
        preacts = ["layer1.3.relu3:input", "layer2.7.relu3:input", "layer3.3.relu3:input"]
        self.tap_points = tap_table(
            stages, stem="relu", preacts=preacts, last_map="layer3", classifier="linear"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(global_pool(x))
