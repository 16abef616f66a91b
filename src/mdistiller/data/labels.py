"""Validation splits, balanced subsets and weights, and label noise, each from one seed."""

import numpy as np
import torch
from torch import Tensor

from mdistiller.types import IGNORED

# A random stream for each purpose, so that one setting does not affect another's draw.
_SUBSET, _NOISE, _VALIDATION = 1, 2, 3


def has_class(labels: Tensor) -> Tensor:
    """Whether each sample has a label, bool [N]; of several classes (float [N, C]), whether one is known."""
    known = labels != IGNORED
    return known if known.ndim == 1 else known.any(1)


def balanced_subset(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Returns positions (int64, ascending) of at most `limit` samples, as many of each class as possible.

    `seed` chooses the samples within a class, and the classes with one sample more where the limit does not
    divide evenly. None keeps all samples. Labels are int64 [N]; samples without a class count as a class. Of
    samples with several classes (float [N, C]), any are chosen.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    rng = np.random.default_rng([seed, _SUBSET])
    if labels.ndim > 1:
        return torch.from_numpy(np.sort(rng.permutation(len(labels))[:limit]).astype(np.int64))
    members = [rng.permutation(np.flatnonzero(labels.numpy() == c)) for c in labels.unique().tolist()]
    # The samples with the smallest ranks within their classes are the balanced choice.
    rank = np.concatenate([np.arange(len(m)) for m in members])
    tie = np.concatenate([np.full(len(m), t) for m, t in zip(members, rng.random(len(members)), strict=True)])
    chosen = np.concatenate(members)[np.lexsort((tie, rank))[:limit]]
    return torch.from_numpy(np.sort(chosen).astype(np.int64))


def stratified_cut(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cuts `fraction` of each class off for validation, rounded; returns both parts' positions, ascending.

    A class of two or more samples has at least one in each part; one of a single sample keeps it for
    training, as all samples without a class are. Labels and positions are int64. Of samples with several
    classes (labels float [N, C]), any are cut.
    """
    rng = np.random.default_rng([seed, _VALIDATION])
    is_cut = np.zeros(len(labels), dtype=bool)
    if labels.ndim > 1:
        labels = torch.where(has_class(labels), 0, IGNORED)  # as if of one class
    for label in labels[labels != IGNORED].unique().tolist():
        members = np.flatnonzero(labels.numpy() == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        is_cut[rng.permutation(members)[:count]] = True
    train, validation = (torch.from_numpy(np.flatnonzero(part)) for part in (~is_cut, is_cut))
    return train, validation


def add_label_noise(labels: Tensor, rate: float, num_classes: int, seed: int) -> Tensor:
    """Replaces round(rate * N) of the N classes in labels (int64) by another one, uniformly, in a copy."""
    known = (labels != IGNORED).nonzero()[:, 0]
    count = round(rate * len(known))
    if not count:
        return labels
    rng = np.random.default_rng([seed, _NOISE])
    where = known[torch.from_numpy(rng.permutation(len(known))[:count])]
    shift = torch.from_numpy(rng.integers(1, num_classes, count))
    noisy = labels.clone()
    noisy[where] = (noisy[where] + shift) % num_classes
    return noisy


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Returns the weight of each class, float32 [C], inversely proportional to its number of samples.

    The mean over the samples is 1: N / (present classes * samples of the class). An absent class has
    weight 0.
    """
    counts = labels[labels != IGNORED].bincount(minlength=num_classes)
    present = int((counts > 0).sum())
    weights = counts.sum() / (present * counts.clamp(min=1).double())
    return weights.masked_fill(counts == 0, 0.0).float()
