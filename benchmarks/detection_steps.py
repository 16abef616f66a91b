"""What a step of each detection method costs beside plain training: milliseconds, in turn in one process.

    python benchmarks/detection_steps.py --root data/voc07-mini --out results/detection/steps.json

A step is all that the trainer does for a batch that is read: both passes, update, and the teacher's pass. The
teacher's weights are random, since only time is measured. CPU milliseconds are the process's own: on a shared
machine they say more than the clock's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mdistiller.methods import NoneConfig
from mdistiller.recipes.coco import get_detection_recipe
from mdistiller.runs.environment import environment
from mdistiller.tasks.detection.config import DetectionAugmentConfig
from mdistiller.tasks.detection.loader import load_detection
from mdistiller.tasks.detection.models import build_detector
from mdistiller.tasks.detection.run import DetectionFeed, DetectionTrainer
from mdistiller.training.distributed import World, pick_device

PLAIN = "alone"


@dataclass
class Command:
    """Steps of all methods, in turn."""

    root: Path
    """A COCO-format data set."""
    out: Path | None = None
    """The JSON file to write."""
    pair: str = "fasterrcnn_resnet50_resnet18"
    """ARCHITECTURE_TEACHER_STUDENT."""
    methods: tuple[str, ...] = ("kd", "fitnet", "fgfi", "reviewkd", "dkd", "dkd+reviewkd")
    """Besides plain training."""
    side: int = 240
    """Length of the images' short side; the long one has at most 4/3 of it."""
    batch_size: int = 8
    """Images a step."""
    steps: int = 6
    """Steps of each that count."""
    warmup: int = 2
    """Steps of each before."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


def trainers(c: Command, here: World) -> dict[str, DetectionTrainer]:
    """A trainer for each row, on one teacher, from the same weights."""
    configs = {name: get_detection_recipe(f"small.{name}.{c.pair}") for name in c.methods}
    first = configs[c.methods[0]]
    assert first.teacher is not None
    change: dict[str, Any] = {
        "data": first.data.model_copy(update={"root": c.root, "workers": 0, "test_limit": 1}),
        "augment": DetectionAugmentConfig(short_sides=(c.side,), long_side=c.side * 4 // 3),
        "batch_size": c.batch_size,
    }
    configs = {PLAIN: first.model_copy(update={"method": NoneConfig(), "teacher": None}), **configs}
    splits = load_detection(change["data"])
    size = change["augment"].size
    teacher = build_detector(first.teacher, splits.num_classes, **size)
    made = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        student = build_detector(config.student, splits.num_classes, **size)
        own = None if name == PLAIN else teacher
        made[name] = DetectionTrainer(config.model_copy(update=change), splits, student, own, here)
        made[name].learner.train()
    return made


def main() -> None:
    """Measure, print a table, and write the log."""
    c = tyro.cli(Command)
    here = World(pick_device(c.device))
    made = trainers(c, here)
    times: dict[str, list[float]] = {name: [] for name in made}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    feed = made[PLAIN].source
    for step in range(c.warmup + c.steps):
        ((batch, _),) = feed.take(step, 1)[0]
        for name, trainer in made.items():
            assert isinstance(trainer.source, DetectionFeed)
            _wait(here)
            start, busy = time.perf_counter(), time.process_time()
            trainer.update(batch, trainer.source.teacher)
            _wait(here)
            cpu[name].append(1000 * (time.process_time() - busy))
            times[name].append(1000 * (time.perf_counter() - start))
        print(step + 1, {name: round(kept[-1]) for name, kept in times.items()}, file=sys.stderr, flush=True)
    medians = {
        name: {"ms": statistics.median(kept[c.warmup :]), "cpu_ms": statistics.median(cpu[name][c.warmup :])}
        for name, kept in times.items()
    }
    plain = medians[PLAIN]
    print("| method | ms a step | of plain | CPU ms a step | of plain |\n| --- | ---: | ---: | ---: | ---: |")
    for name, found in medians.items():
        cells = [f"{found[key]:.0f} | {found[key] / plain[key]:.2f}" for key in ("ms", "cpu_ms")]
        print(f"| {name} | {' | '.join(cells)} |")
    if c.out is not None:
        log = {
            "settings": {
                k: str(v) if isinstance(v, Path) else v for k, v in asdict(c).items() if k != "root"
            },
            "data": c.root.name,
            "environment": {k: v for k, v in environment(0).items() if k != "command"},
            "ms": times,
            "cpu_ms": cpu,
            "medians": medians,
        }
        c.out.parent.mkdir(parents=True, exist_ok=True)
        c.out.write_text(json.dumps(log, indent=1) + "\n")


def _wait(here: World) -> None:
    if here.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
