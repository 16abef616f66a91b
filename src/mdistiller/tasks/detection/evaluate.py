"""Average precision of a detector, as COCO defines it, through pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.tasks.detection.coco import DetectionSet, coco_tools, has_mask
from mdistiller.tasks.detection.detector import keep_coordinates
from mdistiller.tasks.detection.loader import DetectionBatch
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast

_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCO's twelve, in its order


def evaluate_detector(
    model: nn.Module,
    batches: Iterable[DetectionBatch],
    images: DetectionSet,
    world: World,
    *,
    precision: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Average precision in percent; see `average_precision`. Every process gets the same figures.

    Args:
        model: a torchvision detector; run in eval mode, and put back into the mode it was in.
        batches: this process's share of the set, as it is read, unscaled.
        images: the set.
        world: predictions are gathered from all its processes.
        precision: autocast precision; float32 means none.
    """
    mine: list[dict[str, Any]] = []
    keep_coordinates(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                with autocast(world.device, precision):
                    found = model(batch.image)
                for position, predictions in zip(batch.index.tolist(), found, strict=True):
                    mine += as_results(predictions, images, position)
    finally:
        model.train(was_training)
    results = [result for part in world.gather(mine) for result in part]
    return average_precision(results, images)


def as_results(predictions: dict[str, Tensor], images: DetectionSet, position: int) -> list[dict[str, Any]]:
    """One image's predictions in COCO's format for results.

    Args:
        predictions: `boxes` [N, 4], `labels` [N], `scores` [N], and perhaps `masks` [N, 1, H, W] in [0, 1],
            in pixels of the image as it is read.
        images: the set.
        position: the image's position in it.
    """
    image, category_ids = images.images[position].id, images.category_ids
    corners = predictions["boxes"].double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    rows = zip(predictions["labels"].tolist(), predictions["scores"].tolist(), boxes.tolist(), strict=True)
    # A label between category ids is of no category: it can only be wrong.
    results: list[dict[str, Any]] = [
        {"image_id": image, "category_id": category_ids.get(label, -1), "bbox": box, "score": score}
        for label, score, box in rows
    ]
    if images.masks and "masks" in predictions:
        encode = coco_tools().mask.encode
        masks = (predictions["masks"][:, 0] >= 0.5).byte().cpu().numpy()
        for result, mask in zip(results, masks, strict=True):
            result["segmentation"] = encode(np.asfortranarray(mask))
    return [result for result in results if result["category_id"] != -1]


def average_precision(results: list[dict[str, Any]], images: DetectionSet) -> dict[str, Any]:
    """COCO's figures for a list of results, in percent.

    AP is the mean over the overlaps 0.5, 0.55 … 0.95 and over the categories that have an object; AP50 and
    AP75 are at one overlap; APs, APm and APl over small, medium and large objects (areas to 32², to 96² and
    beyond, in pixels of the images as they are read). A figure without an object is None.

    Args:
        results: dicts with `image_id`, `category_id`, `bbox` (x, y, width, height), `score`, and for masks
            `segmentation`, an RLE.
        images: the set with the objects.

    Returns:
        The figures by name, and `categories`: AP by category name. If the set has masks, `masks` has the same
        for the masks, over the images all of whose objects have one.

    Raises:
        ConfigError: pycocotools is not installed, or the set has no object at all.
    """
    if not images.ground_truth["annotations"]:
        raise ConfigError("there is no object in the images to evaluate")
    figures = _evaluate(results, images, "bbox")
    if images.masks:
        figures["masks"] = _evaluate(results, images, "segm")
    return figures


def _evaluate(results: list[dict[str, Any]], images: DetectionSet, kind: str) -> dict[str, Any]:
    tools = coco_tools()
    # It prints as it goes; standard output is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = tools.coco.COCO()
        # It writes into what it is given.
        content = images.ground_truth
        annotations = [dict(a, id=i) for i, a in enumerate(content["annotations"], 1)]
        keep = {image["id"] for image in content["images"]}
        if kind == "segm":
            keep -= {a["image_id"] for a in annotations if not has_mask(a)}
            annotations = [a for a in annotations if a["image_id"] in keep]
        truth.dataset = content | {"annotations": annotations}
        truth.createIndex()
        if kind == "segm":  # with a box, a result's area would be the box's
            results = [{k: r[k] for k in r if k != "bbox"} for r in results if "segmentation" in r]
        if results:
            found = truth.loadRes([dict(r) for r in results])
        else:
            found = tools.coco.COCO()
            found.dataset = truth.dataset | {"annotations": []}
            found.createIndex()
        evaluation = tools.cocoeval.COCOeval(truth, found, kind)
        evaluation.params.imgIds = sorted(keep)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures: dict[str, Any] = {
        name: _percent(value) for name, value in zip(_FIGURES, evaluation.stats, strict=False)
    }
    precision = evaluation.eval["precision"]  # [overlaps, recalls, categories, areas, limits of detections]
    names = {category: name for _, category, name in images.categories}
    figures["categories"] = {
        names[category]: _percent(_mean(precision[:, :, k, 0, -1]))
        for k, category in enumerate(evaluation.params.catIds)
    }
    return figures


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _percent(value: float) -> float | None:
    return None if value < 0 or math.isnan(value) else 100 * float(value)
