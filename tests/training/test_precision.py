"""Convolutions that stay in float32 on a CPU without matrix tiles."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mdistiller
from mdistiller.training.precision import Float32Conv2d, avoid_slow_convolutions


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_strided_kernels_and_the_first_layer_are_meant_and_no_other():
    model = mdistiller.create_model("resnet8x4", 10)
    before = model.state_dict()
    avoid_slow_convolutions(model)
    changed = [name for name, m in model.named_modules() if isinstance(m, Float32Conv2d)]
    assert changed == ["conv1", "layer2.0.conv1", "layer3.0.conv1"]  # not the shortcuts, which are 1 x 1
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(after[key].data_ptr() == value.data_ptr() for key, value in before.items())


def test_nothing_changes_on_a_cpu_with_tiles(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model = mdistiller.create_model("resnet8", 10)
    avoid_slow_convolutions(model)
    assert not any(isinstance(m, Float32Conv2d) for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_values_and_gradients_are_those_of_float32_and_the_output_bfloat16(copied):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    module = nn.Sequential(copy.deepcopy(plain))
    avoid_slow_convolutions(module)
    module = copied(module)
    x = torch.randn(4, 3, 9, 9)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = plain(inputs[0])
    with torch.autocast("cpu", torch.bfloat16):
        got = module(inputs[1])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected.to(torch.bfloat16))
    weight = torch.randn_like(expected).to(torch.bfloat16)
    expected.backward(weight.float())
    got.backward(weight)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(module[0].weight.grad, plain.weight.grad)
    torch.testing.assert_close(module[0].bias.grad, plain.bias.grad)
    assert torch.equal(module(x), plain(x))  # without autocast
