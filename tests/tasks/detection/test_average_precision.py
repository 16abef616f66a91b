"""AP against pycocotools used directly, perfect predictions, and metrics of a detector."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCOeval_faster
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_detectors import loader, read_coco, two_stage, write_set
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.settings import flatten
from mdistiller.tasks.detection.coco import coco_classes
from mdistiller.tasks.detection.evaluate import (
    as_results,
    average_precision,
    evaluate_detector,
)
from mdistiller.training.distributed import World

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CPU = World(torch.device("cpu"))


def noisy(images, seed=0, masks=False):
    """Results that are right, shifted, of the wrong category, or invented."""
    generator = np.random.default_rng(seed)
    categories = [category for _, category, _ in images.categories]
    results = []
    for a in images.ground_truth["annotations"]:
        for _ in range(int(generator.integers(0, 3))):
            box = np.array(a["bbox"]) + generator.normal(0, 0.08, 4) * (a["bbox"][2:] * 2)
            category = a["category_id"] if generator.random() < 0.8 else int(generator.choice(categories))
            result = {"image_id": a["image_id"], "category_id": category, "score": float(generator.random())}
            result["bbox"] = np.maximum(box, 0.5).tolist()
            if masks:
                record = next(r for r in images.images if r.id == a["image_id"])
                pixels = np.zeros(record.size, np.uint8, order="F")
                x, y, w, h = (round(v) for v in result["bbox"])
                pixels[y : y + h, x : x + max(3 * w // 4, 1)] = 1  # its area is not the box's
                result["segmentation"] = mask_tools.encode(pixels)
            results.append(result)
    return results


def directly(file, results, kind="bbox", ids=None):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), kind)
        if ids is not None:
            evaluation.params.imgIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def compare(metrics, evaluation):
    for name, value in zip(NAMES, evaluation.stats, strict=False):
        if value == -1:
            assert metrics[name] is None
        else:
            assert metrics[name] / 100 == pytest.approx(value, abs=1e-6)
    precision = evaluation.eval["precision"]
    for k, name in enumerate(metrics["categories"]):
        known = precision[:, :, k, 0, -1]
        known = known[known > -1]
        got = metrics["categories"][name]
        assert got is None if not known.size else got / 100 == pytest.approx(known.mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["voc07-mini", "coco-mini"])
def test_metrics_are_those_of_pycocotools(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no data set in ../shared/data/{name}")
    file = folder / "instances_val.json"
    images = read_coco(file, folder / "images")
    results = noisy(images)
    metrics = average_precision(results, images)
    assert 5 < metrics["AP"] < 60
    compare(metrics, directly(file, results))


def test_masks_and_crowds_as_pycocotools_has_them(tmp_path, capfd):
    def crowd(content):
        content["annotations"][3].update(
            iscrowd=1, segmentation={"size": [64, 80], "counts": [0, 64 * 80]}, bbox=[0, 0, 80, 64]
        )

    file = write_set(tmp_path, 8, change=crowd)
    images = read_coco(file, tmp_path / "images", masks=True)
    results = noisy(images, masks=True)
    metrics = average_precision(results, images)
    assert capfd.readouterr().out == ""  # standard output is for results
    # As the images' own area there is the mask's, so is it here.
    compare(metrics, directly(file, [{k: v for k, v in r.items() if k != "segmentation"} for r in results]))
    compare(
        metrics["masks"],
        directly(file, [{k: v for k, v in r.items() if k != "bbox"} for r in results], "segm"),
    )
    assert metrics["masks"]["AP"] > 0


def test_faster_coco_eval_has_the_numbers_of_pycocotools(tmp_path, monkeypatch):
    """With masks, crowds, equal scores and more than a hundred predictions for an image."""

    def crowd(content):
        content["annotations"][3].update(
            iscrowd=1, segmentation={"size": [64, 80], "counts": [0, 64 * 80]}, bbox=[0, 0, 80, 64]
        )

    images = read_coco(write_set(tmp_path, 8, change=crowd), tmp_path / "images", masks=True)
    results = [r for seed in range(20) for r in noisy(images, seed, masks=True)]
    results += [{**results[0], "score": 0.5}] * 120
    for result in results[::3]:
        result["score"] = round(result["score"], 1)
    assert issubclass(coco_classes()[1], COCOeval_faster)
    found = average_precision(results, images)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert coco_classes() == (COCO, COCOeval)
    wanted = average_precision(results, images)
    values = [{k: -1 if v is None else v for k, v in flatten(metrics).items()} for metrics in (found, wanted)]
    assert values[0] == pytest.approx(values[1], rel=0, abs=1e-12)


def perfect(images, position):
    image, target = images.read(position)
    scores = torch.ones(len(target["labels"]))
    masks = (
        target["masks"][:, None].float() if images.masks else torch.zeros(len(scores), 1, *image.shape[1:])
    )
    boxes = target["boxes"].as_subclass(torch.Tensor)
    return {
        "boxes": boxes,
        "labels": target["labels"],
        "scores": scores,
        "masks": masks.as_subclass(torch.Tensor),
    }


def test_perfect_predictions(tmp_path):
    images = read_coco(write_set(tmp_path, 6), tmp_path / "images", masks=True)
    results = [r for i in range(len(images)) for r in as_results(perfect(images, i), images, i)]
    metrics = average_precision(results, images)
    assert metrics["AP"] == metrics["AP50"] == metrics["masks"]["AP"] == pytest.approx(100)
    assert metrics["categories"] == pytest.approx({"red": 100, "green": 100, "blue": 100})
    assert metrics["APl"] is None  # no object is as large


def test_no_predictions_and_no_objects(tmp_path):
    file = write_set(tmp_path, 3)
    images = read_coco(file, tmp_path / "images", masks=True)
    assert average_precision([], images)["AP"] == 0
    assert average_precision([], images)["masks"]["AP"] == 0
    empty = read_coco(write_set(tmp_path, 3, change=lambda c: c.update(annotations=[])), tmp_path / "images")
    with pytest.raises(ConfigError, match="have no object"):
        average_precision([], empty)


def test_objects_without_a_mask_are_evaluated_by_their_boxes(tmp_path):
    content = json.loads(write_set(tmp_path, 3).read_text())
    crowd = {"id": 99, "image_id": 0, "category_id": 2, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1}
    content["annotations"].append(crowd)
    (tmp_path / "a.json").write_text(json.dumps(content))
    images = read_coco(tmp_path / "a.json", tmp_path / "images", masks=True)
    results = [r for i in range(1, 3) for r in as_results(perfect(images, i), images, i)]
    metrics = average_precision(results, images)
    assert metrics["masks"]["AP"] == pytest.approx(100)  # the first image, missed, has none
    assert metrics["AP"] < 100


class Oracle(nn.Module):
    """Knows the answers, by the image's first pixel that is no background."""

    def __init__(self, images):
        super().__init__()
        self.images, self.at = images, 0

    def forward(self, batch):
        assert not self.training
        found = [perfect(self.images, self.at + i) for i in range(len(batch))]
        self.at += len(batch)
        return found


def test_a_detector_is_evaluated_on_images_as_they_are(squares):
    images = read_coco(squares / "instances_val.json", squares / "images", masks=True)
    model = Oracle(images).train()
    metrics = evaluate_detector(model, loader(images, 3).epoch(0), images, CPU)
    assert metrics["AP"] == metrics["masks"]["AP"] == pytest.approx(100)
    assert model.training


def test_predictions_come_back_in_pixels_of_the_image(squares):
    """A detector that scales images to twice their size must not predict boxes twice as large."""
    images = read_coco(squares / "instances_val.json", squares / "images")
    model = two_stage(min_size=128, max_size=256, box_score_thresh=0.0).eval()
    batch = next(loader(images, 2).epoch(0))
    with torch.no_grad():
        found = model(batch.image)
    for position, predictions in enumerate(found):
        height, width = images.images[position].size
        for result in as_results(predictions, images, position):
            x, y, w, h = result["bbox"]
            assert x + w <= width + 1e-3
            assert y + h <= height + 1e-3
            assert result["category_id"] in (2, 5, 9)
    metrics = evaluate_detector(model, loader(images, 2).epoch(0), images, CPU)
    assert 0 <= metrics["AP"] < 60


def test_labels_of_no_category_are_left_out(tmp_path):
    images = read_coco(write_set(tmp_path, 3), tmp_path / "images")
    predictions = {
        "boxes": torch.tensor([[0.0, 0, 5, 5], [0, 0, 5, 5]]),
        "labels": torch.tensor([4, 2]),
        "scores": torch.tensor([0.9, 0.8]),
    }
    assert [r["category_id"] for r in as_results(predictions, images, 0)] == [5]


def test_images_that_cannot_be_read_are_not_evaluated(tmp_path):
    file = write_set(tmp_path, 4)
    images = read_coco(file, tmp_path / "images", on_error="skip")
    images.images[1].path.write_bytes(b"no image")

    class Perfect(nn.Module):
        def forward(self, given):
            return [predictions[tuple(image.flatten().tolist())] for image in given]

    with pytest.warns(UserWarning, match="left out 1 image that cannot be read"):
        batches = list(loader(images, 2).epoch(0))
    predictions = {
        tuple(image.flatten().tolist()): target | {"scores": torch.ones(len(target["labels"]))}
        for batch in batches
        for image, target in zip(batch.image, batch.target, strict=True)
    }
    assert len(predictions) == 3
    assert evaluate_detector(Perfect(), batches, images, CPU)["AP"] == pytest.approx(100)
