"""Kinds of a detector's errors, and its confusions between classes and the background."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from mdistiller.tasks.detection.coco import DetectionSet, coco_tools
from mdistiller.tasks.detection.listing import Annotation

KINDS = ("correct", "classification", "localisation", "both", "duplicate", "background", "missed")
"""Kinds into which `error_kinds` divides predictions and objects, in the order of a table."""

_CLOSE, _NEAR = 0.5, 0.1  # overlaps of a match, and of a box that is near an object


def error_kinds(results: Sequence[Annotation], images: DetectionSet, score: float) -> Counter[str]:
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


def confusion_matrix(results: Sequence[Annotation], images: DetectionSet, score: float) -> np.ndarray:
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
    results: Sequence[Annotation], images: DetectionSet, score: float
) -> Iterator[tuple[list[Annotation], list[Annotation]]]:
    """Yields the predictions of each image, the likeliest first, and its objects."""
    found: dict[int, list[Annotation]] = defaultdict(list)
    truth: dict[int, list[Annotation]] = defaultdict(list)
    for result in sorted(results, key=lambda r: -r["score"]):
        if result["score"] >= score:
            found[result["image_id"]].append(result)
    for annotation in images.ground_truth["annotations"]:
        truth[annotation["image_id"]].append(annotation)
    for record in images.images:
        objects = [a for a in truth[record.id] if not a.get("iscrowd")]
        crowds = [a for a in truth[record.id] if a.get("iscrowd")]
        mine = found[record.id]
        on_crowd = _iou(mine, crowds, crowd=True).max(1, initial=0) >= _CLOSE
        on_object = _iou(mine, objects).max(1, initial=0) >= _CLOSE
        yield [r for r, c, own in zip(mine, on_crowd, on_object, strict=True) if own or not c], objects


def _overlaps(found: Sequence[Annotation], truth: Sequence[Annotation]) -> tuple[np.ndarray, np.ndarray]:
    """Computes intersection over union [predictions, objects], and whether the classes are the same."""
    predicted, true = (np.array([o["category_id"] for o in part], np.int64) for part in (found, truth))
    return _iou(found, truth), predicted[:, None] == true


def _iou(found: Sequence[Annotation], truth: Sequence[Annotation], *, crowd: bool = False) -> np.ndarray:
    """Computes intersection over union [predictions, objects]; of crowds, over the prediction's area."""
    boxes, objects = ([o["bbox"] for o in part] for part in (found, truth))
    overlaps = coco_tools().mask.iou(boxes, objects, [crowd] * len(objects))
    return np.reshape(overlaps, (len(boxes), len(objects)))
