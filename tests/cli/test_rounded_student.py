"""Layers that round while they train, against the formula in numpy and against ONNX Runtime's graph."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mdistiller.deploy.student import load_student
from mdistiller.models import create_model

FILE = Path(__file__).parents[2] / "examples" / "rounded_student.py"


@pytest.fixture
def example(registries):
    return SimpleNamespace(**runpy.run_path(str(FILE)))


def test_weights_round_by_channel(example):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 1e-3, 50.0, 0.0])[:, None, None, None]
    w = weight.numpy().reshape(4, -1)
    scale = np.abs(w).max(1, keepdims=True) / 64
    expected = np.where(scale > 0, np.round(w / np.where(scale > 0, scale, 1)) * scale, 0)
    found = example.round_weight(weight).numpy().reshape(4, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)
    assert [len(np.unique(channel)) for channel in found][3] == 1
    assert min(len(np.unique(channel)) for channel in found[:3]) > 20


def test_a_scaled_channel_rounds_to_the_scaled_values(example):
    """So a batch norm that is folded into the weight changes nothing."""
    weight, factor = torch.randn(5, 7), torch.tensor([0.5, -2.0, 1.0, -0.25, 4.0])[:, None]
    torch.testing.assert_close(example.round_weight(weight * factor), example.round_weight(weight) * factor)


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_inputs_round_between_their_ends(example, shift):
    x = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) + shift
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    scale = (high - low) / 255
    found = example.round_input(x)
    assert (found - x).abs().max() <= 0.501 * scale + 0.5 * scale  # rounding, and the zero point at the ends
    assert (found - x).abs().mean() <= 0.26 * scale
    assert len(found.unique()) <= 256
    assert example.round_input(torch.tensor([0.0, *x[0].tolist()]))[0] == 0  # padding is exact
    assert torch.equal(example.round_input(torch.zeros(3)), torch.zeros(3))


def test_gradients_pass_through(example):
    weight = torch.randn(4, 6, requires_grad=True)
    given = torch.randn(4, 6)
    (example.round_weight(weight) * given).sum().backward()
    torch.testing.assert_close(weight.grad, given)
    x = torch.randn(100, requires_grad=True)
    (example.round_input(x) * 2).sum().backward()
    assert (x.grad == 2).float().mean() > 0.97  # but for values beyond a rounded end


def test_a_model_keeps_weights_keys_and_evaluation(example):
    torch.manual_seed(0)
    model, image = create_model("resnet8", 10), torch.randn(4, 3, 16, 16)
    plain = copy.deepcopy(model)
    example.train_rounded(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model.eval()(image), plain.eval()(image))
    rounded, exact = model.train()(image), plain.train()(image)
    off = (rounded - exact).abs().max() / exact.abs().max()
    assert 1e-4 < off < 0.2
    rounded.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_layer_computes_the_int8_product(example):
    """A linear layer against the sum of products of integers, which int8 kernels compute."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 5), torch.randn(8, 12)
    model = nn.Sequential(layer)
    example.train_rounded(model)
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


def test_the_example_trains_exports_and_resumes(cli, tmp_path, forget_plugins, monkeypatch):
    monkeypatch.setattr("mdistiller.training.trainer.drop_previous", lambda path: None)
    plugin = ("--plugin", FILE)
    given = ("train", "digits.student.rounded", *plugin, *cli.FAST, "--epochs", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(*given, "--out", whole).code == 0
    assert cli(*given, "--out", parts).code == 0
    (parts / "resume.pt").write_bytes((parts / "resume.previous.pt").read_bytes())
    assert cli("train", parts / "config.json", "--resume", *plugin).code == 0
    assert (parts / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    plain = create_model("resnet8", 4)
    plain.load_state_dict(load_student(whole).state_dict())
    top1 = cli("eval", whole, *plugin, "--json").json()["top1"]
    assert top1 == [line for line in cli.metrics(whole) if line["kind"] == "eval"][-1]["top1"]
    assert cli("export", whole, "--no-eval", *plugin).code == 0
