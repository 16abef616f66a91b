"""Quantisation-aware training: layers that compute with weights and inputs rounded to eight bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import ConfigError


def round_weight(weight: Tensor) -> Tensor:
    """Rounds a weight to -64 to 64 times a scale for each output channel; the gradient passes through.

    A batch norm that is folded into the weight multiplies each output channel by a number, which multiplies
    its scale: the rounded weight is that of the exported graph.

    Args:
        weight: float32, output channels first.

    Returns:
        The multiples of max |w| / 64 of each channel that are nearest to its weights.
    """
    largest = weight.detach().flatten(1).abs().amax(1).float()
    scale = (largest / 64).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -64, 64)


def round_input(x: Tensor) -> Tensor:
    """Rounds an input to uint8 between its smallest and largest value; the gradient passes through.

    The range contains 0, which is exact, as padding needs it. It is that of the batch: nothing is kept for it
    in the state.
    """
    x = x.float()
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-low / scale).round().int()
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


class QuantizedConv2d(nn.Conv2d):
    """Convolution that rounds its weight and input while it trains; in evaluation it is `nn.Conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves as `nn.Conv2d`."""
        if not self.training:
            return super().forward(x)
        return self._conv_forward(round_input(x), round_weight(self.weight), self.bias)


class QuantizedLinear(nn.Linear):
    """Linear layer that rounds its weight and input while it trains; in evaluation it is `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Computes the same as `nn.Linear`."""
        if not self.training:
            return super().forward(x)
        return F.linear(round_input(x), round_weight(self.weight), self.bias)


_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: QuantizedConv2d, nn.Linear: QuantizedLinear}


def train_rounded(model: nn.Module) -> None:
    """Makes the convolutions and linear layers in a model round while it trains (Jacob et al., CVPR 2018).

    Each is replaced by a layer that shares its parameters and hooks: state dict, and outputs in evaluation,
    stay. So the student's file, and what is exported from it, is that of an ordinary student, whose weights
    are used to rounding.

    Raises:
        ConfigError: a model without such layers.
    """
    layers = model.named_modules(remove_duplicate=False)
    found = {path: layer for path, layer in layers if path and type(layer) in _ROUNDED}
    if not found:
        raise ConfigError(f"student.qat: {type(model).__name__} has no Conv2d and no Linear to quantise")
    rounded = {layer: _rounded(layer) for layer in found.values()}
    for path, layer in found.items():
        model.set_submodule(path, rounded[layer])


def _rounded(layer: nn.Module) -> nn.Module:
    kind = _ROUNDED[type(layer)]
    new = kind.__new__(kind)
    vars(new).update(vars(layer))
    return new
