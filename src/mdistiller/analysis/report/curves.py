"""Curves over training: accuracy, loss, and the diagnostics; and what the accuracy costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from mdistiller.analysis.report.markup import WORDS, Section, drawn, figure, legend, panels
from mdistiller.analysis.report.style import TEACHER, mark
from mdistiller.analysis.runs import Row, Run

Groups = Mapping[str, Sequence[Run]]
Points = Callable[[Run], list[tuple[int, float]]]

HIDES = "A name above hides and shows it in all of these plots."


def over_training(groups: Groups, rows: Sequence[Row]) -> list[Section]:
    """The runs' figure over epochs and training loss over steps."""
    compared, words = rows[0].figure, WORDS[rows[0].figure]
    summary = "; ".join(f"{row.label}: last {row.last} %, best {row.best} %" for row in rows)
    band = "Line: mean over seeds; band: lowest to highest seed. "
    accuracy = bands(groups, lambda run: [(line["epoch"], line[compared]) for line in run.evals])
    loss = bands(groups, lambda run: [(line["step"], line["loss"]) for line in run.windows])
    accuracy.update_layout(xaxis_title="epoch", yaxis_title=f"{words.axis}, %", margin=_MARGIN)
    loss.update_layout(xaxis_title="step", yaxis_title="training loss, all terms", margin=_MARGIN)
    names = legend(groups)
    alt = f"Curves of {words.axis} in % over epochs. {summary}."
    found = [
        Section(
            "curves",
            f"{words.title} over training",
            figure(names, drawn("accuracy-curves", accuracy, alt), caption=band + HIDES),
        )
    ]
    if any(run.windows for runs in groups.values() for run in runs):
        ends = "; ".join(
            f"{label}: {statistics.fmean(r.windows[-1]['loss'] for r in runs if r.windows):.4g}"
            for label, runs in groups.items()
            if any(r.windows for r in runs)
        )
        caption = (
            "Each method's own weighted sum: compare the seeds of one method, not the methods. "
            + band
            + HIDES
        )
        alt = f"Curves of the training loss over steps. At the end, {ends}."
        found.append(
            Section("loss", "Training loss", figure(names, drawn("loss-curves", loss, alt), caption=caption))
        )
    return found


_MARGIN = {"l": 60, "r": 15, "t": 15, "b": 45}


def bands(groups: Groups, points: Points) -> go.Figure:
    """The mean over seeds of a figure of runs, and its range, over whatever `points` gives first."""
    plot = go.Figure()
    for i, (label, members) in enumerate(groups.items()):
        colour, dash, _, _ = mark(i)
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
            plot.add_scatter(
                **edge, y=high, fill="tonexty", fillcolor=_faded(colour, min(0.2, 1.2 / len(groups)))
            )
        mode = "lines+markers" if len(x) < 3 else "lines"
        mean = [statistics.fmean(values[at]) for at in x]
        plot.add_scatter(
            **shared,
            y=mean,
            mode=mode,
            line={"color": colour, "dash": dash},
            hovertemplate="%{y:.4g}<extra>%{fullData.name}</extra>",
        )
    plot.update_layout(hovermode="x unified")
    seen = sorted({at for trace in plot.data for at in trace.x})
    if len(seen) <= 6:  # else there may be ticks between the epochs
        plot.update_xaxes(tickvals=seen)
    return plot


def _faded(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity:.2g})"


# Name in the metrics, heading, whether the teacher has one too.
_DIAGNOSTICS = (
    ("tckd", "TCKD, nats, log scale", False),
    ("nckd", "NCKD, nats, log scale", False),
    ("p_t", "probability of the target, p_t", True),
    ("gap", "logit gap, target − best other", True),
    ("agreement", "same first class as the teacher, %", False),
    ("ece", "calibration error (ECE), %", True),
)


def transfer(groups: Groups) -> list[Section]:
    """What is transferred over time, where the runs' diagnostics tell it."""
    blocks: list[str] = []
    kinds: tuple[tuple[Literal["test", "train"], str], ...] = (
        ("test", "On the test images"),
        ("train", "On training images, not augmented"),
    )
    for on, heading in kinds:
        shown = [
            panel
            for name, title, teachers in _DIAGNOSTICS
            if (panel := _diagnostic(groups, on, name, title, teachers)) is not None
        ]
        if shown:
            is_open = " open" if not blocks else ""
            blocks.append(f"<details{is_open}><summary>{heading}</summary>{panels(shown)}</details>")
    if not blocks:
        return []
    caption = (
        "TCKD and NCKD are the target's and the other classes' part of KD, at temperature 4 and times 16, "
        "for all methods alike. Dotted grey: the teacher. Line: mean over seeds; band: lowest to highest "
        "seed. " + HIDES
    )
    return [Section("transfer", "What is transferred", figure(legend(groups), *blocks, caption=caption))]


def _diagnostic(
    groups: Groups, on: Literal["test", "train"], name: str, title: str, teachers: bool
) -> str | None:
    def points(run: Run, key: str = name) -> list[tuple[int, float]]:
        found = [(line["epoch"], (line.get("diagnostics") or {}).get(on) or {}) for line in run.evals]
        return [(epoch, figures[key]) for epoch, figures in found if figures.get(key) is not None]

    plot = bands(groups, points)
    ends = {
        label: statistics.fmean(values)
        for label, runs in groups.items()
        if (values := [found[-1][1] for run in runs if (found := points(run))])
    }
    if not ends:
        return None
    if teachers:
        seen = set()
        for runs in groups.values():
            line = points(runs[0], f"teacher_{name}")
            teacher = f"teacher {(runs[0].config['teacher'] or {}).get('name')}"
            if not line or (teacher, line[-1][1]) in seen:
                continue
            seen.add((teacher, line[-1][1]))
            plot.add_scatter(
                x=[at for at, _ in line],
                y=[value for _, value in line],
                name=teacher,
                mode="lines" if len(line) > 1 else "markers",
                line={"color": TEACHER, "dash": "dot"},
                hovertemplate="%{y:.4g}<extra>%{fullData.name}</extra>",
            )
    plot.update_layout(margin={"l": 45, "r": 10, "t": 10, "b": 35}, xaxis_title="epoch")
    if name in ("tckd", "nckd"):
        plot.update_yaxes(type="log")
    told = "; ".join(f"{label}: {value:.4g}" for label, value in ends.items())
    alt = f"Curves of {title} over epochs. At the end, {told}."
    return f"<div><h3>{title}</h3>{drawn(f'{on}-{name}', plot, alt, height=230)}</div>"


def cost(rows: Sequence[Row]) -> list[Section]:
    """Figure 2 of the DKD paper: milliseconds a step and extra parameters against accuracy."""
    if len(rows) < 2:
        return []
    plot, axis = go.Figure(), WORDS[rows[0].figure].axis
    most = max(row.method_parameters or 0 for row in rows)
    told = []
    for i, row in enumerate(rows):
        extra = row.method_parameters
        size = math.sqrt(_LEAST**2 + (_MOST**2 - _LEAST**2) * (extra or 0) / (most or 1))
        words = "extra parameters not known" if extra is None else f"{extra:,} extra parameters"
        plot.add_scatter(
            x=[row.ms_per_step],
            y=[row.last.mean],
            error_y={
                "type": "data",
                "array": [row.last.std],
                "visible": row.last.std is not None,
                "color": mark(i).colour,
                "thickness": 1,
            },
            mode="markers",
            name=row.label,
            legendgroup=row.label,
            marker={
                "size": size,
                "color": mark(i).colour,
                "symbol": mark(i).symbol,
                "opacity": 0.8,
                "line": {"width": 0},
            },
            hovertemplate=f"{row.label}<br>{row.ms_per_step:.1f} ms a step, {row.last} %<br>{words}"
            "<extra></extra>",
        )
        told.append(f"{row.label}: {row.ms_per_step:.1f} ms, {row.last} %, {words}")
    plot.update_layout(
        xaxis_title="milliseconds a step",
        yaxis_title=f"last {axis}, %",
        margin=_MARGIN,
        hovermode="closest",
    )
    plot.update_xaxes(rangemode="tozero")
    caption = (
        "Up and to the left is better. A mark's area grows with the parameters that the method trains "
        "besides the student's; bars: ± standard deviation over seeds. Milliseconds compare only between "
        "runs on the same machine. " + HIDES
    )
    alt = f"Milliseconds a step against {axis}. {'; '.join(told)}."
    return [
        Section(
            "cost",
            "What it costs",
            figure(legend([row.label for row in rows]), drawn("cost-scatter", plot, alt), caption=caption),
        )
    ]


_LEAST, _MOST = 11, 44  # diameters in pixels
