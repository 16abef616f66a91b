"""Trains the cells of an experiment, and writes their table beside the published accuracies."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from mdistiller.config import RunConfig
from mdistiller.errors import DataError
from mdistiller.recipes.experiments import Cell
from mdistiller.recipes.family import find_family, split_pair
from mdistiller.recipes.published import teacher_top1
from mdistiller.report.markup import csv_text, markdown_table
from mdistiller.report.runs import RunRecord, load_run, make_row
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.folder import CONFIG, check_resumable

HEAD = ("teacher → student", "setting", "seeds", "last, %", "best, %", "published, %", "seconds")


class Result(NamedTuple):
    """Finished runs of a cell, one per seed."""

    cell: Cell
    runs: list[RunRecord]


class Table(NamedTuple):
    """Table of an experiment.

    rows: texts by heading.
    notes: sentences below the table.
    teachers: top-1 of each teacher in percent, by its key.
    runs: folders of the finished runs.
    """

    rows: list[dict[str, str]]
    notes: list[str]
    teachers: dict[str, float]
    runs: list[Path]


def is_finished(config: RunConfig) -> bool:
    """Whether the run in `config.out` is finished.

    Raises:
        ConfigError: the folder holds another run.
    """
    assert config.out is not None
    if not (config.out / CONFIG).exists():
        return False
    check_resumable(config, same_precision=True)
    return _finished_run(config.out) is not None


def folder_of(out: Path, cell: Cell, seed: int) -> Path:
    """Returns the run folder of a cell and seed."""
    return out / "runs" / re.sub(r"[^\w.+-]+", "-", f"{cell.pair}.{cell.setting}-s{seed}").replace("-.", ".")


def missing_runs(
    out: Path, cells: Sequence[Cell], seeds: int, teachers: Mapping[str, Path]
) -> list[tuple[str, RunConfig]]:
    """Returns the runs that are not finished, each with its position in words.

    The first seed of every cell comes before the second seed of any.

    Args:
        out: folder of the experiment.
        cells: cells with their data folder and precision.
        seeds: runs of each cell.
        teachers: weights by the teacher's key; pretrained teachers are not in it.

    Raises:
        ConfigError: a run folder holds another run.
    """
    found, total = [], seeds * len(cells)
    for number, (seed, cell) in enumerate(((seed, cell) for seed in range(seeds) for cell in cells), 1):
        config = cell.config.replace(seed=seed, out=folder_of(out, cell, seed))
        if cell.teacher is not None and cell.teacher.key in teachers:
            config = config.replace(teacher={"checkpoint": teachers[cell.teacher.key]})
        if not is_finished(config):
            found.append((f"run {number} of {total}: {cell.pair}, {cell.setting}", config))
    return found


def results(out: Path, cells: Sequence[Cell], seeds: int) -> list[Result]:
    """Reads the finished runs of each cell."""
    found = []
    for cell in cells:
        runs = (_finished_run(folder_of(out, cell, seed)) for seed in range(seeds))
        found.append(Result(cell, [run for run in runs if run is not None]))
    return found


def _finished_run(folder: Path) -> RunRecord | None:
    try:
        run = load_run(folder)
    except DataError:
        return None
    return run if run.summary is not None else None


def rows(found: Sequence[Result]) -> list[list[str]]:
    """Returns the table as text, without its header."""
    lines = []
    for cell, runs in found:
        row = make_row(cell.setting, runs) if runs else None
        last, best = (str(row.last), str(row.best)) if row else ("", "")
        seconds = f"{row.seconds:.0f}" if row and row.seconds is not None else ""
        family = find_family(cell.config.recipe.partition(".")[0])
        pair = " → ".join(split_pair(cell.pair, family.aliases if family else ()))
        lines.append([pair, cell.setting, str(len(runs)), last, best, cell.status, seconds])
    return lines


def write_table(path: Path, title: str, command: str, found: Sequence[Result]) -> Table:
    """Writes PATH.md with title, table and notes, and PATH.csv with the table."""
    lines, teachers = rows(found), teacher_accuracies(found)
    notes = notes_of(found, command, teachers)
    table = markdown_table(HEAD, lines, texts=2)
    write_text(path.with_suffix(".md"), "\n".join([f"# {title}", "", table, *(f"- {n}" for n in notes), ""]))
    write_text(path.with_suffix(".csv"), csv_text([HEAD, *lines]))
    named = [dict(zip(HEAD, line, strict=True)) for line in lines]
    return Table(named, notes, teachers, [run.path for _, runs in found for run in runs])


def teacher_accuracies(found: Sequence[Result]) -> dict[str, float]:
    """Returns each teacher's top-1 on the test images by its key, the mean over the runs that recorded it."""
    known: dict[str, list[float]] = {}
    for cell, runs in found:
        if cell.teacher is not None and runs and (top1 := make_row(cell.setting, runs).teacher) is not None:
            known.setdefault(cell.teacher.key, []).append(top1)
    return {key: fmean(values) for key, values in known.items()}


def notes_of(found: Sequence[Result], command: str, teachers: Mapping[str, float]) -> list[str]:
    """Returns notes on a table: command, the teachers' top-1, meaning of the columns."""
    accuracies = [_teacher_text(name, top1, found) for name, top1 in teachers.items()]
    return [
        f"Command: `{command}`",
        f"Teachers, top-1 on the same test images: {'; '.join(accuracies) or '–'}.",
        "Mean ± standard deviation (n − 1) over seeds. `best` is picked on the test set. Empty: no runs. "
        "A published accuracy says whether it is of the last epoch or of the best one on the test set, which "
        "is 0.3 points more on average; (unverified) was noted from memory.",
    ]


def _teacher_text(name: str, top1: float, found: Sequence[Result]) -> str:
    """Returns a teacher's top-1 and its difference to the published teacher of the same name."""
    cell = next(cell for cell, _ in found if cell.teacher is not None and cell.teacher.key == name)
    family = find_family(cell.config.recipe.partition(".")[0]) if cell.status else None
    known = teacher_top1(family.published, name) if family and family.published else None
    more = "" if known is None else f" (published {known[0]:.2f} %, difference {top1 - known[0]:+.2f})"
    return f"{name} {top1:.2f} %{more}"
