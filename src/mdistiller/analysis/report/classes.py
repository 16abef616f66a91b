"""Sections on classes: gains and losses against the baseline, and the commonest confusions."""

from collections import Counter
from html import escape

import plotly.graph_objects as go
from torch import Tensor

import mdistiller.analysis.report.markup as html
from mdistiller.analysis.report.students import RunOutputs, per_class

SHOWN = 10  # classes at each end of a row's gains
PAIRS, PICTURES = 5, 6  # confusions of a row, images of a confusion
_SIDE = 96  # largest size of a picture in pixels


def gains(found: RunOutputs) -> list[html.Section]:
    """Returns the accuracy of each row by class, minus that of its baseline."""
    if found.splits is None or not found.baselines:
        return []
    names = found.splits.classes
    parts = []
    for i, (label, other) in enumerate(found.baselines.items()):
        gain, base = (per_class(found.students[row], len(names)) for row in (label, other))
        parts.append(_gains(f"gains-{i}", label, other, gain - base, names))
    counts = next(iter(found.students.values()))[0].label.bincount(minlength=len(names))
    low, high = int(counts[counts > 0].min()), int(counts.max())
    between = html.counted(low, "image") if low == high else f"{low} to {high} images"
    caption = (
        f"Accuracy of each class on {found.images:,} test images, the mean over seeds, minus that of the "
        f"baseline, in percentage points. A class has {between}: one more correct image is up to "
        f"{100 / low:.1f} points. Of many classes, only those with the largest gains and losses are drawn."
    )
    body = html.figure(html.panels(parts), caption=caption)
    return [html.Section("gains", "Gains and losses by class", body)]


def _gains(name: str, label: str, other: str, gain: Tensor, names: tuple[str, ...]) -> str:
    order = [i for i in gain.argsort(descending=True, stable=True).tolist() if not gain[i].isnan()]
    if len(order) > 2 * SHOWN:
        order = order[:SHOWN] + order[-SHOWN:]
    values = [float(gain[i]) for i in order]
    at = list(range(len(order)))
    colours = [html.GAIN if value >= 0 else html.LOSS for value in values]
    bars = go.Bar(x=values, y=at, orientation="h", marker={"color": colours, "line": {"width": 0}})
    bars.update(customdata=[names[i] for i in order], hovertemplate="%{customdata}: %{x:+.1f}<extra></extra>")
    plot = go.Figure(bars, layout={"margin": {"l": 20, "r": 10, "t": 10, "b": 35}})
    plot.update_xaxes(title="points", zeroline=True)
    plot.update_yaxes(tickvals=at, ticktext=[html.shorten(names[i]) for i in order])
    plot.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    up, down = int((gain > 0).sum()), int((gain < 0).sum())
    summary = f"{up} {'class gains' if up == 1 else 'classes gain'} and {down} "
    summary += f"{'loses' if down == 1 else 'lose'} against {other}"
    best, worst = order[0], order[-1]
    alt = (
        f"Bars of the classes' gains of {label} over {other}: {names[best]} {gain[best]:+.1f} down to "
        f"{names[worst]} {gain[worst]:+.1f} points. {summary}."
    )
    drawing = html.drawn(name, plot, alt, height=75 + 19 * len(order))
    return html.panel(label, html.paragraph(summary, "note"), drawing)


def worst_pairs(found: RunOutputs, label: str) -> list[tuple[tuple[int, int], list[int]]]:
    """Returns a row's commonest errors, most frequent first, as (true class, predicted class) and images.

    An image is repeated for each seed with this error; images with the error in most seeds come first.
    """
    errors: dict[tuple[int, int], Counter[int]] = {}
    for outputs in found.students[label]:
        predicted = outputs.logits.argmax(1)
        for i in (predicted != outputs.label).nonzero()[:, 0].tolist():
            pair = (int(outputs.label[i]), int(predicted[i]))
            errors.setdefault(pair, Counter())[int(outputs.index[i])] += 1
    order = sorted(errors, key=lambda pair: (-errors[pair].total(), pair))
    return [(pair, [i for i, n in errors[pair].most_common() for _ in range(n)]) for pair in order[:PAIRS]]


def confusions(found: RunOutputs) -> list[html.Section]:
    """Returns each row's commonest confusions with their images."""
    if found.splits is None or not found.students:
        return []
    blocks = []
    totals = next(iter(found.students.values()))[0].label.bincount(minlength=found.splits.num_classes)
    for i, (label, outputs) in enumerate(found.students.items()):
        items = []
        for (true, predicted), images in worst_pairs(found, label):
            count = f"{len(images) / len(outputs):.3g} of {int(totals[true])} images"
            count += " (mean over seeds)" if len(outputs) > 1 else ""
            first, second = (found.splits.classes[k] for k in (true, predicted))
            pictures = "".join(
                f'<img src="{html.image_uri(found.image(index), _SIDE, "png")}" width="72" height="72" '
                f'alt="{escape(f"{first}, predicted as {second} (test image {index})")}">'
                for index in list(dict.fromkeys(images))[:PICTURES]
            )
            items.append(f"<li>{escape(f'{first} predicted as {second}: {count}')}<br>{pictures}</li>")
        body = f'<ul class="confusions">{"".join(items)}</ul>' if items else html.paragraph("No errors.")
        blocks.append(html.folded(label, body, unfolded=i == len(found.students) - 1))
    note = f"The {PAIRS} commonest errors of each row on {found.images:,} test images. Images with the error"
    note = html.paragraph(f"{note} in most seeds come first.", "note")
    return [html.Section("confusions", "Worst confusions", note + "".join(blocks))]
