"""bfloat16 on CPUs without matrix tiles (AMX): around convolutions whose gradient is slow there."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Float32Conv2d(nn.Conv2d):
    """A convolution that autocast leaves in float32; its output has the precision of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            y = super().forward(x.float())
        return y.to(torch.get_autocast_dtype("cpu"))


def avoid_slow_convolutions(module: nn.Module) -> None:
    """Let the few convolutions run in float32 whose bfloat16 gradient takes up to a hundred times as long.

    With AVX-512 alone, torch 2.13 computes the weights' gradient of strided kernels, and of those on three
    channels, so slowly that they take most of the step. Nothing changes on a CPU with AMX. Parameters and the
    state dict stay.
    """
    if torch.cpu._is_amx_tile_supported():
        return
    for m in module.modules():
        if type(m) is nn.Conv2d and max(m.kernel_size) > 1 and (max(m.stride) > 1 or m.in_channels < 8):
            m.__class__ = Float32Conv2d
