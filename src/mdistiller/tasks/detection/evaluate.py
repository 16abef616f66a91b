"""COCO's average precision of a detector, through faster-coco-eval or pycocotools."""

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.runs.checkpoint import write_text
from mdistiller.tasks.detection.adapter import float32_coordinates
from mdistiller.tasks.detection.coco import (
    DetectionBatch,
    DetectionSet,
    Target,
    coco_classes,
    coco_tools,
    has_mask,
)
from mdistiller.tasks.detection.listing import Content
from mdistiller.teacher import EvalMode
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast
from mdistiller.types import Line

if TYPE_CHECKING:
    from pycocotools.coco import COCO

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCO's twelve, in its order


def evaluate_detector(
    model: nn.Module,
    batches: Iterable[DetectionBatch],
    images: DetectionSet,
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    predictions: Path | None = None,
) -> Line:
    """Computes average precision in percent, the same in every process; see `average_precision`.

    `batches` is this process's share of the set, unscaled; the predictions of all processes are gathered. The
    model runs in evaluation mode, with autocast to `precision`, and is put back into its own mode.
    `predictions` is a JSON file to write, in COCO's format for results.
    """
    mine: list[Line] = []
    read: list[int] = []
    with torch.no_grad(), EvalMode(model.modules()), float32_coordinates(model):
        for batch in batches:
            with autocast(world.device, precision):
                found = model(batch.image)
            read += [images.images[position].id for position in batch.index.tolist()]
            for position, objects in zip(batch.index.tolist(), found, strict=True):
                mine += as_results(objects, images, position)
    whole, ids = images.ground_truth, {image for part in world.gather(read) for image in part}
    truth: Content = {**whole, "images": [entry for entry in whole["images"] if entry["id"] in ids]}
    results = [result for part in world.gather(mine) for result in part]
    if predictions is not None and world.is_main:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        write_text(predictions, json.dumps(results) + "\n")
    # The ground truth of those images alone that could be read.
    return average_precision(results, replace(images, ground_truth=truth))


def as_results(predictions: Target, images: DetectionSet, position: int) -> list[Line]:
    """Converts the predictions for the image at `position` in the set to COCO's format for results.

    They are `boxes` [N, 4], `labels` [N], `scores` [N], and perhaps `masks` [N, 1, H, W] in [0, 1], in pixels
    of the unscaled image.
    """
    image = images.images[position].id
    category_ids = {label: category for label, category, _ in images.categories}
    corners = predictions["boxes"].double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    categories = map(category_ids.get, predictions["labels"].tolist())
    rows = zip(categories, predictions["scores"].tolist(), boxes.tolist(), strict=True)
    # A label that is no category's is wrong in any case.
    known = [(i, c, score, box) for i, (c, score, box) in enumerate(rows) if c is not None]
    results: list[Line]
    results = [
        {"image_id": image, "category_id": c, "bbox": box, "score": score} for _, c, score, box in known
    ]
    if images.masks and "masks" in predictions:
        encode = coco_tools().mask.encode
        masks = (predictions["masks"][:, 0] >= 0.5).byte().cpu().numpy()
        for result, (i, *_) in zip(results, known, strict=True):
            rle = encode(np.asfortranarray(masks[i]))
            result["segmentation"] = rle | {"counts": rle["counts"].decode()}  # JSON has no bytes
    return results


def average_precision(results: Sequence[Line], images: DetectionSet) -> Line:
    """Computes COCO's metrics of a list of results, in percent.

    AP is the mean over the overlaps 0.5, 0.55 … 0.95 and over the categories that have an object; AP50 and
    AP75 are at one overlap; APs, APm and APl are of small, medium and large objects (areas to 32², to 96² and
    beyond, in pixels of the unscaled images). A metric without an object is None.

    A result has `image_id`, `category_id`, `bbox` (x, y, width, height), `score`, and for masks
    `segmentation`, an RLE.

    Returns:
        The metrics by name, and `categories`, AP by category name. If the set has masks, `masks` holds the
        same for masks, over the images with a mask for every object.

    Raises:
        ConfigError: pycocotools is not installed, or the set has no object.
    """
    if not images.ground_truth["annotations"]:
        raise ConfigError("the test images have no object")
    metrics = _evaluate(results, images, "bbox")
    if images.masks:
        metrics["masks"] = _evaluate(results, images, "segm")
    return metrics


def _evaluate(results: Sequence[Line], images: DetectionSet, kind: str) -> Line:
    # pycocotools prints, and standard output is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        # pycocotools writes into the annotations.
        truths = enumerate(images.ground_truth["annotations"], 1)
        annotations: list[Line] = [{**a, "id": i} for i, a in truths]
        rows: list[Line] = [dict(r) for r in results]
        keep = {image["id"] for image in images.ground_truth["images"]}
        if kind == "segm":
            keep -= {a["image_id"] for a in annotations if not has_mask(a)}
            annotations = [a for a in annotations if a["image_id"] in keep]
            # Without boxes, as a result's area would be that of its box.
            rows = [{k: r[k] for k in r if k != "bbox"} for r in rows if "segmentation" in r]
        truth = _index(images.ground_truth, annotations)
        found = truth.loadRes(rows) if rows else _index(images.ground_truth, [])
        evaluation = coco_classes()[1](truth, found, kind)
        evaluation.params.imgIds = sorted(keep)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics: Line = {n: _percent(v) for n, v in zip(METRICS, evaluation.stats, strict=False)}
    precision = evaluation.eval["precision"]  # [overlaps, recalls, categories, areas, limits of detections]
    names = {category: name for _, category, name in images.categories}
    by_category = enumerate(map(names.get, evaluation.params.catIds))
    return metrics | {"categories": {name: _percent(precision[:, :, k, 0, -1]) for k, name in by_category}}


def _index(content: Content, annotations: list[Line]) -> "COCO":
    index = coco_classes()[0]()
    index.dataset = {"info": {}, **content, "annotations": annotations}
    index.createIndex()
    return index


def _percent(values: np.ndarray | float) -> float | None:
    """Returns the mean in percent without the undefined values, -1; None without any value."""
    known = [v for v in np.ravel(values) if v > -1]
    return 100 * float(np.mean(known)) if known else None
