"""Composes the page from its sections. The page loads nothing, and works from a file."""

import re
import shlex
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path

import mdistiller.report.markup as html
from mdistiller.errors import ConfigError, DataError, one_line
from mdistiller.report.answer import Contest, answer
from mdistiller.report.costs import costs
from mdistiller.report.curves import over_training, transfer
from mdistiller.report.formats import WRITERS
from mdistiller.report.page_rows import PageRows
from mdistiller.report.ranked import SEEDS, ranked_chart
from mdistiller.report.runs import load_run
from mdistiller.report.sections import missing_parts, sections_of
from mdistiller.report.tables import headline, making, published, settings
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.progress import counted

FORMATS = ("html", *WRITERS)


def file_name(format: str) -> str:
    """Returns the usual name of a report's file, such as report.html or report.tex."""
    return f"report.{'tex' if format == 'latex' else format}"


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    images: int = 0,
    device: str = "auto",
    format: str = "html",
) -> Path:
    """Writes the report about some run folders.

    Args:
        folders: run folders, finished or under way.
        out: the file, which is also returned.
        title: headline; by default the name of the data and the number of runs.
        notes: paragraphs of plain text below the answer.
        images: largest number of test images on which the students run, for the sections on classes
            and correlations, on a detector's classes, errors and boxes, or on masks (at
            most six images). 0 leaves these sections out; then neither models nor data are needed.
        device: device of the models: auto (a GPU if there is one), cpu, cuda, cuda:N or mps.
        format: html, the whole page; md, latex, csv or json, its answer and tables.

    Raises:
        DataError: a folder is no run, or the runs have different metrics, such as detectors and classifiers.
        ConfigError: no such device or format.
    """
    text = report_text(folders, title=title, notes=notes, images=images, device=device, format=format)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def try_report(folders: Sequence[Path], out: Path) -> Path | None:
    """Writes the report about finished runs; one that cannot be written gives a warning and None."""
    try:
        return write_report(folders, out)
    except Exception as error:  # any other ending would make finished runs look like failed ones
        warnings.warn(
            f"no report: {one_line(error)}. The runs are complete; to try again: "
            f"mdistiller report {shlex.quote(str(out.parent))}",
            stacklevel=2,
        )
        return None


def report_text(
    folders: Sequence[Path],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    images: int = 0,
    device: str = "auto",
    format: str = "html",
) -> str:
    """Returns the text that `write_report` writes."""
    if format not in FORMATS:
        raise ConfigError(f"format: got {format!r}; allowed: {', '.join(FORMATS)}")
    runs = [load_run(folder) for folder in folders]
    metrics = list(dict.fromkeys(run.metric for run in runs))
    if len(metrics) > 1:
        raise DataError(f"the runs have different metrics ({', '.join(metrics)}): write a page for each kind")
    rows = PageRows.of(runs)
    extra = sections_of(runs[0].task)
    found = extra.outputs(rows, images, device) if images else None
    tests = list(dict.fromkeys(run.test_set for run in runs))
    title = title or f"{' and '.join(tests)}: {counted(len(runs), 'run')}"
    if format != "html":
        return WRITERS[format](rows, found, title)
    if len(tests) > 1:
        notes = [*notes, "These runs have different test images, so their metrics do not compare."]
    sections = [headline(rows), *costs(runs), *over_training(rows), *transfer(rows, found)]
    if images:
        sections += extra.make(rows, images, device, found)
    missing = missing_parts(found.failures) if found is not None else []
    sections += [*missing, *published(rows), *settings(rows.groups)]
    sections.append(making(runs, more="" if images else extra.shows))
    links = "".join(f'<li><a href="#{section.name}">{escape(section.title)}</a></li>' for section in sections)
    parts = [*_first_screen(rows), *map(html.paragraph, notes)]
    parts.append(f'<nav aria-label="Sections"><ul>{links}</ul></nav>')
    parts += [section.element() for section in sections]
    return html.document(title, parts)


def _first_screen(rows: PageRows) -> list[str]:
    """Returns the answer of each contest with its chart."""
    parts = []
    for i, contest in enumerate(rows.contests):
        found = answer(contest, rows.groups)
        body = html.paragraph(_unbroken(found.sentence), "answer")
        teachers = {rows.groups[row.label][0].teacher for row in contest.rows} - {None}
        models = (
            f"{', '.join(sorted(map(str, teachers)))} → {contest.student}" if teachers else contest.student
        )
        body = f"<h2>{escape(f'{models} on {contest.test_set}')}</h2>{body}"
        name = f"ranking-{i}" if len(rows.contests) > 1 else "ranking"
        drawing = ranked_chart(name, contest, rows.looks, rows.metric)
        note = f"{found.note} {_explain(contest)}".strip()
        parts.append(f'<div class="first">{body}{html.figure(drawing, caption=note)}</div>')
    return parts


def answer_frame(folder: Path) -> str:
    """Returns HTML for a notebook: a run's answer and chart, and a link to its report where there is one."""
    rows = PageRows.of([load_run(folder)])
    page, report = html.document(str(folder), _first_screen(rows)), folder / file_name("html")
    text = escape(report.as_posix())
    link = f'<p><a href="{text}" target="_blank">{text}</a></p>' if report.is_file() else ""
    frame = '<iframe style="width:100%;height:26rem;border:0" title="Result of the run"'
    return f'{frame} srcdoc="{escape(page)}"></iframe>{link}'


def _unbroken(sentence: str) -> str:
    """Returns a sentence whose numbers stay on one line with their signs and units."""
    return re.sub(r" (?=[±=<%])|(?<=[±=<]) ", "\u00a0", sentence)


def _explain(contest: Contest) -> str:
    """Returns the meaning of the marks in the chart."""
    seeds = [row.seeds for row in contest.rows]
    parts = ["Ring: a single run."]
    if max(seeds) >= SEEDS:
        parts.append("Filled mark: the mean of three or more, with its 95 % confidence interval.")
    if contest.teachers:
        parts.append("Diamond and dashed line: the teacher.")
    return " ".join(parts)
