"""Predictions of the runs' detectors on test images, drawn on a few of them."""

from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from mdistiller.errors import MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.report.markup import Section, figure, image_uri, panel, panels, paragraph
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import RunRecord
from mdistiller.report.sections import RunOutputs, check_same_images, missing_parts, no_student, part_of
from mdistiller.tasks.detection.coco import DetectionSet
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.drawing import place_labels
from mdistiller.tasks.detection.evaluate import world_results
from mdistiller.tasks.detection.loader import DetectionLoader, load_split
from mdistiller.tasks.detection.models import build_detector
from mdistiller.tasks.detection.report.detections import SCORE, detections
from mdistiller.training.distributed import World, pick_device

MOST = 6  # images that are drawn
_LONG_SIDE = 480  # pixels of a photograph on the page
_UNUSED = ("train_annotations", "train_images", "train_limit", "masks", "keep_empty")


def boxes(rows: PageRows, images: int, device: str, found: RunOutputs | None = None) -> list[Section]:
    """Returns the predictions of each row's first student on at most `images` test images, counted and drawn.

    Raises:
        ConfigError: no such device.
    """
    groups, target, failures = rows.groups, pick_device(device), []
    try:
        data = _test_images(next(iter(groups.values()))[0], images)
        shown = load_split(data, "test")
        photographs = [shown.read(i)[0].as_subclass(Tensor) for i in range(min(len(shown), MOST))]
    except (MDistillerError, OSError) as error:
        return missing_parts([f"The test images cannot be read: {error}"])
    results: dict[str, list[dict[str, Any]]] = {}
    for label, runs in groups.items():
        try:
            check_same_images(_test_images(runs[0], images), data, *_UNUSED)
            results[label] = _predict(runs[0], shown, target)
        except (MDistillerError, OSError) as error:
            failures.append(no_student(runs[0], error))
    sections = []
    try:
        sections = detections(rows, shown, results)
    except MDistillerError as error:
        failures.append(f"The predictions cannot be evaluated: {error}")
    parts = []
    for k, photograph in enumerate(photographs):
        drawings = [
            panel(label, _drawing(shown, k, found, rows.looks[label].colour, label))
            for label, found in results.items()
        ]
        parts.append(_symbol(k, photograph) + panels(drawings))
    caption = (
        f"Predictions of each row's first seed with a score of at least {SCORE}. Thin white: true objects. A "
        "label that would cover another one is left out; the pointer on a box shows its own."
    )
    body = figure(*parts, caption=caption) + "".join(map(paragraph, failures))
    return [*sections, Section("boxes", "Boxes on test images", body)]


def _test_images(run: RunRecord, images: int) -> DetectionDataConfig:
    data = part_of(run, "data", DetectionDataConfig)
    return data.replace(test_limit=min(images, data.test_limit or images), masks=False)


def _predict(run: RunRecord, images: DetectionSet, device: torch.device) -> list[dict[str, Any]]:
    """Predicts objects of all images, in COCO's format for results."""
    student = ModelConfig(name=run.student, checkpoint=run.path)
    model = build_detector(student, images.num_classes).to(device)
    workers = part_of(run, "data", DetectionDataConfig).workers
    loader = DetectionLoader(images, 1, workers=workers, device=device, shuffle=False)
    return world_results(model, loader.epoch(0), images, World(device))


def _symbol(k: int, photograph: Tensor) -> str:
    """Returns the photograph as a symbol that all rows draw on, so the page holds it once."""
    height, width = photograph.shape[1:]
    return (
        '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>'
        f'<image id="photograph{k}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="{image_uri(photograph.permute(1, 2, 0), _LONG_SIDE, "jpeg")}"/></defs></svg>'
    )


def _drawing(images: DetectionSet, k: int, results: Sequence[dict[str, Any]], colour: str, label: str) -> str:
    record = images.images[k]
    (height, width), size = record.size, record.size[1] / 24
    by_category = {category: name for _, category, name in images.categories}
    parts = [_box(box, "#fff", 1) for box in record.boxes.tolist()]
    own = [r for r in results if r["image_id"] == record.id and r["score"] >= SCORE]
    own.sort(key=lambda r: -r["score"])
    corners = [(x, y, x + w, y + h) for x, y, w, h in (r["bbox"] for r in own)]
    texts = [f"{by_category[r['category_id']]} {r['score']:.2f}" for r in own]
    for box, text in reversed(list(zip(corners, texts, strict=True))):  # the likeliest on top
        parts.append(_box(box, colour, 2.5 if len(own) <= 10 else 1.5, text))
    widths = [0.56 * size * len(text) for text in texts]
    places = place_labels(corners, widths, 1.15 * size, (width, height))
    for text, place in zip(texts, places, strict=True):
        if place is not None:
            parts.append(
                f'<text x="{place[0] + size / 8:.1f}" y="{place[1] + 0.9 * size:.1f}" font-size="{size:.1f}" '
                f'fill="#fff" stroke="{colour}" stroke-width="{size / 4:.1f}" paint-order="stroke" '
                f'stroke-linejoin="round">{escape(text)}</text>'
            )
    names = {number: name for number, _, name in images.categories}
    true = ", ".join(names[number] for number in record.labels.tolist()) or "none"
    alt = f"{record.path.name}, {label}: predicted {', '.join(texts) or 'nothing'}; true objects: {true}"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{escape(alt)}">'
        f'<use href="#photograph{k}"/>{"".join(parts)}</svg>'
    )


def _box(box: Sequence[float], colour: str, width: float, text: str = "") -> str:
    x1, y1, x2, y2 = box
    end = f"><title>{escape(text)}</title></rect>" if text else "/>"
    return (
        f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none" '
        f'stroke="{colour}" stroke-width="{width}" pointer-events="all" '
        f'vector-effect="non-scaling-stroke"{end}'
    )
