"""Mixed precision, and a fast path around convolutions whose bfloat16 gradient is slow on some CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Returns an autocast context for a precision on a device; float32 switches it off."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of sums over a data set: float64, or float32 on mps, which lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Float32Conv2d(nn.Conv2d):
    """Convolution that runs in float32 under autocast; its output has autocast's precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves as `nn.Conv2d`."""
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            y = super().forward(x.float())
        return y.to(torch.get_autocast_dtype("cpu"))


def avoid_slow_convolutions(module: nn.Module) -> None:
    """Makes the few convolutions run in float32 whose bfloat16 gradient takes up to a hundred times as long.

    With AVX-512 alone, torch 2.13 computes the weights' gradient of strided kernels, and of those on three
    channels, so slowly that it takes most of the step. Nothing changes on a CPU with matrix tiles (AMX).
    Parameters and the state dict stay.
    """
    if torch.cpu._is_amx_tile_supported():
        return
    for m in module.modules():
        if type(m) is nn.Conv2d and max(m.kernel_size) > 1 and (max(m.stride) > 1 or m.in_channels < 8):
            m.__class__ = Float32Conv2d
