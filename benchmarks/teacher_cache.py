"""CPU time of a step with a teacher cache: the run that records and one that reads, beside live and plain.

    OMP_NUM_THREADS=1 python benchmarks/teacher_cache.py --out results/teacher_cache
    OMP_NUM_THREADS=1 python benchmarks/teacher_cache.py --photos DIR --out results/teacher_cache

Four runs of DKD take turns, a few steps at a time, on the same images and models: without a teacher (plain),
with the live teacher, with a cache that is empty (recording: every image is missing), and with the cache that
the run before has just recorded (reading). A step is all that the trainer does for a batch, from its images
on. The time is the processor's, since other work on the machine stretches the clock's.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flags import read
from steps import steps_of

from mdistiller import create_model
from mdistiller.data import load_data
from mdistiller.methods import DKDConfig
from mdistiller.methods.none import NoneConfig
from mdistiller.runs.environment import environment
from mdistiller.settings import Settings
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.build import build_run
from mdistiller.training.distributed import World
from mdistiller.training.task import get_task

PLAIN, LIVE, RECORDING, READING = "plain", "live", "recording", "reading"
RATIOS = ((RECORDING, LIVE), (READING, PLAIN), (LIVE, READING), (LIVE, PLAIN))


class Command(Settings):
    """Steps of all four runs, in turn."""

    out: Path | None = None
    """Folder for STUDENT-PRECISION.json."""
    photos: Path | None = None
    """Folder of photographs in class folders, read and cropped in each step. None: 32-pixel images in
    memory, padded, cropped and flipped, as CIFAR's."""
    pair: tuple[str, str] = ("resnet32x4", "resnet8x4")
    """Teacher and student, with random weights."""
    image_size: int = 32
    """Side of the images in pixels."""
    batch_size: int = 64
    """Images a step."""
    precision: str = "float32"
    """Autocast precision."""
    format: str = "int8"
    """Format of the cache."""
    rounds: int = 9
    """Turns of each; the first is not counted."""
    steps: int = 3
    """Steps a turn."""


def configs(c: Command, folder: Path) -> dict[str, ClassificationConfig]:
    """Returns the four runs by name."""
    images = c.rounds * c.steps * c.batch_size  # one epoch, in which no image comes twice
    data: dict[str, Any] = {"kind": "synthetic", "synthetic_samples": images, "synthetic_classes": 100}
    if c.photos is not None:
        data = {"kind": "folder", "root": c.photos, "workers": 0, "memory": "stream", "train_limit": images}
    data |= {"image_size": c.image_size, "test_limit": 200}
    config = ClassificationConfig.model_validate(
        {
            "data": data,
            "augment": {"seed": 0},
            "student": {"name": c.pair[1]},
            "teacher": {"name": c.pair[0], "checkpoint": folder / "teacher.pt"},
            "method": DKDConfig(),
            "epochs": 1,
            "batch_size": c.batch_size,
            "precision": c.precision,
            "device": "cpu",
            "diagnostics": False,
        }
    )
    torch.manual_seed(0)
    classes = load_data(config.data).num_classes
    torch.save(create_model(c.pair[0], classes).state_dict(), folder / "teacher.pt")
    cached = config.replace(teacher_cache=folder / "cache", teacher_cache_format=c.format)
    plain = config.replace(method=NoneConfig(), teacher=None)
    return {PLAIN: plain, LIVE: config, RECORDING: cached, READING: cached}


class Run:
    """Steps of a run and the processor's seconds of its turns."""

    def __init__(self, config: ClassificationConfig) -> None:
        world = World(torch.device("cpu"))
        self.step = steps_of(*build_run(get_task("classification"), config, world))
        self.seconds: list[float] = []

    def turn(self, steps: int) -> None:
        """Trains some steps."""
        start = time.process_time()
        for _ in range(steps):
            self.step()
        self.seconds.append((time.process_time() - start) / steps)


def ratios(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Returns the ratios of the times of turns that follow one another, lowest first."""
    return {
        f"{a} / {b}": sorted(x / y for x, y in zip(runs[a].seconds[1:], runs[b].seconds[1:], strict=True))
        for a, b in RATIOS
    }


def table(runs: dict[str, Run]) -> str:
    """Returns medians and ratios as Markdown tables."""
    lines = ["| run | ms of CPU a step |", "| --- | ---: |"]
    lines += [f"| {name} | {1000 * statistics.median(run.seconds[1:]):.1f} |" for name, run in runs.items()]
    lines += ["", "| ratio | median | lowest – highest |", "| --- | ---: | ---: |"]
    for name, found in ratios(runs).items():
        lines.append(f"| {name} | {statistics.median(found):.3f} | {found[0]:.3f} – {found[-1]:.3f} |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes the log."""
    c = read(Command, args)
    with tempfile.TemporaryDirectory() as name:
        runs = {kind: Run(config) for kind, config in configs(c, Path(name)).items()}
        for number in range(1, c.rounds + 1):
            for run in runs.values():  # reading comes after recording
                run.turn(c.steps)
            print(f"round {number} of {c.rounds}", file=sys.stderr)
        size = sum(path.stat().st_blocks * 512 for path in (Path(name) / "cache").glob("*.rows"))
    print(table(runs))
    if c.out is not None:
        c.out.mkdir(parents=True, exist_ok=True)
        log = {"pair": c.pair, "image_size": c.image_size, "batch_size": c.batch_size, "format": c.format}
        log |= {"photos": c.photos is not None, "cache_bytes": size, "threads": torch.get_num_threads()}
        log["seconds_a_step"] = {kind: run.seconds for kind, run in runs.items()}
        log["ratios"] = ratios(runs)
        log["environment"] = {k: v for k, v in environment(0).items() if k != "command"}
        file = c.out / f"{c.pair[1].rpartition('/')[2]}-{c.precision}.json"
        file.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
