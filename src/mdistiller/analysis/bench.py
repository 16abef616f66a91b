"""Time of a training step of each method against plain training.

All rows are measured in one process and take turns, so that a disturbance affects all of them. They have the
same weights and batches. A turn is the steps that share a pass of the teacher: one on a CPU.
"""

import copy
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mdistiller.config import RunConfig
from mdistiller.data import Splits
from mdistiller.report.markup import markdown_table
from mdistiller.training.batches import ImageBatches
from mdistiller.training.build import build_trainer
from mdistiller.training.cached_teacher import CachedTeacher
from mdistiller.training.distributed import World
from mdistiller.training.task import get_task
from mdistiller.training.teacher_cache import LOGITS
from mdistiller.training.trainer import Trainer
from mdistiller.types import Batch, Line

PLAIN = "plain training"


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
            ahead = trainer.distiller.teacher_ahead
            outputs = [None] * len(batches) if ahead is None else ahead.ask(batches)
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
