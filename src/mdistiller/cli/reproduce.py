"""`mdistiller reproduce NAME`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mdistiller.analysis.experiment import (
    HEAD,
    Result,
    folder_of,
    notes_of,
    results,
    rows,
    run_once,
    write_json,
    write_tables,
)
from mdistiller.data import Augment, load_data, make_loader
from mdistiller.engine.config import TrainConfig
from mdistiller.engine.distributed import world
from mdistiller.engine.evaluate import evaluate
from mdistiller.engine.log import ProgressDisplay
from mdistiller.engine.teachers import build_model
from mdistiller.errors import ConfigError
from mdistiller.models import ModelConfig
from mdistiller.recipes import split_pair
from mdistiller.recipes.experiments import Cell, get_experiment, teacher_config


@dataclass(frozen=True)
class ReproduceCommand:
    """Run an experiment of the paper cell by cell, and write its table beside the published figures.

    What is finished in the output folder is not run again, and what was broken off goes on.
    """

    name: tyro.conf.Positional[str]
    """cifar100 or table1."""
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
    """CIFAR-100."""
    teachers: Path | None = None
    """A folder with NAME.pt, NAME.safetensors or a run folder NAME for each teacher. A teacher that is
    missing is trained first."""
    teacher_table: Path | None = None
    """A folder for tables of the teachers' logits."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    compile: bool = False
    """Run teacher and learner through torch.compile."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    json: bool = False
    """Print the table as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Run `mdistiller reproduce`."""
    c = tyro.cli(ReproduceCommand, args=args, prog="mdistiller reproduce")
    experiment = get_experiment(c.name)
    if c.seeds < 1:
        raise ConfigError(f"seeds: got {c.seeds}; allowed: 1 or more")
    cells = _chosen(experiment.cells(c.scale), c)
    out = c.out if c.out is not None else Path("runs") / f"{c.name}-{c.scale}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error}") from error
    teachers = {name: _teacher(name, c, out) for name in dict.fromkeys(split_pair(x.pair)[0] for x in cells)}
    told = _evaluate(teachers, cells, c, out)
    title = experiment.title + {"paper": "", "small": " (small scale)", "smoke": " (smoke test)"}[c.scale]
    line = f"mdistiller reproduce {c.name} --scale {c.scale} --seeds {c.seeds} --precision {c.precision}"

    def write() -> list[Result]:
        found = results(out, cells, c.seeds)
        write_tables(out, c.name, title, notes_of(found, line, told), rows(found, _arrow))
        return found

    total = len(cells) * c.seeds
    for seed in range(c.seeds):  # the first seed of every cell before the second of any
        for i, cell in enumerate(cells, 1):
            config = _settled(cell.config, c).model_copy(
                update={"seed": seed, "out": folder_of(out, cell, seed)}
            )
            if config.teacher is not None:
                teacher = config.teacher.model_copy(update={"checkpoint": teachers[config.teacher.name]})
                config = config.model_copy(update={"teacher": teacher})
            print(f"run {seed * len(cells) + i} of {total}: {cell.pair}, {cell.setting}", file=sys.stderr)
            if run_once(config, ProgressDisplay()):
                write()
    found = write()
    if c.json:
        table = [dict(zip(HEAD, row, strict=True)) for row in rows(found, _arrow)]
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


def _settled(config: TrainConfig, c: ReproduceCommand) -> TrainConfig:
    """A config with what holds for all runs."""
    changes: dict[str, Any] = {"precision": c.precision, "compile": c.compile, "device": c.device}
    if config.data.kind == "cifar100":
        changes["data"] = config.data.model_copy(update={"root": c.data_root})
    if config.teacher is not None:
        changes["teacher_table"] = c.teacher_table
    return config.model_copy(update=changes)


def _teacher(name: str, c: ReproduceCommand, out: Path) -> Path:
    """A teacher's weights: given, trained before, or trained now."""
    if c.teachers is not None:
        for candidate in (f"{name}.pt", f"{name}.safetensors", name):
            if (c.teachers / candidate).exists():
                return c.teachers / candidate
    folder = out / "teachers" / name
    print(f"teacher {name}: trained in {folder}", file=sys.stderr)
    run_once(_settled(teacher_config(name, c.scale), c).model_copy(update={"out": folder}), ProgressDisplay())
    return folder


def _evaluate(
    teachers: dict[str, Path], cells: list[Cell], c: ReproduceCommand, out: Path
) -> dict[str, dict[str, float]]:
    """Top-1, top-5 and loss of each teacher on the test images of the experiment, in float32."""
    path = out / "teachers.json"
    config = _settled(cells[0].config, c)
    with world(c.device) as here:
        splits = load_data(config.data)
        prepare = Augment(config.augment, splits.mean, splits.std, splits.num_classes).to(here.device).eval()
        loader = make_loader(splits.test, 500, device=here.device, shuffle=False)
        told = {}
        for name, checkpoint in teachers.items():
            model = build_model(ModelConfig(name=name, checkpoint=checkpoint), splits.num_classes)
            told[name] = evaluate(model.to(here.device), loader.epoch(0), prepare, here)
    write_json(path, told)
    return told


def _arrow(pair: str) -> str:
    return " → ".join(split_pair(pair))
