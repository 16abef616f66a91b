"""Sections on the students' features, by t-SNE, and on the correlation of their logits with the teacher's."""

import colorsys
from collections.abc import Sequence
from html import escape

import numpy as np
import torch

import mdistiller.report.markup as html
from mdistiller.errors import DataError
from mdistiller.report.correlation import correlation_difference, off_diagonal_mean
from mdistiller.report.features import Collected, embed, separability
from mdistiller.report.page_rows import PageRows
from mdistiller.report.svg import Canvas, Scale
from mdistiller.tasks.classification.report.outputs import ClassifierOutputs

POINTS = 500  # most images in a t-SNE plot; both sections draw the rows that are shown first
# Tableau's ten colours, as in plots of scikit-learn and matplotlib.
_TEN = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
_SIDE = 300
MANY = 30  # classes
LARGEST = 100  # pairs of many classes whose differences are saved


def palette(classes: int) -> list[str]:
    """Returns a colour for each class."""
    if classes <= len(_TEN):
        return list(_TEN[:classes])
    # Steps of the golden ratio keep the hues of neighbouring classes far apart.
    rgbs = (colorsys.hls_to_rgb(i * 0.618034 % 1, (0.45, 0.6)[i % 2], 0.7) for i in range(classes))
    return ["#" + "".join(f"{round(255 * value):02x}" for value in rgb) for rgb in rgbs]


def embeddings(found: ClassifierOutputs, rows: PageRows) -> list[html.Section]:
    """Returns t-SNE plots of the features of each row's first seed, and how well their classes separate."""
    if found.splits is None or not found.students or found.is_multi_label:
        return []
    names, shown = found.splits.classes, [label for label in rows.shown if label in found.students]
    parts = [
        _embedding(f"tsne-{i}", rows.names[label], found.students[label][0], names)
        for i, label in enumerate(shown)
    ]
    caption = (
        f"t-SNE of the pooled features of {min(POINTS, found.images):,} test images, coloured by class, for "
        "the first seed of each row. Sizes of clusters and distances between them mean little. The mean "
        "silhouette coefficient and the accuracy of the vote of the 10 nearest neighbours (without the image "
        f"itself) are measured on the features, by cosine distance, on {found.images:,} images."
    ) + _left_out(len(shown), len(found.students))
    key = html.swatches(names, palette(len(names))) if len(names) <= len(_TEN) else ""
    return [html.Section("features", "Features", html.figure(key, html.panels(parts), caption=caption))]


def _left_out(drawn: int, rows: int) -> str:
    return f" {drawn} of {rows} rows are drawn." if rows > drawn else ""


def _embedding(name: str, label: str, outputs: Collected, names: tuple[str, ...]) -> str:
    n = len(outputs.label)
    chosen = torch.linspace(0, n - 1, min(POINTS, n)).long()
    classes = outputs.label[chosen].tolist()
    try:
        plane = embed(outputs.features[chosen])
    except DataError as error:
        return html.panel(label, html.paragraph(f"{error}."))
    try:
        silhouette, knn = separability(outputs.features, outputs.label)
        summary = f"silhouette {silhouette:.3f}, nearest neighbours {knn:.1f}\u00a0%"
    except DataError:
        summary = "too few images to measure"
    alt = f"Features of {label} as points in the plane, coloured by class: {summary}."
    picture = _plane_chart(name, plane, classes, names, alt)
    return html.panel(label, html.paragraph(summary, "note"), picture)


def _plane_chart(name: str, plane: np.ndarray, classes: Sequence[int], names: Sequence[str], alt: str) -> str:
    """Returns points in the plane, coloured by class, as a chart."""
    canvas, colours = Canvas(_SIDE, _SIDE), palette(len(names))
    low, high = plane.min(0), plane.max(0)
    span = float((high - low).max())
    x0, y0 = (low + high - span) / 2
    x, y = Scale(x0, x0 + span, 6, _SIDE - 6), Scale(y0, y0 + span, _SIDE - 6, 6)
    for k in sorted(set(classes)):
        dots = "".join(
            f"M{x(a):.0f} {y(b):.0f}h0"
            for (a, b), own in zip(plane.tolist(), classes, strict=True)
            if own == k
        )
        title = f"<title>{escape(names[k])}</title>" if len(names) <= len(_TEN) else ""
        canvas.add("path", title, d=dots, stroke=colours[k], class_="dots")
    points = zip(plane.tolist(), classes, strict=True)
    table = [["x", "y", "class"], *([f"{a:.3f}", f"{b:.3f}", names[k]] for (a, b), k in points)]
    return html.chart(name, [canvas], alt, table)


def correlations(found: ClassifierOutputs, rows: PageRows) -> list[html.Section]:
    """Returns heat maps of |student's − teacher's| correlation of logits, for each row's first seed."""
    if found.splits is None or not found.teachers:
        return []
    shown = [label for label in rows.shown if label in found.teachers]
    shown = shown if found.splits.num_classes <= MANY else shown[:4]  # pictures of many classes are large
    matrices = {
        label: correlation_difference(found.students[label][0].logits, found.teachers[label].logits).numpy()
        for label in shown
    }
    if not matrices:
        return []
    top = max(float(np.nanmax(matrix, initial=0)) for matrix in matrices.values())
    parts = []
    for i, (label, matrix) in enumerate(matrices.items()):
        title = rows.names[label]
        parts.append(_matrix_chart(f"correlation-{i}", title, matrix, top, found.splits.classes))
    caption = (
        f"Pearson's correlation of every two classes' logits over {found.images:,} test images: the absolute "
        "difference between student (first seed) and teacher, as in Figure 4 of the DKD paper. Paler: the "
        f"two classes are related for the student as they are for the teacher. Full colour: {top:.2f}."
    ) + _left_out(len(shown), len(found.teachers))
    body = html.figure(html.panels(parts), caption=caption)
    return [html.Section("correlation", "Correlation of the logits", body)]


def _matrix_chart(name: str, title: str, matrix: np.ndarray, top: float, names: Sequence[str]) -> str:
    """Returns a panel with the differences of every two classes as a heat map."""
    row, column = divmod(int(np.nan_to_num(matrix).argmax()), len(names))
    summary = f"mean of two classes {off_diagonal_mean(torch.from_numpy(matrix)):.3f}"
    alt = (
        f"Heat map of the absolute difference between the correlation matrices of {title} and its teacher"
        f": {summary}; the largest, {matrix[row, column]:.2f}, between {names[row]} and {names[column]}."
    )
    few = len(names) <= 12
    left = 6 + 7 * min(max(map(len, names)), 10) if few else 4
    canvas = Canvas(_SIDE, _SIDE + 18 * few - (left - 4) * (not few))
    side = _SIDE - left - 4
    canvas.heat(matrix, left, 4, side, side, top)
    for k, text in enumerate(names if few else ()):
        at = side * (k + 0.5) / len(names)
        canvas.text(left - 4, 8 + at, html.shorten(text, 10), "end", class_="small")
        if max(map(len, names)) <= 3:
            canvas.text(left + at, side + 18, text, "middle", class_="small")
    if not (few and max(map(len, names)) <= 3):
        canvas.height = side + 8
    if few:
        lines = zip(names, matrix, strict=True)
        table = [["class", *names], *([a, *(f"{v:.3f}" for v in line)] for a, line in lines)]
    else:
        above = np.triu(np.nan_to_num(matrix), 1)
        first = np.argsort(-above, axis=None, kind="stable")[:LARGEST].tolist()
        pairs = [divmod(k, len(names)) for k in first]
        table = [
            ["class", "other", "difference"],
            *([names[a], names[b], f"{above[a, b]:.3f}"] for a, b in pairs),
        ]
    return html.panel(title, html.paragraph(summary, "note"), html.chart(name, [canvas], alt, table))
