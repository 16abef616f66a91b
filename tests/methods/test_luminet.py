"""LumiNet against perceptions by numpy."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.autograd import gradcheck

from mdistiller.errors import ConfigError
from mdistiller.functional import luminet_loss
from mdistiller.methods import LumiNetConfig, get_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = {"zero at equal"}


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(3 * rng.normal(size=(6, 7))), torch.tensor(1 + 5 * rng.normal(size=(6, 7)))


def perceived(z):
    return (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)


@pytest.mark.parametrize("temperature", [0.7, 4.0])
def test_value_is_the_formula_s(logits, temperature):
    q, p = (softmax(perceived(x.numpy()) / temperature, axis=1) for x in logits)
    expected = np.mean([np.sum(p[b] * np.log(p[b] / q[b])) for b in range(6)])
    assert luminet_loss(*logits, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_shift_and_scale_of_a_class_do_not_matter(logits):
    s, t = logits
    changed = t * torch.linspace(1, 4, 7, dtype=torch.float64) + torch.arange(7)
    torch.testing.assert_close(luminet_loss(s, changed), luminet_loss(s, t), rtol=1e-4, atol=0)
    assert luminet_loss(changed, t).item() < 1e-9


def test_gradient_one_sample_and_constant_classes(logits):
    s, t = logits
    assert gradcheck(luminet_loss, (s.requires_grad_(), t.requires_grad_()))
    one = s[:1].detach().requires_grad_()
    value = luminet_loss(one, t[:1])
    assert value.item() == 0
    zeros = torch.zeros(6, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(luminet_loss(zeros, t.float()), zeros)
    assert torch.isfinite(grad).all()
    assert grad.any()


def test_the_weight_is_alpha_squared_after_the_warm_up(logits):
    method_class = get_method("luminet")
    config = LumiNetConfig(alpha=3.0, temperature=2.0, warmup=0.5)
    method = method_class(config, create_model("resnet8"), create_model("resnet8"), DataInfo((3, 32, 32)))
    s, t = (Outputs(x, {}) for x in logits)
    batch = Batch(*[torch.zeros(6, dtype=torch.int64)] * 3)
    got = [method(s, t, batch, torch.tensor(p))["luminet"] for p in (0.25, 1.0)]
    whole = 9 * luminet_loss(*logits, temperature=2.0)
    torch.testing.assert_close(torch.stack(got), torch.stack([whole / 2, whole]))


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"one shape \[B, C\].*\[4, 5\] and \[4, 6\]"):
        luminet_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        luminet_loss(x, x, temperature=0)
