"""Quantization-aware distillation: a student whose layers round to eight bits while it trains.

    mdistiller train digits.dkd.resnet20_rounded --plugin examples/rounded_student.py \
        --student.options base resnet8 --teacher.checkpoint runs/teacher --out runs/rounded
    mdistiller export runs/rounded --format onnx --int8 --plugin examples/rounded_student.py

In a training step, convolutions and linear layers round their weights to int8 and their inputs to uint8;
gradients pass straight through (Jacob et al., CVPR 2018). In evaluation the model is the plain one, and its
file has the plain one's keys. On digits, `export --int8` loses nothing without it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mdistiller import create_model, register_model


def round_weight(weight):
    """Rounds a weight to -64 to 64 times a scale for each output channel; the gradient passes through.

    A batch norm that is folded into the weight multiplies each channel's scale: the rounded weight is that of
    the exported graph.
    """
    largest = weight.detach().flatten(1).abs().amax(1).float()
    scale = (largest / 64).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -64, 64)


def round_input(x):
    """Rounds an input to uint8 over the range of the batch, in which 0 is exact, as padding needs it."""
    x = x.float()
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-low / scale).round().int()
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


class RoundedConv2d(nn.Conv2d):
    """Convolution that rounds its weight and input while it trains; in evaluation it is `nn.Conv2d`."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return self._conv_forward(round_input(x), round_weight(self.weight), self.bias)


class RoundedLinear(nn.Linear):
    """Linear layer that rounds its weight and input while it trains; in evaluation it is `nn.Linear`."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return F.linear(round_input(x), round_weight(self.weight), self.bias)


ROUNDED = {nn.Conv2d: RoundedConv2d, nn.Linear: RoundedLinear}


def train_rounded(model):
    """Replaces the convolutions and linear layers of a model by layers that share their parameters."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in ROUNDED:
                rounded = ROUNDED[type(layer)].__new__(ROUNDED[type(layer)])
                vars(rounded).update(vars(layer))
                setattr(parent, name, rounded)
    return model


@register_model
def rounded(num_classes, base="resnet8"):
    """Builds a model of the zoo whose layers round."""
    return train_rounded(create_model(base, num_classes=num_classes))
