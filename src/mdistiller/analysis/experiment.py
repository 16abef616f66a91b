"""The cells of an experiment: their runs, and their table beside the published accuracies."""

import re
from collections.abc import Sequence
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


class Table(NamedTuple):
    """Table of an experiment.

    rows: texts by heading.
    notes: sentences below the table: its command, the teachers' top-1, the meaning of the columns.
    teachers: top-1 of each teacher in percent by its key, the mean over the runs that recorded it.
    """

    rows: list[dict[str, str]]
    notes: list[str]
    teachers: dict[str, float]


def is_finished(config: RunConfig) -> bool:
    """Whether the run in `config.out` is finished.

    Raises:
        ConfigError: the folder holds another run.
    """
    assert config.out is not None
    if not (config.out / CONFIG).exists():
        return False
    check_resumable(config, same_precision=True)
    return bool(finished_runs([config]))


def run_of(cell: Cell, seed: int, out: Path) -> RunConfig:
    """Returns the run of a cell with a seed, in its folder below that of the experiment."""
    name = re.sub(r"[^\w.+-]+", "-", f"{cell.pair}.{cell.setting}-s{seed}").replace("-.", ".")
    return cell.config.replace(seed=seed, out=out / "runs" / name)


def finished_runs(configs: Sequence[RunConfig]) -> list[RunRecord]:
    """Reads the runs of some configs, those that are finished."""
    found = []
    for config in configs:
        assert config.out is not None
        try:
            found.append(load_run(config.out))
        except DataError:
            continue
    return [run for run in found if run.summary is not None]


def write_table(path: Path, title: str, command: str, found: Sequence[tuple[Cell, list[RunRecord]]]) -> Table:
    """Writes the finished runs of some cells: PATH.md with title, table and notes, and PATH.csv."""
    lines, known, accuracies = [], dict[str, list[float]](), []
    for cell, runs in found:
        row = make_row(cell.setting, runs) if runs else None
        family = find_family(cell.config.recipe.partition(".")[0])
        pair = " → ".join(split_pair(cell.pair, family.aliases if family else ()))
        last, best = (str(row.last), str(row.best)) if row else ("", "")
        seconds = f"{row.seconds:.0f}" if row and row.seconds is not None else ""
        lines.append([pair, cell.setting, str(len(runs)), last, best, cell.status, seconds])
        if row is not None and row.teacher is not None and cell.teacher is not None:
            known.setdefault(cell.teacher.key, []).append(row.teacher)
    teachers = {key: fmean(values) for key, values in known.items()}
    for key, top1 in teachers.items():
        cell = next(cell for cell, _ in found if cell.teacher is not None and cell.teacher.key == key)
        family = find_family(cell.config.recipe.partition(".")[0]) if cell.status else None
        published = teacher_top1(family.published, key) if family and family.published else None
        more = (
            f" (published {published[0]:.2f} %, difference {top1 - published[0]:+.2f})" if published else ""
        )
        accuracies.append(f"{key} {top1:.2f} %{more}")
    notes = [
        f"Command: `{command}`",
        f"Teachers, top-1 on the same test images: {'; '.join(accuracies) or '–'}.",
        "Mean ± standard deviation (n − 1) over seeds. `best` is picked on the test set. Empty: no runs. "
        "A published accuracy says whether it is of the last epoch or of the best one on the test set, which "
        "is 0.3 points more on average; (unverified) was noted from memory.",
    ]
    table = markdown_table(HEAD, lines, texts=2)
    write_text(path.with_suffix(".md"), "\n".join([f"# {title}", "", table, *(f"- {n}" for n in notes), ""]))
    write_text(path.with_suffix(".csv"), csv_text([HEAD, *lines]))
    return Table([dict(zip(HEAD, line, strict=True)) for line in lines], notes, teachers)
