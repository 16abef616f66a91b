"""Command `mdistiller bench`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from mdistiller.analysis.bench import PLAIN, Bench, bench_page, bench_table
from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.cli.terminal import counted
from mdistiller.config import CompileMode
from mdistiller.data import DataConfig, load_data
from mdistiller.errors import ConfigError
from mdistiller.methods import list_methods
from mdistiller.models import ModelConfig
from mdistiller.recipes.family import split_pair
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.environment import environment
from mdistiller.tasks.classification.cells import classification_recipe
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.batches import steps_ahead
from mdistiller.training.distributed import process_group

COMPOSED = ("dkd+reviewkd", "lskd-dkd", "sdd-dkd", "ctkd-dkd")


@dataclass(frozen=True)
class BenchCommand(CommonFlags):
    """Measure the time of a step of each method beside plain training, for CIFAR-100.

    A step is augmentation, teacher, forward, backward and update, without the reading of images. Rows take
    turns of the steps that share a pass of the teacher: one step on a CPU, 16 of batch 64 on a GPU.
    """

    pair: tyro.conf.Positional[str] = "resnet32x4_resnet8x4"
    """TEACHER_STUDENT."""
    methods: tuple[str, ...] = ()
    """Names of methods. By default all."""
    cached: tuple[str, ...] = ("kd", "dkd")
    """Methods with a second row, in which a full teacher cache replaces the teacher."""
    dot: tuple[str, ...] = ()
    """Methods with a second row, in which DOT is the optimizer. By default kd, unless methods are named."""
    rounds: int = 30
    """Turns of each row."""
    warmup: int = 5
    """Turns at the start that do not count."""
    batch_size: int = 64
    """Images a step."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision."""
    compile: CompileMode = "off"
    """Run teacher and student through torch.compile, in its default mode or with CUDA graphs."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""
    images: int = 256
    """Training images; with few images each one is repeated, which fills memory banks."""
    data_root: Path | None = None
    """Folder of CIFAR-100. None: synthetic images."""
    teacher_checkpoint: Path | None = None
    """The teacher's weights, with which the table has the losses before the first and after the last step.
    None: random weights; a step takes the same time."""
    out: Path | None = None
    """Folder for bench.json, bench.md and bench.html (a picture)."""


def _configs(c: BenchCommand) -> dict[str, ClassificationConfig]:
    data = DataConfig(
        kind="synthetic", synthetic_samples=c.images, synthetic_classes=100, image_size=32, test_limit=100
    )
    if c.data_root is not None:
        data = DataConfig(root=c.data_root, train_limit=c.images, test_limit=100)
    changes = {"data": data} | {k: getattr(c, k) for k in ("batch_size", "precision", "compile", "device")}
    configs = {PLAIN: classification_recipe(f"cifar100.student.{split_pair(c.pair)[1]}").replace(**changes)}
    names, dot = c.methods, c.dot
    if not names:
        names, dot = (*(m for m in list_methods() if m != "none"), *COMPOSED), dot or ("kd",)
    for name in names:
        config = configs[name] = classification_recipe(f"cifar100.{name}.{c.pair}").replace(**changes)
        if name in dot:
            configs[f"{name}, DOT"] = config.replace(optim=config.optim.replace(name="dot"))
    return configs


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller bench`."""
    c = parse_command(BenchCommand, args, prog="mdistiller bench")
    if not 0 <= c.warmup < c.rounds:
        raise ConfigError(f"warmup: got {c.warmup}; allowed: 0 to rounds - 1 = {c.rounds - 1}")
    configs = _configs(c)
    with process_group(c.device) as world:
        torch.backends.cudnn.benchmark = world.device.type == "cuda"
        splits = load_data(configs[PLAIN].data)
        turn = steps_ahead(configs[PLAIN], splits.image_size, world)
        configs = {name: config.replace(max_steps=turn * c.rounds) for name, config in configs.items()}
        torch.manual_seed(0)
        model = ModelConfig(name=split_pair(c.pair)[0], checkpoint=c.teacher_checkpoint)
        teacher = build_model(model, splits.num_classes)
        with counted("building, method", len(configs)) as built:
            bench = Bench(configs, c.cached, splits, teacher, turn, world, built)
        named = list(configs) if c.teacher_checkpoint is not None else []
        before = {name: bench.losses(name) for name in named}
        with counted("round", c.rounds) as done:
            bench.run(c.rounds, done)
        rows = bench.rows(c.warmup)
        after = {name: bench.losses(name) for name in named}
    for row in rows:
        if row["name"] in before:
            row["losses"] = [before[row["name"]], after[row["name"]]]
    names = ("rounds", "warmup", "batch_size", "precision", "compile", "images")
    settings = {name: getattr(c, name) for name in names}
    settings |= {"real_images": c.data_root is not None, "steps_a_turn": turn}
    where = {k: v for k, v in environment(0).items() if k != "command"}
    result = {"pair": c.pair, "settings": settings, "environment": where, "rows": rows}
    if c.out is not None:
        page = bench_page(rows, f"{c.pair}, batch {c.batch_size}")
        texts = {"json": json.dumps(result, indent=1) + "\n", "md": bench_table(rows), "html": page}
        try:
            c.out.mkdir(parents=True, exist_ok=True)
            for kind, text in texts.items():
                write_text(c.out / f"bench.{kind}", text)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {c.out}: {error}") from error
    print(json.dumps(result) if c.json else bench_table(rows).rstrip())
