"""Sections on training: curves of the metric, the loss and the diagnostics, and the cost of a step."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

import mdistiller.analysis.report.markup as html
from mdistiller.analysis.runs import Row, Run

Groups = Mapping[str, Sequence[Run]]
Points = Callable[[Run], list[tuple[int, float]]]

_CLICK = "A click on a name above hides or shows the row in all plots."
_BAND = "Line: mean over seeds; band: lowest to highest seed. "
_HOVER = "%{y:.4g}<extra>%{fullData.name}</extra>"
_MARGIN = {"l": 60, "r": 15, "t": 15, "b": 45}


def _section(name: str, title: str, labels: Iterable[str], *drawings: str, caption: str) -> html.Section:
    return html.Section(name, title, html.figure(html.legend(labels), *drawings, caption=caption + _CLICK))


def over_training(groups: Groups, rows: Sequence[Row]) -> list[html.Section]:
    """Returns curves of the metric over epochs and of the training loss over steps."""
    metric, names = rows[0].metric, html.metric_names(rows[0].metric)
    curves = bands(groups, lambda run: [(line["epoch"], line[metric]) for line in run.evals])
    curves.update_layout(xaxis_title="epoch", yaxis_title=f"{names.axis}, %", margin=_MARGIN)
    summary = "; ".join(f"{row.label}: last {row.last} %, best {row.best} %" for row in rows)
    drawing = html.drawn("accuracy-curves", curves, f"Curves of {names.axis} in % over epochs. {summary}.")
    found = [_section("curves", f"{names.title} over training", groups, drawing, caption=_BAND)]

    def losses(run: Run) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in run.windows]

    if ends := _last_values(groups, losses):
        plot = bands(groups, losses)
        plot.update_layout(xaxis_title="step", yaxis_title="training loss, weighted sum", margin=_MARGIN)
        alt = f"Curves of the training loss over steps. At the end, {ends}."
        caption = "Each method has its own weighted sum of losses, so only seeds of one method compare. "
        drawing = html.drawn("loss-curves", plot, alt)
        found.append(_section("loss", "Training loss", groups, drawing, caption=caption + _BAND))
    return found


def _last_values(groups: Groups, points: Points) -> str:
    """Returns the last value of each row's curve, the mean over seeds, in words; empty without any value."""
    ends = {label: [found[-1][1] for run in runs if (found := points(run))] for label, runs in groups.items()}
    return "; ".join(f"{label}: {statistics.fmean(values):.4g}" for label, values in ends.items() if values)


def bands(groups: Groups, points: Points) -> go.Figure:
    """Plots the mean over seeds of the points of each run, and their range."""
    plot = go.Figure()
    for i, (label, members) in enumerate(groups.items()):
        colour, dash, _, _ = html.mark(i)
        values: dict[int, list[float]] = {}
        for run in members:
            for at, value in points(run):
                values.setdefault(at, []).append(value)
        x = sorted(values)
        if not x:
            continue
        shared: dict[str, Any] = {"x": x, "legendgroup": label, "name": label}
        if len(members) > 1:
            low, high = ([f(values[at]) for at in x] for f in (min, max))
            edge = shared | {"line": {"width": 0, "color": colour}, "hoverinfo": "skip", "mode": "lines"}
            plot.add_scatter(**edge, y=low)
            rgb = ", ".join(str(int(colour[k : k + 2], 16)) for k in (1, 3, 5))
            fill = f"rgba({rgb}, {min(0.2, 1.2 / len(groups)):.2g})"
            plot.add_scatter(**edge, y=high, fill="tonexty", fillcolor=fill)
        means = [statistics.fmean(values[at]) for at in x]
        line = {"color": colour, "dash": dash}
        mode = "lines+markers" if len(x) < 3 else "lines"
        plot.add_scatter(**shared, y=means, mode=mode, line=line, hovertemplate=_HOVER)
    plot.update_layout(hovermode="x unified")
    ticks = sorted({at for trace in plot.data for at in trace.x})
    if len(ticks) <= 6:  # plotly would put ticks between the epochs
        plot.update_xaxes(tickvals=ticks)
    return plot


# Name among the diagnostics, heading, whether the teacher has one too.
_DIAGNOSTICS = (
    ("tckd", "TCKD, nats, log scale", False),
    ("nckd", "NCKD, nats, log scale", False),
    ("p_t", "probability of the target, p_t", True),
    ("gap", "logit gap, target − best other", True),
    ("agreement", "same prediction as the teacher, %", False),
    ("ece", "calibration error (ECE), %", True),
)


def transfer(groups: Groups) -> list[html.Section]:
    """Returns curves of the diagnostics, for runs that have them."""
    blocks: list[str] = []
    for images, heading in (("test", "test images"), ("train", "training images, without augmentation")):
        shown = [found for diagnostic in _DIAGNOSTICS if (found := _diagnostic(groups, images, *diagnostic))]
        if shown:
            blocks.append(html.folded(f"On {heading}", html.panels(shown), unfolded=not blocks))
    if not blocks:
        return []
    caption = (
        "TCKD and NCKD are the parts of KD for the target class and for the other classes, at temperature 4 "
        f"and times 16 for all methods. Dotted grey: the teacher. {_BAND}"
    )
    return [_section("transfer", "Knowledge transfer", groups, *blocks, caption=caption)]


def _diagnostic(groups: Groups, images: str, name: str, title: str, teachers: bool) -> str:
    def points(run: Run, key: str = name) -> list[tuple[int, float]]:
        found = [(line["epoch"], (line.get("diagnostics") or {}).get(images) or {}) for line in run.evals]
        return [(epoch, values[key]) for epoch, values in found if values.get(key) is not None]

    if not (ends := _last_values(groups, points)):
        return ""
    plot = bands(groups, points)
    drawn_teachers = set()
    for runs in groups.values() if teachers else ():
        line = points(runs[0], f"teacher_{name}")
        teacher = f"teacher {(runs[0].config['teacher'] or {}).get('name')}"
        if not line or (teacher, line[-1][1]) in drawn_teachers:
            continue
        drawn_teachers.add((teacher, line[-1][1]))
        x, y = zip(*line, strict=True)
        mode, style = "lines" if len(line) > 1 else "markers", {"color": html.TEACHER, "dash": "dot"}
        plot.add_scatter(x=x, y=y, name=teacher, mode=mode, line=style, hovertemplate=_HOVER)
    plot.update_layout(margin={"l": 45, "r": 10, "t": 10, "b": 35}, xaxis_title="epoch")
    if name in ("tckd", "nckd"):
        plot.update_yaxes(type="log")
    alt = f"Curves of {title} over epochs. At the end, {ends}."
    return html.panel(title, html.drawn(f"{images}-{name}", plot, alt, height=230))


def cost(rows: Sequence[Row]) -> list[html.Section]:
    """Returns Figure 2 of the DKD paper: milliseconds a step and extra parameters against the metric."""
    rows = [row for row in rows if row.ms_per_step is not None]
    if len(rows) < 2:
        return []
    caption = (
        "Up and to the left is better. The area of a mark grows with the parameters that the method trains "
        "besides the student's; bars: ± standard deviation over seeds. Milliseconds compare only between "
        "runs on the same machine. "
    )
    drawing = html.drawn("cost-scatter", *cost_plot(rows))
    return [_section("cost", "Cost", [row.label for row in rows], drawing, caption=caption)]


_LEAST, _MOST = 11, 44  # diameters in pixels


def cost_plot(rows: Sequence[Row], *, labels: bool = False) -> tuple[go.Figure, str]:
    """Plots the cost of a step against the metric, a mark per row; returns it with its content in words."""
    plot, axis = go.Figure(), html.metric_names(rows[0].metric).axis
    most = max(row.method_parameters or 0 for row in rows) or 1
    points = []
    for i, row in enumerate(rows):
        extra, style = row.method_parameters, html.mark(i)
        size = math.sqrt(_LEAST**2 + (_MOST**2 - _LEAST**2) * (extra or 0) / most)
        words = "extra parameters unknown" if extra is None else f"{extra:,} extra parameters"
        point = go.Scatter(x=[row.ms_per_step], y=[row.last.mean], name=row.label, legendgroup=row.label)
        point.update(text=[row.label], textposition="top center", mode="markers" + "+text" * labels)
        point.marker.update(size=size, symbol=style.symbol, color=style.colour, opacity=0.8, line_width=0)
        bar = {"array": [row.last.std], "visible": row.last.std is not None, "color": style.colour}
        point.error_y.update(type="data", thickness=1, **bar)
        hover = f"{row.label}<br>{row.ms_per_step:.1f} ms a step, {row.last} %<br>{words}<extra></extra>"
        plot.add_trace(point.update(hovertemplate=hover))
        points.append(f"{row.label}: {row.ms_per_step:.1f} ms, {row.last} %, {words}")
    titles = {"xaxis_title": "milliseconds a step", "yaxis_title": f"last {axis}, %"}
    plot.update_layout(**titles, margin=_MARGIN, hovermode="closest")
    plot.update_xaxes(rangemode="tozero")
    return plot, f"Milliseconds a step against {axis}. {'; '.join(points)}."
