"""ShuffleNetV2 (Ma et al., ECCV 2018)."""

import torch
from torch import Tensor, nn

from mdistiller.models.cifar.common import channel_shuffle, conv, global_pool
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table


class BasicBlock(nn.Module):
    """Block that passes half of the channels unchanged and the rest through 1x1, depthwise 3x3 and 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 2
        self.conv1 = conv(width, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, width, 1)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to the same shape; x must not be negative."""
        unchanged, out = x.chunk(2, 1)
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(out)))))
        out = self.bn3(self.conv3(out))
        # The unchanged half is the output of a ReLU, so a ReLU over both halves does not alter it, and its
        # input is the whole pre-activation of the block.
        return channel_shuffle(self.relu3(torch.cat([unchanged, out], 1)), 2)


class DownBlock(nn.Module):
    """Block that halves the resolution in two branches and shuffles their concatenated outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        width = outputs // 2
        self.conv1 = conv(inputs, inputs, 3, 2, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = conv(inputs, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(inputs, width, 1)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.conv4 = conv(width, width, 3, 2, groups=width)
        self.bn4 = nn.BatchNorm2d(width)
        self.conv5 = conv(width, width, 1)
        self.bn5 = nn.BatchNorm2d(width)
        self.relu5 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H / 2, W / 2]."""
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.relu3(self.bn3(self.conv3(x)))))
        right = self.relu5(self.bn5(self.conv5(right)))
        return channel_shuffle(torch.cat([left, right], 1), 2)


@register_model("ShuffleV2")
class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of width 1x: stages of 1 + 3, 1 + 7 and 1 + 3 blocks after a 1x1 stem."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu1 = nn.ReLU()
        self.layer1 = nn.Sequential(DownBlock(24, 116), *(BasicBlock(116) for _ in range(3)))
        self.layer2 = nn.Sequential(DownBlock(116, 232), *(BasicBlock(232) for _ in range(7)))
        self.layer3 = nn.Sequential(DownBlock(232, 464), *(BasicBlock(464) for _ in range(3)))
        self.conv2 = conv(464, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(1024, num_classes)
        stages = ["layer1", "layer2", "layer3"]
        preacts = ["layer1.3.relu3:input", "layer2.7.relu3:input", "layer3.3.relu3:input"]
        self.tap_points = tap_table(
            stages, stem="relu1", preacts=preacts, last_map="relu2", classifier="linear"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(global_pool(x))
