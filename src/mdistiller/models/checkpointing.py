"""Gradient checkpointing: blocks whose activations are computed again in the backward pass."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.nn.modules.batchnorm import _NormBase

from mdistiller.errors import ConfigError
from mdistiller.models.layers import block_paths


def checkpoint_blocks(model: nn.Module) -> None:
    """Makes each block of a model keep its inputs only, by hooks; parameters and the state dict stay.

    Raises:
        ConfigError: the model has no known blocks.
    """
    blocks = [model.get_submodule(path) for path in block_paths(model)]
    blocks = [block for block in blocks if any(True for _ in block.parameters())]
    if not blocks:
        raise ConfigError(
            f"gradient_checkpointing: {type(model).__name__} has no known blocks; allowed is False"
        )
    for block in blocks:
        checkpoint(block, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Returns the contexts of the first pass and of the recomputation."""
    return nullcontext(), _KeptStatistics(block)


class _KeptStatistics(AbstractContextManager[None]):
    """Context in which batch norms move copies of their running statistics: the first pass has moved them."""

    def __init__(self, block: nn.Module) -> None:
        self.norms = [m for m in block.modules() if isinstance(m, _NormBase)]
        self.kept: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.kept = [dict(norm._buffers) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})

    def __exit__(self, *error: object) -> None:
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update(buffers)
