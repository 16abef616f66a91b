"""Sections on the students' features, by t-SNE, and on the correlation of their logits with the teacher's."""

import colorsys

import plotly.graph_objects as go
import torch

import mdistiller.analysis.report.markup as html
from mdistiller.analysis.correlation import correlation_difference
from mdistiller.analysis.features import Collected, embed, separability
from mdistiller.analysis.report.students import RunOutputs
from mdistiller.errors import DataError

POINTS, ROWS = 1000, 12  # most images in a t-SNE plot, most rows that are drawn
# Tableau's ten colours, as in plots of scikit-learn and matplotlib.
_TEN = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)


def _palette(classes: int) -> list[str]:
    if classes <= len(_TEN):
        return list(_TEN[:classes])
    # Steps of the golden ratio keep the hues of neighbouring classes far apart.
    rgbs = (colorsys.hls_to_rgb(i * 0.618034 % 1, (0.45, 0.6)[i % 2], 0.7) for i in range(classes))
    return ["#" + "".join(f"{round(255 * value):02x}" for value in rgb) for rgb in rgbs]


def embeddings(found: RunOutputs) -> list[html.Section]:
    """Returns t-SNE plots of the features of each row's first seed, and how well their classes separate."""
    if found.splits is None or not found.students:
        return []
    names, colours = found.splits.classes, _palette(found.splits.num_classes)
    rows = enumerate(list(found.students.items())[:ROWS])
    parts = [_embedding(f"tsne-{i}", row, outputs[0], names, colours) for i, (row, outputs) in rows]
    caption = (
        f"t-SNE of the pooled features of {min(POINTS, found.images):,} test images, coloured by class, for "
        "the first seed of each row. Sizes of clusters and distances between them mean little. The mean "
        "silhouette coefficient and the accuracy of the vote of the 10 nearest neighbours (without the image "
        f"itself) are measured on the features, by cosine distance, on {found.images:,} images."
    ) + _left_out(len(found.students))
    key = html.swatches(names, colours) if len(names) <= len(_TEN) else ""
    return [html.Section("features", "Features", html.figure(key, html.panels(parts), caption=caption))]


def _left_out(rows: int) -> str:
    return f" The first {ROWS} of {rows} rows are drawn." if rows > ROWS else ""


def _embedding(name: str, label: str, outputs: Collected, names: tuple[str, ...], colours: list[str]) -> str:
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
    x, y = plane.T.round(2).tolist()
    points = go.Scatter(x=x, y=y, mode="markers", text=[names[k] for k in classes])
    marker = {"size": 5, "color": [colours[k] for k in classes], "opacity": 0.85, "line": {"width": 0}}
    points.update(marker=marker, hovertemplate="%{text}<extra></extra>")
    plot = go.Figure(points, layout={"margin": dict.fromkeys("lrtb", 5), "hovermode": "closest"})
    plot.update_xaxes(visible=False).update_yaxes(visible=False, scaleanchor="x")
    alt = f"Features of {label} as points in the plane, coloured by class: {summary}."
    return html.panel(label, html.paragraph(summary, "note"), html.drawn(name, plot, alt, height=300))


def correlations(found: RunOutputs) -> list[html.Section]:
    """Returns heat maps of |student's − teacher's| correlation of logits, for each row's first seed."""
    if found.splits is None or not found.teachers:
        return []
    matrices = {
        label: correlation_difference(found.students[label][0].logits, teacher.logits)
        for label, teacher in list(found.teachers.items())[:ROWS]
    }
    names = found.splits.classes
    top = max(float(matrix.nan_to_num().max()) for matrix in matrices.values())
    few = len(names) <= 12
    axis = {"showgrid": False, "showticklabels": few, "ticks": "", "zeroline": False, "constrain": "domain"}
    if few:
        axis |= {"tickvals": list(range(len(names))), "ticktext": [html.shorten(name, 10) for name in names]}
    parts, pairs = [], [[f"{a} and {b}" for b in names] for a in names]
    for i, (label, matrix) in enumerate(matrices.items()):
        row, column = divmod(int(matrix.nan_to_num().argmax()), len(names))
        summary = f"mean {float(matrix.nanmean()):.3f}"
        alt = (
            f"Heat map of the absolute difference between the correlation matrices of {label} and its teacher"
            f": {summary}; the largest, {float(matrix[row, column]):.2f}, between {pairs[row][column]}."
        )
        heat = go.Heatmap(z=[[round(value, 3) for value in line] for line in matrix.tolist()])
        heat.update(zmin=0, zmax=top, colorscale="Cividis")
        heat.update(colorbar={"thickness": 10, "len": 0.9, "outlinewidth": 0})
        heat.update(hovertemplate="%{customdata}: %{z:.3f}<extra></extra>", customdata=pairs)
        plot = go.Figure(heat, layout={"margin": {"l": 10, "r": 5, "t": 5, "b": 10}})
        plot.update_xaxes(**axis).update_yaxes(autorange="reversed", scaleanchor="x", **axis)
        picture = html.drawn(f"correlation-{i}", plot, alt, height=300)
        parts.append(html.panel(label, html.paragraph(summary, "note"), picture))
    caption = (
        f"Pearson's correlation of every two classes' logits over {found.images:,} test images: the absolute "
        "difference between student (first seed) and teacher, as in Figure 4 of the DKD paper. Darker: the "
        "two classes are related for the student as they are for the teacher."
    ) + _left_out(len(found.teachers))
    body = html.figure(html.panels(parts), caption=caption)
    return [html.Section("correlation", "Correlation of the logits", body)]
