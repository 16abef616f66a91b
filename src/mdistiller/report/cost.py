"""Section on cost: milliseconds a step against the metric."""

import math
from collections.abc import Sequence

import mdistiller.report.markup as html
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import Row
from mdistiller.report.svg import Canvas, Frame, fences

_LEAST, _MOST = 5, 20  # radii in pixels
WIDE, NARROW = (900, 360), (344, 300)


def cost(rows: PageRows) -> list[html.Section]:
    """Returns Figure 2 of the DKD paper: milliseconds a step and extra parameters against the metric."""
    listed = {row.label for contest in rows.contests for row in contest.rows}
    timed = [row for row in rows.rows if row.ms_per_step is not None and row.label in listed]
    if len(timed) < 2:
        return []
    caption = (
        "Up and to the left is better. The area of a mark grows with the parameters that the method trains "
        "besides the student's; bars: ± standard deviation over seeds. Milliseconds compare only between "
        "runs on the same machine. The buttons above show and hide rows."
    )
    drawings = [_draw(timed, rows, size) for size in (WIDE, NARROW)]
    table = [["row", "ms_per_step", "mean", "std", "extra_parameters"]]
    for row in timed:
        cells = (row.label, row.ms_per_step, row.last.mean, row.last.std, row.method_parameters)
        table.append(["" if cell is None else str(cell) for cell in cells])
    points = "; ".join(
        f"{row.label}: {row.ms_per_step:.1f} ms, {rows.metric.text(row.last)}, {_extra(row)}" for row in timed
    )
    alt = f"Milliseconds a step against {rows.metric.axis}. {points}."
    body = html.figure(rows.legend(), html.chart("cost-scatter", drawings, alt, table), caption=caption)
    return [html.Section("cost", "Cost", body)]


def _extra(row: Row) -> str:
    extra = row.method_parameters
    return "extra parameters unknown" if extra is None else f"{extra:,} extra parameters"


def _radius(row: Row, most: int) -> float:
    """Returns the radius of a row's mark, whose area grows with the extra parameters up to `most`."""
    return math.sqrt(_LEAST**2 + (_MOST**2 - _LEAST**2) * (row.method_parameters or 0) / (most or 1))


def _draw(rows: Sequence[Row], page: PageRows, size: tuple[float, float]) -> Canvas:
    """Draws a mark for each row, the largest first; names stand where they have room."""
    canvas, metric = Canvas(*size), page.metric
    low, high = fences([row.last.mean for row in rows])
    room = 0.12 * (high - low) + (0.2 if metric.unit else 0.01 * abs(high))
    most = 101 if metric.unit else math.inf
    times = [row.ms_per_step or 0 for row in rows]
    ends, titles = (low - room, min(high + room, most)), ("milliseconds a step", metric.head(metric.axis))
    frame = Frame(canvas, (0, max(times) * 1.08), ends, titles=titles, right=24)

    def height(value: float) -> float:
        return min(max(frame.y(value), frame.top), frame.bottom)

    largest = max(row.method_parameters or 0 for row in rows)
    spots = [(frame.x(row.ms_per_step or 0), height(row.last.mean), _radius(row, largest)) for row in rows]
    taken = [(x - r, y - r, x + r, y + r) for x, y, r in spots]
    order = sorted(range(len(rows)), key=lambda i: -spots[i][2])
    for i in order:
        row, look, (x, y, r) = rows[i], page.looks[rows[i].label], spots[i]
        value = metric.text(row.last)
        hint = f"{page.names[row.label]}: {row.ms_per_step:.1f} ms a step, {value}, {_extra(row)}"
        with canvas.row(row.label, shown=row.label in page.shown, hint=hint):
            if row.last.std is not None:
                top, bottom = (height(row.last.mean + sign * row.last.std) for sign in (1, -1))
                canvas.line(x, top, x, bottom, stroke=look.colour, stroke_width=1.5)
            canvas.mark(look.shape, x, y, r, fill=look.colour, fill_opacity=0.85, class_="dot")
            if row.label in page.shown and (
                place := _free_place(page.names[row.label], (x, y, r), taken, canvas)
            ):
                canvas.text(*place, page.names[row.label], class_="halo small")
    return canvas


def _free_place(
    text: str,
    spot: tuple[float, float, float],
    taken: list[tuple[float, float, float, float]],
    canvas: Canvas,
) -> tuple[float, float] | None:
    """Returns a position for a name that covers no mark and no other name, and keeps it; None without one."""
    x, y, r = spot
    width = 6.2 * len(text)
    places = [
        (x + r + 3, y + 4),
        (x - r - 3 - width, y + 4),
        (x - width / 2, y - r - 5),
        (x - width / 2, y + r + 13),
    ]
    for left, base in places:
        box = (left, base - 11, left + width, base + 2)
        inside = box[0] > 40 and box[2] < canvas.width - 2 and box[1] > 20 and box[3] < canvas.height - 45
        if inside and not any(
            box[0] < x2 and x1 < box[2] and box[1] < y2 and y1 < box[3] for x1, y1, x2, y2 in taken
        ):
            taken.append(box)
            return left, base
    return None
