"""Section on the correlation of the students' logits, and its difference to the teacher's."""

from collections.abc import Sequence

import numpy as np
import torch

import mdistiller.report.markup as html
from mdistiller.report.page_rows import PageRows
from mdistiller.report.svg import Canvas
from mdistiller.tasks.classification.report.measures import correlation_difference, off_diagonal_mean
from mdistiller.tasks.classification.report.outputs import ClassifierOutputs

_SIDE = 300
LARGEST = 100  # pairs of many classes whose differences are saved


def correlations(found: ClassifierOutputs, rows: PageRows) -> list[html.Section]:
    """Returns heat maps of |student's − teacher's| correlation of logits, for each row's first seed."""
    if found.splits is None or not found.teachers:
        return []
    shown = [label for label in rows.pictured if label in found.teachers]
    matrices = {
        label: correlation_difference(found.students[label][0].logits, found.teachers[label].logits).numpy()
        for label in shown
    }
    if not matrices:
        return []
    top = max(float(np.nanmax(matrix, initial=0)) for matrix in matrices.values())
    parts = []
    for i, (label, matrix) in enumerate(matrices.items()):
        parts.append(_matrix_chart(f"correlation-{i}", label, matrix, top, found.splits.classes))
    caption = (
        f"Pearson's correlation of every two classes' logits over {found.images:,} test images: the absolute "
        "difference between student (first seed) and teacher, as in Figure 4 of the DKD paper. Faint: "
        f"student and teacher relate the two classes equally. Full color: {top:.2f}."
    )
    if len(shown) < len(found.teachers):
        caption += f" {len(shown)} of {len(found.teachers)} rows are drawn."
    body = html.figure(html.panels(parts), caption=caption)
    return [html.Section("correlation", "Correlation of the logits", body)]


def _matrix_chart(name: str, title: str, matrix: np.ndarray, top: float, names: Sequence[str]) -> str:
    """Returns a panel with the differences of every two classes as a heat map."""
    row, column = divmod(int(np.nan_to_num(matrix).argmax()), len(names))
    summary = f"mean difference {off_diagonal_mean(torch.from_numpy(matrix)):.3f}"
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
