"""Sections of the report on a detector's classes, errors and boxes."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import torch
from torch import Tensor

import mdistiller.report.markup as html
from mdistiller.errors import MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import MeanStd, RunRecord, find_baseline
from mdistiller.report.sections import (
    RunOutputs,
    TaskSections,
    check_same_images,
    missing_parts,
    no_student,
    part_of,
    register_sections,
)
from mdistiller.report.svg import Canvas, Frame
from mdistiller.tasks.detection.coco import DetectionSet
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.drawing import place_labels
from mdistiller.tasks.detection.evaluate import average_precision, precision_curves, world_results
from mdistiller.tasks.detection.layouts import load_split
from mdistiller.tasks.detection.listing import Annotation
from mdistiller.tasks.detection.loader import DetectionLoader
from mdistiller.tasks.detection.mistakes import KINDS, confusion_matrix, error_kinds
from mdistiller.tasks.detection.models import build_detector
from mdistiller.training.distributed import World, pick_device

MOST = 6  # images that are drawn
_LONG_SIDE = 480  # pixels of a photograph on the page
_UNUSED = ("train_annotations", "train_images", "train_limit", "masks", "keep_empty")
SCORE = 0.3  # lowest of a prediction that counts or is drawn
CLASSES = 12  # of a confusion matrix
UNFOLDED = 30  # classes of a table that is shown without a click
Results = Mapping[str, list[Annotation]]
"""Predictions of each row's first student in COCO's format for results."""


def boxes(rows: PageRows, images: int, device: str, found: RunOutputs | None = None) -> list[html.Section]:
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
    results: dict[str, list[Annotation]] = {}
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
            html.panel(label, _drawing(shown, k, found, rows.looks[label].colour, label))
            for label, found in results.items()
        ]
        parts.append(_symbol(k, photograph) + html.panels(drawings))
    caption = (
        f"Predictions of each row's first seed with a score of at least {SCORE}. Thin white: true objects. A "
        "label that would cover another one is left out; the pointer on a box shows its own."
    )
    body = html.figure(*parts, caption=caption) + "".join(map(html.paragraph, failures))
    return [*sections, html.Section("boxes", "Boxes on test images", body)]


def _test_images(run: RunRecord, images: int) -> DetectionDataConfig:
    data = part_of(run, "data", DetectionDataConfig)
    return data.replace(test_limit=min(images, data.test_limit or images), masks=False)


def _predict(run: RunRecord, images: DetectionSet, device: torch.device) -> list[Annotation]:
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
        f'href="{html.image_uri(photograph.permute(1, 2, 0), _LONG_SIDE, "jpeg")}"/></defs></svg>'
    )


def _drawing(images: DetectionSet, k: int, results: Sequence[Annotation], colour: str, label: str) -> str:
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


def detections(rows: PageRows, images: DetectionSet, results: Results) -> list[html.Section]:
    """Returns the sections on predictions for a set of images.

    Raises:
        ConfigError: pycocotools is not installed, or the images have no object.
    """
    if not results:
        return []
    sections = [_by_class(rows, images, results), _precision(rows, images, results)]
    return [*sections, _errors(rows, images, results), _confusions(rows, images, results), *_by_seed(rows)]


def _by_class(rows: PageRows, images: DetectionSet, results: Results) -> html.Section:
    metrics = {label: average_precision(found, images) for label, found in results.items()}
    objects = dict.fromkeys((category for _, category, _ in images.categories), 0)
    for annotation in images.ground_truth["annotations"]:
        objects[annotation["category_id"]] += not annotation.get("iscrowd")
    lines = [(name, objects[category]) for _, category, name in images.categories]
    cells = []
    for name, count in [*lines, ("all", sum(objects.values()))]:
        values = [m["AP"] if name == "all" else m["categories"].get(name) for m in metrics.values()]
        texts = [f'<td data-value="{"" if v is None else v}">{_number(v)}</td>' for v in values]
        first = f'<th scope="row" data-value="{escape(name)}">{escape(name)}</th>'
        cells.append([first, f'<td data-value="{count}">{count:,}</td>', *texts])
    head = html.sortable(("class", "objects", *(rows.names[label] for label in results)))
    table = html.html_table(head, cells, "Table of AP by class", name="class-ap-table")
    note = f"AP in percent of each row's first seed on {len(images):,} test images. –: no object."
    title = f"{len(images.categories)} classes"
    body = html.folded(title, table, unfolded=len(images.categories) <= UNFOLDED)
    return html.Section("class-ap", "AP by class", body + html.paragraph(note, "note"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _precision(rows: PageRows, images: DetectionSet, results: Results) -> html.Section:
    curves = {}
    for label, found in results.items():
        values = np.array(list(precision_curves(found, images).values()))
        curves[label] = 100 * np.nanmean(values[~np.isnan(values).all(1)], 0)
    recall = np.arange(101)
    drawings = [_draw(curves, rows, size) for size in ((900, 340), (344, 270))]
    ends = "; ".join(f"{label}: AP50 {values.mean():.1f}" for label, values in curves.items())
    numbers = [[str(x), *(f"{values[x]:.4g}" for values in curves.values())] for x in recall]
    alt = f"Curves of precision over recall. {ends}."
    drawing = html.chart("precision", drawings, alt, [["recall, %", *curves], *numbers])
    caption = (
        "Precision at each recall for an overlap of a half, the mean over classes, as COCO's AP50 counts it: "
        "the largest precision at this recall or a higher one. The area below a line is its AP50."
    )
    return html.Section(
        "precision-recall", "Precision and recall", html.figure(rows.legend(), drawing, caption=caption)
    )


def _draw(curves: Mapping[str, np.ndarray], rows: PageRows, size: tuple[float, float]) -> Canvas:
    canvas = Canvas(*size)
    frame = Frame(canvas, (0, 100), (0, 100), titles=("recall, %", "precision, %"), whole=True)
    with frame.inside():
        for label, values in curves.items():
            look = rows.looks[label]
            points = [(frame.x(x), frame.y(y)) for x, y in enumerate(values.tolist())]
            with canvas.row(label, shown=label in rows.shown):
                canvas.curve(
                    points, fill=None, class_="curve", stroke=look.colour, stroke_dasharray=look.dash or None
                )
                canvas.mark(look.shape, *points[50], 4, fill=look.colour)
    return canvas


def _errors(rows: PageRows, images: DetectionSet, results: Results) -> html.Section:
    counts = {label: error_kinds(found, images, SCORE) for label, found in results.items()}
    cells = []
    for kind in KINDS:
        most = max(found[kind] for found in counts.values()) or 1
        good = "" if kind == "correct" else " loss"
        values = [
            f'<td class="shade{good}" style="--s:{found[kind] / most:.2f}">{found[kind]:,}</td>'
            for found in counts.values()
        ]
        cells.append([f'<th scope="row">{kind}</th>', *values])
    head = html.heads(("kind", *(rows.names[label] for label in counts)))
    table = html.html_table(head, cells, "Table of errors", name="errors-table")
    note = (
        f"Predictions with a score of at least {SCORE} on {len(images):,} test images, and missed objects. "
        "Correct: overlaps an object of its class by half or more. Classification: an object of another "
        "class. Localisation: an object of its class, by a tenth to a half. Both: one of another class, by "
        "a tenth to a half. Duplicate: an object that a likelier prediction has. Background: no object. "
        "Missed: an object without a correct prediction, or an error of classification or localisation at it."
    )
    return html.Section("errors", "Kinds of errors", table + html.paragraph(note, "note"))


def _confusions(rows: PageRows, images: DetectionSet, results: Results) -> html.Section:
    names = [*images.classes, "background"]
    matrices = {label: confusion_matrix(found, images, SCORE) for label, found in results.items()}
    chosen = _worst(sum(matrices.values(), np.zeros((len(names), len(names)), np.int64)))
    shown = [label for label in rows.shown if label in matrices] or list(matrices)
    parts = [
        html.panel(label, _matrix(matrices[label], names, chosen, f"confusion-{i}"))
        for i, label in enumerate(shown)
    ]
    left = len(names) - len(chosen)
    note = (
        f"Objects (rows) by the class that is predicted at them (columns), from a score of {SCORE} on and "
        "for an overlap of a half or more. Row of the background: predictions at no object; its column: "
        "objects without a prediction."
    ) + f" The {left} classes with the fewest errors are left out." * bool(left)
    body = "".join(parts) + html.paragraph(note, "note")
    return html.Section("box-confusions", "Confusions", body)


def _worst(matrix: np.ndarray) -> list[int]:
    """Returns the classes with the most errors in the order of the set, and the background."""
    background = len(matrix) - 1
    wrong = (matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal())[:background]
    return [*sorted(np.argsort(-wrong, kind="stable")[:CLASSES].tolist()), background]


def _matrix(matrix: np.ndarray, names: Sequence[str], chosen: Sequence[int], name: str) -> str:
    part = matrix[np.ix_(chosen, chosen)]
    cells = []
    for i, row in enumerate(part):
        total = row.sum() or 1
        values = [
            f'<td class="shade{"" if i == j else " loss"}" style="--s:{value / total:.2f}">{value or ""}</td>'
            for j, value in enumerate(row.tolist())
        ]
        cells.append([f'<th scope="row">{escape(html.shorten(names[chosen[i]]))}</th>', *values])
    head = html.heads(("true", *(html.shorten(names[k]) for k in chosen)))
    return html.html_table(head, cells, "Confusion matrix", name=name)


def _by_seed(rows: PageRows) -> list[html.Section]:
    """Returns a table of the rows against their baselines with the same seeds, and against their teachers."""
    cells, by_label = [], {row.label: row for row in rows.rows}
    for label, runs in rows.groups.items():
        baseline, row = find_baseline(runs[0], rows.groups), by_label[label]
        if baseline is None:
            continue
        alone = {run.config["seed"]: run.evals[-1].value for run in rows.groups[baseline]}
        own = {run.config["seed"]: run.evals[-1].value for run in runs}
        seeds = sorted(alone.keys() & own.keys())
        paired = MeanStd.of([own[seed] - alone[seed] for seed in seeds]) if seeds else None
        spread = "" if paired is None or paired.std is None else f" ± {paired.std:.2f}"
        texts = (
            "–" if paired is None else f"{paired.mean:+.2f}{spread}",
            f"{len(seeds)}",
            "–" if row.over_teacher is None else f"{row.over_teacher:+.2f}",
        )
        signed = (f"<td>{escape(text.replace('-', '−'))}</td>" for text in texts)
        cells.append([f'<th scope="row">{escape(label)}</th>', *signed])
    if not cells:
        return []
    head = html.heads(("row", "Δ alone, paired", "seeds", "Δ teacher"))
    table = html.html_table(head, cells, "Table of differences by seed", name="paired-table")
    note = (
        "AP at the last epoch in percentage points. Δ alone: minus that of the student alone with the same "
        "seed, mean ± standard deviation over the seeds that both rows have. Δ teacher: minus the teacher's."
    )
    return [html.Section("paired", "Differences by seed", table + html.paragraph(note, "note"))]


register_sections("detection", TaskSections("AP by class, kinds of errors and boxes", boxes))
