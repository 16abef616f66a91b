"""NormKD against the formula written out in numpy, and at the limits of floating point."""

import numpy as np
import pytest
import torch
from loss_checks import LOGITS, check_shapes, check_signature
from scipy.special import softmax
from torch.autograd import gradcheck

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


def test_gradient(logits):
    s, t = logits
    assert gradcheck(normkd_loss, (s.requires_grad_(), t.requires_grad_()))


EXTREMES = {
    "equal logits": ([3.0, 3.0, 3.0], [3.0, 3.0, 3.0]),
    "zeros against a certain teacher": ([0.0, 0.0, 0.0], [1e4, 0.0, -1e4]),
    "certain against zeros": ([1e4, 0.0, -1e4], [0.0, 0.0, 0.0]),
    "certain of different classes": ([-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]),
    "two classes": ([1e4, -1e4], [-1e4, 1e4]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_logits_stay_finite(dtype, case):
    s, t = (torch.tensor([x] * 2, dtype=dtype) for x in EXTREMES[case])
    value = normkd_loss(s.requires_grad_(), t)
    (grad,) = torch.autograd.grad(value, s)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(grad).all()
    assert torch.isfinite(value)


def test_half_precision_is_promoted(logits):
    s, t = (x.bfloat16() for x in logits)
    torch.testing.assert_close(normkd_loss(s, t), normkd_loss(s.float(), t.float()), rtol=0, atol=0)


def test_compiles_whole(logits):
    compiled = torch.compile(normkd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*logits), normkd_loss(*logits))


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[4, 5\] and \[4, 6\]"):
        normkd_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="C ≥ 2"):
        normkd_loss(x[:, :1], x[:, :1])
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        normkd_loss(x, x, temperature=0)


def test_signature_and_shapes():
    check_signature(
        "normkd_loss", "(student_logits, teacher_logits, *, temperature=2.0, reduction='mean', mask=None)"
    )
    check_shapes("normkd_loss", *LOGITS)
