"""Sections on training: curves of the metric, of the loss and of the diagnostics."""

import math
import statistics
from collections.abc import Callable, Sequence

import mdistiller.report.markup as html
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import RunRecord, teacher_names
from mdistiller.report.sections import RunOutputs
from mdistiller.report.svg import Canvas, Frame, fences
from mdistiller.report.tables import transfer_table

Points = Callable[[RunRecord], list[tuple[int, float]]]

MOST, FEW = 60, 40  # points of a curve, in a panel fewer
FEW_ROWS = 8  # up to which curves have bands, and there are curves on training images
EARLY, LATE = 0.2, 0.5  # shares of the training, see `value_range`
WIDE, NARROW, PANEL = (900, 340), (344, 270), (344, 220)
_SELECT = "The buttons show and hide rows, at most eight at a time."
_AXIS = "Axes ignore outliers in the first epochs. "


class Curve:
    """Values of a row over training: x, and the mean, the lowest and the highest over seeds."""

    def __init__(self, runs: Sequence[RunRecord], points: Points, most: int) -> None:
        values: dict[int, list[float]] = {}
        for run in runs:
            for at, value in points(run):
                values.setdefault(at, []).append(value)
        xs = sorted(values)
        step = max(1, -(-len(xs) // most))
        self.x = xs[:-1:step] + xs[-1:]
        self.mean = [statistics.fmean(values[x]) for x in self.x]
        self.low, self.high = ([f(values[x]) for x in self.x] for f in (min, max))

    def after(self, share: float) -> list[float]:
        """Returns the means after a share of the curve's own length."""
        start = self.x[0] + share * (self.x[-1] - self.x[0])
        return [y for x, y in zip(self.x, self.mean, strict=True) if x >= start]


def find_curves(rows: PageRows, points: Points, most: int = MOST) -> dict[str, Curve]:
    """Returns the curves of the rows that have points, by label."""
    found = {label: Curve(runs, points, most) for label, runs in rows.groups.items()}
    return {label: curve for label, curve in found.items() if curve.x}


def value_range(
    curves: Sequence[Curve], more: Sequence[float] = (), *, log: bool = False
) -> tuple[float, float]:
    """Returns the ends of an axis that the first epochs and curves that end far off do not rule.

    They hold the values of the second half of the training, and values after the first fifth that are at
    most as far from these as these are apart.
    """
    ends = fences([c.mean[-1] for c in curves])
    near = [c for c in curves if ends[0] <= c.mean[-1] <= ends[1]]

    def after(share: float) -> list[float]:
        found = [y for c in near for y in c.after(share)] + list(more)
        return [math.log(y) for y in found if y > 0] or [0.0] if log else found

    late, early = after(LATE), after(EARLY)
    reach = max(late) - min(late)
    low, high = max(min(early), min(late) - reach), min(max(early), max(late) + reach)
    room = 0.06 * (high - low) or max(abs(high) * 0.01, 1e-3)
    low, high = low - room, high + room
    return (math.exp(low), math.exp(high)) if log else (low, high)


def draw_curves(
    curves: dict[str, Curve],
    rows: PageRows,
    size: tuple[float, float],
    titles: tuple[str, str],
    *,
    lines: dict[str, list[tuple[int, float]]],
    log: bool = False,
) -> Canvas:
    """Draws curves; `lines` are drawn dashed in the color of text, such as the teacher's."""
    canvas = Canvas(*size)
    ys = value_range(list(curves.values()), [y for points in lines.values() for _, y in points], log=log)
    first, last = min(c.x[0] for c in curves.values()), max(c.x[-1] for c in curves.values())
    if titles[1].endswith("%") and not log:
        ys = max(ys[0], -2), min(ys[1], 102)
    frame = Frame(canvas, (first, last), ys, titles=titles, log=log, whole=True)
    with frame.inside():
        labels: dict[str, float] = {}
        for name, points in sorted(lines.items(), key=lambda line: -line[1][0][1]):
            at = [(frame.x(x), frame.y(y)) for x, y in points]
            ends = at if len(at) > 1 else [(frame.left, at[0][1]), (frame.right, at[0][1])]
            canvas.curve(ends, class_="teacher")
            line_y = ends[0][1]
            y = max(
                [line_y - 5 if line_y - 16 > frame.top else line_y + 13, *(at + 13 for at in labels.values())]
            )
            labels[name] = y
        for name, y in labels.items():  # above all lines
            canvas.text(frame.left + 6, y, name, class_="halo small")
        for label, curve in curves.items():
            look, x = rows.looks[label], [frame.x(value) for value in curve.x]
            with canvas.row(label, shown=label in rows.shown):
                if size != PANEL and len(rows.rows) <= FEW_ROWS and len(rows.groups[label]) > 1:
                    edge = list(zip(x, map(frame.y, curve.high), strict=True))
                    edge += list(zip(x, map(frame.y, curve.low), strict=True))[::-1]
                    canvas.curve(edge, class_="band", fill=look.color)
                mean = list(zip(x, map(frame.y, curve.mean), strict=True))
                style = {"stroke": look.color, "stroke_dasharray": look.dash or None}
                canvas.curve(mean, fill=None, class_="curve", **style)
                canvas.mark(look.shape, *mean[-1], 4, fill=look.color)
    return canvas


def curve_chart(
    name: str,
    title: str,
    curves: dict[str, Curve],
    rows: PageRows,
    titles: tuple[str, str],
    lines: dict[str, list[tuple[int, float]]],
    *,
    sizes: Sequence[tuple[float, float]] = (PANEL,),
    log: bool = False,
) -> str:
    """Returns a chart of curves in some sizes, with a column of numbers for each row and line."""
    drawings = [draw_curves(curves, rows, size, titles, lines=lines, log=log) for size in sizes]
    ends = "; ".join(f"{label}: {c.mean[-1]:.4g}" for label, c in curves.items())
    columns = {label: dict(zip(c.x, c.mean, strict=True)) for label, c in curves.items()}
    steps = sorted({at for values in columns.values() for at in values})
    columns |= {line: dict(points) for line, points in lines.items() if len(points) > 1}
    table = [[str(at), *("" if at not in c else f"{c[at]:.5g}" for c in columns.values())] for at in steps]
    return html.chart(name, drawings, f"{title}. At the end, {ends}.", [[titles[0], *columns], *table])


def over_training(rows: PageRows) -> list[html.Section]:
    """Returns curves of the metric over epochs, and of the training loss over steps in a frame for each row.

    Each row has a weighted sum of losses of its own, so that losses of different rows do not compare.
    """
    metric, parts = rows.metric, []
    curves = find_curves(rows, lambda run: [(line.epoch, line.value) for line in run.evals])
    if max(len(c.x) for c in curves.values()) > 1:
        lines = {name: [(0, value)] for name, value in rows.teachers.items()}
        titles, sizes = ("epoch", metric.head(metric.axis)), (WIDE, NARROW)
        drawn = curve_chart(
            "accuracy-curves", f"{metric.title} over epochs", curves, rows, titles, lines, sizes=sizes
        )
        band = "; band: lowest to highest seed" * (len(rows.rows) <= FEW_ROWS)
        caption = f"Line: mean over seeds{band}. {_AXIS}{_SELECT}"
        parts.append(html.figure(rows.legend(), drawn, caption=caption))
    losses = find_curves(rows, lambda run: [(line.step, line.loss) for line in run.windows], FEW)
    panels = []
    for i, label in enumerate(rows.shown):
        if label in losses and len(losses[label].x) > 1:
            own, titles = {label: losses[label]}, ("step", "")
            drawn = curve_chart(f"loss-{i}", "Training loss over steps", own, rows, titles, {})
            panels.append(html.panel(label, drawn))
    if panels:
        note = "Weighted sums of each row's own losses; values of different rows do not compare."
        body = html.panels(panels) + html.paragraph(note, "note")
        parts.append(html.folded("Training loss of each row", body))
    return [html.Section("curves", "Training", "".join(parts))] if parts else []


# Name among the diagnostics, heading, whether the teacher has one too.
_DIAGNOSTICS = (
    ("agreement", "Same prediction as the teacher, %", False),
    ("nckd", "NCKD, nats, log scale", False),
    ("tckd", "TCKD, nats, log scale", False),
    ("p_t", "Probability of the target, p_t", True),
    ("gap", "Logit gap, target − best other", True),
    ("ece", "Calibration error (ECE), %", True),
)


def transfer(rows: PageRows, found: RunOutputs | None = None) -> list[html.Section]:
    """Returns the measures at the end of the training, and curves of the diagnostics, where there are any."""
    body, few = transfer_table(rows, found), len(rows.rows) <= FEW_ROWS
    caption = f"TCKD and NCKD as above. Dashed: the teacher. Line: mean over seeds. {_AXIS}{_SELECT}"
    for images, heading in (("test", "test images"), ("train", "training images, without augmentation")):
        shown = [panel for diagnostic in _DIAGNOSTICS if (panel := _diagnostic(rows, images, *diagnostic))]
        if shown and (few or images == "test"):
            drawn = html.figure(rows.legend(), html.panels(shown), caption=caption)
            body += html.folded(f"Curves on {heading}", drawn, unfolded=few and images == "test")
    return [html.Section("transfer", "Knowledge transfer", body)] if body else []


def _diagnostic(rows: PageRows, images: str, name: str, title: str, has_teacher: bool) -> str:
    def points(run: RunRecord, key: str = name) -> list[tuple[int, float]]:
        return [(line.epoch, seen[key]) for line in run.evals if key in (seen := line.seen(images))]

    log = name in ("tckd", "nckd")
    curves = find_curves(rows, points, FEW)
    if not curves:
        return ""
    lines: dict[str, list[tuple[int, float]]] = {}
    names = teacher_names([runs[0] for runs in rows.groups.values()])
    for runs in rows.groups.values() if has_teacher else ():
        if line := points(runs[0], f"teacher_{name}"):
            lines.setdefault(names[runs[0].taught_by], line)
    titles = "epoch", "%" if name in ("agreement", "ece") else ""
    drawn = curve_chart(f"{images}-{name}", f"{title} over epochs", curves, rows, titles, lines, log=log)
    return html.panel(title, drawn)
