"""ABKD against the α-β-divergence by loops in numpy, and its special cases."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.autograd import gradcheck

from mdistiller.errors import ConfigError
from mdistiller.functional import abkd_loss, kd_loss
from mdistiller.methods import ABKDConfig, get_method
from mdistiller.models import create_model
from mdistiller.types import DataInfo

CONTRACT = {"zero at equal"}


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(3 * rng.normal(size=(6, 7))), torch.tensor(3 * rng.normal(size=(6, 7)))


def divergence(p, q, a, b):
    terms = (
        a / (a + b) * p_c ** (a + b) + b / (a + b) * q_c ** (a + b) - p_c**a * q_c**b
        for p_c, q_c in zip(p, q, strict=True)
    )
    return math.fsum(terms) / (a * b)


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (0.5, 0.5), (1.2, 0.1), (0.2, 1.5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_is_the_formula_s(logits, alpha, beta, temperature):
    s, t = (softmax(x.numpy() / temperature, axis=1) for x in logits)
    expected = np.mean([divergence(p, q, alpha, beta) for p, q in zip(t, s, strict=True)])
    got = abkd_loss(*logits, alpha=alpha, beta=beta, temperature=temperature)
    assert got.item() == pytest.approx(expected, rel=1e-10)


def test_special_cases(logits):
    s, t = logits
    forward, reverse = (kd_loss(*pair, temperature=2.0) / 4 for pair in ((s, t), (t, s)))
    torch.testing.assert_close(abkd_loss(s, t, alpha=1.0, beta=0.0, temperature=2.0), forward)
    torch.testing.assert_close(abkd_loss(s, t, alpha=0.0, beta=1.0, temperature=2.0), reverse)
    p, q = (x.softmax(1) for x in (t, s))
    halves = abkd_loss(s, t, alpha=0.5, beta=0.5, temperature=1.0)
    torch.testing.assert_close(halves, 2 * (p.sqrt() - q.sqrt()).square().sum(1).mean())  # Hellinger
    squares = abkd_loss(s, t, alpha=1.0, beta=1.0, temperature=1.0)
    torch.testing.assert_close(squares, (p - q).square().sum(1).mean() / 2)


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.0), (0.0, 0.7), (0.0, 0.0)])
def test_edges_are_limits(logits, alpha, beta):
    near = abkd_loss(*logits, alpha=alpha or 1e-5, beta=beta or 1e-5)
    assert abkd_loss(*logits, alpha=alpha, beta=beta).item() == pytest.approx(near.item(), rel=1e-3)


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (0.7, 0.0), (0.0, 0.7), (0.0, 0.0)])
def test_zero_at_equal_positive_elsewhere_and_smooth(logits, alpha, beta):
    s, t = logits
    assert abs(abkd_loss(t, t, alpha=alpha, beta=beta).item()) < 1e-12
    assert abkd_loss(s, t, alpha=alpha, beta=beta) > 1e-3

    def loss(s, t):
        return abkd_loss(s, t, alpha=alpha, beta=beta)

    assert gradcheck(loss, (s.requires_grad_(), t.requires_grad_()))
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(s, t), loss(s, t))


def test_the_method_weighs_samples(logits):
    s, t = logits
    method_class = get_method("abkd")
    config = ABKDConfig(weight=5.0, alpha=0.4, beta=0.9, temperature=2.0)
    method = method_class(config, create_model("resnet8"), create_model("resnet8"), DataInfo((3, 32, 32)))
    got = method.sample_losses(s, t, torch.zeros(6, dtype=torch.int64))["abkd"]
    assert got.shape == (6,)
    torch.testing.assert_close(got.mean(), 5 * abkd_loss(s, t, alpha=0.4, beta=0.9, temperature=2.0))


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[4, 5\] and \[4, 6\]"):
        abkd_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match=r"alpha and beta must not be negative; got -1 and 0.3"):
        abkd_loss(x, x, alpha=-1)


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_a_class_of_minus_infinity_has_no_part(alpha, beta):
    generator = torch.Generator().manual_seed(0)
    s, t = 3 * torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    expected = abkd_loss(s, t, alpha=alpha, beta=beta)
    wide = [torch.nn.functional.pad(x, (0, 2), value=-torch.inf).requires_grad_() for x in (s, t)]
    got = abkd_loss(*wide, alpha=alpha, beta=beta)
    torch.testing.assert_close(got, expected)
    for gradient in torch.autograd.grad(got, wide):
        assert torch.isfinite(gradient).all()
        assert (gradient[:, 5:] == 0).all()
