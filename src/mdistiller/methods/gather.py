"""Gathering of a batch from all processes, for methods that relate samples to each other."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        # Every process computes the same loss and passes back only the gradient of its own samples. DDP then
        # averages over processes where a sum is needed, hence the factor.
        rank, size = dist.get_rank(), dist.get_world_size()
        return grads[0].chunk(size)[rank] * size


def gather(x: Tensor) -> Tensor:
    """Concatenates `x` [B, …] of all processes to [processes · B, …]; returns `x` itself for one process.

    A loss of the result that all processes compute and DDP averages has the gradient of one process with the
    whole batch, for the student and for layers after the gathering. All processes must have the same B.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)
