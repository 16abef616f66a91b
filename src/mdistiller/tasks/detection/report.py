"""Sections of the report on a detector's classes and boxes."""

from collections.abc import Mapping, Sequence
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
from mdistiller.tasks.detection.coco import DetectionSet
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.drawing import class_color, draw_boxes
from mdistiller.tasks.detection.evaluate import average_precision, world_results
from mdistiller.tasks.detection.layouts import load_split
from mdistiller.tasks.detection.loader import DetectionLoader
from mdistiller.tasks.detection.models import build_detector
from mdistiller.training.distributed import World, pick_device
from mdistiller.types import Line

MOST = 6  # images that are drawn
_LONG_SIDE = 480  # pixels of a photograph on the page
_UNUSED = ("train_annotations", "train_images", "train_limit", "masks", "keep_empty")
SCORE = 0.3  # lowest of a prediction that is drawn


def boxes(rows: PageRows, images: int, device: str, found: RunOutputs | None = None) -> list[html.Section]:
    """Returns AP by class of each row's first student on at most `images` test images, and drawn boxes.

    Raises:
        ConfigError: no such device.
    """
    target = pick_device(device)
    try:
        data = _test_images(next(iter(rows.groups.values()))[0], images)
        shown = load_split(data, "test")
        photographs = [_photograph(shown, k) for k in range(min(len(shown), MOST))]
    except (MDistillerError, OSError) as error:
        return missing_parts([f"The test images cannot be read: {error}"])

    def predict(run: RunRecord) -> list[Line]:
        check_same_images(_test_images(run, images), data, *_UNUSED)
        return _predict(run, shown, target)

    results, failures = of_first_runs(rows.groups, predict)
    sections = []
    try:
        sections = [by_class(rows, shown, results)] if results else []
    except MDistillerError as error:
        failures.append(f"The predictions cannot be evaluated: {error}")
    parts = [
        html.panels(
            html.panel(label, _drawing(shown, k, photograph, results[label], label))
            for label in rows.pictured
            if label in results
        )
        for k, photograph in enumerate(photographs)
    ]
    caption = (
        f"Predictions of each row's first seed with a score of at least {SCORE}. White: true objects. A "
        "label that would cover another one is left out."
    )
    body = html.figure(*parts, caption=caption) + "".join(map(html.paragraph, failures))
    return [*sections, html.Section("boxes", "Boxes on test images", body)]


def _test_images(run: RunRecord, images: int) -> DetectionDataConfig:
    data = part_of(run, "data", DetectionDataConfig)
    return data.replace(test_limit=min(images, data.test_limit or images), masks=False)


def _predict(run: RunRecord, images: DetectionSet, device: torch.device) -> list[Line]:
    """Predicts objects of all images, in COCO's format for results."""
    student = ModelConfig(name=run.student, checkpoint=run.path)
    model = build_detector(student, images.num_classes).to(device)
    workers = part_of(run, "data", DetectionDataConfig).workers
    loader = DetectionLoader(images, 1, workers=workers, device=device, shuffle=False)
    return world_results(model, loader.epoch(0), images, World(device))[0]


def _photograph(images: DetectionSet, k: int) -> Image.Image:
    """Returns a test image with its true objects, in the size of the page."""
    pixels, target = images.read(k)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    width = image.width
    image.thumbnail((_LONG_SIDE, _LONG_SIDE))
    true = target["boxes"] * (image.width / width)
    return draw_boxes(image, true.tolist(), [""] * len(true), [(255, 255, 255)] * len(true))


def _drawing(
    images: DetectionSet, k: int, photograph: Image.Image, results: Sequence[Line], label: str
) -> str:
    record = images.images[k]
    scale = photograph.width / record.size[1]
    names = {category: (number, name) for number, category, name in images.categories}
    own = [r for r in results if r["image_id"] == record.id and r["score"] >= SCORE]
    own.sort(key=lambda r: -r["score"])
    corners = [[scale * v for v in (x, y, x + w, y + h)] for x, y, w, h in (r["bbox"] for r in own)]
    texts = [f"{names[r['category_id']][1]} {r['score']:.2f}" for r in own]
    colors = [class_color(names[r["category_id"]][0] - 1) for r in own]
    drawn = draw_boxes(photograph, corners, texts, colors)
    by_label = dict(names.values())
    true = ", ".join(by_label[number] for number in record.labels.tolist()) or "none"
    alt = f"{record.path.name}, {label}: predicted {', '.join(texts) or 'nothing'}; true objects: {true}"
    return html.picture(torch.from_numpy(np.array(drawn)), _LONG_SIDE, alt)


def by_class(rows: PageRows, images: DetectionSet, results: Mapping[str, Sequence[Line]]) -> html.Section:
    """Returns a table of the AP of each class and row.

    Raises:
        ConfigError: pycocotools is not installed, or the images have no object.
    """
    metrics = {label: average_precision(found, images) for label, found in results.items()}
    objects = dict.fromkeys((category for _, category, _ in images.categories), 0)
    for annotation in images.ground_truth["annotations"]:
        objects[annotation["category_id"]] += not annotation.get("iscrowd")
    lines = [(name, objects[category]) for _, category, name in images.categories]
    cells = []
    for name, count in [*lines, ("all", sum(objects.values()))]:
        values = [m["AP"] if name == "all" else m["categories"].get(name) for m in metrics.values()]
        texts = [
            f'<td data-value="{"" if v is None else v}">{html.value_text(v, ".1f")}</td>' for v in values
        ]
        first = f'<th scope="row" data-value="{escape(name)}">{escape(name)}</th>'
        cells.append([first, f'<td data-value="{count}">{count:,}</td>', *texts])
    head = html.sortable(("class", "objects", *results))
    table = html.html_table(head, cells, "Table of AP by class", name="class-ap-table")
    note = f"AP in percent of each row's first seed on {len(images):,} test images. –: no object."
    body = html.long_table(table, len(images.categories), "classes")
    return html.Section("class-ap", "AP by class", body + html.paragraph(note, "note"))


register_sections("detection", TaskSections("AP by class and boxes", boxes))
