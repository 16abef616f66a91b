"""Chart of the rows of a contest and their teachers, the best first: means, intervals, single seeds."""

import math
from collections.abc import Mapping

from mdistiller.report.answer import Contest
from mdistiller.report.looks import Look
from mdistiller.report.markup import chart, shorten
from mdistiller.report.runs import Row
from mdistiller.report.spread import half_width
from mdistiller.report.svg import Canvas, Scale, fences, tick_text
from mdistiller.runs.progress import counted
from mdistiller.types import Metric

WIDE, NARROW = 900, 344
SEEDS = 3  # from which a row has a mean and an interval; with fewer, it has its single runs
FEW = 15  # rows up to which there is more space between them


def interval(row: Row) -> tuple[float, float] | None:
    """Returns the 95 % confidence interval of a row's mean; None with fewer than three seeds."""
    half = half_width(row.values) if row.seeds >= SEEDS else None
    return None if half is None else (row.last.mean - half, row.last.mean + half)


def ranked_chart(name: str, contest: Contest, looks: Mapping[str, Look], metric: Metric) -> str:
    """Returns the chart for a page, in a wide and a narrow form, with its numbers as CSV."""
    seeds = max(row.seeds for row in contest.rows)
    table = [["row", "n", "mean", "std", "low95", "high95", *(f"value{i + 1}" for i in range(seeds))]]
    for row in contest.rows:
        std = "" if row.last.std is None else row.last.std
        cells = [row.label, row.seeds, row.last.mean, std, *(interval(row) or ("", "")), *row.values]
        table.append([str(cell) for cell in cells] + [""] * (len(table[0]) - len(cells)))
    for teacher, value in contest.teachers.items():
        table.append([teacher, "", str(value)] + [""] * (len(table[0]) - 3))
    drawings = [draw_ranked(contest, looks, metric, width) for width in (WIDE, NARROW)]
    order = "; ".join(f"{row.label} {metric.text(row.last)}" for row in contest.rows)
    teachers = "".join(f"; {name} {metric.text(value)}" for name, value in contest.teachers.items())
    return chart(name, drawings, f"{metric.title} of the rows, the best first. {order}{teachers}.", table)


def draw_ranked(contest: Contest, looks: Mapping[str, Look], metric: Metric, width: float) -> Canvas:
    """Draws the chart; a narrow one has each name above its row."""
    wide = width >= 600
    lines: list[tuple[str, float, Row | None]] = [
        (row.label + ("" if row.finished else " (under way)"), row.last.mean, row) for row in contest.rows
    ]
    for teacher, value in sorted(contest.teachers.items(), key=lambda pair: pair[1]):
        at = next(
            (i for i, (_, mean, row) in enumerate(lines) if mean <= value or not (row and row.finished)), None
        )
        lines.insert(len(lines) if at is None else at, (teacher, value, None))
    values = [format(value if row is None else row.last, metric.spec) for _, value, row in lines]
    label = min(8.4 * max(len(text) for text, *_ in lines) + 24, 0.42 * width) if wide else 8
    height, top = ((26, 22), (42, 36))[not wide][len(lines) > FEW], 12
    canvas = Canvas(width, top + height * len(lines) + 44)
    right = width - (8.2 * max(map(len, values)) + 14 if wide else 12)
    most = 100.0 if metric.unit else math.inf  # a percentage ends at 100, and values stand right of the scale
    scale = Scale(*_ends(contest, metric), label, right)
    bottom = top + height * len(lines)
    for tick in scale.ticks(int((right - label) / 90)):
        if wide:
            canvas.line(scale(tick), top - 4, scale(tick), bottom, class_="grid")
        canvas.text(scale(tick), bottom + 17, tick_text(tick), "middle", class_="faint")
    title = metric.head(f"{metric.axis}, last epoch")
    canvas.text((label + right) / 2, bottom + 37, title, "middle", class_="faint")
    for value in contest.teachers.values() if wide else ():
        canvas.line(scale(value), top - 4, scale(value), bottom, class_="teacher")
    for i, ((text, value, row), number) in enumerate(zip(lines, values, strict=True)):
        y = top + height * i + (height / 2 if wide else height - 13)
        kind = "strong" if row is contest.rows[0] else ""
        hint = f"{text}: {metric.text(row.last)}, {counted(row.seeds, 'seed')}" if row else ""
        with canvas.row(row.label if row else text, hint=hint):
            if wide:
                canvas.text(label - 16, y + 4, shorten(text, int((label - 22) / 7.6)), "end", class_=kind)
                canvas.text(width - 4, y + 4, number, "end", class_=kind)
            else:
                _guides(canvas, scale, contest, y)
                fits = int((width - 7.6 * len(number) - 40) / 7.6)
                canvas.text(label, y - 12, shorten(text, fits), class_=f"halo {kind}")
                canvas.text(width - 4, y - 12, number, "end", class_=f"halo {kind}")
            with canvas.clip(label - 8, y - 10, right - label + 16, 20):
                if row is None:
                    canvas.mark("diamond", scale(value), y, 5, class_="ink")
                    continue
                look, ends = looks[row.label], interval(row)
                if ends is not None:
                    canvas.line(
                        scale(ends[0]), y, scale(min(ends[1], most)), y, class_="bar", stroke=look.color
                    )
                for single in row.values:
                    canvas.add("circle", cx=scale(single), cy=y, r=3.6, class_="seed", stroke=look.color)
                if row.seeds >= SEEDS:
                    canvas.mark(look.shape, scale(value), y, 6, fill=look.color)
                if value < scale.low:
                    canvas.text(label - 7, y + 5, "◂", fill=look.color, class_="strong")
    return canvas


def _ends(contest: Contest, metric: Metric) -> tuple[float, float]:
    """Returns the ends of the axis: far outliers are left out, the best and the student alone are not."""
    low, high = fences([row.last.mean for row in contest.rows])
    low, high = min(low, contest.rows[0].last.mean), max(high, contest.rows[0].last.mean)
    if contest.alone is not None:
        low = min(low, contest.alone.last.mean)
    for row in [row for row in contest.rows if low <= row.last.mean <= high]:
        first, last = interval(row) or (row.last.mean, row.last.mean)
        reach = high - low
        low, high = (
            min(low, *row.values, max(first, low - reach)),
            max(high, *row.values, min(last, high + reach)),
        )
    ends = [low, high, *contest.teachers.values()]
    low, high = min(ends), max(ends)
    room = 0.04 * (high - low) or (1 if metric.unit else 0.04 * abs(high) or 1)
    return low - room, min(high + room, 100.5 if metric.unit else math.inf)


def _guides(canvas: Canvas, scale: Scale, contest: Contest, y: float) -> None:
    """Draws grid and teachers beside one row's mark alone, where names and values stand above it."""
    for tick in scale.ticks(3):
        canvas.line(scale(tick), y - 7, scale(tick), y + 9, class_="grid")
    for value in contest.teachers.values():
        canvas.line(scale(value), y - 7, scale(value), y + 9, class_="teacher")
