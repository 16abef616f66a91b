"""Sections of the report on a detector's classes and boxes."""

from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from PIL import Image

import mdistiller.report.markup as html
from mdistiller.errors import MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import RunRecord
from mdistiller.report.sections import (
    RunOutputs,
    TaskSections,
    check_same_images,
    missing_parts,
    of_first_runs,
    part_of,
    register_sections,
)
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.detection.coco import DetectionSet
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.deployment import Box, DetectorDeployment, draw_boxes, draw_objects
from mdistiller.tasks.detection.layouts import load_split
from mdistiller.tasks.detection.models import build_detector
from mdistiller.training.deployment import ModelInput
from mdistiller.training.distributed import pick_device

MOST = 6  # images that are drawn
_LONG_SIDE = 480  # pixels of a photograph on the page
_UNUSED = ("train_annotations", "train_images", "train_limit", "masks", "keep_empty")
SCORE = 0.3  # lowest of a prediction that is drawn
_TOP = 100  # predictions of an image that are drawn at most


def boxes(rows: PageRows, images: int, device: str, found: RunOutputs | None = None) -> list[html.Section]:
    """Returns AP by class, and drawn boxes of each row's first student on at most `images` test images.

    Raises:
        ConfigError: no such device.
    """
    target = pick_device(device)
    try:
        data = _test_images(next(iter(rows.groups.values()))[0], images)
        shown = load_split(data, "test")
        photographs = [_photograph(shown, k) for k in range(len(shown))]
    except (MDistillerError, OSError) as error:
        return missing_parts([f"The test images cannot be read: {error}"])

    def predict(run: RunRecord) -> list[list[Box]]:
        check_same_images(_test_images(run, images), data, *_UNUSED)
        return _predict(run, shown, target)

    results, failures = of_first_runs({label: rows.groups[label] for label in rows.pictured}, predict)
    parts = [
        html.panels(
            html.panel(name, _drawing(shown, k, image, own[k], name)) for name, own in results.items()
        )
        for k, image in enumerate(photographs)
    ]
    caption = (
        f"Predictions of each row's first seed with a score of at least {SCORE}. White: true objects. A "
        "label that would cover another one is left out."
    )
    body = html.figure(*parts, caption=caption) + "".join(map(html.paragraph, failures))
    return [by_class(rows, shown.classes), html.Section("boxes", "Boxes on test images", body)]


def _test_images(run: RunRecord, images: int) -> DetectionDataConfig:
    data = part_of(run, "data", DetectionDataConfig)
    return data.replace(test_limit=min(images, MOST, data.test_limit or MOST), masks=False)


@torch.no_grad()
def _predict(run: RunRecord, shown: DetectionSet, device: torch.device) -> list[list[Box]]:
    """Predicts the objects of the images."""
    exports, fields = DetectorDeployment(), ModelInput(classes=shown.classes)
    student = build_detector(ModelConfig(name=run.student, checkpoint=run.path), shown.num_classes)
    images = [shown.read(k)[0].to(device).float() / 255 for k in range(len(shown))]
    return exports.predict(exports.as_model(student.to(device)), fields, images, _TOP)


def _photograph(images: DetectionSet, k: int) -> Image.Image:
    """Returns a test image with its true objects, in the size of the page."""
    pixels, target = images.read(k)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    width = image.width
    image.thumbnail((_LONG_SIDE, _LONG_SIDE))
    true = target["boxes"] * (image.width / width)
    return draw_boxes(image, true.tolist(), [""] * len(true), [(255, 255, 255)] * len(true))


def _drawing(images: DetectionSet, k: int, photograph: Image.Image, found: list[Box], label: str) -> str:
    record = images.images[k]
    own = [box for box in found if box.score >= SCORE]
    drawn = draw_objects(photograph, own, images.classes, photograph.width / record.size[1])
    texts = ", ".join(f"{box.label} {box.score:.2f}" for box in own) or "nothing"
    true = ", ".join(images.classes[number - 1] for number in record.labels.tolist()) or "none"
    alt = f"{record.path.name}, {label}: predicted {texts}; true objects: {true}"
    return html.picture(torch.from_numpy(np.array(drawn)), _LONG_SIDE, alt)


def by_class(rows: PageRows, classes: Sequence[str]) -> html.Section:
    """Returns a table of the AP of each class and row, at the end of the row's first run."""
    last = {
        label: [line for line in read_metrics(runs[0].path) if line["kind"] == "eval"][-1]
        for label, runs in rows.groups.items()
    }
    columns = [{**(line.get("categories") or {}), "all": line["AP"]} for line in last.values()]
    cells = []
    for name in [*classes, "all"]:
        values = [column.get(name) for column in columns]
        texts = [
            f'<td data-value="{"" if v is None else v}">{html.value_text(v, ".1f")}</td>' for v in values
        ]
        cells.append([f'<th scope="row" data-value="{escape(name)}">{escape(name)}</th>', *texts])
    head = html.sortable(("class", *last))
    table = html.html_table(head, cells, "Table of AP by class", name="class-ap-table")
    note = "AP in percent of each row's first seed on its run's test images. –: no object."
    body = html.long_table(table, len(classes), "classes")
    return html.Section("class-ap", "AP by class", body + html.paragraph(note, "note"))


register_sections("detection", TaskSections("AP by class and boxes", boxes))
