"""Command `mdistiller bench`."""

import json
from pathlib import Path
from typing import Literal

import torch

from mdistiller.analysis.bench import PLAIN, Bench, bench_table
from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.cli.terminal import tracked
from mdistiller.config import CompileMode, RunConfig
from mdistiller.data import Splits
from mdistiller.errors import ConfigError
from mdistiller.methods import list_methods
from mdistiller.models import ModelConfig
from mdistiller.recipes import get_recipe
from mdistiller.recipes.family import split_pair
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.environment import environment
from mdistiller.training.batches import steps_ahead
from mdistiller.training.distributed import process_group
from mdistiller.training.task import get_task
from mdistiller.types import Line

COMPOSED = ("dkd+reviewkd", "lskd-dkd", "sdd-dkd", "ctkd-dkd")


class BenchCommand(Command):
    """Measure the time of a step of each method beside plain training, for CIFAR-100.

    A step is augmentation, teacher, forward, backward and update, without the reading of images. Rows take
    turns of the steps that share a pass of the teacher: one step on a CPU, 16 of batch 64 on a GPU.
    """

    pair: Positional[str] = "resnet32x4_resnet8x4"
    """TEACHER_STUDENT."""
    methods: tuple[str, ...] = ()
    """Names of methods. By default all."""
    cached: tuple[str, ...] = ("kd", "dkd")
    """Methods with a second row, in which a full teacher cache replaces the teacher."""
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
    """Training images, synthetic ones; with few images each one is repeated, which fills memory banks."""
    out: Path | None = None
    """Folder for bench.json and bench.md."""

    def execute(self) -> None:
        if not 0 <= self.warmup < self.rounds:
            raise ConfigError(f"warmup: got {self.warmup}; allowed: 0 to rounds - 1 = {self.rounds - 1}")
        configs = self._configs()
        task = get_task(configs[PLAIN].task)
        with process_group(self.device) as world:
            torch.backends.cudnn.benchmark = world.device.type == "cuda"
            splits = task.load_data(configs[PLAIN])
            assert isinstance(splits, Splits)
            turn = steps_ahead(configs[PLAIN], splits.image_size, world)
            configs = {name: config.replace(max_steps=turn * self.rounds) for name, config in configs.items()}
            torch.manual_seed(0)
            teacher = task.build_model(configs[PLAIN], ModelConfig(name=split_pair(self.pair)[0]), splits)
            named = tracked("building", list(configs.items()))
            bench = Bench(named, self.cached, splits, teacher, turn, world)
            bench.run(tracked("round", range(self.rounds)))
            rows = bench.rows(self.warmup)
        names = ("rounds", "warmup", "batch_size", "precision", "compile", "images")
        settings = {name: getattr(self, name) for name in names}
        settings["steps_a_turn"] = turn
        where = {k: v for k, v in environment(0).items() if k != "command"}
        result = {"pair": self.pair, "settings": settings, "environment": where, "rows": rows}
        if self.out is not None:
            texts = {"json": json.dumps(result, indent=1) + "\n", "md": bench_table(rows)}
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                for kind, text in texts.items():
                    write_text(self.out / f"bench.{kind}", text)
            except OSError as error:
                raise ConfigError(f"out: cannot write to {self.out}: {error}") from error
        print(json.dumps(result) if self.as_json else bench_table(rows).rstrip())

    def _configs(self) -> dict[str, RunConfig]:
        data: Line = {"kind": "synthetic", "synthetic_samples": self.images, "synthetic_classes": 100}
        data |= {"image_size": 32, "test_limit": 100}
        changes: Line = {"data": data, "batch_size": self.batch_size, "precision": self.precision}
        changes |= {"compile": self.compile, "device": self.device}
        student = split_pair(self.pair)[1]
        configs = {PLAIN: get_recipe(f"cifar100.student.{student}").replace(**changes)}
        names = self.methods or (*(m for m in list_methods() if m != "none"), *COMPOSED)
        recipes = {name: get_recipe(f"cifar100.{name}.{self.pair}") for name in names}
        return configs | {name: recipe.replace(**changes) for name, recipe in recipes.items()}
