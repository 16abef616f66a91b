"""Tables of the report: metrics of the rows, measures of the transfer, settings, published runs, commands.

Measures tell what a student and its teacher have in common on the test images.
"""

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from mdistiller.errors import MDistillerError
from mdistiller.recipes import get_recipe
from mdistiller.recipes.describe import differences, find_published, status
from mdistiller.report.markup import (
    Section,
    from_here,
    html_table,
    long_table,
    paragraph,
    sortable,
    text_table,
    value_text,
)
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import Row, RunRecord, differing
from mdistiller.report.sections import RunOutputs
from mdistiller.report.spread import MeanStd
from mdistiller.runs.folder import CONFIG
from mdistiller.runs.progress import counted
from mdistiller.training.task import load_config
from mdistiller.types import Metric

_IN_NAMES = ("student.name", "teacher.name", "method.name")  # fields that rows are named by
Value = str | float | MeanStd | None


class Measure(NamedTuple):
    """Heading, format, and explanation of a measure."""

    head: str
    spec: str
    note: str = ""


MEASURES = {
    "agreement": Measure("agreement, %", ".1f", "Agreement: images with the teacher's first class."),
    "nckd": Measure(
        "NCKD, nats", ".3f", "NCKD: the part of KD for the other classes, at temperature 4, times 16."
    ),
    "tckd": Measure("TCKD, nats", ".3f", "TCKD: the same for the target."),
    "ece": Measure("ECE, %", ".2f", "ECE: expected calibration error, 15 bins."),
    "correlation": Measure(
        "Δ correlation",
        ".3f",
        "Δ correlation: difference to the teacher in the correlation of two classes' logits.",
    ),
    "silhouette": Measure(
        "silhouette", ".3f", "Silhouette: mean silhouette coefficient of the classes in the pooled features."
    ),
    "knn": Measure(
        "10 nearest, %",
        ".1f",
        "10 nearest: accuracy of the 10 nearest images' vote. Both by cosine distance.",
    ),
}


def measured(rows: PageRows, found: RunOutputs | None = None) -> dict[str, dict[str, MeanStd]]:
    """Returns the known measures of each row by label, over its seeds.

    They are the diagnostics of the last epoch on the test images; what the diagnostics lack is computed from
    the models' outputs, where there are any. A student alone is compared with the teacher of the others.
    """
    known = {}
    for label, runs in rows.groups.items():
        computed = {} if found is None else found.measures(rows, label)
        seen = [run.evals[-1].seen() for run in runs]
        values = {
            name: [line[name] for line in seen if name in line] or computed.get(name, []) for name in MEASURES
        }
        known[label] = {name: MeanStd.of(each) for name, each in values.items() if each}
    return known


class Column(NamedTuple):
    """Column of a table: heading, and name and format of its values."""

    head: str
    name: str
    spec: str

    def text(self, values: Mapping[str, Value]) -> str:
        """Returns a row's value as text."""
        value = values.get(self.name)
        return value if isinstance(value, str) else value_text(value, self.spec)


def _columns(metric: Metric) -> list[Column]:
    spec, gain = metric.spec, f"+{metric.spec}"
    return [
        Column("run", "label", ""),
        Column("seeds", "seeds", "d"),
        Column(metric.head("last"), "last", spec),
        Column(metric.head("best"), "best", spec),
        Column("Δ baseline", "over_baseline", gain),
        Column("Δ teacher", "over_teacher", gain),
        Column("seconds", "seconds", ".1f"),
        Column("ms/step", "ms_per_step", ".1f"),
        Column("parameters", "student_parameters", ",d"),
        Column("extra", "method_parameters", ",d"),
    ]


def _values(row: Row) -> dict[str, Value]:
    return {**vars(row), "label": row.label + ("" if row.finished else " (under way)")}


def table(rows: Sequence[Row], metric: Metric) -> list[list[str]]:
    """Returns the table of the rows as text, header first."""
    columns = _columns(metric)
    return [[c.head for c in columns], *([c.text(_values(row)) for c in columns] for row in rows)]


def paper_table(page: PageRows, found: RunOutputs | None) -> list[list[str]]:
    """Returns the table of a paper, the best first in each contest, without the columns that are empty."""
    metric, measures = page.metric, measured(page, found)
    columns = [
        Column("row", "label", ""),
        Column("n", "seeds", "d"),
        Column(metric.head(metric.axis), "last", metric.spec),
        Column("Δ baseline", "over_baseline", f"+{metric.spec}"),
        *(Column(measure.head, name, measure.spec) for name, measure in MEASURES.items()),
    ]
    lines = [{**_values(row), **measures[row.label]} for contest in page.contests for row in contest.rows]
    used = [c for c in columns if any(values.get(c.name) is not None for values in lines)]
    return [[c.head for c in used], *([c.text(values) for c in used] for values in lines)]


def headline(page: PageRows) -> Section:
    """Returns the table of the rows as HTML."""
    metric = page.metric
    points = ", in percentage points" if metric.unit else ""
    note = (
        f"{metric.sentence[0].upper()}{metric.sentence[1:]} at the last and at the best epoch, mean ± "
        "standard deviation over seeds. The best epoch is picked on the test set, so it is optimistic. "
        f"Δ: last epoch minus that of the same student alone, and minus the teacher's{points}. "
        "Seconds: one whole run."
    )
    lines = [_values(row) for row in page.rows]
    columns = [c for c in _columns(metric) if any(values[c.name] for values in lines)]
    if columns[-1].head == "extra":
        note += " Extra: parameters that the method trains besides the student's."
    body = _sortable_table(columns, lines, "Table of metrics", "accuracy-table")
    return Section("accuracy", f"{metric.title} and cost", body + paragraph(note, "note"))


def transfer_table(page: PageRows, found: RunOutputs | None) -> str:
    """Returns the table of the measured rows as HTML; an empty text without any."""
    measures = measured(page, found)
    shown = {name: m for name, m in MEASURES.items() if any(name in values for values in measures.values())}
    lines: list[dict[str, Value]] = [
        {"label": label, **values} for label, values in measures.items() if values
    ]
    if not lines:
        return ""
    columns = [Column("run", "label", ""), *(Column(m.head, name, m.spec) for name, m in shown.items())]
    notes = " ".join(m.note for m in shown.values())
    note = f"On the test images after the last epoch, mean ± standard deviation over seeds. {notes}"
    table = _sortable_table(columns, lines, "Table of the transfer", "transfer-table")
    return table + paragraph(note, "note")


def _sortable_table(
    columns: Sequence[Column], rows: Sequence[Mapping[str, Value]], label: str, name: str
) -> str:
    """Returns a table as HTML, a long one folded; a click on a heading sorts by its column."""
    lines = []
    for values in rows:
        cells = []
        for column in columns:
            value = values.get(column.name)
            key = value.mean if isinstance(value, MeanStd) else "" if value is None else value
            cells.append(f'data-value="{escape(str(key))}">{escape(column.text(values))}')
        lines.append([f'<th scope="row" {cells[0]}</th>', *(f"<td {cell}</td>" for cell in cells[1:])])
    table = html_table(sortable(column.head for column in columns), lines, label, name=name)
    return long_table(table, len(rows), "rows")


def settings(groups: Mapping[str, Sequence[RunRecord]]) -> list[Section]:
    """Returns each row's values of the fields that differ between rows."""
    found = differing([runs[0].config for runs in groups.values()])
    found = [(name, values) for name, values in found if name not in _IN_NAMES]
    if not found:
        return []
    lines = []
    for i, label in enumerate(groups):
        lines.append([label, " · ".join(f"{name} {values[i]}" for name, values in found if values[i])])
    body = text_table(["row", "settings that differ between rows"], lines, "Table of settings", "settings")
    note = "All other fields of the runs' config.json are equal, except for seed and out."
    return [Section("settings", "Different settings", body + paragraph(note, "note"), folded=True)]


def published(page: PageRows) -> list[Section]:
    """Returns a table of each row's recipe: figure, origin, and the fields that the run changes."""
    rows = []
    for label, runs in page.groups.items():
        recipe = runs[0].config.get("recipe")
        if isinstance(recipe, str) and recipe and (cells := _cells(recipe, runs[0])):
            rows.append([label, *cells])
    if not rows:
        return []
    head = ("run", page.metric.head("published"), "origin", "this run")
    body = text_table(head, rows, "Table of published runs")
    note = paragraph(
        "The published top-1 of each recipe says whether it is of the last epoch or of the best one on the "
        "test set. Compare it only with a run that has the recipe's values and data.",
        "note",
    )
    return [Section("published", "Published runs", body + note, folded=True)]


def _cells(recipe: str, run: RunRecord) -> tuple[str, str, str] | None:
    try:
        runs = find_published(recipe).runs
    except MDistillerError:  # a recipe of a plug-in
        return None
    if not runs:
        return None
    try:
        config = load_config(run.path / CONFIG)
        changes = "; ".join(differences(config, get_recipe(config.recipe))) or "as the recipe"
    except MDistillerError as error:
        changes = f"not compared: {from_here(str(error))}"
    origin = "; ".join(dict.fromkeys([runs[0].source, runs[0].figures])).strip("; ")
    return status(runs), origin, changes


def making(runs: Sequence[RunRecord], *, more: str) -> Section:
    """Returns hardware, versions, the commands that repeat the runs, and the command that adds `more`."""
    env = runs[0].env
    hardware = ", ".join(env.gpus) or f"{env.cpu} ({counted(env.threads, 'thread')})"
    torch, own = (env.versions.get(name, "unknown") for name in ("torch", "mdistiller"))
    made = f"{hardware}; torch {torch}, mdistiller {own}"
    if env.commit:
        made += f" at {env.commit[:12]}"
    commands = "\n".join(
        f"mdistiller train {shlex.quote(from_here(str(run.path / CONFIG)))}"
        if run.is_trained
        else shlex.join(map(from_here, run.env.command))
        for run in runs
    )
    body = paragraph(f"{made}. To repeat:") + f'<pre tabindex="0">{escape(commands)}</pre>'
    if more:
        body += paragraph(f"For {more}: mdistiller report RUN…", "note")
    return Section("made", "Hardware and commands", body, folded=True)
