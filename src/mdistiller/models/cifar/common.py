"""Layers and initializations shared by the CIFAR models."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias; its padding keeps the spatial size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleaves the channels of `groups` equal groups: [B, C, H, W], C divisible by `groups`."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def activated(convolution: nn.Conv2d) -> list[nn.Module]:
    """Follows a convolution by batch norm and ReLU."""
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]


def stage(
    block: Callable[[int, int, int], nn.Module], count: int, inputs: int, outputs: int, stride: int
) -> nn.Sequential:
    """Chains `count` blocks(inputs, outputs, stride), of which only the first changes channels and size."""
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1)))


def global_pool(x: Tensor) -> Tensor:
    """Averages over space: [B, C, H, W] to [B, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def init_convolutions(model: nn.Module) -> None:
    """Draws every convolution's weight from N(0, 2 / fan_out) and zeroes its bias (He et al., ICCV 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def with_channels(model: nn.Module, channels: int) -> nn.Module:
    """Returns a new model whose first convolution takes images of so many channels."""
    first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(len(first.weight), channels, *first.kernel_size))
    init_convolutions(first)
    return model


def init_classifier(linear: nn.Linear) -> None:
    """Draws the weight from N(0, 0.01²) and zeroes the bias."""
    nn.init.normal_(linear.weight, 0, 0.01)
    nn.init.zeros_(linear.bias)
