"""Command `mdistiller reproduce NAME`."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import mdistiller.analysis.experiment as experiments
from mdistiller.analysis.measures import MEASURES, NOTHING, Material, Measured, check_transfer
from mdistiller.errors import ConfigError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.progress import ProgressDisplay, Silent
from mdistiller.tasks.classification.cells import Cell, Scale, Teacher
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.tasks.classification.experiments import EXPERIMENTS, get_experiment
from mdistiller.training.distributed import pick_device, process_group

Waiting = list[tuple[str, ClassificationConfig]]
_SUFFIXES = {
    "paper": "",
    "quarter": " (a quarter of the epochs)",
    "small": " (small scale)",
    "smoke": " (smoke test)",
}


@dataclass(frozen=True)
class ReproduceCommand:
    """Run an experiment of the paper cell by cell, and write its table beside the published accuracies.

    Runs that are finished in the output folder are not repeated, and interrupted ones are resumed.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=f"One of: {', '.join(EXPERIMENTS)}.")]
    scale: Scale = "paper"
    """paper: the full recipes, for a GPU. quarter: the same for a quarter of the epochs. small: resnet56 →
    resnet20 on 5,000 images for 12 epochs. smoke: tiny models on the embedded digits, as a test of the
    command."""
    out: Path | None = None
    """Folder of runs and tables. None: runs/NAME-SCALE."""
    seeds: int = 3
    """Runs of each cell."""
    pairs: tuple[str, ...] = ()
    """Pairs TEACHER_STUDENT. By default all of the experiment's."""
    settings: tuple[str, ...] = ()
    """Names of columns. By default all of the experiment's."""
    data_root: Path = Path("data")
    """Folder of CIFAR-100 or ImageNet."""
    transfer: tuple[Path, ...] = ()
    """Folders of other data sets, for table13: STL-10, Tiny-ImageNet, or any class folders in train/ and
    val/."""
    teachers: Path | None = None
    """Folder with NAME.pt, NAME.safetensors or a run folder NAME for each teacher. A missing teacher is
    trained first."""
    teacher_cache: Path | None = None
    """Folder that keeps the teachers' outputs, which every run reads or records."""
    teacher_views: int | None = None
    """Augmented views of each image that the epochs use in turn, which limits the size of the cache."""
    on: Literal["ray"] | None = None
    """ray: train the runs of all seeds on Ray, as many at once as it has resources for. None: one after
    another."""
    address: str | None = None
    """With --on ray: address of a running cluster, or auto. None: this machine alone."""
    cpus: float = 1
    """With --on ray: cores of a run."""
    gpus: float = 0
    """With --on ray: GPUs of a run."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    compile: bool = False
    """Run teacher and student through torch.compile."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""
    run: bool = True
    """Train the missing runs. --no-run: write the table of the finished ones."""
    json: bool = False
    """Print the table as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller reproduce`."""
    c = tyro.cli(ReproduceCommand, args=args, prog="mdistiller reproduce")
    experiment = get_experiment(c.name)
    if c.seeds < 1:
        raise ConfigError(f"seeds: got {c.seeds}; allowed: 1 or more")
    cells = _choose(experiment.cells(c.scale), c)
    if experiment.extra == "transfer":
        check_transfer(cells, c.transfer)
    out = c.out if c.out is not None else Path("runs") / f"{c.name}-{c.scale}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error}") from error
    cells = [cell._replace(config=_with_flags(cell.config, c)) for cell in cells]
    needed = {cell.teacher.key: cell.teacher for cell in cells if cell.teacher is not None}
    teachers = {key: path for key, t in needed.items() if (path := _weights(t, c, out)) is not None}
    accuracies = _evaluate(teachers, cells, c.device)
    write_text(out / "teachers.json", json.dumps(accuracies, indent=1) + "\n")
    title = experiment.title + _SUFFIXES[c.scale]
    line = f"mdistiller reproduce {c.name} --scale {c.scale} --seeds {c.seeds} --precision {c.precision}"

    def write(measured: Measured = NOTHING) -> tuple[list[experiments.Result], list[dict[str, str]]]:
        found = experiments.results(out, cells, c.seeds)
        notes = experiments.notes_of(found, line, accuracies)
        return found, experiments.write_tables(out / c.name, title, notes, found, measured)

    total = len(cells) * c.seeds
    later: Waiting = []
    for seed in range(c.seeds if c.run else 0):  # the first seed of every cell before the second of any
        for i, cell in enumerate(cells, 1):
            config = cell.config.replace(seed=seed, out=experiments.folder_of(out, cell, seed))
            if cell.teacher is not None and cell.teacher.key in teachers:
                config = config.replace(teacher={"checkpoint": teachers[cell.teacher.key]})
            if experiments.is_finished(config):
                continue
            words = f"run {seed * len(cells) + i} of {total}: {cell.pair}, {cell.setting}"
            if c.on is None:
                print(words, file=sys.stderr)
                experiments.run_one(config, ProgressDisplay())
                write()
            else:
                later.append((words, config))
    if later:
        _run_on_ray(later, c, write)
    found, table = write()
    if experiment.extra:
        folders = {(cell.pair, cell.setting): [run.path for run in runs] for cell, runs in found}
        material = Material(cells, folders, teachers, pick_device(c.device), c.transfer)
        _, table = write(MEASURES[experiment.extra](material))
    if c.json:
        print(json.dumps({"title": title, "rows": table, "teachers": accuracies, "out": str(out)}))
    else:
        print((out / f"{c.name}.md").read_text(encoding="utf-8").rstrip())


def _run_on_ray(runs: Waiting, c: ReproduceCommand, write: Callable[[], Any]) -> None:
    """Trains runs on Ray, and writes the tables after each."""
    from mdistiller.integrations.ray import Resources, run_tasks

    def done(i: int) -> None:
        print(f"done: {runs[i][0]}", file=sys.stderr)
        write()

    configs = [config.replace(out=Path(os.path.abspath(str(config.out)))).absolute() for _, config in runs]
    tasks = [partial(experiments.run_one, config, Silent()) for config in configs]
    run_tasks(tasks, Resources(c.cpus, c.gpus, c.address), done)


def _choose(cells: list[Cell], c: ReproduceCommand) -> list[Cell]:
    for name, field in (("pairs", "pair"), ("settings", "setting")):
        chosen, known = getattr(c, name), {getattr(cell, field) for cell in cells}
        unknown = [value for value in chosen if value not in known]
        if unknown:
            raise ConfigError(f"{name}: got {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
        cells = [cell for cell in cells if not chosen or getattr(cell, field) in chosen]
    return cells


def _with_flags(config: ClassificationConfig, c: ReproduceCommand) -> ClassificationConfig:
    changes: dict[str, Any] = {"precision": c.precision, "compile": c.compile, "device": c.device}
    if config.data.kind != "digits":  # they come with scikit-learn
        changes["data"] = {"root": c.data_root}
    if not (config.augment.mixup_alpha or config.augment.cutmix_alpha):  # these cannot be stored
        changes |= {"teacher_cache": c.teacher_cache, "teacher_views": c.teacher_views}
    return config.replace(**changes)


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
        experiments.run_one(config, ProgressDisplay())
    return folder


def _evaluate(teachers: dict[str, Path], cells: list[Cell], device: str) -> dict[str, dict[str, float]]:
    """Computes top-1, top-5 and loss of each teacher on the experiment's test images, in float32."""
    by_key = {cell.teacher.key: cell for cell in cells if cell.teacher is not None}
    with process_group(device) as world:
        material = Material(cells, {}, teachers, world.device)
        prepare = material.augment(cells[0].config).eval()
        found = {}
        for key, cell in by_key.items():
            found[key] = evaluate(material.teacher(cell), material.test_batches(), prepare, world)
    return found
