"""Types that one training step passes around.

They are named tuples because DDP, `torch.compile` and `torch.export` traverse those.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Label of an image without a class, which PyTorch's losses and those of `functional` ignore by default."""


LogitsOf = str | int | Callable[[Any], Tensor] | None
"""Entry of a model's result that holds the logits: a key, an index, or a function of the result."""


class Batch(NamedTuple):
    """Batch of samples.

    Attributes:
        image: Float [B, C, H, W], normalised; before augmentation uint8 [B, H, W, C].
        label: Class ids, int64 [B], -100 for an image without a class; or float [B, classes], rows that sum
            to one (mixup, CutMix; less with a part without a class), or several classes each, in [0, 1].
        index: Position of each sample in the training set, int64 [B], read by memory banks.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index

    def split(self, count: int, num_views: int = 1) -> "list[Batch]":
        """Splits the batch into at most `count` parts, each with the same samples of every view."""
        return [Batch(*part) for part in zip(*(split(x, count, num_views) for x in self), strict=True)]


class DenseBatch(Batch):
    """Batch of dense predictions, whose label has a row for each position; some may be without a class."""


class Outputs(NamedTuple):
    """Outputs of a tapped model: logits [B, classes] and tapped features by name."""

    logits: Tensor
    features: dict[str, Tensor]

    def split(self, count: int, num_views: int = 1) -> "list[Outputs]":
        """Splits the outputs like `Batch.split`."""
        parts = zip(
            *(split(x, count, num_views) for x in (self.logits, *self.features.values())), strict=True
        )
        return [Outputs(logits, dict(zip(self.features, part, strict=True))) for logits, *part in parts]


class DataInfo(NamedTuple):
    """Facts about the training data that a method can use when it is built.

    Attributes:
        input_shape: (C, H, W) of one image, or an example of the models' inputs, a tensor or a mapping.
        labels: Class of every training image by `Batch.index`, int64 [N] on the CPU, -100 for none, or float
            [N, classes] of several classes each; None if unknown.
        batch_size: Images per step over all processes together; None if unknown.
        logits_of: Entry of the models' results that holds the logits; None: it is found.
        taps: Default taps of feature methods, the student's and the teacher's; None: each method's own.
        are_maps: Features are maps [B, C, H, W], whatever their shape looks like.
        only_labelled: Means over samples leave out those without a class, for methods that read no label too.
    """

    input_shape: tuple[int, ...] | Tensor | Mapping[str, Any]
    labels: Tensor | None = None
    batch_size: int | None = None
    logits_of: LogitsOf = None
    taps: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    are_maps: bool = False
    only_labelled: bool = False


def split(x: Tensor, count: int, num_views: int) -> list[Tensor]:
    """Splits [num_views · B, …], view after view, into parts with the same samples of every view."""
    return [torch.cat(part) for part in zip(*(v.chunk(count) for v in x.chunk(num_views)), strict=True)]
