"""Command `mdistiller bench`: time of a training step of each method against plain training.

All rows are measured in one process and take turns, so that a disturbance affects all of them. They have the
same weights and batches. A turn is the steps that share a pass of the teacher: one on a CPU.
"""

import copy
import json
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

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
from mdistiller.report.markup import markdown_table
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.environment import environment
from mdistiller.training.batches import ImageBatches, steps_ahead
from mdistiller.training.build import build_trainer
from mdistiller.training.cached_teacher import CachedTeacher
from mdistiller.training.distributed import World, process_group
from mdistiller.training.task import get_task
from mdistiller.training.teacher_cache import LOGITS
from mdistiller.training.trainer import Trainer
from mdistiller.types import Batch, Line

PLAIN = "plain training"
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


@dataclass
class _Row:
    trainer: Trainer
    source: ImageBatches
    memory: int | None = None
    times: list[float] = field(default_factory=list)


@dataclass
class Bench:
    """Trainers of several methods for one pair of models, and their times.

    Args:
        configs: the runs with their rows' names, plain training first; they share data, student and batch
            size.
        cached: names of rows that get a second row, with a full teacher cache in place of the teacher. The
            stored values are zeros, since only the look-up is timed.
        teacher: each row has a copy.
        turn: steps of a turn, see `steps_ahead`.
    """

    configs: Iterable[tuple[str, RunConfig]]
    cached: Sequence[str]
    splits: Splits
    teacher: nn.Module
    turn: int
    world: World
    _rows: dict[str, _Row] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.teacher = self.teacher.to(self.world.device).eval()
        for name, config in self.configs:
            self._add(name, config)
            distiller = self._rows[name].trainer.distiller
            reads_logits = distiller.asked is not None and not distiller.method.teacher_taps
            if name in self.cached and reads_logits:
                folder = Path(tempfile.mkdtemp())
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self._add(f"{name}, cache", config.replace(teacher_cache=folder, teacher_views=1))

    def _add(self, name: str, config: RunConfig) -> None:
        device = self.world.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_reserved(device)
        task = get_task(config.task)
        torch.manual_seed(config.seed)
        student = task.build_student(config, self.splits)
        teacher = copy.deepcopy(self.teacher) if config.teacher is not None else None
        source = task.make_batches(config, self.splits, self.world)
        trainer = build_trainer(task, config, self.splits, student, teacher, source, self.world)
        assert isinstance(source, ImageBatches)
        asked = trainer.distiller.asked
        if asked is not None:
            asked.open()
        row = self._rows[name] = _Row(trainer, source)
        if isinstance(asked, CachedTeacher) and asked.cache is not None:
            zeros = np.zeros((len(self.splits.train), self.splits.num_classes), np.float32)
            for view in range(source.num_views):
                asked.cache.fill(view, 1 + np.arange(len(zeros)), (LOGITS,), lambda: {LOGITS: zeros})
        if device.type == "cuda":
            state = copy.deepcopy(trainer.state_dict())
            self._steps(row, list(islice(self.batches(), self.turn)))
            row.memory = torch.cuda.max_memory_reserved(device) - before
            trainer.load_state_dict(state)

    def _steps(self, row: _Row, raws: Sequence[Batch]) -> None:
        trainer, source = row.trainer, row.source
        trainer.distiller.train()
        for start in range(0, len(raws), source.lookahead):
            batches = source.prepare(raws[start : start + source.lookahead], trainer.step)
            outputs = trainer.distiller.ask_ahead(batches)
            for batch, teacher in zip(batches, outputs, strict=True):
                trainer.train_step(batch, teacher)

    def batches(self) -> Iterator[Batch]:
        """Yields raw batches without end, the same for all rows."""
        loader = self._rows[PLAIN].source.loader
        return (raw for epoch in count() for raw in loader.epoch(epoch))

    def run(self, rounds: Iterable[int]) -> None:
        """Times one turn of each row per round."""
        batches = self.batches()
        for _ in rounds:
            turn = list(islice(batches, self.turn))
            for row in self._rows.values():
                self._synchronize()
                start = time.perf_counter()
                self._steps(row, turn)
                self._synchronize()
                row.times.append(1000 * (time.perf_counter() - start) / self.turn)

    def rows(self, warmup: int) -> list[Line]:
        """Returns a row for each name, without the times of the first `warmup` turns."""
        plain = statistics.median(self._rows[PLAIN].times[warmup:])
        rows = []
        for name, row in self._rows.items():
            ms, trainer = row.times[warmup:], row.trainer
            median = statistics.median(ms)
            found = {"name": name, "extra_parameters": trainer.parameters["method_parameters"]}
            found |= {"ms": ms, "ms_median": median, "ms_low": min(ms), "ms_high": max(ms)}
            found["images_per_second"] = 1000 * trainer.config.batch_size / median
            rows.append(found | {"of_plain": median / plain, "peak_memory_bytes": row.memory})
        return rows

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


_COLUMNS = {
    "method": "{name}",
    "extra parameters": "{extra_parameters:,}",
    "ms a step": "{ms_median:.1f}",
    "lowest – highest": "{ms_low:.1f} – {ms_high:.1f}",
    "× plain": "{of_plain:.2f}",
    "images/s": "{images_per_second:,.0f}",
}


def bench_table(rows: Sequence[Line]) -> str:
    """Returns the rows as a Markdown table."""
    lines = []
    for row in rows:
        memory = row["peak_memory_bytes"]
        cells = [text.format(**row) for text in _COLUMNS.values()]
        lines.append([*cells, "" if memory is None else f"{memory / 1e6:,.0f}"])
    return markdown_table([*_COLUMNS, "memory, MB"], lines)
