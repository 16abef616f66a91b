"""Shapes, reductions, masks and absent classes of all losses that are sums over samples."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from mdistiller import functional
from mdistiller.errors import ConfigError

CLASSES = 7
DISTANCES = torch.rand(CLASSES, CLASSES, dtype=torch.float64)
WITHOUT_TARGET = {
    "kd_loss": {},
    "abkd_loss": {},
    "gdkd_loss": {"k": 3},
    "ikl_loss": {},
    "normkd_loss": {},
    "ttm_loss": {},
    "wttm_loss": {},
    "binary_kd_loss": {},
}
WITH_TARGET = {
    "dkd_loss": {},
    "tckd_loss": {},
    "nckd_loss": {},
    "nkd_loss": {},
    "rld_loss": {},
    "ofa_loss": {"gamma": 1.3},
    "deepkd_loss": {"k": 3},
    "wkd_l_loss": {"distances": DISTANCES},
}
SOFT = ("dkd_loss", "tckd_loss", "nckd_loss", "nkd_loss", "ofa_loss", "wkd_l_loss")
ABKD = [{"alpha": a, "beta": b} for a, b in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))]
CASES = [
    *((name, "none", more) for name, more in WITHOUT_TARGET.items()),
    *(("abkd_loss", "none", more) for more in ABKD),
    *((name, "ids", more) for name, more in WITH_TARGET.items()),
    *((name, "soft", WITH_TARGET[name]) for name in SOFT),
    ("multilabel_dkd_loss", "multi-hot", {"alpha": 2.0, "beta": 0.5}),
]
every_loss = pytest.mark.parametrize(("name", "kind", "more"), CASES, ids=lambda x: str(x))


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 6, CLASSES, dtype=torch.float64, generator=generator)


def targets(kind, classes=CLASSES):
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return ()
    if kind == "ids":
        return (torch.randint(0, classes, (6,), generator=generator),)
    weights = torch.rand(6, classes, dtype=torch.float64, generator=generator)
    return (weights.softmax(1),) if kind == "soft" else ((weights > 0.5).double(),)


@every_loss
def test_leading_shapes_and_reductions(name, kind, more, logits):
    loss, target = getattr(functional, name), targets(kind)
    each = torch.stack([loss(*(x[i : i + 1] for x in (*logits, *target)), **more) for i in range(6)])
    assert not torch.allclose(each, each[0].expand(6))
    given = [x.reshape(3, 1, 2, *x.shape[1:]) for x in (*logits, *target)]
    got = loss(*given, **more, reduction="none")
    assert got.shape == (3, 1, 2)
    torch.testing.assert_close(got.flatten(), each, rtol=1e-10, atol=1e-12)
    for reduction in ("mean", "sum"):
        for arguments in (given, (*logits, *target)):
            value = loss(*arguments, **more, reduction=reduction)
            torch.testing.assert_close(value, getattr(each, reduction)(), rtol=1e-10, atol=1e-12)
    one = loss(*(x[0] for x in (*logits, *target)), **more, reduction="none")
    torch.testing.assert_close(one, each[0], rtol=1e-10, atol=1e-12)


@every_loss
def test_masked_and_ignored_samples_have_no_part(name, kind, more, logits):
    loss, target = getattr(functional, name), targets(kind)
    plain = loss(*logits, *target, **more, reduction="none")
    mask = torch.tensor([True, False, True, True, False, True])
    student, teacher = logits.clone()
    student[1], teacher[4] = torch.nan, -torch.inf  # padding may hold anything
    student.requires_grad_()
    other = tuple(x.clone() for x in target)
    if kind == "ids":
        other[0][1] = 10**6
    elif target:
        other[0][1] = torch.nan

    def check(keep, *arguments, **options):
        got = loss(*arguments, **more, **options, reduction="none")
        torch.testing.assert_close(got, plain * keep, rtol=1e-12, atol=0)
        mean = loss(*arguments, **more, **options)
        torch.testing.assert_close(mean, plain[keep].mean(), rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(mean, student)
        assert torch.isfinite(gradient).all()
        assert (gradient[~keep] == 0).all()
        assert (gradient[keep] != 0).any()

    check(mask, student, teacher, *other, mask=mask)
    assert loss(student, teacher, *other, **more, mask=torch.zeros_like(mask)) == 0
    if kind == "ids":
        ignored = target[0].masked_fill(~mask, -100)
        check(mask, student, teacher, ignored)
        student_less = mask.clone()
        student_less[0] = False
        check(student_less & mask, student, teacher, ignored, mask=student_less)
        check(mask, student, teacher, ignored.masked_fill(~mask, 9), ignore_index=9)


@every_loss
def test_an_absent_class_has_no_part(name, kind, more, logits):
    """Logits of −∞ in both models give the loss and the gradient of the logits without that class."""
    loss, target = getattr(functional, name), targets(kind)
    kept = torch.tensor([0, 1, 3, 4, 6])
    absent = torch.tensor([2, 5])
    fewer = dict(more)
    if name == "wkd_l_loss":
        fewer["distances"] = DISTANCES[kept][:, kept]
    if kind == "ids":
        rest = targets(kind, 5)
        target = (kept[rest[0]],)
    else:
        target = tuple(x.clone().index_fill(1, absent, 0.0) for x in target)
        rest = tuple(x[:, kept] for x in target)
    student, teacher = (x.index_fill(1, absent, -torch.inf).requires_grad_() for x in logits)
    small = logits[0][:, kept].requires_grad_(), logits[1][:, kept].requires_grad_()
    got, expected = loss(student, teacher, *target, **more), loss(*small, *rest, **fewer)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(
        torch.autograd.grad(got, (student, teacher), allow_unused=True),
        torch.autograd.grad(expected, small, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a[:, kept], b, rtol=1e-8, atol=1e-9)
        assert (a[:, absent] == 0).all()


@every_loss
def test_compiles_whole_with_a_mask(name, kind, more, logits):
    loss, target = getattr(functional, name), targets(kind)
    mask = torch.tensor([True, False, True, True, False, True])
    given = (*logits, *target)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given, **more, mask=mask), loss(*given, **more, mask=mask))


def test_multilabel_dkd_is_the_formula_s(logits):
    (target,) = targets("multi-hot")
    s, t, y = (x.numpy() for x in (*logits, target))
    p, q = expit(t / 2), expit(s / 2)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    loss = functional.multilabel_dkd_loss
    got = loss(*logits, target, alpha=2.0, beta=0.5, temperature=2.0)
    assert got.item() == pytest.approx(4 * ((2 * y + 0.5 * (1 - y)) * kl).mean(), rel=1e-12)
    # A class against 'not this class' is a problem of two classes with the logits z and 0.
    pairs = [torch.stack([x, torch.zeros_like(x)], -1) for x in logits]
    two_way = functional.dkd_loss(*pairs, torch.zeros(6, CLASSES, dtype=torch.int64), temperature=2.0)
    torch.testing.assert_close(loss(*logits, target, temperature=2.0), two_way)
    with pytest.raises(ConfigError, match=r"float \[6, 7\].*one_hot.*got torch.int64 \[6, 7\]"):
        loss(*logits, target.long())
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, b, target), tuple(x.requires_grad_() for x in logits)
    )


def test_bad_masks():
    x = torch.randn(2, 3, 5)
    for mask in (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3, 5, dtype=torch.bool)):
        with pytest.raises(ConfigError, match=r"mask must be bool \[2, 3\].*got torch"):
            functional.kd_loss(x, x, mask=mask)
        with pytest.raises(ConfigError, match=r"mask must be bool \[2, 3\]"):
            functional.ikl_loss(x, x, mask=mask)


@pytest.mark.parametrize("name", ["dist_loss", "luminet_loss", "mlkd_loss", "crld_loss"])
def test_losses_of_a_batch_say_so(name):
    """They compare samples with each other, so tokens have to be flattened by the caller."""
    x = torch.randn(2, 3, 5)
    with pytest.raises(ConfigError, match=r"one shape \[B, C\]"):
        getattr(functional, name)(x, x)
