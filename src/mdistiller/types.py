"""What flows through one training step."""

from __future__ import annotations

from typing import NamedTuple

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


class Outputs(NamedTuple):
    """What a tapped model returns: logits [B, classes] and the tapped features by name."""

    logits: Tensor
    features: dict[str, Tensor]
