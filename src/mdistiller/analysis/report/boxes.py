"""What the runs' detectors find on a few test images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import torch
from PIL import Image
from torch import Tensor

from mdistiller.analysis.report.markup import Section, figure, panels, paragraph
from mdistiller.analysis.report.students import part_of
from mdistiller.analysis.report.style import mark
from mdistiller.analysis.runs import READING, Run
from mdistiller.errors import DataError, MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.tasks.detection.coco import DetectionSet
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.loader import load_split
from mdistiller.tasks.detection.models import build_detector
from mdistiller.training.distributed import pick_device

MOST = 6  # images
SCORE = 0.3
_LONG_SIDE = 480  # of a photograph on the page


def boxes(groups: Mapping[str, Sequence[Run]], images: int, device: str = "auto") -> list[Section]:
    """The predictions of each row's first student on at most `images` test images, and at most six.

    Raises:
        ConfigError: no such device.
    """
    where, failures = pick_device(device), []
    try:
        data = _test_images(next(iter(groups.values()))[0], images)
        shown = load_split(data, "test")
        photographs = [shown.read(i)[0].as_subclass(Tensor) for i in range(len(shown))]
    except (MDistillerError, OSError) as error:
        text = f"The detectors could not be shown the test images: {error}"
        return [Section("missing", "What could not be shown", paragraph(text))]
    drawings: list[list[str]] = [[] for _ in photographs]
    for i, (label, runs) in enumerate(groups.items()):
        try:
            if _read(_test_images(runs[0], images)) != _read(data):
                raise DataError("its test images are others than those of the first run")
            found = _predict(runs[0], shown, photographs, where)
        except (MDistillerError, OSError) as error:
            failures.append(f"The student of {runs[0].path} could not be shown the images: {error}")
            continue
        for k, predictions in enumerate(found):
            drawing = _drawing(shown, k, predictions, mark(i).colour, label)
            drawings[k].append(f"<div><h3>{escape(label)}</h3>{drawing}</div>")
    parts = [_symbol(k, photograph) + panels(drawings[k]) for k, photograph in enumerate(photographs)]
    caption = (
        f"What each row's first seed predicts with a score of {SCORE} or more; thin and white: the objects "
        "that are there."
    )
    body = figure(*parts, caption=caption) + "".join(map(paragraph, failures))
    return [Section("boxes", "Boxes on test images", body)]


def _test_images(run: Run, images: int) -> DetectionDataConfig:
    data = part_of(run, "data", DetectionDataConfig)
    limit = min(images, MOST, data.test_limit or MOST)
    return data.model_copy(update={"test_limit": limit, "masks": False})


def _read(data: DetectionDataConfig) -> dict[str, object]:
    # Training images and masks are not shown.
    others = {name for name in DetectionDataConfig.model_fields if name.startswith("train_")}
    return data.model_dump(exclude={*READING, *others, "keep_empty"})


@torch.no_grad()
def _predict(
    run: Run, images: DetectionSet, photographs: Sequence[Tensor], device: torch.device
) -> list[dict[str, Tensor]]:
    """For each image `boxes` [N, 4] in its pixels, `labels` and `scores`, of the student as it was saved."""
    student = ModelConfig(name=run.config["student"]["name"], checkpoint=run.path)
    model = build_detector(student, images.num_classes).to(device).eval()
    found = []
    for photograph in photographs:
        (predictions,) = model([photograph.to(device).float() / 255])
        keep = predictions["scores"] >= SCORE
        found.append({key: predictions[key][keep].cpu() for key in ("boxes", "labels", "scores")})
    return found


def _symbol(k: int, photograph: Tensor) -> str:
    """The photograph, once on the page however many rows draw on it, in its own coordinates."""
    height, width = photograph.shape[1:]
    picture = Image.fromarray(photograph.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_LONG_SIDE, _LONG_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>'
        f'<image id="photograph{k}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/jpeg;base64,{data}"/></defs></svg>'
    )


def _drawing(images: DetectionSet, k: int, predictions: dict[str, Tensor], colour: str, label: str) -> str:
    record = images.images[k]
    (height, width), size = record.size, max(record.size) / 22
    names = {number: name for number, _, name in images.categories}
    parts = [_box(box, "#fff", 1) for box in record.boxes.tolist()]
    told = []
    for box, number, score in zip(*(predictions[key].tolist() for key in predictions), strict=True):
        text = f"{names.get(number, number)} {score:.2f}"
        told.append(text)
        parts.append(_box(box, colour, 2.5))
        x, y = box[0] + size / 5, max(box[1], 0) + size
        parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}" fill="#fff" stroke="{colour}" '
            f'stroke-width="{size / 4:.1f}" paint-order="stroke" stroke-linejoin="round">'
            f"{escape(text)}</text>"
        )
    there = ", ".join(names[number] for number in record.labels.tolist()) or "none"
    alt = f"{record.path.name}, {label}: found {', '.join(told) or 'nothing'}; objects there: {there}"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{escape(alt)}">'
        f'<use href="#photograph{k}"/>{"".join(parts)}</svg>'
    )


def _box(box: Sequence[float], colour: str, width: float) -> str:
    x1, y1, x2, y2 = box
    return (
        f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none" '
        f'stroke="{colour}" stroke-width="{width}" vector-effect="non-scaling-stroke"/>'
    )
