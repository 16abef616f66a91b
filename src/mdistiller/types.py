"""What flows through one training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Named tuples, because DDP, `torch.compile` and `torch.export` all look inside them.


class Batch(NamedTuple):
    """A batch of samples.

    image: [B, C, H, W], float and normalised once augmented; [B, H, W, C] uint8 before that.
    label: int64 [B] class ids, or float [B, classes] rows that sum to one (mixup, cutmix).
    index: int64 [B], each sample's position in the training set (memory banks need it).
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # the field's name; tuple.index is not missed

    def split(self, count: int, num_views: int = 1) -> list[Batch]:
        """Splits the batch into at most `count` parts, each with the same samples of every view."""
        return [Batch(*part) for part in zip(*(split(x, count, num_views) for x in self), strict=True)]


class Outputs(NamedTuple):
    """What a tapped model returns: logits [B, classes] and the tapped features by name."""

    logits: Tensor
    features: dict[str, Tensor]

    def split(self, count: int, num_views: int = 1) -> list[Outputs]:
        """Splits the outputs as `Batch.split` splits the batch."""
        features = {name: split(value, count, num_views) for name, value in self.features.items()}
        return [
            Outputs(logits, {name: values[i] for name, values in features.items()})
            for i, logits in enumerate(split(self.logits, count, num_views))
        ]


class DataInfo(NamedTuple):
    """What a method may know of the training data when it is built.

    input_shape: (C, H, W) of one image.
    labels: int64 [N] on the CPU, the class of every training image by `Batch.index`; None if not known.
    batch_size: images a step, over all processes together; None if not known.
    """

    input_shape: tuple[int, ...]
    labels: Tensor | None = None
    batch_size: int | None = None


def join(parts: Sequence[Tensor]) -> Tensor:
    """Parts as one batch; a single one is not copied."""
    return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]


def split(x: Tensor, count: int, num_views: int) -> list[Tensor]:
    """Splits [num_views · B, …], view after view, into parts with the same samples of every view."""
    return [join(part) for part in zip(*(v.chunk(count) for v in x.chunk(num_views)), strict=True)]
