"""Losses from hidden states and weights against those of materialized logits, and divergences by numpy."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import abkd_loss, dkd_loss, kd_loss
from mdistiller.methods.base import promote

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from large_vocabulary import linear_dkd_loss, linear_kd_loss

N, V, D, E = 10, 13, 4, 6


def inputs(dtype=torch.float64, scale=1.0):
    """Hidden states, weights and bias of the student and of the teacher, and class ids."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [x.requires_grad_() for x in (draw(2, 5, D), draw(V, D), draw(V))]
    teacher = [draw(2, 5, E), draw(V, E), draw(V)]
    return student, teacher, torch.randint(0, V, (2, 5), generator=generator)


def js_loss(student, teacher, target, temperature=4.0, **options):
    """The Jensen-Shannon divergence from logits, by autograd."""
    log_q, log_p = ((promote(x) / temperature).log_softmax(-1) for x in (student, teacher))
    log_m = torch.logaddexp(log_q, log_p) - np.log(2)
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    losses = (terms / 2).sum(-1) * temperature**2
    return losses[target != -100].mean()


def reverse_loss(student, teacher, target, temperature=4.0, **options):
    losses = abkd_loss(student, teacher, alpha=0.0, beta=1.0, temperature=temperature, reduction="none")
    return (losses * temperature**2)[target != -100].mean()


LOSSES = {
    "dkd": (linear_dkd_loss, dkd_loss, {"alpha": 0.7, "beta": 3.0, "temperature": 2.0}),
    "kl": (linear_kd_loss, kd_loss, {"temperature": 2.0}),
    "reverse": (linear_kd_loss, reverse_loss, {"temperature": 2.0, "divergence": "reverse_kl"}),
    "js": (linear_kd_loss, js_loss, {"temperature": 2.0, "divergence": "js"}),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def both(name, student, teacher, target, scale=3.0, **options):
    """Value and gradients of the linear loss, and of the loss of the logits."""
    linear, plain, settings = LOSSES[name]
    biases = {"student_bias": student[2], "teacher_bias": teacher[2]}
    got = linear(*student[:2], *teacher[:2], target, **biases, **settings, **options)
    settings = {k: v for k, v in settings.items() if k != "divergence"}
    options.pop("chunk_size", None)
    expected = plain(F.linear(*student), F.linear(*teacher), target, **settings, **options)
    return [(x.detach(), torch.autograd.grad(scale * x, student)) for x in (got, expected)]


@every_loss
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 10])
def test_values_and_gradients_are_those_of_the_logits(name, chunk_size):
    student, teacher, target = inputs()
    target[0, 1] = target[1, 4] = -100
    got, expected = both(name, student, teacher, target, chunk_size=chunk_size)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    got, expected = both(name, *(inputs(torch.float32)[:2]), target)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@every_loss
def test_half_precision(name):
    """The logits are rounded as those of a bfloat16 layer; all else is in float32."""
    student, teacher, target = inputs(torch.bfloat16)
    got, expected = both(name, student, teacher, target, chunk_size=3)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], rtol=2e-3, atol=0)
    for a, b in zip(got[1], expected[1], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).float().norm() < 0.02 * b.float().norm()
    student, teacher, target = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = both(name, student, teacher, target)
    torch.testing.assert_close(got[0], expected[0], rtol=2e-3, atol=0)
    for a, b in zip(got[1], expected[1], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("name", ["dkd", "kl"])
def test_ignored_rows_reductions_and_absent_classes(name):
    student, teacher, target = inputs()
    plain = both(name, student, teacher, target, reduction="sum")
    torch.testing.assert_close(*plain, rtol=1e-11, atol=1e-13)
    target[0, 1] = -100
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    got, expected = both(name, student, teacher, target, mask=mask, chunk_size=3)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    with torch.no_grad():  # padding may hold anything
        student[0][0, 1], student[0][1, 3], teacher[0][1, 3] = torch.nan, torch.inf, torch.nan
        student[2][4] = teacher[2][4] = -torch.inf
    target = target.masked_fill(target == 4, 5)
    got, expected = both(name, student, teacher, target, mask=mask)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-11, atol=1e-13)
    hidden, weight, bias = got[1]
    for gradient in got[1]:
        assert torch.isfinite(gradient).all()
    assert (hidden[0, 1] == 0).all()
    assert (weight[4] == 0).all()
    assert bias[4] == 0
    assert both(name, *inputs()[:2], torch.full((2, 5), -100))[0][0] == 0


def test_divergences_are_the_formula_s():
    student, teacher, _ = inputs()
    s, t = (F.linear(*x).detach().numpy().reshape(N, V) / 4 for x in (student, teacher))
    p, q = softmax(t, axis=1), softmax(s, axis=1)
    m = (p + q) / 2
    expected = {
        "kl": (p * np.log(p / q)).sum(1),
        "reverse_kl": (q * np.log(q / p)).sum(1),
        "js": (p * np.log(p / m) + q * np.log(q / m)).sum(1) / 2,
    }
    biases = {"student_bias": student[2], "teacher_bias": teacher[2]}
    for name, value in expected.items():
        got = linear_kd_loss(*student[:2], *teacher[:2], divergence=name, **biases)
        assert got.item() == pytest.approx(16 * value.mean(), rel=1e-12)


@every_loss
def test_extreme_logits_stay_finite(name):
    student, teacher, target = inputs(torch.float32, scale=60.0)  # logits up to about 1e4
    ((value, gradients), _) = both(name, student, teacher, target)
    for x in (value, *gradients):
        assert torch.isfinite(x).all()


def test_without_bias_and_without_gradients():
    (hidden, weight, _), (t_hidden, t_weight, _), target = inputs()
    teacher = t_hidden.requires_grad_(), t_weight

    def check(h, w):
        return linear_dkd_loss(h, w, *teacher, target, chunk_size=4)

    torch.testing.assert_close(
        torch.autograd.grad(check(hidden, weight), (hidden, weight)),
        torch.autograd.grad(dkd_loss(hidden @ weight.T, t_hidden @ t_weight.T, target), (hidden, weight)),
    )
    with torch.no_grad():
        assert not check(hidden, weight).requires_grad
    check(hidden.detach(), weight).backward()
    assert weight.grad is not None
    assert t_hidden.grad is None
    loss = check(hidden, weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_loss
def test_no_tensor_of_all_logits_is_kept(name):
    """Rows and classes are many beside the width, so a tensor of logits would be larger than all others."""
    rows, classes = 64, 96
    hidden, weight = torch.randn(rows, 2, requires_grad=True), torch.randn(classes, 2, requires_grad=True)
    given = (
        hidden,
        weight,
        torch.randn(rows, 3),
        torch.randn(classes, 3),
        torch.zeros(rows, dtype=torch.int64),
    )
    kept = []
    linear, _, settings = LOSSES[name]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear(*given, **settings, chunk_size=8)
    assert max(kept) == weight.numel() < 8 * classes


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch itself
@pytest.mark.parametrize("name", ["dkd", "js"])
def test_compiles_whole(name):
    linear, _, settings = LOSSES[name]
    student, teacher, target = inputs()
    given = *student[:2], *teacher[:2], target
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    values = [f(*given, **settings, chunk_size=4) for f in (compiled, linear)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(x, student[:2]) for x in values))


def test_bad_input():
    h, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"got of the student \[4, 3\], \[5, 4\] and bias None"):
        linear_kd_loss(h, torch.randn(5, 4), h, w)
    with pytest.raises(ConfigError, match=r"got of the teacher \[4, 3\], \[6, 3\].*\[4\] and 5 classes"):
        linear_kd_loss(h, w, h, torch.randn(6, 3))
    with pytest.raises(ConfigError, match=r"got of the teacher \[3, 3\]"):
        linear_kd_loss(h, w, h[:3], w)
    with pytest.raises(ConfigError, match=r"bias \[4\]"):
        linear_kd_loss(h, w, h, w, teacher_bias=torch.zeros(4))
    with pytest.raises(ConfigError, match=r"class ids int64 \[4\]; got torch.float32 \[4, 5\]"):
        linear_dkd_loss(h, w, h, w, torch.rand(4, 5))
    with pytest.raises(ConfigError, match=r"mask must be bool \[4\]; got torch.bool \[3\]"):
        linear_dkd_loss(h, w, h, w, y, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        linear_dkd_loss(h, w, h, w, y, temperature=0)
    with pytest.raises(ConfigError, match="'mean' or 'sum'; got 'none', but the gradient"):
        linear_dkd_loss(h, w, h, w, y, reduction="none")
    with pytest.raises(ConfigError, match="'kl', 'reverse_kl' or 'js'; got 'jsd'"):
        linear_kd_loss(h, w, h, w, divergence="jsd")
    with pytest.raises(ConfigError, match=r"chunk_size must be a number of rows.*got 0"):
        linear_kd_loss(h, w, h, w, chunk_size=0)


@pytest.mark.parametrize("name", ["kd", "dkd"])
@pytest.mark.parametrize(("alike", "scale"), [(False, 1024.0), (True, 1.0)])
def test_float16_with_a_loss_scale_is_as_exact_as_the_loss_of_logits(name, alike, scale):
    """Small parts of a mean are not lost, and sums of rows that all push one class do not overflow."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((1024, 16), (4000, 16), (1024, 16), (4000, 16))
    given = [0.3 * torch.randn(size, generator=generator) for size in sizes]
    if alike:
        given = [x.clone() for x in given]
        given[0][:], given[2][:] = 30 * given[0][0].sign(), 3 * given[2][0].sign()
    target = torch.randint(4000, (1024,), generator=generator)
    given = [x.half() for x in given]
    settings = {"temperature": 4.0} | ({"beta": 8.0} if name == "dkd" else {})
    loss = {"kd": kd_loss, "dkd": dkd_loss}[name]
    linear = {"kd": linear_kd_loss, "dkd": linear_dkd_loss}[name]

    def gradients(kind, *, whole):
        hidden, weight, t_hidden, t_weight = (x.to(kind, copy=True).requires_grad_() for x in given)
        if whole:
            labels = (target,) if name == "dkd" else ()
            value = loss(hidden @ weight.T, (t_hidden @ t_weight.T).detach(), *labels, **settings)
        else:
            value = linear(hidden, weight, t_hidden, t_weight, target, **settings)
        (value * scale).backward()
        return [x.grad.double() / scale for x in (hidden, weight)]

    exact = gradients(torch.float64, whole=True)
    ordinary = gradients(torch.float16, whole=True)
    for found, plain, expected in zip(gradients(torch.float16, whole=False), ordinary, exact, strict=True):
        assert 0 < (found - expected).norm() < 2 * (plain - expected).norm()
