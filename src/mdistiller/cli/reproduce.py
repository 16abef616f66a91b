"""Command `mdistiller reproduce NAME`."""

import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

import mdistiller.analysis.experiment as experiments
from mdistiller.api import train
from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.config import CompileMode, RunConfig
from mdistiller.errors import ConfigError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.recipes.experiments import Cell, Scale, Teacher, get_experiment, list_experiments
from mdistiller.report import write_report
from mdistiller.runs.folder import CONFIG
from mdistiller.runs.progress import ProgressDisplay

_SUFFIXES = {
    "paper": "",
    "quarter": " (a quarter of the epochs)",
    "small": " (small scale)",
    "smoke": " (smoke test)",
}


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
        cells = _choose(experiment.cells(self.scale), self)
        out = self.out if self.out is not None else Path("runs") / f"{self.name}-{self.scale}"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {out}: {error}") from error
        cells = [cell._replace(config=_with_flags(cell.config, self)) for cell in cells]
        needed = {cell.teacher.key: cell.teacher for cell in cells if cell.teacher is not None}
        teachers = {key: path for key, t in needed.items() if (path := _weights(t, self, out)) is not None}
        title, path = experiment.title + _SUFFIXES[self.scale], out / self.name
        line = f"mdistiller reproduce {self.name} --scale {self.scale} --seeds {self.seeds} "
        line += f"--precision {self.precision}"

        def write() -> experiments.Table:
            return experiments.write_table(path, title, line, experiments.results(out, cells, self.seeds))

        missing = experiments.missing_runs(out, cells, self.seeds, teachers) if self.run else []
        for words, config in missing:
            print(words, file=sys.stderr)
            _run_one(config)
            write()
        table = write()
        if table.runs:
            page, device = path.with_suffix(".html"), self.device
            write_report(table.runs, page, title=title, notes=table.notes, images=self.images, device=device)
        if self.as_json:
            found = {"title": title, "rows": table.rows, "teachers": table.teachers, "out": str(out)}
            print(json.dumps(found))
        else:
            print(path.with_suffix(".md").read_text(encoding="utf-8").rstrip())


def _run_one(config: RunConfig) -> None:
    """Trains into `config.out`, or resumes there."""
    resume = config.out is not None and (config.out / CONFIG).exists()
    train(config, resume=resume, reporter=ProgressDisplay())


def _choose(cells: list[Cell], c: ReproduceCommand) -> list[Cell]:
    for name, field in (("pairs", "pair"), ("settings", "setting")):
        chosen, known = getattr(c, name), {getattr(cell, field) for cell in cells}
        unknown = [value for value in chosen if value not in known]
        if unknown:
            raise ConfigError(f"{name}: got {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
        cells = [cell for cell in cells if not chosen or getattr(cell, field) in chosen]
    return cells


def _with_flags(config: RunConfig, c: ReproduceCommand) -> RunConfig:
    changes: dict[str, object] = {"precision": c.precision, "compile": c.compile, "device": c.device}
    if c.teacher_cache is not None:
        changes |= {"teacher_cache": c.teacher_cache, "teacher_views": c.teacher_views}
    return config.replace(data={"root": c.data_root}, **changes)


def _weights(teacher: Teacher, c: ReproduceCommand, out: Path) -> Path | None:
    """Returns a teacher's weights, which it trains if there are none; None for a pretrained teacher."""
    if c.teachers is not None:
        for candidate in (f"{teacher.key}.pt", f"{teacher.key}.safetensors", teacher.key):
            if (c.teachers / candidate).exists():
                return c.teachers / candidate
    if teacher.config is None:
        return None
    folder = out / "teachers" / teacher.key
    if not c.run:
        if not (folder / STUDENT_FILE).exists():
            raise ConfigError(f"teachers: no weights of {teacher.key}, and --no-run trains none")
        return folder
    print(f"teacher {teacher.key}: trained in {folder}", file=sys.stderr)
    config = _with_flags(teacher.config, c).replace(out=folder)
    if not experiments.is_finished(config):
        _run_one(config)
    return folder
