"""ImageNet ResNets with four stages and a stem for small images (He et al., CVPR 2016).

The capital letters of `ResNet18` and `ResNet50` distinguish them from the CIFAR ResNets with three stages.
"""

from torch import Tensor, nn

from mdistiller.models.cifar.common import conv, global_pool, init_convolutions, stage
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected if the shape changes."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu_out(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution of a quarter of the outputs, a 1x1 convolution and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // self.expansion
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu_out(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet with four stages after a 3x3 stem without pooling: 32x32 images end as 4x4 maps."""

    def __init__(self, block: type[BasicBlock | Bottleneck], blocks: list[int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        widths = [64, *(block.expansion * width for width in (64, 128, 256, 512))]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            stage(block, count, widths[i], widths[i + 1], stride=2 if i else 1)
            for i, count in enumerate(blocks)
        )
        self.linear = nn.Linear(widths[4], num_classes)
        init_convolutions(self)
        stages = ["layer1", "layer2", "layer3", "layer4"]
        preacts = [f"layer{i}.{count - 1}.relu_out:input" for i, count in enumerate(blocks, 1)]
        self.tap_points = tap_table(
            stages, stem="relu", preacts=preacts, last_map="layer4", classifier="linear"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(global_pool(x))


@register_model
def ResNet18(num_classes: int = 100) -> ResNet:  # noqa: N802
    """Builds ResNet-18 for small images, 64 to 512 channels."""
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes)


@register_model
def ResNet50(num_classes: int = 100) -> ResNet:  # noqa: N802
    """Builds ResNet-50 for small images, 256 to 2048 channels."""
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes)
