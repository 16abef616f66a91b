"""Convolutions of a student on a CPU whose gradients PyTorch computes slowly, in another way.

The gradients are equal to rounding; parameters, state dict and outputs without gradient are those of
`nn.Conv2d`. The figures that the rules follow are in docs/results/speed.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WINDOW = 3  # the largest kernel with a fast gradient of depthwise weights
_SMALL_MAP = 8  # up to this size of the output, windows are faster in float32 too


class Float32Conv2d(nn.Conv2d):
    """Convolution that trains in float32 under autocast; its output has autocast's precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves as `nn.Conv2d`."""
        if not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            y = super().forward(x.float())
        return y.to(torch.get_autocast_dtype("cpu"))


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with faster gradients on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves as `nn.Conv2d`."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not (x.is_cpu and torch.is_grad_enabled() and self._is_slow(x, dtype)):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = _Depthwise.apply(x.to(dtype), self.weight.to(dtype), bias, self.stride[0])
        return y

    def _is_slow(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether a gradient takes less time in the other way, for an input in a precision."""
        stride = self.stride[0]
        size = [-(-side // stride) for side in x.shape[2:]]
        return _by_windows(self.kernel_size[0], dtype, size) or (stride > 1 and dtype == torch.bfloat16)


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution with a square odd kernel whose padding keeps the size at stride 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, 1, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (grad,), stride = grads, ctx.stride
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(grad, x, weight, stride)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(grad, x, weight, stride)
        if ctx.needs_input_grad[2]:
            db = grad.sum((0, 2, 3))
        return dx, dw, db, None


def _gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, *, of_input: bool
) -> Tensor:
    sizes, wanted = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0]), [of_input, not of_input, False]
    found = torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, x.shape[1], wanted)
    return found[0 if of_input else 1]


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    padding, dtype = weight.shape[-1] // 2, x.dtype
    if stride > 1 and dtype == torch.bfloat16:  # up to a hundred times as long as in float32
        # Of the input, only the shape is read.
        grad, x, weight = grad.float(), torch.empty_like(x, dtype=torch.float32), weight.float()
    return _gradient(grad, x, weight, stride, padding, of_input=True).to(dtype)


def _by_windows(kernel: int, dtype: torch.dtype, size: Sequence[int]) -> bool:
    """Whether windows of 3x3 weights take less time for the weights' gradient, for an output (H, W)."""
    if kernel == _WINDOW:
        return min(size) < kernel
    return dtype != torch.float32 or max(size) <= _SMALL_MAP


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Computes the gradient of a large kernel by windows of 3x3 weights, each on a shifted part of the input.

    Padding beforehand also avoids a slow case of 3x3 kernels on maps that are smaller.
    """
    kernel, size = weight.shape[-1], grad.shape[2:]
    if not _by_windows(kernel, x.dtype, size):
        return _gradient(grad, x, weight, stride, kernel // 2, of_input=False)
    padded = F.pad(x, [kernel // 2] * 4)
    high, wide = (stride * (side - 1) + _WINDOW for side in size)
    starts = sorted({min(i, kernel - _WINDOW) for i in range(0, kernel, _WINDOW)})
    out, window = torch.empty_like(weight), weight[:, :, :_WINDOW, :_WINDOW]
    for i in starts:
        for j in starts:  # windows may overlap; what they have in common is equal
            part = padded[:, :, i : i + high, j : j + wide]
            found = _gradient(grad, part, window, stride, 0, of_input=False)
            out[:, :, i : i + _WINDOW, j : j + _WINDOW] = found
    return out


def replace_slow_convolutions(module: nn.Module, precision: torch.dtype) -> None:
    """Makes the convolutions of a module that trains on a CPU compute their slow gradients in another way.

    Only their class changes. In bfloat16 some others train in float32: with AVX-512 alone and several
    threads, torch 2.13 computes the weights' gradient of strided kernels, and of those on three channels, so
    slowly that it takes most of the step; with one thread, or with matrix tiles (AMX), it does not.
    """
    slow = torch.get_num_threads() > 1 and not torch.cpu._is_amx_tile_supported()
    to_float32 = precision == torch.bfloat16 and slow
    for m in module.modules():
        if type(m) is not nn.Conv2d:
            continue
        if _has_faster_gradients(m):
            m.__class__ = DepthwiseConv2d
        elif to_float32 and max(m.kernel_size) > 1 and (max(m.stride) > 1 or m.in_channels < 8):
            m.__class__ = Float32Conv2d


def _has_faster_gradients(m: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise with a square odd kernel and half of it as padding."""
    kernel, stride = m.kernel_size[0], m.stride[0]
    square = m.kernel_size == (kernel, kernel) and m.stride == (stride, stride) and m.dilation == (1, 1)
    depthwise = 1 < m.groups == m.in_channels == m.out_channels and m.padding_mode == "zeros"
    return square and depthwise and kernel % 2 == 1 < kernel and m.padding == (kernel // 2, kernel // 2)
