"""Binary KD against its formula in numpy, and at the limits of floating point."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch.autograd import gradcheck

from mdistiller.errors import ConfigError
from mdistiller.functional import binary_kd_loss, dkd_loss, multilabel_dkd_loss
from mdistiller.methods import get_method, list_methods, method_config
from mdistiller.types import Batch, Outputs

CONTRACT = {"zero at equal"}


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(3 * rng.normal(size=(6, 7))), torch.tensor(3 * rng.normal(size=(6, 7)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_values_are_the_formula_s(logits, temperature):
    s, t = logits
    q, p = (expit(x.numpy() / temperature) for x in (s, t))
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    expected = temperature**2 * divergence.mean(1)
    assert binary_kd_loss(s, t, temperature=temperature).item() == pytest.approx(expected.mean(), rel=1e-9)


def test_the_gradient_is_the_difference_of_the_probabilities(logits):
    s, t = logits
    (gradient,) = torch.autograd.grad(binary_kd_loss(s.requires_grad_(), t), s)
    torch.testing.assert_close(gradient, (s.sigmoid() - t.sigmoid()) / 42)
    assert gradcheck(binary_kd_loss, (s, t.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits(dtype):
    s = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 3.0]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[-1e4, -1e4, 1e4], [float("-inf"), float("inf"), -3.0]], dtype=dtype)
    loss = binary_kd_loss(s, t)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


def test_multilabel_dkd_is_the_formula_s():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 6, 7, dtype=torch.float64, generator=generator)
    target = (torch.rand(6, 7, dtype=torch.float64, generator=generator) > 0.5).double()
    s, t, y = (x.numpy() for x in (*logits, target))
    p, q = expit(t / 2), expit(s / 2)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    got = multilabel_dkd_loss(*logits, target, alpha=2.0, beta=0.5, temperature=2.0)
    assert got.item() == pytest.approx(4 * ((2 * y + 0.5 * (1 - y)) * kl).mean(), rel=1e-12)
    # A class against 'not this class' is a problem of two classes with the logits z and 0.
    pairs = [torch.stack([x, torch.zeros_like(x)], -1) for x in logits]
    two_way = dkd_loss(*pairs, torch.zeros(6, 7, dtype=torch.int64), temperature=2.0)
    torch.testing.assert_close(multilabel_dkd_loss(*logits, target, temperature=2.0), two_way)
    with pytest.raises(ConfigError, match=r"float \[6, 7\].*one_hot.*got torch.int64 \[6, 7\]"):
        multilabel_dkd_loss(*logits, target.long())
    inputs = tuple(x.requires_grad_() for x in logits)
    assert gradcheck(lambda a, b: multilabel_dkd_loss(a, b, target), inputs)


def test_methods_for_several_classes_read_no_logits_but_binary_kd():
    """Their classes declare it; features of random values stand for a model's."""
    from test_contract import models

    from mdistiller.methods.compose import build_method
    from mdistiller.taps import TappedModel
    from mdistiller.types import DataInfo

    names = [name for name in list_methods() if not get_method(name).needs.one_class]
    assert {"binary_kd", "fitnet", "none"} < set(names)
    assert not {"kd", "dkd"} & set(names)
    for name in {*names} - {"binary_kd", "none"}:
        student, teacher = models()
        method = build_method(
            method_config(name), student, teacher, DataInfo((3, 32, 32), torch.zeros(40, 10), 8)
        )
        assert not method.needs.labels
        student = method.extend_student(student).eval()
        image = torch.randn(8, 3, 32, 32)
        with torch.no_grad():
            s, t = (
                TappedModel(student, method.student_taps)(image),
                TappedModel(teacher, method.teacher_taps)(image),
            )
        found = []
        for shift in (0, 5):
            torch.manual_seed(0)
            s, t = (Outputs(x.logits + shift * torch.randn(8, 10), x.features) for x in (s, t))
            torch.manual_seed(0)
            losses = method.eval()(s, t, Batch(image, torch.zeros(8, 10), torch.arange(8)), torch.tensor(1.0))
            found.append(torch.stack([value.detach() for value in losses.values()]))
        assert torch.equal(*found), name
