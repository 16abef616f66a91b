"""Chart of the rows of a contest, the best first: means, intervals, single seeds, the teacher as a line."""

import math
from collections.abc import Mapping

from mdistiller.report.answer import Contest
from mdistiller.report.looks import Look
from mdistiller.report.markup import chart, shorten
from mdistiller.report.runs import half_width
from mdistiller.report.svg import Canvas, Scale, fences, tick_text
from mdistiller.runs.progress import counted
from mdistiller.types import Metric

WIDE, NARROW = 900, 344


def ranked_chart(
    name: str, contest: Contest, looks: Mapping[str, Look], names: Mapping[str, str], metric: Metric
) -> str:
    """Returns the chart for a page, in a wide and a narrow form, with its numbers as CSV."""
    table = [["row", "n", "mean", "std", "low95", "high95", *_seed_heads(contest)]]
    for row in contest.rows:
        half = half_width(row.values)
        ends = ("", "") if half is None else (row.last.mean - half, row.last.mean + half)
        std = "" if row.last.std is None else row.last.std
        cells = [row.label, row.seeds, row.last.mean, std, *ends, *row.values]
        table.append([str(cell) for cell in cells] + [""] * (len(table[0]) - len(cells)))
    for teacher, value in contest.teachers.items():
        table.append([f"teacher {teacher}", "", str(value)] + [""] * (len(table[0]) - 3))
    drawings = [draw_ranked(contest, looks, names, metric, width) for width in (WIDE, NARROW)]
    order = "; ".join(f"{names[row.label]} {metric.text(row.last)}" for row in contest.rows)
    teachers = "".join(f"; teacher {name} {metric.text(value)}" for name, value in contest.teachers.items())
    return chart(name, drawings, f"{metric.title} of the rows, the best first. {order}{teachers}.", table)


def _seed_heads(contest: Contest) -> list[str]:
    return [f"value{i + 1}" for i in range(max(row.seeds for row in contest.rows))]


def draw_ranked(
    contest: Contest, looks: Mapping[str, Look], names: Mapping[str, str], metric: Metric, width: float
) -> Canvas:
    """Draws the chart; a narrow one has each name above its row."""
    rows, wide = contest.rows, width >= 600
    texts = [names[row.label] + ("" if row.finished else " (under way)") for row in rows]
    values = [format(row.last, metric.spec) for row in rows]
    label = min(7.6 * max(map(len, texts)) + 22, 0.42 * width) if wide else 8
    height, top = 26 if wide else 42, 30 if contest.teachers else 12
    canvas = Canvas(width, top + height * len(rows) + 44)
    right = width - (7.4 * max(map(len, values)) + 14 if wide else 12)
    low, high = fences([row.last.mean for row in rows])
    low, high = min(low, contest.rows[0].last.mean), max(high, contest.rows[0].last.mean)
    if contest.alone is not None:
        low = min(low, contest.alone.last.mean)
    inner = [row for row in rows if low <= row.last.mean <= high]
    for row in inner:
        reach = (half_width(row.values) or 0.0) if row.seeds > 2 else 0.0
        low = min(low, *row.values, max(row.last.mean - reach, low - (high - low)))
        high = max(high, *row.values, min(row.last.mean + reach, high + (high - low)))
    ends = [low, high, *contest.teachers.values()]
    low, high = min(ends), max(ends)
    most = 100.0 if metric.unit else math.inf  # a percentage ends at 100, and values stand right of the scale
    room = 0.04 * (high - low) or (1 if metric.unit else 0.04 * abs(high) or 1)
    scale = Scale(low - room, min(high + room, most + 0.5), label, right)
    bottom = top + height * len(rows)
    for tick in scale.ticks(int((right - label) / 90)):
        if wide:
            canvas.line(scale(tick), top - 4, scale(tick), bottom, class_="grid")
        canvas.text(scale(tick), bottom + 17, tick_text(tick), "middle", class_="faint")
    canvas.text(
        (label + right) / 2, bottom + 37, metric.head(f"{metric.axis}, last epoch"), "middle", class_="faint"
    )
    for i, (teacher, value) in enumerate(contest.teachers.items()):
        x = scale(value)
        number = f"{value:.1f}" if metric.unit else metric.text(value)
        text = f"teacher{f' {teacher}' * (len(contest.teachers) > 1 or wide)} {number}"
        side = "end" if x + 3.6 * len(text) > width else "middle"
        canvas.line(x, top - 6, x, bottom if wide else top + 2, class_="teacher")
        canvas.text(min(x, width - 4) if side == "end" else x, 16, text * (i == 0 or wide), side)
    for i, row in enumerate(rows):
        y = top + height * i + (height / 2 if wide else 29)
        look = looks[row.label]
        kind = "strong" if i == 0 else None
        fits = int((label - 22) / 7) if wide else int((width - 7.6 * len(values[i]) - 40) / 7)
        name = shorten(texts[i], fits)
        hint = f"{row.label}: {metric.text(row.last)}, {counted(row.seeds, 'seed')}"
        with canvas.row(row.label, hint=hint):
            if not wide:
                _guides(canvas, scale, contest, y)
            if wide:
                canvas.text(label - 16, y + 4, name, "end", class_=kind)
                canvas.text(width - 4, y + 4, values[i], "end", class_=kind)
            else:
                canvas.text(label, y - 12, name, class_=f"halo {kind or ''}")
                canvas.text(width - 4, y - 12, values[i], "end", class_=f"halo {kind or ''}")
            with canvas.clip(label - 8, y - 11, right - label + 16, 22):
                if (half := half_width(row.values)) is not None:
                    x1, x2 = scale(row.last.mean - half), scale(min(row.last.mean + half, most))
                    canvas.line(x1, y, x2, y, class_="bar", stroke=look.colour)
                if len(row.values) > 1:
                    for value in row.values:
                        canvas.add("circle", cx=scale(value), cy=y, r=3.4, class_="seed", stroke=look.colour)
                if row.last.mean < scale.low:
                    canvas.text(label - 7, y + 5, "◂", fill=look.colour, class_="strong")
                canvas.mark(look.shape, scale(row.last.mean), y, 6, fill=look.colour)
    return canvas


def _guides(canvas: Canvas, scale: Scale, contest: Contest, y: float) -> None:
    """Draws grid and teachers beside one row's mark alone, where names and values stand above it."""
    for tick in scale.ticks(3):
        canvas.line(scale(tick), y - 7, scale(tick), y + 9, class_="grid")
    for value in contest.teachers.values():
        canvas.line(scale(value), y - 7, scale(value), y + 9, class_="teacher")
