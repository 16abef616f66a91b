"""Scorecard of the knowledge transfer: a line for each row, with the student's distance from its teacher."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import mdistiller.report.markup as html
from mdistiller.methods.dkd import dkd_samples
from mdistiller.report.correlation import correlation_difference, off_diagonal_mean
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import MeanStd, Run
from mdistiller.report.sections import RunOutputs
from mdistiller.report.svg import fences

TEMPERATURE = 4.0  # of TCKD and NCKD, as in the diagnostics


class Measure(NamedTuple):
    """Column of the scorecard: field, heading, format, and whether more is better."""

    field: str
    head: str
    spec: str
    more: bool


MEASURES = (
    Measure("agreement", "agreement, %", ".1f", True),
    Measure("nckd", "NCKD, nats", ".3f", False),
    Measure("tckd", "TCKD, nats", ".3f", False),
    Measure("ece", "ECE, %", ".2f", False),
    Measure("correlation", "Δ correlation", ".3f", False),
)


def score(rows: PageRows, found: RunOutputs | None = None) -> dict[str, dict[str, MeanStd]]:
    """Returns the known measures of each row by label, over its seeds.

    They are the diagnostics of the last epoch on the test images; what the diagnostics lack is computed from
    the models' outputs, where there are any. A student alone is compared with the teacher of the others.
    """
    scores: dict[str, dict[str, MeanStd]] = {}
    for label, runs in rows.groups.items():
        computed = _computed(label, rows, found)
        values = {}
        for measure in MEASURES:
            recorded = [_diagnostics(run).get(measure.field) for run in runs]
            known = [value for value in recorded if value is not None] or computed.get(measure.field, [])
            if known:
                values[measure.field] = MeanStd.of(known)
        scores[label] = values
    return scores


def _diagnostics(run: Run) -> Mapping[str, float]:
    return (run.evals[-1].get("diagnostics") or {}).get("test") or {}


def _computed(label: str, rows: PageRows, found: RunOutputs | None) -> dict[str, list[float]]:
    """Computes the measures of a row's students from their outputs, a value for each seed."""
    if found is None or label not in found.students:
        return {}
    near = [c for c in rows.contests if label in (row.label for row in c.rows)]
    labels = [label, *(row.label for contest in near for row in contest.rows)]
    teacher = next((found.teachers[other] for other in labels if other in found.teachers), None)
    if teacher is None:
        return {}
    values: dict[str, list[float]] = {"correlation": []}
    for student in found.students[label]:
        values["correlation"].append(
            off_diagonal_mean(correlation_difference(student.logits, teacher.logits))
        )
        if found.is_multi_label:
            continue
        tckd, nckd = dkd_samples(student.logits, teacher.logits, student.label, TEMPERATURE)
        same = (student.logits.argmax(1) == teacher.logits.argmax(1)).double().mean()
        for name, value in (("agreement", 100 * same), ("tckd", tckd.mean()), ("nckd", nckd.mean())):
            values.setdefault(name, []).append(float(value))
    return values


def shade(value: float, values: Sequence[float], *, more: bool) -> float:
    """Returns the goodness of a value among others, from 0 to 1; far outliers do not rule it."""
    low, high = fences(values)
    share = 0.0 if high == low else min(max((value - low) / (high - low), 0), 1)
    return share if more else 1 - share


def scorecard(rows: PageRows, found: RunOutputs | None = None) -> list[html.Section]:
    """Returns the scorecard as a table, the rows in the order of their metric."""
    scores = score(rows, found)
    columns = [m for m in MEASURES if any(m.field in values for values in scores.values())]
    listed = [row for contest in rows.contests for row in contest.rows if scores[row.label]]
    if not columns or not any(
        "agreement" in scores[row.label] or "correlation" in scores[row.label] for row in listed
    ):
        return []
    metric, lines = rows.metric, []
    several = [row.last.mean for row in listed]
    for row in listed:
        look = html.swatch(rows.looks[row.label])
        cells = [
            f'<th scope="row" data-value="{escape(row.label)}">{look} {escape(rows.names[row.label])}</th>'
        ]
        cells.append(_cell(row.last, metric.spec, shade(row.last.mean, several, more=True)))
        for measure in columns:
            value = scores[row.label].get(measure.field)
            known = [s[measure.field].mean for s in scores.values() if measure.field in s]
            good = 0 if value is None else shade(value.mean, known, more=measure.more)
            cells.append(_cell(value, measure.spec, good))
        lines.append(cells)
    better = [f"{measure.head} {'↑' if measure.more else '↓'}" for measure in columns]
    head = html.sortable(["row", metric.head(metric.axis), *better])
    table = html.html_table(head, lines, "Scorecard of the transfer", "card", name="scorecard-table")
    note = (
        "Student against teacher on the test images, last epoch, mean ± standard deviation over seeds. "
        "Stronger colour: closer to the teacher, or better. Agreement: images with the same first class. "
        "NCKD, TCKD: the parts of KD for the other classes and for the target, at temperature 4, times 16. "
        "ECE: expected calibration error, 15 bins."
    )
    if any(m.field == "correlation" for m in columns):
        note += " Δ correlation: difference in the correlation of two classes' logits, mean over the pairs."
    return [html.Section("scorecard", "What was transferred", table + html.paragraph(note, "note"))]


def _cell(value: MeanStd | None, spec: str, good: float) -> str:
    if value is None:
        return '<td data-value="">–</td>'
    std = "" if value.std is None else f' <span class="std">± {value.std:{spec}}</span>'
    text = f"{value.mean:{spec}}{std}"
    return f'<td class="shade" style="--s:{good:.2f}" data-value="{value.mean:.6g}">{text}</td>'
