"""The students' features in the plane, and the correlation of their logits beside the teacher's."""

from __future__ import annotations

import colorsys
from html import escape

import plotly.graph_objects as go
import torch

from mdistiller.analysis.correlation import correlation_difference
from mdistiller.analysis.features import Collected, embed, separability
from mdistiller.analysis.report.markup import Section, drawn, figure, panels, paragraph, shorten, swatches
from mdistiller.analysis.report.students import Seen
from mdistiller.errors import DataError

POINTS = 1000
"""Images in one t-SNE, at most."""
ROWS = 12
"""Rows that are drawn, at most."""
# Tableau's ten, as scikit-learn's and matplotlib's pictures of t-SNE have them.
_TEN = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)


def _palette(classes: int) -> list[str]:
    if classes <= len(_TEN):
        return list(_TEN[:classes])
    # Neighbouring ids get hues that lie far apart.
    found = []
    for i in range(classes):
        rgb = colorsys.hls_to_rgb(i * 0.618034 % 1, (0.45, 0.6)[i % 2], 0.7)
        found.append("#" + "".join(f"{round(255 * value):02x}" for value in rgb))
    return found


def embeddings(seen: Seen) -> list[Section]:
    """t-SNE of each row's features, of its first seed, with figures of how well the classes lie apart."""
    if seen.splits is None or not seen.students:
        return []
    names, colours = seen.splits.classes, _palette(seen.splits.num_classes)
    rows = list(seen.students)[:ROWS]
    parts = [
        _embedding(f"tsne-{i}", row, seen.students[row][0], names, colours) for i, row in enumerate(rows)
    ]
    points = min(POINTS, seen.images)
    caption = (
        f"t-SNE of the pooled features of {points:,} test images, coloured by class, for the first seed of "
        "each row. Distances between clusters, and their sizes, mean little. Silhouette (the mean "
        "coefficient) and nearest neighbours (the accuracy of the vote of 10, each image left out of its "
        f"own) are measured on the features themselves, by cosine distance, on {seen.images:,} images."
    ) + _left_out(len(seen.students))
    key = swatches(names, colours) if len(names) <= len(_TEN) else ""
    return [Section("features", "The features", figure(key, panels(parts), caption=caption))]


def _left_out(rows: int) -> str:
    return f" Of {rows} rows, the first {ROWS} are drawn." if rows > ROWS else ""


def _embedding(name: str, label: str, outputs: Collected, names: tuple[str, ...], colours: list[str]) -> str:
    n = len(outputs.label)
    chosen = torch.linspace(0, n - 1, min(POINTS, n)).long()
    classes = outputs.label[chosen].tolist()
    try:
        plane = embed(outputs.features[chosen])
    except DataError as error:
        return f"<div><h3>{escape(label)}</h3>{paragraph(f'{error}.')}</div>"
    try:
        silhouette, knn = separability(outputs.features, outputs.label)
        told = f"silhouette {silhouette:.3f}, nearest neighbours {knn:.1f}\u00a0%"
    except DataError:
        told = "too few images to measure"
    plot = go.Figure(
        go.Scatter(
            x=plane[:, 0].round(2).tolist(),
            y=plane[:, 1].round(2).tolist(),
            mode="markers",
            marker={"size": 5, "color": [colours[k] for k in classes], "opacity": 0.85, "line": {"width": 0}},
            text=[names[k] for k in classes],
            hovertemplate="%{text}<extra></extra>",
        )
    )
    plot.update_layout(margin={"l": 5, "r": 5, "t": 5, "b": 5}, hovermode="closest")
    plot.update_xaxes(visible=False)
    plot.update_yaxes(visible=False, scaleanchor="x")
    alt = f"Points of the features of {label} in the plane, coloured by class: {told}."
    head = f"<h3>{escape(label)}</h3>{paragraph(told, 'note')}"
    return f"<div>{head}{drawn(name, plot, alt, height=300)}</div>"


def correlations(seen: Seen) -> list[Section]:
    """|student's − teacher's| correlation of logits, of each row's first seed."""
    if seen.splits is None or not seen.teachers:
        return []
    found = {
        label: correlation_difference(seen.students[label][0].logits, teacher.logits)
        for label, teacher in list(seen.teachers.items())[:ROWS]
    }
    names = seen.splits.classes
    top = max(float(matrix.nan_to_num().max()) for matrix in found.values())
    parts = []
    for i, (label, matrix) in enumerate(found.items()):
        mean = float(matrix.nanmean())
        row, column = divmod(int(matrix.nan_to_num().argmax()), len(names))
        told = f"mean {mean:.3f}"
        alt = (
            f"Heat map of the absolute difference between the correlation matrices of {label} and its "
            f"teacher: {told}; the largest, {float(matrix[row, column]):.2f}, between {names[row]} and "
            f"{names[column]}."
        )
        few = len(names) <= 12
        at = list(range(len(names)))
        plot = go.Figure(
            go.Heatmap(
                z=[[round(value, 3) for value in line] for line in matrix.tolist()],
                zmin=0,
                zmax=top,
                colorscale="Cividis",
                colorbar={"thickness": 10, "len": 0.9, "outlinewidth": 0},
                hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
                customdata=[[f"{a} and {b}" for b in names] for a in names],
            )
        )
        plot.update_layout(margin={"l": 10, "r": 5, "t": 5, "b": 10})
        ticks = {"tickvals": at, "ticktext": [shorten(name, 10) for name in names]} if few else {}
        axis = {"showgrid": False, "showticklabels": few, "ticks": "", "zeroline": False, **ticks}
        plot.update_xaxes(constrain="domain", **axis)
        plot.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain", **axis)
        picture = drawn(f"correlation-{i}", plot, alt, height=300)
        parts.append(f"<div><h3>{escape(label)}</h3>{paragraph(told, 'note')}{picture}</div>")
    caption = (
        f"Pearson's correlation of every two classes' logits over {seen.images:,} test images: the absolute "
        "difference between student (first seed) and teacher, as in Figure 4 of the DKD paper. Darker: the "
        "student sees the two classes related as the teacher does."
    ) + _left_out(len(seen.teachers))
    return [Section("correlation", "Correlation of the logits", figure(panels(parts), caption=caption))]
