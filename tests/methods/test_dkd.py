"""KD and DKD against the formulas written out in numpy, and at the limits of floating point."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import logsumexp

from mdistiller.errors import ConfigError
from mdistiller.functional import dkd_loss, kd_loss
from mdistiller.methods.dkd import logit_gap

CONTRACT = {"zero at equal"}


def tckd_loss(*logits_and_target, **options):
    return dkd_loss(*logits_and_target, alpha=1.0, beta=0.0, **options)


def nckd_loss(*logits_and_target, **options):
    return dkd_loss(*logits_and_target, alpha=0.0, beta=1.0, **options)


WITH_TARGET = [dkd_loss, tckd_loss, nckd_loss]


def softmax(z):
    return np.exp(z - logsumexp(z, axis=1, keepdims=True))


def numpy_parts(student, teacher, target, temperature):
    """TCKD and NCKD a sample, by plain loops over the definition."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    tckd, nckd = [], []
    for pt, qt, t in zip(p, q, target, strict=True):
        tckd.append(pt[t] * np.log(pt[t] / qt[t]) + (1 - pt[t]) * np.log((1 - pt[t]) / (1 - qt[t])))
        others = [i for i in range(len(pt)) if i != t]
        a, b = pt[others] / (1 - pt[t]), qt[others] / (1 - qt[t])
        nckd.append(np.sum(a * np.log(a / b)))
    return np.array(tckd) * temperature**2, np.array(nckd) * temperature**2


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(6, 7)), 3 * rng.normal(size=(6, 7)), rng.integers(0, 7, size=6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_are_the_formula_s(logits, temperature):
    s, t, y = logits
    student, teacher, target = torch.tensor(s), torch.tensor(t), torch.tensor(y)
    p, q = softmax(t / temperature), softmax(s / temperature)
    kd = (p * np.log(p / q)).sum(1).mean() * temperature**2
    assert kd_loss(student, teacher, temperature=temperature).item() == pytest.approx(kd, rel=1e-12)
    tckd, nckd = numpy_parts(s, t, y, temperature)
    got = tckd_loss(student, teacher, target, temperature=temperature)
    assert got.item() == pytest.approx(tckd.mean(), rel=1e-12)
    got = nckd_loss(student, teacher, target, temperature=temperature)
    assert got.item() == pytest.approx(nckd.mean(), rel=1e-12)
    got = dkd_loss(student, teacher, target, alpha=0.5, beta=3.0, temperature=temperature)
    assert got.item() == pytest.approx((0.5 * tckd + 3 * nckd).mean(), rel=1e-12)


@pytest.mark.parametrize("scale", [0.1, 3.0, 15.0])
def test_kd_is_tckd_plus_muted_nckd(scale):
    torch.manual_seed(0)
    student, teacher = scale * torch.randn(2, 1, 50, 10, dtype=torch.float64).squeeze(1)
    target = torch.randint(0, 10, (50,))
    temperature = 4.0
    p_target = (teacher / temperature).softmax(1).gather(1, target[:, None])[:, 0]
    for i in range(50):
        one = student[i : i + 1], teacher[i : i + 1]
        y = target[i : i + 1]
        split = tckd_loss(*one, y, temperature=temperature)
        split = split + (1 - p_target[i]) * nckd_loss(*one, y, temperature=temperature)
        assert abs(kd_loss(*one, temperature=temperature) - split).item() < 1e-10


@pytest.mark.parametrize("loss", WITH_TARGET)
def test_soft_labels_are_the_expectation_over_classes(logits, loss):
    s, t, _ = map(torch.tensor, logits)
    soft = torch.rand(6, 7, dtype=torch.float64).softmax(1)
    expected = 0.0
    for b in range(6):
        for c in range(7):
            expected += soft[b, c] * loss(s[b : b + 1], t[b : b + 1], torch.tensor([c])) / 6
    assert loss(s, t, soft).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("loss", WITH_TARGET)
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_one_hot_equals_class_ids(logits, loss, scale):
    s, t, y = map(torch.tensor, logits)
    s, t = scale * s, scale * t
    one_hot = F.one_hot(y, 7).double()
    torch.testing.assert_close(loss(s, t, one_hot), loss(s, t, y), rtol=1e-9, atol=1e-9)


def test_a_certain_teacher_keeps_its_dark_knowledge():
    # In float32, log p of the others is about -1e4 here, with a spacing of 1e-3: NCKD has to be computed
    # from the logits, or this comparison with the same logits less the target's fails.
    dark = torch.tensor([[0.3, -0.2, 0.9]])
    student = torch.tensor([[0.0, 0.5, 0.1]])
    target = torch.tensor([0])
    got = nckd_loss(F.pad(student, (1, 0)), F.pad(dark, (1, 0), value=1e4), target, temperature=1.0)
    assert got.item() == pytest.approx(kd_loss(student, dark, temperature=1.0).item(), rel=1e-6)


def test_two_classes_have_no_non_target_part():
    s, t = torch.randn(4, 2), torch.randn(4, 2)
    y = torch.tensor([0, 1, 1, 0])
    assert nckd_loss(s, t, y).item() == 0
    assert dkd_loss(s, t, y).item() == pytest.approx(kd_loss(s, t).item(), rel=1e-5)


def test_zero_where_student_equals_teacher(logits):
    _, t, y = map(torch.tensor, logits)
    for value in (kd_loss(t, t), *(loss(t, t, y) for loss in WITH_TARGET)):
        assert abs(value.item()) < 1e-12


@pytest.mark.parametrize("loss", WITH_TARGET)
def test_compiles_whole(loss, logits):
    s, t, y = map(torch.tensor, logits)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(s, t, y), loss(s, t, y))


def test_bad_input():
    x, y = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[4, 5\] and \[4, 6\]"):
        kd_loss(x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="C ≥ 2"):
        kd_loss(x[:, :1], x[:, :1])
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        dkd_loss(x, x, y, temperature=0)
    with pytest.raises(ConfigError, match=r"class ids int64 \[4\]"):
        dkd_loss(x, x, y[:3])
    with pytest.raises(ConfigError, match=r"got torch.float32 \[4\]"):
        tckd_loss(x, x, y.float())
    with pytest.raises(ValueError, match="soft labels"):
        nckd_loss(x, x, torch.rand(4, 6))


def test_a_config_may_extend_another_method_s(monkeypatch):
    from mdistiller.methods import DKD, DKDConfig, register_method, registry
    from mdistiller.recipes import get_recipe

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class MoreConfig(DKDConfig):
        more: float = 1.0

    @register_method("more_dkd")
    class More(DKD):
        Config = MoreConfig

    assert (DKDConfig().model_dump()["name"], MoreConfig().model_dump()["name"]) == ("dkd", "more_dkd")
    method = get_recipe("cifar100.more_dkd.resnet56_resnet20").method
    assert (type(method), method.beta, method.more) == (MoreConfig, 2.0, 1.0)


def build(**settings):
    from mdistiller.methods import DKD, DKDConfig
    from mdistiller.types import DataInfo

    return DKD(DKDConfig(**settings), torch.nn.Identity(), torch.nn.Identity(), DataInfo((3, 8, 8)))


def distil(method, s, t, y):
    from mdistiller.types import Batch, Outputs

    batch = Batch(torch.zeros(len(s), 3, 8, 8), y, torch.arange(len(s)))
    return method(Outputs(s, {}), Outputs(t, {}), batch, torch.ones(()))["dkd"].item()


def numpy_gap(z, y):
    return np.array([row[t] - np.delete(row, t).max() for row, t in zip(z, y, strict=True)])


def test_logit_gap(logits):
    _, t, y = logits
    gap = numpy_gap(t, y)
    assert (gap < 0).any()
    assert (gap > 0).any()
    np.testing.assert_allclose(logit_gap(torch.tensor(t), torch.tensor(y)), gap, rtol=1e-12)
    soft = np.random.default_rng(1).dirichlet(np.ones(7), size=6)
    expected = sum(soft[:, c] * numpy_gap(t, np.full(6, c)) for c in range(7))
    np.testing.assert_allclose(logit_gap(torch.tensor(t), torch.tensor(soft)), expected, rtol=1e-12)
    tied = torch.tensor([[2.0, 2.0, 1.0]])
    assert logit_gap(tied, torch.tensor([0])).item() == 0
    assert logit_gap(tied, torch.tensor([2])).item() == -1


@pytest.mark.parametrize("rule", ["auto", "auto-sample"])
def test_adaptive_beta_is_the_teacher_s_gap(logits, rule):
    s, t, y = logits
    tckd, nckd = numpy_parts(s, t, y, 4.0)
    beta = numpy_gap(t, y).clip(min=0)
    beta = beta.mean() if rule == "auto" else beta
    got = distil(build(beta=rule, alpha=0.5), *map(torch.tensor, logits))
    assert got == pytest.approx((0.5 * tckd + beta * nckd).mean(), rel=1e-9)


@pytest.mark.parametrize("half", ["confident", "unsure"])
def test_nckd_on_half_of_the_samples(logits, half):
    s, t, y = logits
    tckd, nckd = numpy_parts(s, t, y, 4.0)
    order = softmax(t)[np.arange(6), y].argsort()
    kept = order[3:] if half == "confident" else order[:3]
    got = distil(build(alpha=1, beta=2, nckd_samples=half), *map(torch.tensor, logits))
    assert got == pytest.approx((tckd.sum() + 2 * nckd[kept].sum()) / 6, rel=1e-9)


def test_halves_make_the_whole_and_rank_what_rounds_to_one():
    """In float32, p_t is 1 for all of these; the gap tells them apart. Odd batches are split, too."""
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 4), torch.randn(5, 4)
    y = torch.zeros(5, dtype=torch.int64)
    teacher[:, 0] = torch.tensor([60.0, 90.0, 70.0, 50.0, 80.0])
    parts = [nckd_loss(student[i : i + 1], teacher[i : i + 1], y[:1]).item() for i in range(5)]
    confident = distil(build(alpha=0, beta=1, nckd_samples="confident"), student, teacher, y)
    unsure = distil(build(alpha=0, beta=1, nckd_samples="unsure"), student, teacher, y)
    assert confident == pytest.approx((parts[1] + parts[2] + parts[4]) / 5, rel=1e-5)
    assert unsure == pytest.approx((parts[0] + parts[3]) / 5, rel=1e-5)
    assert confident + unsure == pytest.approx(sum(parts) / 5, rel=1e-5)


@pytest.mark.parametrize("beta", [-1.0, "automatic"])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta"):
        build(beta=beta)


def test_what_beta_and_the_logits_may_be():
    student, teacher = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    target = torch.arange(4)
    with pytest.raises(ConfigError, match="beta must be a number in dkd_loss; got 'auto'"):
        dkd_loss(student, teacher, target, beta="auto")
    # As documented: the teacher's logits get a gradient unless they are detached, with one value.
    teacher.requires_grad_()
    loss = dkd_loss(student.requires_grad_(), teacher, target)
    loss.backward()
    assert teacher.grad.abs().sum() > 0
    assert torch.equal(dkd_loss(student, teacher.detach(), target), loss)
    masked = student.detach().index_fill(1, torch.tensor([4]), float("-inf"))
    assert not torch.isfinite(dkd_loss(masked, teacher, target))


# Masked classes


def with_masked(z, masked):
    """Logits with −∞ in place of the masked classes, and the logits of the remaining classes."""
    return np.where(masked, -np.inf, z), z[:, ~masked]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("soft", [False, True])
def test_a_class_of_minus_infinity_has_no_part(logits, dtype, temperature, soft):
    masked = np.array([False, True, False, False, True, False, False])
    kept = np.flatnonzero(~masked)
    s, t, _ = logits
    rng = np.random.default_rng(2)
    target = rng.integers(0, 5, size=6)
    (s, rest_s), (t, rest_t) = with_masked(s, masked), with_masked(t, masked)
    tckd, nckd = numpy_parts(rest_s, rest_t, target, temperature)
    given = torch.tensor(kept[target])
    if soft:
        labels = rng.dirichlet(np.ones(5), size=6)
        parts = [numpy_parts(rest_s, rest_t, np.full(6, c), temperature) for c in range(5)]
        tckd, nckd = (sum(labels[:, c] * part[i] for c, part in enumerate(parts)) for i in (0, 1))
        given = torch.zeros(6, 7, dtype=torch.float64)
        given[:, kept] = torch.tensor(labels)
    p, q = softmax(rest_t / temperature), softmax(rest_s / temperature)
    kd = (p * np.log(p / q)).sum(1) * temperature**2
    student, teacher = (torch.tensor(x).to(dtype).requires_grad_() for x in (s, t))
    cases = [
        (kd_loss, kd, (), {}),
        (tckd_loss, tckd, (given,), {}),
        (nckd_loss, nckd, (given,), {}),
        (dkd_loss, 0.5 * tckd + 3 * nckd, (given,), {"alpha": 0.5, "beta": 3.0}),
    ]
    for loss, expected, more, weights in cases:
        got = loss(student, teacher, *more, temperature=temperature, **weights)
        accuracy = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
        assert got.item() == pytest.approx(expected.mean(), rel=accuracy)
        for gradient in torch.autograd.grad(got, (student, teacher)):
            assert torch.isfinite(gradient).all()
            assert (gradient[:, torch.tensor(masked)] == 0).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("loss", WITH_TARGET)
def test_a_target_that_is_masked_or_alone(loss, soft):
    """A masked target leaves the divergence among the others; a single remaining class leaves nothing."""
    s, t = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    target = torch.tensor([0, 0, 0])
    if soft:
        target = F.one_hot(target, 4).double()

    def check(masked, expected):
        student, teacher = (x.clone() for x in (s, t))
        student[:, masked] = teacher[:, masked] = -torch.inf
        student.requires_grad_()
        teacher.requires_grad_()
        got = loss(student, teacher, target)
        assert got.item() == pytest.approx(expected, abs=1e-12)
        for gradient in torch.autograd.grad(got, (student, teacher)):
            assert torch.isfinite(gradient).all()

    others = kd_loss(s[:, 1:], t[:, 1:]).item()
    check([0], {dkd_loss: 8.0, nckd_loss: 1.0, tckd_loss: 0.0}[loss] * others)
    check([1, 2, 3], 0.0)


def test_a_masked_class_compiles(logits):
    s, t, y = map(torch.tensor, logits)
    s[:, 3] = t[:, 3] = -torch.inf
    compiled = torch.compile(dkd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t, y), dkd_loss(s, t, y))


# Reductions, ignored samples, and leading shapes


def call(loss, s, t, y, **options):
    return loss(s, t, y, temperature=2.0, **options)


@pytest.mark.parametrize("loss", [kd_loss, *WITH_TARGET])
@pytest.mark.parametrize("soft", [False, True])
def test_leading_shapes_and_reductions(logits, loss, soft):
    s, t, y = map(torch.tensor, logits)
    if soft:
        y = torch.rand(6, 7, dtype=torch.float64).softmax(1)
    each = torch.stack([call(loss, s[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(6)])
    for leading in ((6,), (2, 3), (3, 1, 2)):
        given = s.reshape(*leading, 7), t.reshape(*leading, 7), y.reshape(*leading, *y.shape[1:])
        got = call(loss, *given, reduction="none")
        assert got.shape == leading
        torch.testing.assert_close(got.flatten(), each, rtol=1e-12, atol=0)
        torch.testing.assert_close(call(loss, *given, reduction="sum"), each.sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(call(loss, *given), each.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(call(loss, s[0], t[0], y[0], reduction="none"), each[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [kd_loss, *WITH_TARGET])
def test_ignored_samples_have_no_part(logits, loss):
    s, t, y = (torch.tensor(x).reshape(2, 3, *x.shape[1:]) for x in logits)
    plain = call(loss, s, t, y, reduction="none")
    y[0, 1] = y[1, 2] = -100
    s[0, 1], t[1, 2] = torch.nan, -torch.inf  # padding may hold anything
    s.requires_grad_()
    keep = y != -100
    got = call(loss, s, t, y, reduction="none")
    torch.testing.assert_close(got, plain * keep, rtol=1e-12, atol=0)
    mean = call(loss, s, t, y)
    torch.testing.assert_close(mean, plain[keep].mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(call(loss, s, t, y, reduction="sum"), plain[keep].sum(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(mean, s)
    assert torch.isfinite(gradient).all()
    assert (gradient[~keep] == 0).all()
    other = y.masked_fill(~keep, 7)
    torch.testing.assert_close(call(loss, s, t, other, ignore_index=7), mean, rtol=0, atol=0)
    assert call(loss, s, t, torch.full_like(y, -100)) == 0


def test_bad_reductions_and_shapes():
    x, y = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="reduction must be 'mean', 'sum' or 'none'; got 'batchmean'"):
        kd_loss(x, x, reduction="batchmean")
    with pytest.raises(ConfigError, match=r"class ids int64 \[2, 3\].*\[2, 3, 5\]; got torch.int64 \[3, 2\]"):
        dkd_loss(x, x, y.T)
    with pytest.raises(ConfigError, match=r"one shape \[..., C\].*\[2, 3, 5\] and \[3, 2, 5\]"):
        kd_loss(x, x.transpose(0, 1))
