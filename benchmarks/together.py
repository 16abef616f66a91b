"""Runs side by side against the same runs one by one: milliseconds of a step of one run.

    python benchmarks/together.py --out results/together

Both forms take turns in one process, so that what disturbs the machine hits both; beside the clock's time
stands the processor's, which other work touches less. A step is all that the trainer does for a batch,
evaluation left out.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from mdistiller import create_model, get_recipe
from mdistiller.config import RunConfig
from mdistiller.runs.environment import environment
from mdistiller.runs.progress import Silent
from mdistiller.training.batches import BatchSource
from mdistiller.training.build import build_trainers
from mdistiller.training.distributed import World, pick_device
from mdistiller.training.task import get_task
from mdistiller.training.trainer import Trainer

IMAGES = 2048


@dataclass
class Command:
    """Steps of both forms, in turn."""

    out: Path | None = None
    """Folder for PAIR-PRECISION.json."""
    pair: tuple[str, str] = ("resnet56", "resnet20")
    """Teacher and student."""
    methods: tuple[str, ...] = ("kd", "dkd", "dist", "at")
    """One run for each."""
    precision: str = "float32"
    """Autocast precision."""
    batch_size: int = 64
    """Images a step."""
    rounds: int = 7
    """Turns of each; the first is not counted."""
    steps: int = 4
    """Steps of each run a turn; on a GPU rounded up to whole passes of the teacher, 16 steps at batch 64."""
    compile: bool = False
    """torch.compile for teacher and learners."""


Runs = tuple[list[Trainer], BatchSource]


def run_configs(c: Command, teacher: Path) -> list[RunConfig]:
    """Returns the config of each method's run, on computed images."""
    data = {"kind": "synthetic", "synthetic_samples": IMAGES, "synthetic_classes": 100}
    return [
        get_recipe(f"cifar100.{method}.{'_'.join(c.pair)}").replace(
            data=data,
            teacher={"checkpoint": teacher},
            batch_size=c.batch_size,
            precision=c.precision,
            compile=c.compile,
            diagnostics=False,
        )
        for method in c.methods
    ]


def advance(runs: Runs, steps: int) -> None:
    """Trains runs of one batch source for some steps."""
    trainers, source = runs
    done = 0
    while done < steps:
        batches = source.next_batches(trainers[0].step, steps - done)
        for trainer, prepared in zip(trainers, batches, strict=True):
            for batch, teacher in prepared:
                trainer.train_step(batch, teacher)
        done += len(batches[0])
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(c: Command) -> None:
    """Times both forms in turn, and prints the ratio."""
    world, task = World(pick_device("auto")), get_task("classification")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        weights = Path(folder) / "teacher.pt"
        torch.save(create_model(c.pair[0], 100).state_dict(), weights)
        configs = run_configs(c, weights)
        forms: dict[str, list[Runs]] = {
            "one by one": [build_trainers(task, [config], world) for config in configs],
            "side by side": [build_trainers(task, configs, world)],
        }
    for trainers, source in (runs for form in forms.values() for runs in form):
        source.open(Silent())
        for trainer in trainers:
            trainer.start_epoch()
    whole = forms["side by side"][0][1].lookahead
    c.steps = whole * math.ceil(c.steps / whole)
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in forms} for kind in clocks}
    for turn in range(c.rounds):
        for name, parts in forms.items():
            start = {kind: clock() for kind, clock in clocks.items()}
            for runs in parts:
                advance(runs, c.steps)
            for kind, clock in clocks.items():
                times[kind][name].append(1000 * (clock() - start[kind]) / c.steps / len(c.methods))
        print(f"round {turn + 1} of {c.rounds}", file=sys.stderr)
    for kind, found in times.items():
        kept = {name: values[1:] for name, values in found.items()}
        for name, values in kept.items():
            print(
                f"{kind}, {name}: {statistics.median(values):.1f} ms a step of a run "
                f"({min(values):.1f} to {max(values):.1f})"
            )
        ratios = [a / b for a, b in zip(*kept.values(), strict=True)]
        print(f"{kind}, ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if c.out is not None:
        c.out.mkdir(parents=True, exist_ok=True)
        env = environment(0)
        del env["command"]
        settings = {
            name: getattr(c, name) for name in ("pair", "methods", "precision", "batch_size", "steps")
        }
        result = {"environment": env, "settings": settings, "ms_by_turn": times}
        path = c.out / f"{'_'.join(c.pair)}-{c.precision}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Command))
