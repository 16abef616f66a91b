"""Precision and memory format."""

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def torch_dtype(precision: str) -> torch.dtype:
    """Returns the type of a config's precision; `auto`, where nothing was measured, is float32."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "auto" else precision)
    return dtype


def memory_format(layout: str) -> torch.memory_format:
    """Returns the memory format of a config's layout; `auto`, where nothing was measured, is contiguous."""
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def lay_out(module: M, layout: torch.memory_format) -> M:
    """Puts the weights of a module into a memory format; returns the module."""
    words = {"memory_format": layout}  # not in the signature of every torch
    return module.to(**words)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; others emulate it slowly, or refuse it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Returns an autocast context for a precision on a device; float32 switches it off."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of sums over a data set: float64, or float32 on mps, which lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64
