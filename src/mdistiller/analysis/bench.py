"""Time of a training step of each method against plain training, and whether its loss falls.

All rows are measured in one process and take turns, so that a disturbance affects all of them. They have the
same weights and batches. A turn is the steps that share a pass of the teacher: one on a CPU.
"""

import copy
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mdistiller.config import RunConfig
from mdistiller.data import Splits
from mdistiller.functional import kd_loss
from mdistiller.report.markup import chart, document, markdown_table
from mdistiller.report.svg import Canvas, Scale, tick_text
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
        configs: the runs by row name; they share data, student and batch size.
        cached: names of rows that get a second row, with a full teacher cache in place of the teacher. The
            stored values are zeros, since only the look-up is timed.
        teacher: each row has a copy.
        turn: steps of a turn, see `steps_ahead`.
        built: called with the number of configs that are built, after each.
    """

    configs: dict[str, RunConfig]
    cached: Sequence[str]
    splits: Splits
    teacher: nn.Module
    turn: int
    world: World
    built: Callable[[int], None] = field(default=lambda number: None)
    _rows: dict[str, _Row] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.teacher = self.teacher.to(self.world.device).eval()
        for number, (name, config) in enumerate(self.configs.items(), 1):
            self._add(name, config)
            distiller = self._rows[name].trainer.distiller
            reads_logits = distiller.asked is not None and not distiller.method.teacher_taps
            if name in self.cached and reads_logits:
                folder = Path(tempfile.mkdtemp())
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self._add(f"{name}, cache", config.replace(teacher_cache=folder, teacher_views=1))
            self.built(number)

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
                asked.cache.record(view, np.arange(len(zeros)), {LOGITS: zeros})
        if device.type == "cuda":
            state = copy.deepcopy(trainer.state_dict())
            self._steps(row, list(islice(self.batches(), self.turn)))
            row.memory = torch.cuda.max_memory_reserved(device) - before
            trainer.load_state_dict(state)

    def _steps(self, row: _Row, raws: Sequence[Batch]) -> None:
        trainer, source = row.trainer, row.source
        trainer.distiller.train()
        source.augment.train()
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

    def run(self, rounds: int, done: Callable[[int], None]) -> None:
        """Times one turn of each row per round, and calls `done` with the number of each finished round."""
        batches = self.batches()
        for number in range(1, rounds + 1):
            turn = list(islice(batches, self.turn))
            for row in self._rows.values():
                self._synchronize()
                start = time.perf_counter()
                self._steps(row, turn)
                self._synchronize()
                row.times.append(1000 * (time.perf_counter() - start) / self.turn)
            done(number)

    def losses(self, name: str) -> dict[str, float]:
        """Computes a row's losses on the first batch, at full weight and with batch norm in training mode.

        These are the whole loss, its distillation part, and the KD loss (temperature 4) for a comparison.
        """
        source = self._rows[name].source
        source.augment.eval()
        views = [source.augment(next(self.batches()))] * source.num_views
        batch = Batch(*(torch.cat(parts) for parts in zip(*(view[:3] for view in views), strict=True)))
        # A copy, because a pass changes batch norm and memory banks.
        distiller = copy.deepcopy(self._rows[name].trainer.distiller).train()
        torch.manual_seed(0)  # for methods that draw
        with torch.no_grad():
            live = None if distiller.asked is None else distiller.asked.live(batch)
            out = distiller(batch.image, batch.label, batch.index, 1.0, live)
            kd = kd_loss(out.logits, self.teacher(batch.image)).item()
        distillation = sum(value.item() for name, value in out.losses.items() if name not in out.task)
        return {"loss": out.loss.item(), "distillation": distillation, "kd": kd}

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
_LOSSES = {"loss": "loss", "distillation": "distillation", "KD loss": "kd"}


def bench_table(rows: Sequence[Line]) -> str:
    """Returns the rows as a Markdown table, with losses if they were measured."""
    columns = _LOSSES if any("losses" in row for row in rows) else {}
    lines = []
    for row in rows:
        memory, (first, last) = row["peak_memory_bytes"], row.get("losses", ({}, {}))
        cells = [text.format(**row) for text in _COLUMNS.values()]
        cells.append("" if memory is None else f"{memory / 1e6:,.0f}")
        cells += [f"{first[key]:.4g} → {last[key]:.4g}" if first else "" for key in columns.values()]
        lines.append(cells)
    return markdown_table([*_COLUMNS, "memory, MB", *columns], lines)


def bench_page(rows: Sequence[Line], title: str) -> str:
    """Returns a page with milliseconds a step as bars, longest last, and the extra parameters beside them.

    Figure 2 of the DKD paper shows both against accuracy, which a benchmark of steps does not measure.
    """
    rows = sorted(rows, key=lambda row: row["ms_median"])
    left, height = 16 + 7.2 * max(len(row["name"]) for row in rows), 22
    canvas = Canvas(left + 660, height * len(rows) + 52)
    scale = Scale(0, max(row["ms_median"] for row in rows), left, left + 440)
    bottom = height * len(rows) + 8
    for tick in scale.ticks(6):
        canvas.line(scale(tick), 4, scale(tick), bottom, class_="grid")
        canvas.text(scale(tick), bottom + 17, tick_text(tick), "middle", class_="faint")
    canvas.text(left + 220, bottom + 38, "median milliseconds a step", "middle", class_="faint")
    table = [["row", "ms_median", "ms_low", "ms_high", "extra_parameters"]]
    for i, row in enumerate(rows):
        y, extra = height * i + 8, row["extra_parameters"]
        words = f"{row['ms_median']:.1f}" + f", {extra:,} extra parameters" * (extra > 0)
        canvas.text(left - 8, y + 14, row["name"], "end")
        canvas.add("rect", x=left, y=y + 3, width=scale(row["ms_median"]) - left, height=14, fill="#0072B2")
        canvas.text(scale(row["ms_median"]) + 6, y + 14, words, class_="faint small")
        table.append([str(row[key]) if key != "row" else row["name"] for key in table[0]])
    alt = "; ".join(f"{row['name']}: {row['ms_median']:.1f} ms" for row in rows)
    return document(title, [chart("bench", [canvas], f"Median milliseconds a step. {alt}.", table)])
