"""Checks of the losses in `mdistiller.functional`: pinned signatures, and the shapes in the annotations.

The annotations are checked here with beartype, and nowhere at run time.
"""

import inspect

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from mdistiller import functional

B, C = 4, 5
LOGITS = (torch.randn(B, C), torch.randn(B, C))
LABELS = torch.zeros(B, dtype=torch.int64)
MAPS = (torch.randn(B, 6, 8, 8), torch.randn(B, 6, 8, 8))
VECTORS = (torch.randn(B, 6), torch.randn(B, 6))


def signature(function):
    """The signature without annotations."""
    found = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def check_signature(name, expected):
    assert signature(getattr(functional, name)) == expected
    assert name in functional.__all__


def check_shapes(name, *arguments, any_rank=False, own_rows=(), soft=False, **keywords):
    """Valid arguments pass, and each of them fails with one more dimension, or with one row less.

    any_rank: features of any rank are allowed. own_rows: positions of arguments with rows of their own.
    soft: the last argument, class ids, may also be soft labels.
    """
    checked = jaxtyped(typechecker=beartype)(getattr(functional, name))

    def broken(argument, change):
        return [change(x) for x in argument] if isinstance(argument, list) else change(argument)

    def refused(*changed):
        with pytest.raises(TypeCheckError):
            checked(*changed, **keywords)

    assert checked(*arguments, **keywords).shape == ()
    for i, argument in enumerate(arguments):
        before, after = arguments[:i], arguments[i + 1 :]
        if not any_rank:
            refused(*before, broken(argument, lambda x: x[None]), *after)
        if i not in own_rows:
            refused(*before, broken(argument, lambda x: x[:-1]), *after)
    if soft:
        probabilities = torch.full((B, C), 1 / C)
        assert checked(*arguments[:-1], probabilities, **keywords).shape == ()
        refused(*arguments[:-1], probabilities[:, None])
