"""Kinds of errors and confusions, by hand on one image, and counts against pycocotools' matches."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_average_precision import noisy
from tiny_detectors import read_coco, write_set

from mdistiller.tasks.detection.evaluate import precision_curves
from mdistiller.tasks.detection.mistakes import confusion_matrix, error_kinds

CAT, DOG = 3, 7


def one_image(*objects):
    """A set of one image with objects (category, box), and a crowd in the corner."""
    truth = [{"image_id": 1, "category_id": c, "bbox": box, "iscrowd": 0} for c, box in objects]
    truth.append({"image_id": 1, "category_id": CAT, "bbox": [900, 900, 100, 100], "iscrowd": 1})
    return SimpleNamespace(
        categories=((1, CAT, "cat"), (2, DOG, "dog")),
        images=(SimpleNamespace(id=1),),
        ground_truth={"annotations": truth},
    )


def predicted(*found):
    return [{"image_id": 1, "category_id": c, "bbox": box, "score": s} for c, box, s in found]


IMAGES = one_image(
    (CAT, [0, 0, 100, 100]),
    (DOG, [200, 0, 100, 100]),
    (CAT, [400, 0, 100, 100]),
    (DOG, [0, 400, 100, 100]),
    (DOG, [400, 400, 100, 100]),
)
# Overlaps of shifted boxes: by 10 of 100 pixels 90 / 110, by 50 a third, by 80 a ninth.
FOUND = predicted(
    (CAT, [0, 0, 100, 100], 0.9),  # correct
    (CAT, [10, 0, 100, 100], 0.8),  # duplicate
    (CAT, [200, 10, 100, 100], 0.7),  # classification: a dog
    (CAT, [450, 0, 100, 100], 0.6),  # localisation
    (CAT, [80, 400, 100, 100], 0.55),  # both: a dog, by a ninth
    (DOG, [700, 100, 50, 50], 0.5),  # background
    (CAT, [920, 920, 50, 50], 0.5),  # on the crowd: does not count
    (DOG, [400, 400, 100, 100], 0.1),  # below the score
)


def test_every_kind_by_hand():
    counts = error_kinds(FOUND, IMAGES, 0.3)
    assert counts == {
        "correct": 1,
        "classification": 1,
        "localisation": 1,
        "both": 1,
        "duplicate": 1,
        "background": 1,
        "missed": 2,  # the dogs below; one has an error of both kinds only
    }
    assert error_kinds(FOUND, IMAGES, 0.05)["correct"] == 2
    assert error_kinds([], IMAGES, 0.3)["missed"] == 5


def test_the_likeliest_prediction_takes_the_object():
    images = one_image((CAT, [0, 0, 100, 100]), (CAT, [30, 0, 100, 100]))
    found = predicted((CAT, [5, 0, 100, 100], 0.5), (CAT, [0, 0, 100, 100], 0.9))
    # The likelier one takes the first object; the other one the second, by 75 of 125 pixels.
    assert error_kinds(found, images, 0)["correct"] == 2


def test_the_first_kind_that_holds():
    """A third of a cat and all of a dog: localisation. A taken cat and all of a dog: classification."""
    images = one_image((CAT, [50, 0, 100, 100]), (DOG, [0, 0, 100, 100]))
    counts = error_kinds(predicted((CAT, [0, 0, 100, 100], 0.9)), images, 0)
    assert (counts["localisation"], counts["missed"]) == (1, 1)
    images = one_image((CAT, [0, 0, 100, 100]), (DOG, [0, 0, 100, 100]))
    counts = error_kinds(predicted((CAT, [0, 0, 100, 100], 0.9), (CAT, [0, 0, 100, 99], 0.8)), images, 0)
    assert (counts["correct"], counts["classification"], counts["missed"]) == (1, 1, 0)


def test_the_confusion_matrix_by_hand():
    expected = [
        # cat, dog, background
        [1, 0, 1],  # cats: one found, one missed
        [1, 0, 2],  # dogs: one taken for a cat, two missed
        [3, 1, 0],  # no object: the duplicate, the shifted ones, the invented one
    ]
    assert confusion_matrix(FOUND, IMAGES, 0.3).tolist() == expected
    assert confusion_matrix(FOUND, IMAGES, 0.05)[1].tolist() == [1, 1, 1]


@pytest.fixture
def images(tmp_path):
    file = write_set(tmp_path, 10)
    return file, read_coco(file, tmp_path / "images")


def cocoeval(file: Path, results) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def cells_of(evaluation):
    """Matches of each category and image, for objects of all sizes."""
    return [e for e in evaluation.evalImgs if e and e["aRng"][0] == 0 and e["aRng"][1] > 1e9]


@pytest.mark.parametrize("seed", range(3))
def test_correct_predictions_are_those_that_pycocotools_matches(images, seed):
    file, found = images
    results = [r for r in noisy(found, seed) if r["score"] >= 0.3]
    matches = [e["dtMatches"] for e in cells_of(cocoeval(file, results))]
    counts = error_kinds(noisy(found, seed), found, 0.3)
    assert counts["correct"] == sum(int((m > 0).sum()) for m in matches) > 0
    assert counts.total() - counts["missed"] == len(results)


def test_rows_and_columns_add_up(images):
    _, found = images
    results = noisy(found)
    matrix = confusion_matrix(results, found, 0.3)
    truth = found.ground_truth["annotations"]
    for k, (_, category, _) in enumerate(found.categories):
        assert matrix[k].sum() == sum(a["category_id"] == category for a in truth)
        assert matrix[:, k].sum() == sum(r["category_id"] == category and r["score"] >= 0.3 for r in results)


def test_precision_at_each_recall_by_its_definition(images):
    file, found = images
    results = noisy(found, 1)
    evaluation = cocoeval(file, results)
    for k, (name, curve) in enumerate(precision_curves(results, found).items()):
        category = evaluation.params.catIds[k]
        cells = [e for e in cells_of(evaluation) if e["category_id"] == category]
        scores = np.concatenate([e["dtScores"] for e in cells])
        hit = np.concatenate([e["dtMatches"][0] > 0 for e in cells])[np.argsort(-scores, kind="mergesort")]
        objects = sum(a["category_id"] == category for a in found.ground_truth["annotations"])
        recall, precision = hit.cumsum() / objects, hit.cumsum() / np.arange(1, len(hit) + 1)
        expected = [
            max((p for r, p in zip(recall, precision, strict=True) if r >= x - 1e-12), default=0.0)
            for x in np.linspace(0, 1, 101)
        ]
        assert curve == pytest.approx(expected, abs=1e-9), name
