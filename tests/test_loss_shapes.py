"""Shapes, reductions, masks and absent classes of all losses that are sums over samples."""

import inspect
import typing

import pytest
import torch

from mdistiller import functional
from mdistiller.errors import ConfigError

CLASSES = 7
# Arguments without a default, by name.
GIVEN = {"k": 3, "distances": torch.rand(CLASSES, CLASSES, dtype=torch.float64)}


def cases():
    """Yields name, kind of target and arguments of every loss with a mask, from its signature."""
    for name in functional.__all__:
        loss = getattr(functional, name)
        parameters = inspect.signature(loss).parameters
        if "mask" not in parameters or "student_logits" not in parameters:
            continue
        more = {key: value for key, value in GIVEN.items() if key in parameters}
        target = parameters.get("target")
        if target is None or target.default is None:
            yield name, "none", more
            continue
        # Class ids, soft labels, or several classes each.
        types = typing.get_args(target.annotation) or (target.annotation,)
        ids = any(isinstance(torch.zeros(6, dtype=torch.int64), kind) for kind in types)
        soft = any(isinstance(torch.zeros(6, CLASSES), kind) for kind in types)
        for kind in ["ids"] * ids + ["soft" if ids else "multi-hot"] * soft:
            yield name, kind, more


CASES = list(cases())
every_loss = pytest.mark.parametrize(("name", "kind", "more"), CASES, ids=[f"{x[0]}-{x[1]}" for x in CASES])


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
    fewer = {key: value[kept][:, kept] if key == "distances" else value for key, value in more.items()}
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


def test_there_are_losses_of_every_kind():
    kinds = [kind for _, kind, _ in CASES]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "none": 8,
        "ids": 7,
        "soft": 4,
        "multi-hot": 1,
    }


@every_loss
def test_bad_masks(name, kind, more, logits):
    given = (*logits, *targets(kind))
    for mask in (torch.ones(6), torch.ones(7, dtype=torch.bool), torch.ones(6, CLASSES, dtype=torch.bool)):
        with pytest.raises(ConfigError, match=r"mask must be bool \[6\], the logits' shape .*; got torch"):
            getattr(functional, name)(*given, **more, mask=mask)


def test_losses_of_a_batch_say_so():
    """They compare samples with each other, so a caller has to flatten tokens."""
    losses = [
        loss
        for loss in (getattr(functional, name) for name in functional.__all__)
        if "student_logits" in (keys := inspect.signature(loss).parameters) and "mask" not in keys
    ]
    assert len(losses) == 5
    x = torch.randn(2, 3, 5)
    for loss in losses:
        with pytest.raises(ConfigError, match=r"one shape \[B, C\]"):
            loss(x, x)
