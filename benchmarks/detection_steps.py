"""Milliseconds of a step of each detection method and of plain training, in turn in one process.

    python benchmarks/detection_steps.py --root data/voc07-mini --out results/detection/steps.json

A step is all work for a batch that is read: both passes, the update, and the teacher's pass. The teacher's
weights are random, since only time is measured. CPU milliseconds are those of the process; other work on the
machine changes them less than the clock's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from flags import read

from mdistiller.config import RunConfig, with_choices
from mdistiller.methods.changes import open_weights
from mdistiller.recipes import get_recipe
from mdistiller.runs.environment import environment
from mdistiller.settings import Settings
from mdistiller.training.batches import BatchSource
from mdistiller.training.build import build_trainer
from mdistiller.training.distributed import World, pick_device
from mdistiller.training.task import get_task
from mdistiller.training.trainer import Trainer

BASELINE = "student alone"


class Command(Settings):
    """Steps of all methods, in turn."""

    root: Path
    """COCO-format data set."""
    out: Path | None = None
    """JSON file to write."""
    pair: str = "fasterrcnn_resnet50_resnet18"
    """ARCHITECTURE_TEACHER_STUDENT of a recipe."""
    methods: tuple[str, ...] = ("kd", "fitnet", "fgfi", "reviewkd", "dkd", "dkd+reviewkd")
    """Methods beside plain training."""
    side: int = 240
    """Length of the images' short side in pixels; the long side has at most 4/3 of it."""
    batch_size: int = 8
    """Images per step."""
    steps: int = 6
    """Steps of each method that count."""
    warmup: int = 2
    """Steps of each method before those."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


def build(c: Command, world: World) -> dict[str, tuple[Trainer, BatchSource]]:
    """Builds a trainer for each row, with one teacher and from the same weights, and its batches."""
    task = get_task("detection")
    shared: dict[str, Any] = {
        "data": {"root": c.root, "workers": 0, "test_limit": 1},
        "augment": {"short_sides": (c.side,), "long_side": c.side * 4 // 3},
        "batch_size": c.batch_size,
    }
    configs = {name: _weighted(get_recipe(f"small.{name}.{c.pair}").replace(**shared)) for name in c.methods}
    first = configs[c.methods[0]]
    configs = {BASELINE: first.replace(method={"name": "none"}, teacher=None), **configs}
    data = task.load_data(first)
    teacher = task.build_teacher(first, data)  # its weights are random
    rows = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        student = task.build_student(config, data)
        own = teacher if config.has_teacher else None
        source = task.make_batches(config, data, world)
        trainer = build_trainer(task, config, data, student, own, source, world)
        trainer.distiller.train()
        rows[name] = trainer, source
    return rows


def main() -> None:
    """Measures, prints a table, and writes the log."""
    c = read(Command)
    world = World(pick_device(c.device))
    rows = build(c, world)
    times: dict[str, list[float]] = {name: [] for name in rows}
    cpu: dict[str, list[float]] = {name: [] for name in rows}
    for step in range(c.warmup + c.steps):
        for name, (trainer, source) in rows.items():
            (batch,) = source.next_batches(step, 1)
            _wait(world)
            start, busy = time.perf_counter(), time.process_time()
            (teacher,) = trainer.distiller.ask_ahead([batch])
            trainer.train_step(batch, teacher)
            _wait(world)
            cpu[name].append(1000 * (time.process_time() - busy))
            times[name].append(1000 * (time.perf_counter() - start))
        print(step + 1, {name: round(kept[-1]) for name, kept in times.items()}, file=sys.stderr, flush=True)
    medians = {
        name: {"ms": statistics.median(kept[c.warmup :]), "cpu_ms": statistics.median(cpu[name][c.warmup :])}
        for name, kept in times.items()
    }
    plain = medians[BASELINE]
    print("| method | ms per step | × baseline | CPU ms per step | × baseline |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, found in medians.items():
        cells = [f"{found[key]:.0f} | {found[key] / plain[key]:.2f}" for key in ("ms", "cpu_ms")]
        print(f"| {name} | {' | '.join(cells)} |")
    if c.out is not None:
        log = {
            "settings": {
                k: str(v) if isinstance(v, Path) else v for k, v in c.model_dump().items() if k != "root"
            },
            "data": c.root.name,
            "environment": {k: v for k, v in environment(0).items() if k != "command"},
            "ms": times,
            "cpu_ms": cpu,
            "medians": medians,
        }
        c.out.parent.mkdir(parents=True, exist_ok=True)
        c.out.write_text(json.dumps(log, indent=1) + "\n")


def _weighted(config: RunConfig) -> RunConfig:
    """Returns a config with 1 for the weights that a run measures, which do not change the time of a step."""
    return with_choices(config, {f"method.{name}": 1.0 for name in open_weights(config.method)})


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
