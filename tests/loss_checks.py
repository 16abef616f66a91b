"""Checks of the losses in `mdistiller.functional`: signatures, and the shapes in the annotations.

The annotations are checked here with beartype, and nowhere at run time.
"""

import inspect

import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from mdistiller import functional


def signature(function):
    """The signature without annotations."""
    found = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def check_shapes(name, *arguments, any_rank=False, own_rows=(), soft=None, **keywords):
    """Valid arguments pass, and each of them fails with one more dimension, or with one row less.

    any_rank: features of any rank are allowed. own_rows: positions of arguments with rows of their own.
    soft: soft labels, which are allowed in place of the last argument, class ids.
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
    if soft is not None:
        assert checked(*arguments[:-1], soft, **keywords).shape == ()
        refused(*arguments[:-1], soft[:, None])
