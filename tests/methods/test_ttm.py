"""TTM and WTTM against the formulas written out in numpy, and at the limits of floating point."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import ttm_loss, wttm_loss

CONTRACT = set()

LOSSES = [ttm_loss, wttm_loss]


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(3 * rng.normal(size=(6, 7))), torch.tensor(3 * rng.normal(size=(6, 7)))


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_values_are_the_formula_s(logits, gamma):
    s, t = (x.numpy() for x in logits)
    plain, weighed = [], []
    for b in range(6):
        power = softmax(t[b]) ** gamma
        p, q = power / power.sum(), softmax(s[b])
        plain.append(np.sum(p * np.log(p / q)))
        weighed.append(power.sum() * plain[-1])
    assert ttm_loss(*logits, gamma=gamma).item() == pytest.approx(np.mean(plain), rel=1e-12)
    assert wttm_loss(*logits, gamma=gamma).item() == pytest.approx(np.mean(weighed), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_where_the_student_has_the_transformed_teacher_s_logits(logits, loss):
    _, t = logits
    assert abs(loss(0.25 * t + 1, t, gamma=0.25).item()) < 1e-12
    assert loss(t, t, gamma=0.25).item() > 0.1


def test_the_weight_runs_from_certain_to_uniform():
    s = torch.randn(1, 9, dtype=torch.float64)
    uniform, certain = torch.zeros_like(s), torch.tensor([[1e4] + [0.0] * 8], dtype=torch.float64)
    for teacher, weight in ((uniform, 9**0.8), (certain, 1.0)):
        ratio = wttm_loss(s, teacher, gamma=0.2) / ttm_loss(s, teacher, gamma=0.2)
        assert ratio.item() == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_input(loss):
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[4, 5\] and \[4, 6\]"):
        loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="gamma must be positive; got -1"):
        loss(x, x, gamma=-1)
