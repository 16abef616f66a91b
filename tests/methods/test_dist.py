"""DIST against correlations by numpy, and at the limits of floating point."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import dist_loss

CONTRACT = {"zero at equal"}


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(size=(6, 7))), torch.tensor(rng.normal(size=(6, 7)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_is_the_formula_s(logits, temperature):
    s, t = (softmax(x.numpy() / temperature, axis=1) for x in logits)
    inter = np.mean([1 - np.corrcoef(s[b], t[b])[0, 1] for b in range(6)])
    intra = np.mean([1 - np.corrcoef(s[:, c], t[:, c])[0, 1] for c in range(7)])
    expected = temperature**2 * (2 * inter + 3 * intra)
    # The denominator's 1e-8 is what the tolerance is for.
    got = dist_loss(*logits, beta=2, gamma=3, temperature=temperature)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_weights_pick_the_parts(logits):
    s, t = (softmax(x.numpy() / 4, axis=1) for x in logits)
    inter = np.mean([1 - np.corrcoef(s[b], t[b])[0, 1] for b in range(6)])
    assert dist_loss(*logits, beta=1, gamma=0).item() == pytest.approx(16 * inter, rel=1e-4)
    whole = dist_loss(*logits, beta=1, gamma=0) + dist_loss(*logits, beta=0, gamma=1)
    assert dist_loss(*logits, beta=1, gamma=1).item() == pytest.approx(whole.item(), rel=1e-12)


def test_nearly_zero_where_student_equals_teacher(logits):
    assert 0 <= dist_loss(logits[1], logits[1]).item() < 1e-3


def test_a_linear_relation_of_probabilities_is_enough():
    # A mixture with the uniform distribution halves all deviations: far from equal, yet correlated.
    rng = np.random.default_rng(0)
    p = torch.tensor(softmax(2 * rng.normal(size=(8, 5)), axis=1))
    mixed = (0.5 * p + 0.5 / 5).log()
    assert dist_loss(mixed, p.log(), temperature=1).item() < 1e-5


EXTREMES = {
    "equal logits": ([3.0, 3.0, 3.0], [3.0, 3.0, 3.0]),
    "zeros against a certain teacher": ([0.0, 0.0, 0.0], [1e4, 0.0, -1e4]),
    "certain of different classes": ([-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]),
    "two classes": ([1e4, -1e4], [-1e4, 1e4]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_extreme_logits_stay_finite(dtype, case, temperature, batch):
    s, t = (torch.tensor([x] * batch, dtype=dtype) for x in EXTREMES[case])
    value = dist_loss(s.requires_grad_(), t, temperature=temperature)
    (grad,) = torch.autograd.grad(value, s)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(grad).all()
    assert 0 <= value <= 8 * temperature**2 * (1 + 1e-6)


def test_a_student_that_says_nothing_yet_gets_no_gradient():
    # The correlation's own gradient grows without bound towards constant probabilities.
    student = torch.zeros(4, 10, requires_grad=True)
    value = dist_loss(student, torch.randn(4, 10))
    assert value.item() == pytest.approx(4 * 16)
    assert (torch.autograd.grad(value, student)[0] == 0).all()


def test_one_sample_has_no_intra_class_relation(logits):
    s, t = (x[:1] for x in logits)
    inter = dist_loss(s, t, beta=1, gamma=0, temperature=2)
    assert dist_loss(s, t, beta=1, gamma=1, temperature=2).item() == pytest.approx(inter.item() + 4)


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"one shape \[B, C\].*\[4, 5\] and \[4, 6\]"):
        dist_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        dist_loss(x, x, temperature=0)
