"""PLD against the formula written out in numpy, and its special cases."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax
from torch.nn import functional as F

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import pld_loss

CONTRACT = set()


def by_loops(student, teacher, target, temperature):
    """The losses of samples, step by step over the definition."""
    losses = []
    for s, t, y in zip(student, teacher, target, strict=True):
        order = [y, *(c for c in np.argsort(-t, kind="stable") if c != y)]
        confidence = softmax(t / temperature)
        steps = [confidence[c] * (logsumexp(s[order[k:]]) - s[c]) for k, c in enumerate(order)]
        losses.append(sum(steps))
    return np.array(losses)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(8, 7)), 3 * rng.normal(size=(8, 7)), rng.integers(0, 7, size=8)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_is_the_formula_s(logits, temperature):
    expected = by_loops(*logits, temperature)
    found = pld_loss(*map(torch.tensor, logits), temperature=temperature, reduction="none")
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    mean = pld_loss(*map(torch.tensor, logits), temperature=temperature)
    assert mean.item() == pytest.approx(expected.mean(), rel=1e-12)


def test_a_teacher_certain_of_the_label_gives_the_cross_entropy(logits):
    s, _, y = logits
    teacher = 1e4 * np.eye(7)[y]
    found = pld_loss(torch.tensor(s), torch.tensor(teacher), torch.tensor(y), reduction="none")
    np.testing.assert_allclose(found, -log_softmax(s, axis=1)[np.arange(8), y], rtol=1e-12)


def test_a_uniform_teacher_weighs_all_steps_equally():
    s = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    found = pld_loss(s, torch.zeros(1, 3, dtype=torch.float64), torch.tensor([1]))
    # Classes that tie keep their order: 1, then 0, then 2.
    steps = logsumexp([-1.0, 0.3, 2.0]) + 1.0, logsumexp([0.3, 2.0]) - 0.3, 0.0
    assert found.item() == pytest.approx(sum(steps) / 3, rel=1e-12)


def test_only_the_order_of_the_label_changes_with_it():
    s, t = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    confidence = F.softmax(t, 1)[0]
    for label in (0, 1):
        found = pld_loss(s, t, torch.tensor([label]))
        expected = confidence[label] * F.cross_entropy(s, torch.tensor([label]))  # the last step is certain
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_is_the_paper_s(logits):
    s, t, y = map(torch.tensor, logits)
    s.requires_grad_()
    (found,) = torch.autograd.grad(pld_loss(s, t, y, reduction="sum"), s)
    expected = np.zeros((8, 7))
    for b in range(8):
        order = [y[b].item(), *(c for c in np.argsort(-logits[1][b]) if c != y[b])]
        for k, c in enumerate(order):
            weight = softmax(logits[1][b])[c]
            expected[b, order[k:]] += weight * softmax(logits[0][b][order[k:]])
            expected[b, c] -= weight
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_replaces_the_task_loss():
    student, teacher = mdistiller.create_model("resnet8", 10), mdistiller.create_model("resnet14", 10)
    distiller = mdistiller.Distiller(student, teacher.eval(), "pld").eval()
    image, label = torch.randn(4, 3, 16, 16), torch.tensor([0, 9, 3, 3])
    out = distiller(image, label)
    with torch.no_grad():
        logits = student(image).double().numpy(), teacher(image).double().numpy()
    assert out.losses["task"].item() == 0
    assert out.loss.item() == pytest.approx(by_loops(*logits, label.numpy(), 1.0).mean(), rel=1e-4)


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match="PLD ranks the classes, so it takes no soft labels"):
        pld_loss(x, x, x.softmax(1))
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        pld_loss(x, x, torch.arange(4), temperature=0)
