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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from mdistiller.tasks.classification.trainer import Trainer

from mdistiller import create_model
from mdistiller.data import ImageSet, Splits
from mdistiller.recipes import get_recipe
from mdistiller.runs.environment import environment
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.batches import Feed
from mdistiller.training.distributed import World, pick_device

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


def trainers(c: Command, splits: Splits, here: World, *, shared: bool) -> list[Trainer]:
    """A trainer for each method, on one feed or on feeds of their own."""
    made: list[Trainer] = []
    torch.manual_seed(0)
    teacher = create_model(c.pair[0], 100)
    feed = None
    for method in c.methods:
        values = get_recipe(f"cifar100.{method}.{'_'.join(c.pair)}").model_dump()
        changes = {"batch_size": c.batch_size, "precision": c.precision, "compile": c.compile}
        config = ClassificationConfig.model_validate(values | changes)
        if shared and feed is None:
            feed = Feed(config, splits, here)
        if not shared:
            torch.manual_seed(0)
            teacher = create_model(c.pair[0], 100)
        made.append(Trainer(config, splits, create_model(c.pair[1], 100), teacher, here, feed))
        made[-1].learner.train()
    return made


def advance(feed: Feed, runs: Sequence[Trainer], steps: int) -> None:
    """Take runs on one feed some steps further."""
    done = 0
    while done < steps:
        fed = feed.take(runs[0].step, steps - done)
        for run in runs:
            for batch, teacher in fed[run.place]:
                run.update(batch, teacher)
        done += len(fed[0])
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(c: Command) -> None:
    """Let both forms take turns, and print the ratio."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 32, 32, 3), dtype=torch.uint8, generator=random)
    data = ImageSet(images=images, labels=torch.randint(100, (IMAGES,), generator=random))
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    classes = tuple(map(str, range(100)))
    splits = Splits(train=data, test=data, classes=classes, mean=mean, std=std, image_size=32, description="")
    here = World(pick_device("auto"))
    torch.backends.cudnn.benchmark = here.device.type == "cuda"  # as in a run
    forms = {
        "one by one": [(run.feed, [run]) for run in trainers(c, splits, here, shared=False)],
        "side by side": [(runs[0].feed, runs) for runs in [trainers(c, splits, here, shared=True)]],
    }
    whole = forms["side by side"][0][0].ahead
    c.steps = whole * math.ceil(c.steps / whole)
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in forms} for kind in clocks}
    for turn in range(c.rounds):
        for name, parts in forms.items():
            start = {kind: clock() for kind, clock in clocks.items()}
            for feed, runs in parts:
                advance(feed, runs, c.steps)
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
        about = environment(0)
        del about["command"]
        settings = {
            name: getattr(c, name) for name in ("pair", "methods", "precision", "batch_size", "steps")
        }
        result = {"environment": about, "settings": settings, "ms_by_turn": times}
        path = c.out / f"{'_'.join(c.pair)}-{c.precision}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Command))
