"""Running means of vectors by class, for methods that compare an image with the teacher's class means."""

import torch
from torch import Tensor, nn

from mdistiller.methods.base import exact, promote
from mdistiller.methods.gather import gather


def class_shares(target: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Returns the one-hot rows [B, C] of class ids int64 [B], zeros for -100, or soft labels [B, C]."""
    if target.is_floating_point():
        return target.to(dtype)
    return (target[:, None] == torch.arange(classes, device=target.device)).to(dtype)


class ClassMeans(nn.Module):
    """Means of the vectors of each class, over all batches of all processes so far; saved with a run.

    A mixed image counts for its classes in proportion.

    Args:
        classes: number of classes C.
        width: length D of a vector.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(classes, width))
        self.register_buffer("counts", torch.zeros(classes))

    @torch.no_grad()
    def update(self, vectors: Tensor, shares: Tensor) -> None:
        """Adds vectors [B, D] with the shares [B, C] of their classes."""
        vectors, shares = gather(promote(vectors)), gather(shares)
        with exact(vectors):
            self.sums.add_((shares.T @ vectors).to(self.sums.dtype))
        self.counts.add_(shares.sum(0).to(self.counts.dtype))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Returns the means [C, D]; zeros for a class that has not been seen."""
        return self.sums / self.counts.clamp(min=torch.finfo(self.counts.dtype).tiny)[:, None]
