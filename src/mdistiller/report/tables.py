"""Tables of the report: metrics of the rows, different settings, and commands that repeat the runs."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from mdistiller.report.markup import Section, html_table, paragraph, sortable, text_table, value_text
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import MeanStd, Row, Run, differing
from mdistiller.runs.folder import CONFIG
from mdistiller.runs.progress import counted
from mdistiller.types import Metric

_COLUMNS_OF_SETTINGS = 8  # with more rows, each row has a line


def _columns(metric: Metric) -> tuple[tuple[str, str, str], ...]:
    """Returns heading, field of the row, and format of its numbers, of each column."""
    spec, gain = metric.spec, f"+{metric.spec}"
    return (
        *(("run", "label", ""), ("seeds", "seeds", "d")),
        *((metric.head("last"), "last", spec), (metric.head("best"), "best", spec)),
        *(("Δ baseline", "over_baseline", gain), ("Δ teacher", "over_teacher", gain)),
        *(("seconds", "seconds", ".1f"), ("ms/step", "ms_per_step", ".1f")),
        ("parameters", "student_parameters", ",d"),
    )


def table(rows: Sequence[Row], metric: Metric) -> list[list[str]]:
    """Returns the headline table as text, header first."""
    columns = _columns(metric)
    lines = []
    for row in rows:
        texts = [value_text(getattr(row, field), spec) for _, field, spec in columns[1:]]
        lines.append([row.label + ("" if row.finished else " (under way)"), *texts])
    return [[name for name, _, _ in columns], *lines]


def headline(page: PageRows) -> Section:
    """Returns the headline table as HTML; a click on a heading sorts by its column."""
    rows, metric = page.rows, page.metric
    head, *body = table(rows, metric)
    header = sortable(head)
    lines = []
    for row, texts in zip(rows, body, strict=True):
        cells = []
        for (_, field, _), text in zip(_columns(metric), texts, strict=True):
            value = getattr(row, field)
            key = "" if value is None else value.mean if isinstance(value, MeanStd) else value
            cells.append(f'data-value="{escape(str(key))}">{escape(text)}')
        lines.append([f'<th scope="row" {cells[0]}</th>', *(f"<td {cell}</td>" for cell in cells[1:])])
    points = ", in percentage points" if metric.unit else ""
    note = (
        f"{metric.sentence[0].upper()}{metric.sentence[1:]} at the last epoch and at the best epoch, mean ± "
        "standard deviation over seeds. The best epoch is picked on the test set, so it is optimistic. "
        "Δ: the last epoch minus that of the baseline (the same student without a teacher on the same data), "
        f"and minus the teacher's{points}. Seconds: training and evaluation of one run."
    )
    body_html = html_table(header, lines, "Table of metrics", name="accuracy-table") + paragraph(note, "note")
    return Section("accuracy", f"{metric.title} and cost", body_html)


def settings(groups: Mapping[str, Sequence[Run]]) -> list[Section]:
    """Returns a table of the fields whose values differ between rows."""
    found = differing([runs[0].config for runs in groups.values()])
    if not found:
        return []
    note = paragraph("All other fields of the runs' config.json are equal, except for seed and out.", "note")
    if len(groups) > _COLUMNS_OF_SETTINGS:
        lines = []
        usual = {name: Counter(values).most_common(1)[0][0] for name, values in found}
        for i, label in enumerate(groups):
            own = [(name, values[i]) for name, values in found if values[i] != usual[name]]
            texts = [f"{name} {value or '–'}" for name, value in own]
            lines.append([label, " · ".join(texts)])
        head, kind = ["row", "fields with another value than most rows have"], "settings listed"
    else:
        lines = [[name, *(value or "–" for value in values)] for name, values in found]
        head, kind = ["field", *groups], "settings"
    body = text_table(head, lines, "Table of settings", kind)
    return [Section("settings", "Different settings", body + note)]


def making(runs: Sequence[Run], *, more: str) -> Section:
    """Returns hardware, versions, the commands that repeat the runs, and the command that adds `more`."""
    env = runs[0].env
    hardware = ", ".join(env["gpus"]) or f"{env['cpu']} ({counted(env['threads'], 'thread')})"
    made = f"{hardware}; torch {env['versions']['torch']}, mdistiller {env['versions']['mdistiller']}"
    if env["commit"]:
        made += f" at {env['commit'][:12]}"
    commands = "\n".join(
        f"mdistiller train {shlex.quote(str(run.path / CONFIG))}"
        if run.is_trained
        else shlex.join(run.env.get("command", []))
        for run in runs
    )
    body = paragraph(f"{made}. To repeat:") + f'<pre tabindex="0">{escape(commands)}</pre>'
    if more:
        body += paragraph(f"For {more}: mdistiller report RUN…", "note")
    return Section("made", "Hardware and commands", body)
