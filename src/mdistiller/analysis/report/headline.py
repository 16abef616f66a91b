"""Headline table of the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mdistiller.analysis.report.markup import Section, html_table, metric_names, paragraph
from mdistiller.analysis.runs import Row

HEAD = (
    *("run", "seeds", "last, %", "best, %", "Δ baseline", "Δ teacher"),
    *("seconds", "ms/step", "parameters"),
)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Returns the headline table as text, header first."""
    body = [
        [
            row.label + ("" if row.finished else " (under way)"),
            str(row.seeds),
            str(row.last),
            str(row.best),
            _signed(row.over_baseline),
            _signed(row.over_teacher),
            f"{row.seconds:.1f}",
            f"{row.ms_per_step:.1f}",
            "–" if row.student_parameters is None else f"{row.student_parameters:,}",
        ]
        for row in rows
    ]
    return [list(HEAD), *body]


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def headline(rows: Sequence[Row]) -> Section:
    """Returns the headline table as HTML; a click on a heading sorts by its column."""
    head, *body = table(rows)
    header = [
        f'<th scope="col" aria-sort="none"><button type="button">{escape(name)}</button></th>'
        for name in head
    ]
    lines = []
    for row, texts in zip(rows, body, strict=True):
        values = (
            *(row.label, row.seeds, row.last.mean, row.best.mean, row.over_baseline, row.over_teacher),
            *(row.seconds, row.ms_per_step, row.student_parameters),
        )
        cells = [
            f'data-value="{"" if value is None else escape(str(value))}">{escape(text)}'
            for value, text in zip(values, texts, strict=True)
        ]
        lines.append([f'<th scope="row" {cells[0]}</th>', *(f"<td {cell}</td>" for cell in cells[1:])])
    names = metric_names(rows[0].metric)
    note = (
        f"{names.sentence[0].upper()}{names.sentence[1:]} at the last epoch and at the best epoch, mean ± "
        "standard deviation over seeds. The best epoch is picked on the test set, so it is optimistic. "
        "Δ: the last epoch minus that of the baseline (the same student without a teacher on the same data), "
        "and minus the teacher's, in percentage points. Seconds: training and evaluation of one run."
    )
    body_html = html_table(header, lines, "Table of metrics") + paragraph(note, "note")
    return Section("accuracy", names.title, body_html)
