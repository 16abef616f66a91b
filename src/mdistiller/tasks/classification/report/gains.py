"""Section on classes: gains and losses of each method against the baseline, as one table."""

from collections.abc import Sequence
from html import escape

import numpy as np

import mdistiller.report.markup as html
from mdistiller.report.page_rows import PageRows
from mdistiller.tasks.classification.report.outputs import ClassifierOutputs


def gains(found: ClassifierOutputs, rows: PageRows) -> list[html.Section]:
    """Returns the metric of each class and row, minus that of the row's baseline, the largest gain first."""
    if found.splits is None or not found.baselines:
        return []
    names = found.splits.classes
    labels = [row.label for row in sorted(rows.rows, key=lambda row: -row.last.mean)]
    labels = [label for label in labels if label in found.baselines]
    of_class = {label: found.per_class(label) for label in {*labels, *found.baselines.values()}}
    gain = np.stack([of_class[label] - of_class[found.baselines[label]] for label in labels], 1)
    known = ~np.isnan(gain).all(1)
    if not known.any():
        return []
    mean = np.full(len(names), np.nan)
    mean[known] = np.nanmean(gain[known], 1)
    order = [i for i in np.argsort(-mean, kind="stable").tolist() if known[i]]
    most = float(np.nanmax(np.abs(gain))) or 1.0
    lines = [
        [
            f'<th scope="row" data-value="{escape(names[i])}">{escape(names[i])}</th>',
            *(_cell(value, most) for value in (*gain[i].tolist(), mean[i].item())),
        ]
        for i in order
    ]
    head = html.sortable(("class", *labels, "mean"))
    table = html.html_table(head, lines, "Table of gains by class", name="class-gains")
    words = _words(gain, mean, names, sorted(set(found.baselines.values())))
    note = (
        f"{found.class_metric}, mean over seeds, minus that of the baseline, in percentage points. "
        f"{found.step_of_class()}"
    )
    body = html.folded(f"{len(order)} classes", table, unfolded=len(order) <= html.LONG)
    parts = html.paragraph(words) + body + html.paragraph(note, "note")
    return [html.Section("gains", "Gains and losses by class", parts)]


def _cell(value: float, most: float) -> str:
    if np.isnan(value):
        return '<td data-value="">–</td>'
    kind, text = "shade loss" if value < 0 else "shade", html.value_text(value, "+.2f")
    return f'<td class="{kind}" style="--s:{abs(value) / most:.2f}" data-value="{value:.4g}">{text}</td>'


def _words(gain: np.ndarray, mean: np.ndarray, names: Sequence[str], others: Sequence[str]) -> str:
    """Returns how many classes gain and lose on the mean of the rows, and which most and least."""
    known = mean[~np.isnan(mean)]
    up, down = int((known > 0).sum()), int((known < 0).sum())
    first, last = int(np.nanargmax(mean)), int(np.nanargmin(mean))
    over = f"On the mean of {gain.shape[1]} rows, " if gain.shape[1] > 1 else ""
    text = (
        f"{over}{up} {'class gains' if up == 1 else 'classes gain'} and "
        f"{down} {'loses' if down == 1 else 'lose'} against {' or '.join(others)}: "
        f"most {names[first]} ({_signed(mean[first])}), least {names[last]} ({_signed(mean[last])})."
    )
    return text[0].upper() + text[1:]


def _signed(value: float) -> str:
    return "0" if abs(value) < 0.05 else html.value_text(value, "+.1f")
