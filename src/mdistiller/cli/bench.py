"""`mdistiller bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from mdistiller.analysis.bench import PLAIN, Bench, as_markdown, figure
from mdistiller.data import DataConfig, load_data
from mdistiller.errors import ConfigError
from mdistiller.methods import list_methods, load_plugin
from mdistiller.models import ModelConfig
from mdistiller.recipes import get_recipe, split_pair
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.environment import environment
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.batches import steps_ahead
from mdistiller.training.distributed import process_group

COMPOSED = ("dot", "dkd+reviewkd", "lskd-dkd", "sdd-dkd", "ctkd-dkd")


@dataclass(frozen=True)
class BenchCommand:
    """What a step of each method costs beside plain training, in the settings of CIFAR-100's recipes.

    A step is augmentation, teacher, forward, backward and update, not the reading of images. The rows take
    turns: a turn is the steps that share a pass of the teacher, one on a CPU, 16 of batch 64 on a GPU.
    """

    pair: tyro.conf.Positional[str] = "resnet32x4_resnet8x4"
    """TEACHER_STUDENT."""
    methods: tuple[str, ...] = ()
    """Which methods. None named: all."""
    tables: tuple[str, ...] = ("kd", "dkd")
    """Methods that get a second row, with the teacher's table in the teacher's place."""
    rounds: int = 30
    """Turns of each."""
    warmup: int = 5
    """Of these, how many at the start are not counted."""
    batch_size: int = 64
    """Images a step."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    compile: bool = False
    """Run teacher and learner through torch.compile."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    images: int = 256
    """Training images: so few that each comes several times, as memory banks fill only then."""
    data_root: Path | None = None
    """CIFAR-100, for real images. None: synthetic ones."""
    teacher_checkpoint: Path | None = None
    """The teacher's weights. With them the table has losses before the first step and after the last. None:
    random weights; a step takes as long."""
    out: Path | None = None
    """A folder for bench.json, bench.md and bench.html (a picture)."""
    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Python file that registers methods, models and data sets (code: it is run). May be given again."""
    json: bool = False
    """Print the figures as JSON on stdout."""


def _configs(c: BenchCommand) -> dict[str, ClassificationConfig]:
    teacher, student = split_pair(c.pair)
    data = DataConfig(
        kind="synthetic", synthetic_samples=c.images, synthetic_classes=100, image_size=32, test_limit=100
    )
    if c.data_root is not None:
        data = DataConfig(root=c.data_root, train_limit=c.images, test_limit=100)
    changes: dict[str, Any] = {
        "data": data,
        "batch_size": c.batch_size,
        "precision": c.precision,
        "compile": c.compile,
        "device": c.device,
    }
    recipes = {PLAIN: f"student.{student}"}
    for name in c.methods or (*(m for m in list_methods() if m != "none"), *COMPOSED):
        recipes[name] = f"{name}.{teacher}_{student}"
    configs = {}
    for name, recipe in recipes.items():
        values = get_recipe(f"cifar100.{recipe}").model_dump()
        configs[name] = ClassificationConfig.model_validate(values | changes)
    return configs


def command(args: Sequence[str]) -> None:
    """Run `mdistiller bench`."""
    c = tyro.cli(BenchCommand, args=args, prog="mdistiller bench")
    if not 0 <= c.warmup < c.rounds:
        raise ConfigError(f"warmup: got {c.warmup}; allowed: 0 to rounds - 1 = {c.rounds - 1}")
    for path in c.plugin:
        load_plugin(path)
    configs = _configs(c)
    with process_group(c.device) as here:
        torch.backends.cudnn.benchmark = here.device.type == "cuda"
        splits = load_data(configs[PLAIN].data)
        turn = steps_ahead(configs[PLAIN], splits.image_size, here)
        configs = {
            name: config.model_copy(update={"max_steps": turn * c.rounds}) for name, config in configs.items()
        }
        torch.manual_seed(0)
        teacher = build_model(
            ModelConfig(name=split_pair(c.pair)[0], checkpoint=c.teacher_checkpoint), splits.num_classes
        )
        bench = Bench(configs, c.tables, splits, teacher, turn, here)
        named = list(configs) if c.teacher_checkpoint is not None else []
        before = {name: bench.losses(name) for name in named}
        bench.run(c.rounds, lambda number: print(f"round {number} of {c.rounds}", file=sys.stderr))
        rows = bench.rows(c.warmup)
        after = {name: bench.losses(name) for name in named}
    for row in rows:
        if row["name"] in before:
            row["losses"] = [before[row["name"]], after[row["name"]]]
    about = environment(0)
    del about["command"]
    result = {
        "pair": c.pair,
        "settings": _settings(c) | {"steps_a_turn": turn},
        "environment": about,
        "rows": rows,
    }
    if c.out is not None:
        _write(c.out, result)
    print(json.dumps(result) if c.json else as_markdown(rows).rstrip())


def _settings(c: BenchCommand) -> dict[str, Any]:
    names = ("rounds", "warmup", "batch_size", "precision", "compile", "images")
    return {name: getattr(c, name) for name in names} | {"real_images": c.data_root is not None}


def _write(out: Path, result: dict[str, Any]) -> None:
    rows = result["rows"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "bench.json", json.dumps(result, indent=1) + "\n")
        write_text(out / "bench.md", as_markdown(rows))
        title = f"{result['pair']}, batch {result['settings']['batch_size']}"
        write_text(out / "bench.html", figure(rows, title).to_html(include_plotlyjs=True))
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error}") from error
