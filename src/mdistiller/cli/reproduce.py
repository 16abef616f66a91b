"""`mdistiller reproduce NAME`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mdistiller.analysis.experiment import (
    HEAD,
    Result,
    finished,
    folder_of,
    is_finished,
    notes_of,
    results,
    rows,
    run_all,
    write_json,
    write_tables,
)
from mdistiller.analysis.measures import MEASURES, Material, check_transfer
from mdistiller.data import Augment, load_data, make_loader
from mdistiller.errors import ConfigError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.recipes.cells import Cell, Teacher, models_of
from mdistiller.recipes.experiments import EXPERIMENTS, get_experiment
from mdistiller.runs.progress import ProgressDisplay
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.distributed import pick_device, process_group
from mdistiller.training.launch import grouped


@dataclass(frozen=True)
class ReproduceCommand:
    """Run an experiment of the paper cell by cell, and write its table beside the published figures.

    What is finished in the output folder is not run again, and what was broken off goes on.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=f"One of: {', '.join(EXPERIMENTS)}.")]
    scale: Literal["paper", "small", "smoke"] = "paper"
    """paper: the full recipes, for a GPU. small: resnet56 → resnet20 on 5,000 images for 12 epochs. smoke:
    tiny models on the embedded digits, only to see that it works."""
    out: Path | None = None
    """The folder of runs and tables. None: runs/NAME-SCALE."""
    seeds: int = 3
    """Runs of each cell."""
    pairs: tuple[str, ...] = ()
    """Which pairs TEACHER_STUDENT. None named: all of the experiment's."""
    settings: tuple[str, ...] = ()
    """Which columns, by name. None named: all of the experiment's."""
    data_root: Path = Path("data")
    """CIFAR-100, or ImageNet."""
    transfer: tuple[Path, ...] = ()
    """Folders of other data sets, for table13: STL-10, Tiny-ImageNet, or any class folders in train/ and
    val/."""
    teachers: Path | None = None
    """A folder with NAME.pt, NAME.safetensors or a run folder NAME for each teacher. A teacher that is
    missing is trained first."""
    teacher_table: Path | None = None
    """A folder for tables of the teachers' logits."""
    together: int = 1
    """How many runs may train side by side, on the same images and outputs of the teacher: those of one seed
    and teacher. Their figures are those of runs one by one; their seconds are shares of the time of all."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    compile: bool = False
    """Run teacher and learner through torch.compile."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    run: bool = True
    """Train what is missing. --no-run: write the table of what is finished."""
    json: bool = False
    """Print the table as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Run `mdistiller reproduce`."""
    c = tyro.cli(ReproduceCommand, args=args, prog="mdistiller reproduce")
    experiment = get_experiment(c.name)
    if c.seeds < 1:
        raise ConfigError(f"seeds: got {c.seeds}; allowed: 1 or more")
    if c.together < 1:
        raise ConfigError(f"together: got {c.together}; allowed: 1 or more")
    cells = _chosen(experiment.cells(c.scale), c)
    if experiment.extra == "transfer":
        check_transfer(cells, c.transfer)
    out = c.out if c.out is not None else Path("runs") / f"{c.name}-{c.scale}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error}") from error
    cells = [cell._replace(config=_settled(cell.config, c)) for cell in cells]
    teachers = _teachers(cells, c, out)
    told = _evaluate(teachers, cells, c, out)
    title = experiment.title + {"paper": "", "small": " (small scale)", "smoke": " (smoke test)"}[c.scale]
    line = f"mdistiller reproduce {c.name} --scale {c.scale} --seeds {c.seeds} --precision {c.precision}"

    def write() -> list[Result]:
        found = results(out, cells, c.seeds)
        write_tables(out, c.name, title, notes_of(found, line, told), HEAD, rows(found, _arrow))
        return found

    total = len(cells) * c.seeds
    for seed in range(c.seeds if c.run else 0):  # the first seed of every cell before the second of any
        waiting = []
        for i, cell in enumerate(cells, 1):
            config = cell.config.model_copy(update={"seed": seed, "out": folder_of(out, cell, seed)})
            if cell.teacher is not None and cell.teacher.key in teachers:
                assert config.teacher is not None
                teacher = config.teacher.model_copy(update={"checkpoint": teachers[cell.teacher.key]})
                config = config.model_copy(update={"teacher": teacher})
            if not is_finished(config):
                told_as = f"run {seed * len(cells) + i} of {total}: {cell.pair}, {cell.setting}"
                waiting.append((told_as, config))
        for group in grouped([config for _, config in waiting], c.together):
            for i in group:
                print(waiting[i][0], file=sys.stderr)
            run_all([waiting[i][1] for i in group], ProgressDisplay())
            write()
    found = write()
    head: tuple[str, ...] = HEAD
    lines, notes = rows(found, _arrow), notes_of(found, line, told)
    if experiment.extra:
        folders = {(x.pair, x.setting): [run.path for run in finished(out, x, c.seeds)] for x in cells}
        material = Material(cells, folders, teachers, pick_device(c.device), c.transfer)
        measured = MEASURES[experiment.extra](material)
        head, lines = (*HEAD, *measured.columns), rows(found, _arrow, measured)
        notes += measured.notes
        write_tables(out, c.name, title, notes, head, lines, measured.pictures)
    if c.json:
        table = [dict(zip(head, row, strict=True)) for row in lines]
        print(json.dumps({"title": title, "rows": table, "teachers": told, "out": str(out)}))
    else:
        print((out / f"{c.name}.md").read_text(encoding="utf-8").rstrip())


def _chosen(cells: list[Cell], c: ReproduceCommand) -> list[Cell]:
    for asked, known, what in (
        (c.pairs, {cell.pair for cell in cells}, "pairs"),
        (c.settings, {cell.setting for cell in cells}, "settings"),
    ):
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ConfigError(f"{what}: got {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
    return [
        cell
        for cell in cells
        if (not c.pairs or cell.pair in c.pairs) and (not c.settings or cell.setting in c.settings)
    ]


def _settled(config: ClassificationConfig, c: ReproduceCommand) -> ClassificationConfig:
    """A config with what holds for all runs."""
    changes: dict[str, Any] = {"precision": c.precision, "compile": c.compile, "device": c.device}
    if config.data.kind != "digits":  # which come with a package
        changes["data"] = config.data.model_copy(update={"root": c.data_root})
    if config.teacher is not None and config.augment.policy == "none" and config.data.kind != "folder":
        changes["teacher_table"] = c.teacher_table  # images with few variants
    return config.model_copy(update=changes)


def _teachers(cells: list[Cell], c: ReproduceCommand, out: Path) -> dict[str, Path]:
    """Weights by key, of all but the pretrained teachers."""
    needed = {cell.teacher.key: cell.teacher for cell in cells if cell.teacher is not None}
    found = {key: _weights(teacher, c, out) for key, teacher in needed.items()}
    return {key: path for key, path in found.items() if path is not None}


def _weights(teacher: Teacher, c: ReproduceCommand, out: Path) -> Path | None:
    """Given, trained before, or trained now; None for a teacher that is pretrained."""
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
    config = _settled(teacher.config, c).model_copy(update={"out": folder})
    if not is_finished(config):
        run_all([config], ProgressDisplay())
    return folder


def _evaluate(
    teachers: dict[str, Path], cells: list[Cell], c: ReproduceCommand, out: Path
) -> dict[str, dict[str, float]]:
    """Top-1, top-5 and loss of each teacher on the test images of the experiment, in float32."""
    config = cells[0].config
    by_key = {cell.teacher.key: cell for cell in cells if cell.teacher is not None}
    with process_group(c.device) as here:
        splits = load_data(config.data)
        prepare = Augment(config.augment, splits.mean, splits.std, splits.num_classes).to(here.device).eval()
        loader = make_loader(splits.test, 500, device=here.device, shuffle=False)
        told = {}
        for key, cell in by_key.items():
            assert cell.config.teacher is not None
            weighed = cell.config.teacher.model_copy(update={"checkpoint": teachers.get(key)})
            model = build_model(weighed, splits.num_classes)
            told[key] = evaluate(model.to(here.device), loader.epoch(0), prepare, here)
    write_json(out / "teachers.json", told)
    return told


def _arrow(pair: str) -> str:
    return " → ".join(models_of(pair))
