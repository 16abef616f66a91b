"""GDKD against the formula written out in numpy, against DKD and KD, and at the limits of floating point."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import dkd_loss, gdkd_loss, kd_loss
from mdistiller.methods import GDKDConfig

CONTRACT = {"zero at equal"}


def numpy_parts(student, teacher, k, temperature):
    """The three divergences a sample [B, 3], by plain loops over the definition."""
    parts = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        top = np.argsort(-t)[:k]
        rest = np.setdiff1d(np.arange(len(t)), top)
        row = [sum(p[g].sum() * np.log(p[g].sum() / q[g].sum()) for g in (top, rest))]
        for group in (top, rest):
            a, b = p[group] / p[group].sum(), q[group] / q[group].sum()
            row.append(np.sum(a * np.log(a / b)))
        parts.append(row)
    return np.array(parts) * temperature**2


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(3 * rng.normal(size=(6, 9))), torch.tensor(3 * rng.normal(size=(6, 9)))


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_is_the_formula_s(logits, k, temperature):
    s, t = logits
    parts = numpy_parts(s.numpy(), t.numpy(), k, temperature)
    got = gdkd_loss(s, t, w0=0.5, w1=2, w2=6, k=k, temperature=temperature)
    assert got.item() == pytest.approx((parts @ [0.5, 2, 6]).mean(), rel=1e-12)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_parts_make_up_kd(logits, k):
    for s, t in zip(*logits, strict=True):
        mass = (t / 4).softmax(0).topk(k).values.sum().item()
        whole = gdkd_loss(s[None], t[None], k=k, w0=1, w1=mass, w2=1 - mass)
        assert whole.item() == pytest.approx(kd_loss(s[None], t[None], temperature=4.0).item(), rel=1e-10)


def test_one_top_class_is_dkd_where_the_teacher_is_right(logits):
    s, t = logits
    expected = dkd_loss(s, t, t.argmax(1), alpha=1, beta=8, temperature=4.0)
    assert gdkd_loss(s, t, k=1, w1=5).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("k", [9, 50])
def test_no_rest_leaves_kd(logits, k):
    s, t = logits
    expected = 2 * kd_loss(s, t, temperature=4.0)
    assert gdkd_loss(s, t, k=k, w1=2).item() == pytest.approx(expected.item(), rel=1e-12)


def test_zero_where_student_equals_teacher(logits):
    assert abs(gdkd_loss(logits[1], logits[1]).item()) < 1e-12


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[4, 5\] and \[4, 6\]"):
        gdkd_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="k must be at least 1; got 0"):
        gdkd_loss(x, x, k=0)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        GDKDConfig(k=0)
