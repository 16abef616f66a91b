"""Kinds of a detector's errors, and its confusions between classes and the background."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdistiller.tasks.detection.coco import DetectionSet

KINDS = ("correct", "classification", "localisation", "both", "duplicate", "background", "missed")
"""Kinds into which `error_kinds` divides predictions and objects, in the order of a table."""

_CLOSE, _NEAR = 0.5, 0.1  # overlaps of a match, and of a box that is near an object


def error_kinds(results: Sequence[dict[str, Any]], images: DetectionSet, score: float) -> Counter[str]:
    """Counts predictions and missed objects by `KINDS`, as TIDE does (Bolya et al., ECCV 2020).

    In the order of their scores, predictions take the object of their class that they overlap most, if by
    half or more (intersection over union): correct. Another prediction is the first of these that its largest
    overlaps allow:

    - localisation: a tenth to a half with an object of its class;
    - classification: half or more with an object of another class;
    - duplicate: half or more with an object of its class that is taken;
    - both: a tenth to a half with an object of another class;
    - background: less than a tenth with every object.

    An object is missed if no prediction takes it, nor has an error of classification or localisation at it.
    Predictions below `score` do not count, and neither do those on crowds.
    """
    counts = Counter(dict.fromkeys(KINDS, 0))
    for found, truth in _by_image(results, images, score):
        overlap, same = _overlaps(found, truth)
        taken = np.zeros(len(truth), bool)
        covered = np.zeros(len(truth), bool)
        wrong = []
        for i in range(len(found)):
            own = np.where(same[i] & ~taken, overlap[i], 0)
            if own.max(initial=0) >= _CLOSE:
                taken[own.argmax()] = True
                counts["correct"] += 1
            else:
                wrong.append(i)
        for i in wrong:
            own, other = np.where(same[i], overlap[i], 0), np.where(same[i], 0, overlap[i])
            best, best_other = own.max(initial=0), other.max(initial=0)
            if _NEAR <= best < _CLOSE:
                counts["localisation"] += 1
                covered[own.argmax()] = True
            elif best_other >= _CLOSE:
                counts["classification"] += 1
                covered[other.argmax()] = True
            elif best >= _CLOSE:
                counts["duplicate"] += 1
            else:
                counts["both" if best_other >= _NEAR else "background"] += 1
        counts["missed"] += int((~taken & ~covered).sum())
    return counts


def confusion_matrix(results: Sequence[dict[str, Any]], images: DetectionSet, score: float) -> np.ndarray:
    """Counts pairs of true class and predicted class, [K + 1, K + 1], the background being the last.

    In the order of their scores, predictions take the object that they overlap most, if by half or more,
    whatever its class is. The last row counts predictions that take none, the last column objects that none
    takes. Predictions below `score` do not count, and neither do those on crowds.
    """
    number = {category: k for k, (_, category, _) in enumerate(images.categories)}
    background = len(number)
    counts = np.zeros((background + 1, background + 1), np.int64)
    for found, truth in _by_image(results, images, score):
        overlap, _ = _overlaps(found, truth)
        taken = np.zeros(len(truth), bool)
        for i, result in enumerate(found):
            free = np.where(taken, 0, overlap[i])
            true = background
            if free.max(initial=0) >= _CLOSE:
                taken[free.argmax()] = True
                true = number[truth[free.argmax()]["category_id"]]
            counts[true, number[result["category_id"]]] += 1
        for annotation in (a for a, t in zip(truth, taken, strict=True) if not t):
            counts[number[annotation["category_id"]], background] += 1
    return counts


def _by_image(
    results: Sequence[dict[str, Any]], images: DetectionSet, score: float
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yields the predictions of each image, the likeliest first, and its objects."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    truth: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda r: -r["score"]):
        if result["score"] >= score:
            found[result["image_id"]].append(result)
    for annotation in images.ground_truth["annotations"]:
        truth[annotation["image_id"]].append(annotation)
    for record in images.images:
        objects = [a for a in truth[record.id] if not a.get("iscrowd")]
        crowds = _corners([a for a in truth[record.id] if a.get("iscrowd")])
        mine = found[record.id]
        if len(crowds) and mine:
            boxes = _corners(mine)
            on_crowd = (_common(boxes, crowds) / _area(boxes).clamp(min=1e-9)[:, None]).amax(1) >= _CLOSE
            on_object = _overlaps(mine, objects)[0].max(1, initial=0) >= _CLOSE
            mine = [r for r, crowd, own in zip(mine, on_crowd, on_object, strict=True) if own or not crowd]
        yield mine, objects


def _overlaps(
    found: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes intersection over union [predictions, objects], and whether the classes are the same."""
    boxes, objects = _corners(found), _corners(truth)
    common = _common(boxes, objects)
    union = _area(boxes)[:, None] + _area(objects) - common
    predicted, true = (np.array([o["category_id"] for o in part], np.int64) for part in (found, truth))
    return (common / union.clamp(min=1e-9)).numpy(), predicted[:, None] == true


def _corners(objects: Sequence[dict[str, Any]]) -> Tensor:
    boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float64).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def _common(a: Tensor, b: Tensor) -> Tensor:
    """Computes the areas [len(a), len(b)] that boxes have in common."""
    upper, lower = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    return (lower - upper).clamp(min=0).prod(2)
