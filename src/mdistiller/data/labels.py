"""Choices and changes made to labels, all from one seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# One stream of random numbers for each purpose, so that using one setting doesn't change another's draw.
_SUBSET, _NOISE = 1, 2


def balanced_subset(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Positions (int64, ascending) of at most `limit` samples, as many of each class as possible.

    Every class gives the same number where it has that many; what doesn't divide evenly goes to
    classes chosen by `seed`, as do the samples within a class. `limit` None, or not less than the
    number of samples, keeps all.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    rng = np.random.default_rng([seed, _SUBSET])
    members = [rng.permutation(np.flatnonzero(labels.numpy() == c)) for c in labels.unique().tolist()]
    # Rank each sample within its class; the smallest ranks of all classes are the balanced choice.
    rank = np.concatenate([np.arange(len(m)) for m in members])
    tie = np.concatenate([np.full(len(m), t) for m, t in zip(members, rng.random(len(members)), strict=True)])
    chosen = np.concatenate(members)[np.lexsort((tie, rank))[:limit]]
    return torch.from_numpy(np.sort(chosen).astype(np.int64))


def add_label_noise(labels: Tensor, rate: float, num_classes: int, seed: int) -> Tensor:
    """`labels` (int64 [N]) with round(rate * N) of them replaced by another class, uniformly."""
    count = round(rate * len(labels))
    if not count:
        return labels
    rng = np.random.default_rng([seed, _NOISE])
    where = torch.from_numpy(rng.permutation(len(labels))[:count])
    shift = torch.from_numpy(rng.integers(1, num_classes, count))
    noisy = labels.clone()
    noisy[where] = (noisy[where] + shift) % num_classes
    return noisy
