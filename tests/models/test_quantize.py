"""Layers that round while they train, against the formula in numpy and against ONNX Runtime's graph."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.models import create_model
from mdistiller.models.quantize import round_input, round_weight, train_rounded


def test_weights_round_by_channel():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 1e-3, 50.0, 0.0])[:, None, None, None]
    w = weight.numpy().reshape(4, -1)
    scale = np.abs(w).max(1, keepdims=True) / 64
    expected = np.where(scale > 0, np.round(w / np.where(scale > 0, scale, 1)) * scale, 0)
    found = round_weight(weight).numpy().reshape(4, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)
    assert [len(np.unique(channel)) for channel in found][3] == 1
    assert min(len(np.unique(channel)) for channel in found[:3]) > 20


def test_a_scaled_channel_rounds_to_the_scaled_values():
    """So a batch norm that is folded into the weight changes nothing."""
    weight, factor = torch.randn(5, 7), torch.tensor([0.5, -2.0, 1.0, -0.25, 4.0])[:, None]
    torch.testing.assert_close(round_weight(weight * factor), round_weight(weight) * factor)


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_inputs_round_between_their_ends(shift):
    x = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) + shift
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    scale = (high - low) / 255
    found = round_input(x)
    assert (found - x).abs().max() <= 0.501 * scale + 0.5 * scale  # rounding, and the zero point at the ends
    assert (found - x).abs().mean() <= 0.26 * scale
    assert len(found.unique()) <= 256
    assert round_input(torch.tensor([0.0, *x[0].tolist()]))[0] == 0  # padding is exact
    assert torch.equal(round_input(torch.zeros(3)), torch.zeros(3))


def test_gradients_pass_through():
    weight = torch.randn(4, 6, requires_grad=True)
    given = torch.randn(4, 6)
    (round_weight(weight) * given).sum().backward()
    torch.testing.assert_close(weight.grad, given)
    x = torch.randn(100, requires_grad=True)
    (round_input(x) * 2).sum().backward()
    assert (x.grad == 2).float().mean() > 0.97  # but for values beyond a rounded end


def test_a_model_keeps_weights_keys_and_evaluation():
    torch.manual_seed(0)
    model, image = create_model("resnet8", 10), torch.randn(4, 3, 16, 16)
    plain = copy.deepcopy(model)
    train_rounded(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model.eval()(image), plain.eval()(image))
    rounded, exact = model.train()(image), plain.train()(image)
    off = (rounded - exact).abs().max() / exact.abs().max()
    assert 1e-4 < off < 0.2
    rounded.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ConfigError, match=r"student\.qat: Sequential has no Conv2d and no Linear"):
        train_rounded(nn.Sequential(nn.ReLU()))


def test_a_layer_computes_the_int8_product():
    """A linear layer against the sum of products of integers, which int8 kernels compute."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 5), torch.randn(8, 12)
    model = nn.Sequential(layer)
    train_rounded(model)
    layer = model[0]
    w = layer.weight.detach().numpy().astype(np.float64)
    ws = np.abs(w).max(1, keepdims=True) / 64
    wq = np.round(w / ws)
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    xs = (high - low) / 255
    zero = round(-low / xs)
    xq = np.clip(np.round(x.numpy() / xs) + zero, 0, 255)
    expected = ((xq - zero) @ wq.T) * xs * ws.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer.train()(x).detach().numpy(), expected, atol=2e-4)
    assert not np.allclose(layer.eval()(x).detach().numpy(), expected, atol=2e-4)
