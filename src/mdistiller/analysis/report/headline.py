"""The headline table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mdistiller.analysis.report.markup import WORDS, Section, paragraph
from mdistiller.analysis.runs import Row

HEAD = (
    *("run", "seeds", "last, %", "best, %", "Δ alone", "Δ teacher"),
    *("seconds", "ms/step", "parameters"),
)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The headline table as text, header first."""
    body = [
        [
            row.label + ("" if row.finished else " (under way)"),
            str(row.seeds),
            str(row.last),
            str(row.best),
            _signed(row.over_alone),
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
    """The table as HTML, to be sorted by any column."""
    head, *body = table(rows)
    header = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(name)}</button></th>'
        for name in head
    )
    lines = []
    for row, texts in zip(rows, body, strict=True):
        values = (
            *(row.label, row.seeds, row.last.mean, row.best.mean, row.over_alone, row.over_teacher),
            *(row.seconds, row.ms_per_step, row.student_parameters),
        )
        cells = [
            f'data-value="{"" if value is None else escape(str(value))}">{escape(text)}'
            for value, text in zip(values, texts, strict=True)
        ]
        first = f'<th scope="row" {cells[0]}</th>'
        lines.append(f"<tr>{first}{''.join(f'<td {cell}</td>' for cell in cells[1:])}</tr>")
    words = WORDS[rows[0].figure]
    note = (
        f"{words.sentence[0].upper()}{words.sentence[1:]} after the last epoch and at its best, mean ± "
        "standard deviation over seeds. The best is picked on the test set, so it flatters. Δ: the last one "
        "less that of the same student trained alone on the same data, and less the teacher's, in percentage "
        "points. Seconds are a run's training and evaluation."
    )
    return Section(
        "accuracy",
        words.title,
        f'<div class="scroll" tabindex="0" role="group" aria-label="Table of figures"><table><thead>'
        f"<tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>" + paragraph(note, "note"),
    )
