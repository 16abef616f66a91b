"""The shapes in the losses' signatures hold: jaxtyping checks them here, and nowhere at run time."""

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from mdistiller import functional

LOSSES = functional.__all__


def call(name, b=4, c=5, teacher=None, target=None):
    checked = jaxtyped(typechecker=beartype)(getattr(functional, name))
    args = [torch.randn(b, c), torch.randn(*(teacher or (b, c)))]
    if name != "kd_loss":
        args.append(torch.zeros(b, dtype=torch.int64) if target is None else target)
    return checked(*args)


@pytest.mark.parametrize("name", LOSSES)
def test_right_shapes_pass(name):
    assert call(name).shape == ()


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_shapes_do_not(name):
    with pytest.raises(TypeCheckError):
        call(name, teacher=(4, 6))
    with pytest.raises(TypeCheckError):
        call(name, teacher=(4, 5, 1))


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "kd_loss"])
def test_targets_are_ids_or_rows(name):
    assert call(name, target=torch.full((4, 5), 0.2)).shape == ()
    with pytest.raises(TypeCheckError):
        call(name, target=torch.zeros(3, dtype=torch.int64))
