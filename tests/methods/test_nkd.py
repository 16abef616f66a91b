"""NKD against the formula written out in numpy, and at the limits of floating point."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import kd_loss, nkd_loss

CONTRACT = set()


def numpy_nkd(student, teacher, target, gamma, temperature):
    losses = []
    for s, t, y in zip(student, teacher, target, strict=True):
        own = -softmax(t)[y] * np.log(softmax(s)[y])
        others = [i for i in range(len(s)) if i != y]
        p, q = softmax(t[others] / temperature), softmax(s[others] / temperature)
        losses.append(own - gamma * temperature**2 * np.sum(p * np.log(q)))
    return np.mean(losses)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(6, 7)), 3 * rng.normal(size=(6, 7)), rng.integers(0, 7, size=6)


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0), (0.0, 2.0)])
def test_value_is_the_formula_s(logits, gamma, temperature):
    got = nkd_loss(*map(torch.tensor, logits), gamma=gamma, temperature=temperature)
    assert got.item() == pytest.approx(numpy_nkd(*logits, gamma, temperature), rel=1e-12)


def test_soft_labels_are_the_expectation_over_classes(logits):
    s, t, _ = logits
    soft = torch.rand(6, 7, dtype=torch.float64).softmax(1)
    expected = 0.0
    for b in range(6):
        for c in range(7):
            expected += soft[b, c].item() * numpy_nkd(s[b : b + 1], t[b : b + 1], [c], 3.5, 3.0) / 6
    assert nkd_loss(torch.tensor(s), torch.tensor(t), soft).item() == pytest.approx(expected, rel=1e-10)


def test_one_hot_equals_class_ids(logits):
    s, t, y = map(torch.tensor, logits)
    one_hot = F.one_hot(y, 7).double()
    torch.testing.assert_close(nkd_loss(s, t, one_hot), nkd_loss(s, t, y), rtol=1e-10, atol=1e-10)


def test_equal_models_leave_the_teacher_s_entropy(logits):
    _, t, y = logits
    expected = numpy_nkd(t, t, y, 3.5, 3.0)
    teacher = torch.tensor(t, requires_grad=True)
    value = nkd_loss(teacher, torch.tensor(t), torch.tensor(y))
    assert value.item() == pytest.approx(expected, rel=1e-12)
    # What is left to push is the target alone: raising its logit, and all others in proportion.
    (grad,) = torch.autograd.grad(value, teacher)
    p = torch.tensor(softmax(t, axis=1))
    own = p.gather(1, torch.tensor(y)[:, None])
    torch.testing.assert_close(grad, own * (p - F.one_hot(torch.tensor(y), 7)) / 6)


def test_a_certain_teacher_keeps_its_dark_knowledge():
    # The gradient among the other classes is KD's among them, whatever the target's logit is.
    dark = torch.tensor([[0.3, -0.2, 0.9]])
    student = torch.tensor([[0.0, 0.5, 0.1]], requires_grad=True)
    padded = nkd_loss(
        F.pad(student, (1, 0), value=1e4), F.pad(dark, (1, 0), value=1e4), torch.tensor([0]), gamma=1
    )
    got = torch.autograd.grad(padded, student)[0]
    expected = torch.autograd.grad(kd_loss(student, dark, temperature=3.0), student)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_two_classes_have_no_others():
    s, t = torch.randn(4, 2), torch.randn(4, 2)
    y = torch.tensor([0, 1, 1, 0])
    expected = -(t.softmax(1) * s.log_softmax(1)).gather(1, y[:, None]).mean()
    torch.testing.assert_close(nkd_loss(s, t, y), expected)


def test_bad_input():
    x, y = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[4, 5\] and \[4, 6\]"):
        nkd_loss(x, torch.randn(4, 6), y)
    with pytest.raises(ConfigError, match="C ≥ 2"):
        nkd_loss(x[:, :1], x[:, :1], y)
    with pytest.raises(ConfigError, match=r"class ids int64 \[4\]"):
        nkd_loss(x, x, y[:3])
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        nkd_loss(x, x, y, temperature=0)
