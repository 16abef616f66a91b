"""Section on classes: gains and losses of each method against the baseline, as one heat map."""

from collections.abc import Sequence
from html import escape

import numpy as np

import mdistiller.report.markup as html
from mdistiller.report.page_rows import PageRows
from mdistiller.report.svg import Canvas
from mdistiller.tasks.classification.report.outputs import ClassifierOutputs

ENDS = 25  # classes at each end of the order where there are more than twice as many
CELL = 15  # height of a class's row in pixels


def gains(found: ClassifierOutputs, rows: PageRows) -> list[html.Section]:
    """Returns the metric of each class and row, minus that of the row's baseline, as a heat map."""
    if found.splits is None or not found.baselines:
        return []
    names, labels = found.splits.classes, list(found.baselines)
    of_class = {label: found.per_class(label) for label in {*labels, *found.baselines.values()}}
    gain = np.stack([of_class[row] - of_class[other] for row, other in found.baselines.items()], 1)
    known = [i for i in range(len(names)) if not np.isnan(gain[i]).all()]
    if not known:
        return []
    mean = np.array([np.nanmean(row) if i in known else np.nan for i, row in enumerate(gain)])
    order = sorted(known, key=lambda i: -mean[i])
    best = [row.label for row in sorted(rows.rows, key=lambda row: -row.last.mean) if row.label in labels]
    gain = gain[:, [labels.index(label) for label in best]]
    numbers = [[names[i], *(f"{value:.4g}" for value in (*gain[i], mean[i]))] for i in order]
    drawn, split = order, None
    if len(order) > 2 * ENDS:
        drawn, split = order[:ENDS] + order[-ENDS:], ENDS
    canvas = draw_heatmap(gain[drawn], [names[i] for i in drawn], [rows.names[row] for row in best], split)
    words = _words(gain, mean, names, sorted({rows.names[row] for row in found.baselines.values()}))
    alt = f"Heat map of the gains of {len(drawn)} classes. {words}"
    drawing = html.chart("class-gains", [canvas], alt, [["class", *best, "mean"], *numbers])
    caption = (
        f"{found.class_metric}, mean over seeds, minus that of the baseline, in percentage points, sorted by "
        f"the mean of the rows. {found.step_of_class()}"
    )
    if split:
        caption += f" Drawn are {ENDS} classes at each end of {len(order)}; the CSV has all."
    scroll = f'<div class="scroll" tabindex="0" role="group" aria-label="Gains by class">{drawing}</div>'
    body = html.paragraph(words) + html.figure(scroll, caption=caption)
    return [html.Section("gains", "Gains and losses by class", body)]


def _words(gain: np.ndarray, mean: np.ndarray, names: Sequence[str], others: Sequence[str]) -> str:
    """Returns how many classes gain and lose on the mean of the rows, and which most and least."""
    known = mean[~np.isnan(mean)]
    up, down = int((known > 0).sum()), int((known < 0).sum())
    first, last = int(np.nanargmax(mean)), int(np.nanargmin(mean))
    over = f"On the mean of {gain.shape[1]} rows, " if gain.shape[1] > 1 else ""
    text = (
        f"{over}{up} {'class gains' if up == 1 else 'classes gain'} and "
        f"{down} {'loses' if down == 1 else 'lose'} against {' or '.join(others)}: "
        f"most {names[first]} ({_signed(mean[first])}), least {names[last]} ({_signed(mean[last])})."
    )
    return text[0].upper() + text[1:]


def _signed(value: float) -> str:
    return "0" if abs(value) < 0.05 else html.value_text(value, "+.1f")


def draw_heatmap(
    matrix: np.ndarray, names: Sequence[str], columns: Sequence[str], split: int | None = None
) -> Canvas:
    """Draws a matrix of classes × rows with its names; numbers stand in the cells where they have room.

    `split` is the number of classes above a gap, which stands for classes that are left out.
    """
    longest = min(max(map(len, names)), 22)
    left, count = 7.2 * longest + 12, len(columns)
    cell = min(max((620 - left) / count, 15), 64)
    top = 14 + 0.75 * min(7.2 * max(map(len, columns)), 150)
    gap = 14 if split else 0
    width = left + cell * count + 60
    height = top + CELL * len(names) + gap + 42
    canvas = Canvas(max(width, 300), height)
    scale = float(np.nanmax(np.abs(matrix), initial=0)) or 1.0
    for j, column in enumerate(columns):
        x = left + cell * (j + 0.5)
        canvas.add(
            "text",
            escape(html.shorten(column, 24)),
            transform=f"translate({x + 3:.0f} {top - 6:.0f}) rotate(-48)",
            class_="small",
        )
    blocks = [(0, len(names))] if split is None else [(0, split), (split, len(names))]
    for n, (first, last) in enumerate(blocks):
        y0 = top + CELL * first + gap * n
        canvas.heat(matrix[first:last], left, y0, cell * count, CELL * (last - first), scale)
        for i in range(first, last):
            y = y0 + CELL * (i - first) + 11.5
            canvas.text(left - 6, y, html.shorten(names[i], longest), "end", class_="small")
            if cell >= 36:
                for j in range(count):
                    if not np.isnan(matrix[i, j]):
                        x = left + cell * (j + 0.5)
                        canvas.text(x, y, _signed(matrix[i, j]), "middle", class_="small halo")
    if split:
        canvas.text(left - 6, top + CELL * split + 11, "⋮", "end", class_="faint")
    ramp, y = np.linspace(-1, 1, 41)[None], height - 26
    canvas.heat(ramp, left, y, min(160, canvas.width - left - 50), 8, 1)
    end = left + min(160, canvas.width - left - 50)
    for x, value, anchor in ((left, -scale, "start"), ((left + end) / 2, 0, "middle"), (end, scale, "end")):
        canvas.text(x, y + 22, _signed(value), anchor, class_="faint small")
    canvas.text(end + 8, y + 8, "points", class_="faint small")
    return canvas
