"""Predicted boxes of the runs' detectors on a few test images."""

from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from mdistiller.analysis.report.markup import Section, figure, image_uri, panel, panels, paragraph
from mdistiller.analysis.report.page_rows import PageRows
from mdistiller.analysis.report.students import check_same_images, missing_parts, no_student, part_of
from mdistiller.analysis.runs import Run
from mdistiller.errors import MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.tasks.detection.coco import DetectionSet
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.loader import load_split
from mdistiller.tasks.detection.models import build_detector
from mdistiller.training.distributed import pick_device

MOST = 6  # images
SCORE = 0.3  # lowest of a box that is drawn
_LONG_SIDE = 480  # pixels of a photograph on the page
_UNUSED = ("train_annotations", "train_images", "train_limit", "masks", "keep_empty")


def boxes(rows: PageRows, images: int, device: str = "auto") -> list[Section]:
    """Returns drawings of the predictions of each row's first student on at most `images` test images.

    Raises:
        ConfigError: no such device.
    """
    groups, target, failures = rows.groups, pick_device(device), []
    try:
        data = _test_images(next(iter(groups.values()))[0], images)
        shown = load_split(data, "test")
        photographs = [shown.read(i)[0].as_subclass(Tensor) for i in range(len(shown))]
    except (MDistillerError, OSError) as error:
        return missing_parts([f"The test images cannot be read: {error}"])
    drawings: list[list[str]] = [[] for _ in photographs]
    for label, runs in groups.items():
        try:
            check_same_images(_test_images(runs[0], images), data, *_UNUSED)
            found = _predict(runs[0], shown, photographs, target)
        except (MDistillerError, OSError) as error:
            failures.append(no_student(runs[0], error))
            continue
        for k, predictions in enumerate(found):
            drawings[k].append(panel(label, _drawing(shown, k, predictions, rows.looks[label].colour, label)))
    parts = [_symbol(k, photograph) + panels(drawings[k]) for k, photograph in enumerate(photographs)]
    caption = f"Predictions of each row's first seed with a score of at least {SCORE}. "
    body = figure(*parts, caption=f"{caption}Thin white: true objects.") + "".join(map(paragraph, failures))
    return [Section("boxes", "Boxes on test images", body)]


def _test_images(run: Run, images: int) -> DetectionDataConfig:
    data = part_of(run, "data", DetectionDataConfig)
    return data.replace(test_limit=min(images, MOST, data.test_limit or MOST), masks=False)


@torch.no_grad()
def _predict(
    run: Run, images: DetectionSet, photographs: Sequence[Tensor], device: torch.device
) -> list[dict[str, Tensor]]:
    """Predicts, for each image, `boxes` [N, 4] in its pixels, `labels` [N] and `scores` [N]."""
    student = ModelConfig(name=run.config["student"]["name"], checkpoint=run.path)
    model = build_detector(student, images.num_classes).to(device).eval()
    found = []
    for photograph in photographs:
        (predictions,) = model([photograph.to(device).float() / 255])
        keep = predictions["scores"] >= SCORE
        found.append({key: predictions[key][keep].cpu() for key in ("boxes", "labels", "scores")})
    return found


def _symbol(k: int, photograph: Tensor) -> str:
    """Returns the photograph as a symbol that all rows draw on, so the page holds it once."""
    height, width = photograph.shape[1:]
    return (
        '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>'
        f'<image id="photograph{k}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="{image_uri(photograph.permute(1, 2, 0), _LONG_SIDE, "jpeg")}"/></defs></svg>'
    )


def _drawing(images: DetectionSet, k: int, predictions: dict[str, Tensor], colour: str, label: str) -> str:
    record = images.images[k]
    (height, width), size = record.size, max(record.size) / 22
    names = {number: name for number, _, name in images.categories}
    parts = [_box(box, "#fff", 1) for box in record.boxes.tolist()]
    found = []
    for box, number, score in zip(*(predictions[key].tolist() for key in predictions), strict=True):
        text, x, y = f"{names.get(number, number)} {score:.2f}", box[0] + size / 5, max(box[1], 0) + size
        found.append(text)
        parts.append(_box(box, colour, 2.5))
        parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}" fill="#fff" stroke="{colour}" '
            f'stroke-width="{size / 4:.1f}" paint-order="stroke" stroke-linejoin="round">'
            f"{escape(text)}</text>"
        )
    true = ", ".join(names[number] for number in record.labels.tolist()) or "none"
    alt = f"{record.path.name}, {label}: predicted {', '.join(found) or 'nothing'}; true objects: {true}"
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
