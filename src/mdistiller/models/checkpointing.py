"""Gradient checkpointing: blocks whose activations are computed again in the backward pass."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from mdistiller.errors import ConfigError
from mdistiller.models.layers import block_paths


def checkpoint_blocks(model: nn.Module) -> None:
    """Makes each block of a model keep its inputs only; parameters and the state dict stay.

    Raises:
        ConfigError: the model has no known blocks.
    """
    paths = block_paths(model)
    blocks = [model.get_submodule(path) for path in paths]
    blocks = [block for block in blocks if any(True for _ in block.parameters())]
    if not blocks:
        raise ConfigError(
            f"gradient_checkpointing: {type(model).__name__} has no known blocks; allowed is False"
        )
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _recomputing(kind)


@cache
def _recomputing(kind: Any) -> Any:
    class Recomputing(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            forward = partial(kind.forward, self)
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            contexts = partial(_contexts, self)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    # Taps are found by the names of the classes.
    Recomputing.__name__, Recomputing.__module__ = kind.__name__, kind.__module__
    return Recomputing


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _KeptStatistics(block)


class _KeptStatistics:
    """Context in which batch norms move copies of their running statistics: the first pass has moved them."""

    def __init__(self, block: nn.Module) -> None:
        self.norms = [m for m in block.modules() if isinstance(m, _NormBase)]
        self.kept: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self.kept = [dict(norm._buffers) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})

    def __exit__(self, *error: object) -> None:
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update(buffers)
