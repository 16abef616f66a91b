"""Command `mdistiller reproduce NAME`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

from pydantic import Field

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.cli.seeds import finished_runs, train_each
from mdistiller.config import CompileMode, RunConfig
from mdistiller.errors import ConfigError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.recipes.experiments import Cell, Scale, Teacher, get_experiment, list_experiments
from mdistiller.recipes.family import find_family, split_pair
from mdistiller.recipes.published import teacher_top1
from mdistiller.report import write_report
from mdistiller.report.markup import csv_text, markdown_table
from mdistiller.report.runs import RunRecord, make_row
from mdistiller.runs.checkpoint import write_text
from mdistiller.types import Line

_SUFFIXES = {
    "paper": "",
    "quarter": " (a quarter of the epochs)",
    "small": " (small scale)",
    "smoke": " (smoke test)",
}


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


class ReproduceCommand(Command):
    """Train the runs of an experiment of the paper. Then write its table beside the published accuracies
    (NAME.md, NAME.csv), and the report of the runs (NAME.html).

    Runs that are finished in the output folder are not repeated, and interrupted ones are resumed.
    """

    name: Positional[str] = ""
    """An experiment, such as table6; without one, the command lists all."""
    scale: Scale = "paper"
    """paper: the full recipes, for a GPU. quarter: the same for a quarter of the epochs. small: resnet56 →
    resnet20 on 5,000 images for 12 epochs. smoke: tiny models on the embedded digits, as a test of the
    command."""
    out: Path | None = None
    """Folder of runs and tables. None: runs/NAME-SCALE."""
    seeds: int = Field(default=3, ge=1)
    """Runs of each cell."""
    pairs: tuple[str, ...] = ()
    """Pairs TEACHER_STUDENT. By default all of the experiment's."""
    settings: tuple[str, ...] = ()
    """Names of columns. By default all of the experiment's."""
    data_root: Path = Path("data")
    """Folder of CIFAR-100 or ImageNet."""
    teachers: Path | None = None
    """Folder with NAME.pt, NAME.safetensors or a run folder NAME for each teacher. A missing teacher is
    trained first."""
    teacher_cache: Path | None = None
    """Folder that keeps the teachers' outputs, which every run reads or records."""
    teacher_views: int | None = None
    """Augmented views of each image that the epochs use in turn, which limits the size of the cache."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    compile: CompileMode = "off"
    """Run teacher and student through torch.compile, in its default mode or with CUDA graphs."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""
    run: bool = True
    """Train the missing runs. --no-run: write table and report of the finished ones."""
    images: int = Field(default=2000, ge=0)
    """Largest number of test images on which the report runs the students. 0 leaves these sections out."""

    def execute(self) -> None:
        if not self.name:
            raise ConfigError(f"reproduce needs an experiment. One of: {', '.join(list_experiments())}")
        experiment = get_experiment(self.name)
        cells = self._choose(experiment.cells(self.scale))
        out = self.out if self.out is not None else Path("runs") / f"{self.name}-{self.scale}"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {out}: {error}") from error
        teachers = {cell.teacher.key: cell.teacher for cell in cells if cell.teacher is not None}
        weights = {key: self._weights(teacher, out) for key, teacher in teachers.items()}
        cells = [
            cell._replace(config=self._with_flags(cell.config, cell.teacher and weights[cell.teacher.key]))
            for cell in cells
        ]
        if self.run:  # the first seed of every cell before the second seed of any
            train_each([run_of(cell, seed, out) for seed in range(self.seeds) for cell in cells])
        title, path = experiment.title + _SUFFIXES[self.scale], out / self.name
        line = f"mdistiller reproduce {self.name} --scale {self.scale} --seeds {self.seeds} "
        line += f"--precision {self.precision}"
        found = [
            (cell, finished_runs([run_of(cell, seed, out) for seed in range(self.seeds)])) for cell in cells
        ]
        table = write_table(path, title, line, found)
        if folders := [run.path for _, runs in found for run in runs]:
            page, device = path.with_suffix(".html"), self.device
            write_report(folders, page, title=title, notes=table.notes, images=self.images, device=device)
        if self.as_json:
            result = {"title": title, "rows": table.rows, "teachers": table.teachers, "out": str(out)}
            print(json.dumps(result))
        else:
            print(path.with_suffix(".md").read_text(encoding="utf-8").rstrip())

    def _choose(self, cells: list[Cell]) -> list[Cell]:
        for name, field in (("pairs", "pair"), ("settings", "setting")):
            chosen, known = getattr(self, name), {getattr(cell, field) for cell in cells}
            unknown = [value for value in chosen if value not in known]
            if unknown:
                raise ConfigError(f"{name}: got {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
            cells = [cell for cell in cells if not chosen or getattr(cell, field) in chosen]
        return cells

    def _with_flags(self, config: RunConfig, teacher: Path | None = None) -> RunConfig:
        changes: Line = {"precision": self.precision, "compile": self.compile, "device": self.device}
        if self.teacher_cache is not None:
            changes |= {"teacher_cache": self.teacher_cache, "teacher_views": self.teacher_views}
        if teacher is not None:
            changes["teacher"] = {"checkpoint": teacher}
        return config.replace(data={"root": self.data_root}, **changes)

    def _weights(self, teacher: Teacher, out: Path) -> Path | None:
        """Returns a teacher's weights, which are trained if there are none; None for a pretrained one."""
        key = teacher.key
        if self.teachers is not None:
            for path in (self.teachers / f"{key}{suffix}" for suffix in (".pt", ".safetensors", "")):
                if path.exists():
                    return path
        if teacher.config is None:
            return None
        folder = out / "teachers" / key
        if self.run:
            train_each([self._with_flags(teacher.config).replace(out=folder)])
        elif not (folder / STUDENT_FILE).exists():
            raise ConfigError(f"teachers: no weights of {key}, and --no-run trains none")
        return folder


def run_of(cell: Cell, seed: int, out: Path) -> RunConfig:
    """Returns the run of a cell with a seed, in its folder below that of the experiment."""
    name = re.sub(r"[^\w.+-]+", "-", f"{cell.pair}.{cell.setting}-s{seed}").replace("-.", ".")
    return cell.config.replace(seed=seed, out=out / "runs" / name)


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
