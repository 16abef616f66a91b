"""Section on classes: gains and losses of each method against the baseline, as one table."""

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
    labels = [row.label for row in rows.rows if row.label in found.baselines]
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
    kind = "Average precision" if found.is_multi_label else "Accuracy"
    others = " or ".join(sorted(set(found.baselines.values())))
    note = f"{kind} of each class, mean over seeds, minus that of the {others}, in percentage points."
    parts = html.long_table(table, len(order), "classes") + html.paragraph(note, "note")
    return [html.Section("gains", "Gains and losses by class", parts)]


def _cell(value: float, most: float) -> str:
    if np.isnan(value):
        return '<td data-value="">–</td>'
    kind, text = "shade loss" if value < 0 else "shade", html.value_text(value, "+.2f")
    return f'<td class="{kind}" style="--s:{abs(value) / most:.2f}" data-value="{value:.4g}">{text}</td>'
