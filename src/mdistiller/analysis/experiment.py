"""Runs the cells of an experiment, and writes its table beside the published accuracies."""

import csv
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import mdistiller.report.markup as html
from mdistiller.analysis.measures import Measured
from mdistiller.errors import DataError
from mdistiller.recipes.published import teacher_top1
from mdistiller.report.runs import Run, load_run, make_row
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.folder import CONFIG, check_resumable
from mdistiller.runs.progress import Reporter, counted
from mdistiller.tasks.classification.cells import Cell, models_of
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.launch import train


class Result(NamedTuple):
    """Finished runs of a cell, one per seed."""

    cell: Cell
    runs: list[Run]


def is_finished(config: ClassificationConfig) -> bool:
    """Whether the run in `config.out` is finished.

    Raises:
        ConfigError: the folder holds another run.
    """
    assert config.out is not None
    if not (config.out / CONFIG).exists():
        return False
    check_resumable(config, same_precision=True)
    return _finished_run(config.out) is not None


def run_one(config: ClassificationConfig, reporter: Reporter) -> None:
    """Trains into `config.out`, or resumes there."""
    train(config, resume=config.out is not None and (config.out / CONFIG).exists(), reporter=reporter)


def folder_of(out: Path, cell: Cell, seed: int) -> Path:
    """Returns the run folder of a cell and seed."""
    return out / "runs" / re.sub(r"[^\w.+-]+", "-", f"{cell.pair}.{cell.setting}-s{seed}").replace("-.", ".")


def results(out: Path, cells: Sequence[Cell], seeds: int) -> list[Result]:
    """Reads the finished runs of each cell."""
    found = []
    for cell in cells:
        runs = (_finished_run(folder_of(out, cell, seed)) for seed in range(seeds))
        found.append(Result(cell, [run for run in runs if run is not None]))
    return found


def _finished_run(folder: Path) -> Run | None:
    try:
        run = load_run(folder)
    except DataError:
        return None
    return run if run.summary is not None else None


HEAD = ("teacher → student", "setting", "seeds", "last, %", "best, %", "published, %", "seconds")


def rows(found: Sequence[Result], measured: Measured) -> list[list[str]]:
    """Returns the table as text, without its header."""
    lines = []
    for cell, runs in found:
        row = make_row(cell.setting, runs) if runs else None
        last, best = (str(row.last), str(row.best)) if row else ("", "")
        seconds = f"{row.seconds:.0f}" if row and row.seconds is not None else ""
        pair, more = " → ".join(models_of(cell.pair)), measured.values.get((cell.pair, cell.setting))
        line = [pair, cell.setting, str(len(runs)), last, best, cell.status, seconds]
        lines.append([*line, *(more or [""] * len(measured.columns))])
    return lines


def write_tables(
    path: Path, title: str, notes: Sequence[str], found: Sequence[Result], measured: Measured
) -> list[dict[str, str]]:
    """Writes PATH.md, .csv and .html with title, rows, notes and, on the page, pictures. Returns the rows."""
    head, lines, notes = (*HEAD, *measured.columns), rows(found, measured), [*notes, *measured.notes]
    table = html.markdown_table(head, lines, texts=2)
    write_text(path.with_suffix(".md"), "\n".join([f"# {title}", "", table, *(f"- {n}" for n in notes), ""]))
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows([head, *lines])
    write_text(path.with_suffix(".csv"), sheet.getvalue())
    cells = [[f"<td>{escape(text)}</td>" for text in line] for line in lines]
    parts = [html.html_table(html.heads(head), cells, "Table of results")]
    if measured.pictures:
        wide = len(measured.pictures) == 1
        parts.append(html.figure(measured.pictures[0] if wide else html.panels(measured.pictures)))
    parts += [html.paragraph(note, "note") for note in notes]
    write_text(path.with_suffix(".html"), html.document(title, parts))
    return [dict(zip(head, line, strict=True)) for line in lines]


def notes_of(found: Sequence[Result], command: str, teachers: dict[str, dict[str, float]]) -> list[str]:
    """Returns notes on a table: command, hardware, commits, the teachers' metrics, meaning of the columns."""
    envs = [run.env for _, runs in found for run in runs]
    cpus = (f"{env['cpu']}, {counted(env['threads'], 'thread')}" for env in envs)
    hardware = dict.fromkeys((env["gpus"] or [cpu])[0] for env, cpu in zip(envs, cpus, strict=True))
    hashes = [env["commit"] or "unknown" for env in envs]
    # A commit's first digits, with the mark of a changed source tree.
    commits = dict.fromkeys(name[:9] + "+" * name.endswith("+") for name in hashes)
    accuracies = [_teacher_text(name, metrics["top1"], found) for name, metrics in teachers.items()]
    return [
        f"Command: `{command}`",
        f"Hardware: {'; '.join(hardware) or 'no runs'}. Commit: {', '.join(commits) or '–'}.",
        f"Teachers, top-1 on the same test images: {'; '.join(accuracies) or '–'}.",
        "Mean ± standard deviation (n − 1) over seeds. `best` is picked on the test set. Empty: no runs. "
        "A published accuracy says whether it is of the last epoch or of the best one on the test set, which "
        "is 0.3 points more on average; (unverified) was noted from memory.",
    ]


def _teacher_text(name: str, top1: float, found: Sequence[Result]) -> str:
    """Returns a teacher's top-1 and its difference to the published teacher of the same name."""
    cell = next((cell for cell, _ in found if cell.teacher is not None and cell.teacher.key == name), None)
    known = None
    if cell is not None and cell.status:
        family = cell.config.recipe.partition(".")[0]
        known = teacher_top1(family, name) if family in ("cifar100", "imagenet") else None
    more = "" if known is None else f" (published {known[0]:.2f} %, difference {top1 - known[0]:+.2f})"
    return f"{name} {top1:.2f} %{more}"
