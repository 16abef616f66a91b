"""Validation splits, balanced subsets and label noise, all from one seed."""

import numpy as np
import torch
from torch import Tensor

# A random stream for each purpose, so that one setting does not affect another's draw.
_SUBSET, _NOISE, _VALIDATION = 1, 2, 3


def balanced_subset(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Returns positions (int64, ascending) of at most `limit` samples, as many of each class as possible.

    `seed` chooses the samples within a class, and the classes with one sample more where the limit does not
    divide evenly. None keeps all samples. Labels are int64 [N].
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    rng = np.random.default_rng([seed, _SUBSET])
    members = [rng.permutation(np.flatnonzero(labels.numpy() == c)) for c in labels.unique().tolist()]
    # The samples with the smallest ranks within their classes are the balanced choice.
    rank = np.concatenate([np.arange(len(m)) for m in members])
    tie = np.concatenate([np.full(len(m), t) for m, t in zip(members, rng.random(len(members)), strict=True)])
    chosen = np.concatenate(members)[np.lexsort((tie, rank))[:limit]]
    return torch.from_numpy(np.sort(chosen).astype(np.int64))


def stratified_cut(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cuts `fraction` of each class off for validation, rounded; returns both parts' positions, ascending.

    A class of two or more samples has at least one in each part; one of a single sample keeps it for
    training. Labels and positions are int64.
    """
    rng = np.random.default_rng([seed, _VALIDATION])
    is_cut = np.zeros(len(labels), dtype=bool)
    for label in labels.unique().tolist():
        members = np.flatnonzero(labels.numpy() == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        is_cut[rng.permutation(members)[:count]] = True
    train, validation = (torch.from_numpy(np.flatnonzero(part)) for part in (~is_cut, is_cut))
    return train, validation


def add_label_noise(labels: Tensor, rate: float, num_classes: int, seed: int) -> Tensor:
    """Replaces round(rate * N) of the labels (int64 [N]) by another class, uniformly, in a copy."""
    count = round(rate * len(labels))
    if not count:
        return labels
    rng = np.random.default_rng([seed, _NOISE])
    where = torch.from_numpy(rng.permutation(len(labels))[:count])
    shift = torch.from_numpy(rng.integers(1, num_classes, count))
    noisy = labels.clone()
    noisy[where] = (noisy[where] + shift) % num_classes
    return noisy
