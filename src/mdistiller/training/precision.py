"""Precision and memory format, and a fast path for convolutions that are slow in bfloat16 on some CPUs."""

import torch
from torch import Tensor, nn


def torch_dtype(precision: str) -> torch.dtype:
    """Returns the type of a config's precision; `auto`, where nothing was measured, is float32."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "auto" else precision)
    return dtype


def memory_format(layout: str) -> torch.memory_format:
    """Returns the memory format of a config's layout; `auto`, where nothing was measured, is contiguous."""
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; others emulate it slowly, or refuse it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
