"""The report's answer and tables as Markdown, LaTeX, CSV and JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict

import mdistiller.report.markup as html
from mdistiller.report.answer import answer
from mdistiller.report.page_rows import PageRows
from mdistiller.report.sections import RunOutputs
from mdistiller.report.spread import MeanStd, welch_p
from mdistiller.report.tables import MEASURES, measured, paper_table
from mdistiller.types import Line


def records(rows: PageRows, found: RunOutputs | None) -> list[Line]:
    """Returns a record for each row: its metric, cost and measures, with mean, std and n apart.

    `p_baseline` is of Welch's test against the student alone. None: not known.
    """
    measures, table = measured(rows, found), []
    for row in rows.rows:
        run = rows.groups[row.label][0]
        contest = next((c for c in rows.contests if row in c.rows), None)
        alone = None if contest is None or contest.alone is row else contest.alone
        record: Line = {
            "row": row.label,
            "method": row.method or None,
            "teacher": run.teacher,
            "student": run.student,
            "metric": row.metric,
            "n": row.seeds,
            **_apart("last", row.last),
            **_apart("best", row.best),
            "over_baseline": row.over_baseline,
            "p_baseline": None if alone is None else welch_p(row.values, alone.values),
            "over_teacher": row.over_teacher,
            "seconds": row.seconds,
            "ms_per_step": row.ms_per_step,
            "student_parameters": row.student_parameters,
            "method_parameters": row.method_parameters,
            "finished": row.finished,
        }
        for name in MEASURES:
            record |= _apart(name, measures[row.label].get(name))
        table.append(record)
    return table


def _apart(name: str, value: MeanStd | None) -> dict[str, float | None]:
    mean, std = (None, None) if value is None else (value.mean, value.std)
    return {f"{name}_mean": mean, f"{name}_std": std}


def _answers(rows: PageRows) -> list[Line]:
    found = []
    for contest in rows.contests:
        fields = {"student": contest.student, "test_set": contest.test_set, "teachers": contest.teachers}
        found.append(fields | asdict(answer(contest, rows.groups)))
    return found


def as_json(rows: PageRows, found: RunOutputs | None, title: str) -> str:
    """Returns answers, rows and the single seeds' values."""
    values = {row.label: row.values for row in rows.rows}
    table = [record | {"values": values[record["row"]]} for record in records(rows, found)]
    return json.dumps({"title": title, "answers": _answers(rows), "rows": table}, indent=1) + "\n"


def as_csv(rows: PageRows, found: RunOutputs | None, title: str) -> str:
    """Returns the rows, a column for each number; an empty cell is not known."""
    table = records(rows, found)
    lines = [["" if value is None else str(value) for value in record.values()] for record in table]
    return html.csv_text([list(table[0]), *lines])


def as_markdown(rows: PageRows, found: RunOutputs | None, title: str) -> str:
    """Returns title, answers and table."""
    head, *lines = paper_table(rows, found)
    answers = [html.markdown_text(f"{found['sentence']} {found['note']}") for found in _answers(rows)]
    return "\n\n".join([f"# {html.markdown_text(title)}", *answers, html.markdown_table(head, lines)])


_LATEX = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "→": r"$\to$"},
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"±": r"$\pm$", "Δ": r"$\Delta$", "−": "$-$", "–": "--", "β": r"$\beta$", "α": r"$\alpha$"},
}


def latex_text(text: str) -> str:
    """Returns plain text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))


def as_latex(rows: PageRows, found: RunOutputs | None, title: str) -> str:
    r"""Returns a `tabular` for the package booktabs, with title and answers as comments."""
    head, *lines = [[latex_text(cell) for cell in line] for line in paper_table(rows, found)]
    comments = [title, *(found["sentence"] for found in _answers(rows)), "Needs \\usepackage{booktabs}."]
    body = [" & ".join(line) + r" \\" for line in lines]
    return "\n".join(
        [
            *(f"% {' '.join(comment.split())}" for comment in comments),
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            *(r"\toprule", " & ".join(head) + r" \\", r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}",
            "",
        ]
    )


WRITERS: dict[str, Callable[[PageRows, RunOutputs | None, str], str]] = {
    "md": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
"""Functions that return the report in a format."""
