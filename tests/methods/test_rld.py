"""RLD against the formula written out in numpy, against DKD, and at the limits of floating point."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import dkd_loss, rld_loss

CONTRACT = set()


def numpy_parts(student, teacher, target, temperature, confidence_temperature):
    """Both divergences a sample [B, 2], by plain loops over the definition."""
    parts = []
    for s, t, y in zip(student, teacher, target, strict=True):
        p, q = softmax(t / confidence_temperature).max(), softmax(s / confidence_temperature)[y]
        confidence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        below = np.flatnonzero(t < t[y])
        correlation = 0.0
        if len(below):
            a, b = softmax(t[below] / temperature), softmax(s[below] / temperature)
            correlation = np.sum(a * np.log(a / b))
        parts.append([confidence * confidence_temperature**2, correlation * temperature**2])
    return np.array(parts)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(8, 7)), 3 * rng.normal(size=(8, 7)), rng.integers(0, 7, size=8)


@pytest.mark.parametrize(("temperature", "confidence_temperature"), [(4.0, 4.0), (2.0, 1.0)])
def test_value_is_the_formula_s(logits, temperature, confidence_temperature):
    parts = numpy_parts(*logits, temperature, confidence_temperature)
    got = rld_loss(
        *map(torch.tensor, logits),
        alpha=0.5,
        beta=3,
        temperature=temperature,
        confidence_temperature=confidence_temperature,
    )
    assert got.item() == pytest.approx((parts @ [0.5, 3]).mean(), rel=1e-12)


def test_is_dkd_where_the_teacher_is_right(logits):
    s, t, _ = map(torch.tensor, logits)
    y = t.argmax(1)
    expected = dkd_loss(s, t, y, alpha=1, beta=8, temperature=4.0)
    assert rld_loss(s, t, y).item() == pytest.approx(expected.item(), rel=1e-10)
    assert abs(rld_loss(t, t, y).item()) < 1e-12


def test_classes_above_the_label_do_not_count_among_the_correlations():
    teacher = torch.tensor([[5.0, 2.0, 2.0, 1.0, 0.0]])
    student = torch.tensor([[1.0, 0.0, 3.0, 2.0, -1.0]], requires_grad=True)
    target = torch.tensor([1])  # class 0 lies above, class 2 ties: both are left out, as is the label
    (grad,) = torch.autograd.grad(rld_loss(student, teacher, target, alpha=0), student)
    assert (grad[0] != 0).tolist() == [False, False, False, True, True]


def test_a_label_that_the_teacher_ranks_last_leaves_the_confidence():
    teacher = torch.tensor([[5.0, 2.0, -3.0]])
    student = torch.randn(1, 3, requires_grad=True)
    value = rld_loss(student, teacher, torch.tensor([2]), alpha=0)
    assert value.item() == 0
    assert (torch.autograd.grad(value, student)[0] == 0).all()


def test_bad_input():
    x, y = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[4, 5\] and \[4, 6\]"):
        rld_loss(x, torch.randn(4, 6), y)
    with pytest.raises(ConfigError, match=r"int64 \[4\].*no soft labels.*got torch.float32 \[4, 5\]"):
        rld_loss(x, x, x.softmax(1))
    with pytest.raises(ConfigError, match=r"got torch.int64 \[3\]"):
        rld_loss(x, x, y[:3])
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        rld_loss(x, x, y, temperature=0)
