"""NormKD against the formula written out in numpy, and at the limits of floating point."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import kd_loss, normkd_loss

CONTRACT = {"zero at equal"}


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(3 * rng.normal(size=(6, 7))), torch.tensor(3 * rng.normal(size=(6, 7)) + 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_is_the_formula_s(logits, temperature):
    losses = []
    for s, t in zip(*(x.numpy() for x in logits), strict=True):
        own, others = temperature * s.std(ddof=1), temperature * t.std(ddof=1)
        p, q = softmax(t / others), softmax(s / own)
        losses.append(others**2 * np.sum(p * np.log(p / q)))
    assert normkd_loss(*logits, temperature=temperature).item() == pytest.approx(np.mean(losses), rel=1e-12)


def test_is_kd_where_both_spreads_are_one(logits):
    s, t = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in logits)
    assert normkd_loss(s, t).item() == pytest.approx(kd_loss(s, t, temperature=2.0).item(), rel=1e-12)


def test_the_student_s_shift_and_scale_do_not_matter(logits):
    s, t = logits
    assert normkd_loss(5 * s - 3, t).item() == pytest.approx(normkd_loss(s, t).item(), rel=1e-10)
    assert abs(normkd_loss(5 * t - 3, t).item()) < 1e-12


def test_two_classes_leave_the_order_alone():
    s = torch.tensor([[1.0, -2.0], [0.1, 0.0]], requires_grad=True)
    t = torch.tensor([[0.5, 0.0], [3.0, -4.0]])
    value = normkd_loss(s, t)
    assert abs(value.item()) < 1e-6
    opposite = normkd_loss(-s, t)
    assert opposite.item() > 0.1
    assert torch.autograd.grad(opposite, s)[0].abs().max() < 1e-4


def test_equal_student_logits_start_as_in_kd(logits):
    student = torch.zeros(6, 7, dtype=torch.float64, requires_grad=True)
    teacher = logits[1] / logits[1].std(1, keepdim=True)
    got = torch.autograd.grad(normkd_loss(student, teacher), student)[0]
    torch.testing.assert_close(
        got, torch.autograd.grad(kd_loss(student, teacher, temperature=2.0), student)[0]
    )


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[4, 5\] and \[4, 6\]"):
        normkd_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="C ≥ 2"):
        normkd_loss(x[:, :1], x[:, :1])
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        normkd_loss(x, x, temperature=0)
