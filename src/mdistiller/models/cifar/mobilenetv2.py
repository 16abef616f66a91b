"""MobileNetV2 at half width (Sandler et al., CVPR 2018)."""

from functools import partial

from torch import Tensor, nn

from mdistiller.models.cifar.common import (
    activated,
    conv,
    global_pool,
    init_classifier,
    init_convolutions,
    stage,
)
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table


class InvertedResidual(nn.Module):
    """A 1x1 expansion, a depthwise 3x3 and a linear 1x1 convolution, with a shortcut if the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.has_shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *activated(conv(inputs, width, 1)),
            *activated(conv(width, width, 3, stride, groups=width)),
            conv(width, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        out = self.conv(x)
        return x + out if self.has_shortcut else out


# Groups of blocks: expansion, channels at full width, number of blocks, first stride.
_GROUPS = (
    *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


@register_model("MobileNetV2")
class HalfMobileNetV2(nn.Module):
    """MobileNetV2 with half of the paper's widths except the last (1280), plain ReLU, total stride 16.

    The stages end after groups 1, 2, 4 and 6 (counted from 0), in linear bottlenecks without a ReLU, so
    `stageN.preact` is the stage's output itself.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        width = 16
        self.conv1 = nn.Sequential(*activated(conv(3, width, stride=2)))
        self.blocks = nn.Sequential()
        for expansion, channels, count, first_stride in _GROUPS:
            block = partial(InvertedResidual, expansion=expansion)
            self.blocks.append(stage(block, count, width, channels // 2, first_stride))
            width = channels // 2
        self.conv2 = nn.Sequential(*activated(conv(width, 1280, 1)))
        linear = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(linear)
        init_convolutions(self)
        init_classifier(linear)
        stages = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
        self.tap_points = tap_table(
            stages, stem="conv1", preacts=stages, last_map="conv2", classifier="classifier"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(global_pool(self.conv2(self.blocks(self.conv1(x)))))
