"""Which classes gain and lose against the baseline, and which are taken for which."""

from __future__ import annotations

import base64
import io
from collections import Counter
from html import escape

import plotly.graph_objects as go
import torch
from PIL import Image
from torch import Tensor

from mdistiller.analysis.report.markup import Section, counted, drawn, figure, panels, paragraph, shorten
from mdistiller.analysis.report.students import Seen, classes_of, per_class
from mdistiller.analysis.report.style import GAIN, LOSS

SHOWN = 10
"""Classes at each end of a row's gains."""
PAIRS = 5
"""Confusions of a row."""
PICTURES = 6
"""Images of a pair of classes."""
_SIDE = 96  # pixels of a picture, at most


def gains(seen: Seen) -> list[Section]:
    """Per-class accuracy of each row less that of its baseline."""
    if seen.splits is None or not seen.baselines:
        return []
    names = seen.splits.classes
    parts = []
    for i, (label, other) in enumerate(seen.baselines.items()):
        gain, base = (per_class(seen.students[row], len(names)) for row in (label, other))
        parts.append(_gains(f"gains-{i}", label, other, gain - base, names))
    counts = next(iter(seen.students.values()))[0].label.bincount(minlength=len(names))
    counts = counts[counts > 0]
    caption = (
        f"Accuracy of each class on {seen.images:,} test images, the mean over seeds, less that of the "
        f"baseline, in percentage points. A class has {_between(counts)} here: one image more is up "
        f"to {100 / int(counts.min()):.1f} points. Of many classes, those that gain and lose most."
    )
    return [Section("gains", "Classes that gain and lose", figure(panels(parts), caption=caption))]


def _between(counts: Tensor) -> str:
    low, high = int(counts.min()), int(counts.max())
    return counted(low, "image") if low == high else f"{low} to {high} images"


def _gains(name: str, label: str, other: str, gain: Tensor, names: tuple[str, ...]) -> str:
    order = [i for i in gain.argsort(descending=True, stable=True).tolist() if not gain[i].isnan()]
    if len(order) > 2 * SHOWN:
        order = order[:SHOWN] + order[-SHOWN:]
    values = [float(gain[i]) for i in order]
    at = list(range(len(order)))
    plot = go.Figure(
        go.Bar(
            x=values,
            y=at,
            orientation="h",
            marker={"color": [GAIN if value >= 0 else LOSS for value in values], "line": {"width": 0}},
            customdata=[names[i] for i in order],
            hovertemplate="%{customdata}: %{x:+.1f}<extra></extra>",
        )
    )
    plot.update_layout(margin={"l": 20, "r": 10, "t": 10, "b": 35})
    plot.update_xaxes(title="points", zeroline=True)
    plot.update_yaxes(
        tickvals=at,
        ticktext=[shorten(names[i]) for i in order],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    up, down = (int(count) for count in ((gain > 0).sum(), (gain < 0).sum()))
    told = f"{up} {'class gains' if up == 1 else 'classes gain'} and {down} "
    told += f"{'loses' if down == 1 else 'lose'} against {other}"
    best, worst = order[0], order[-1]
    alt = (
        f"Bars of the classes' gains of {label} over {other}: {names[best]} {gain[best]:+.1f} down to "
        f"{names[worst]} {gain[worst]:+.1f} points. {told}."
    )
    picture = drawn(name, plot, alt, height=75 + 19 * len(order))
    return f"<div><h3>{escape(label)}</h3>{paragraph(told, 'note')}{picture}</div>"


def worst_pairs(seen: Seen, label: str) -> list[tuple[tuple[int, int], list[int]]]:
    """(true class, taken for) of a row's commonest errors, most frequent first, and their images.

    An image counts once for each seed that gets it wrong in this way; such images come once each, those
    that most seeds get wrong first.
    """
    errors: dict[tuple[int, int], Counter[int]] = {}
    for outputs in seen.students[label]:
        taken = classes_of(outputs)
        for i in (taken != outputs.label).nonzero()[:, 0].tolist():
            pair = (int(outputs.label[i]), int(taken[i]))
            errors.setdefault(pair, Counter())[int(outputs.index[i])] += 1
    order = sorted(errors, key=lambda pair: (-errors[pair].total(), pair))
    return [(pair, [i for i, n in errors[pair].most_common() for _ in range(n)]) for pair in order[:PAIRS]]


def confusions(seen: Seen) -> list[Section]:
    """Each row's worst confusions, with the images."""
    if seen.splits is None or not seen.students:
        return []
    blocks = []
    totals = next(iter(seen.students.values()))[0].label.bincount(minlength=seen.splits.num_classes)
    for i, (label, outputs) in enumerate(seen.students.items()):
        items = []
        for (true, taken), images in worst_pairs(seen, label):
            count = f"{len(images) / len(outputs):.3g} of {int(totals[true])} images"
            count += " (mean over seeds)" if len(outputs) > 1 else ""
            first, second = (seen.splits.classes[k] for k in (true, taken))
            pictures = "".join(
                f'<img src="{_data_uri(seen.image(index))}" width="72" height="72" '
                f'alt="{escape(f"{first}, taken for {second} (test image {index})")}">'
                for index in list(dict.fromkeys(images))[:PICTURES]
            )
            text = f"{first} taken for {second}: {count}"
            items.append(f"<li>{escape(text)}<br>{pictures}</li>")
        body = f'<ul class="confusions">{"".join(items)}</ul>' if items else paragraph("No errors.")
        last = i == len(seen.students) - 1
        blocks.append(f"<details{' open' * last}><summary>{escape(label)}</summary>{body}</details>")
    note = paragraph(
        f"The {PAIRS} commonest errors of each row on {seen.images:,} test images, and the images, first "
        "those that most seeds get wrong.",
        "note",
    )
    return [Section("confusions", "Worst confusions", note + "".join(blocks))]


def _data_uri(image: Tensor) -> str:
    picture = Image.fromarray(image.to(torch.uint8).cpu().contiguous().numpy())
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
