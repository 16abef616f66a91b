"""Every method on real CIFAR-100 images: does its loss fall, and what does a step cost beside plain training?

    python benchmarks/methods.py --data-root DIR --teacher-checkpoint FILE --out results/methods

All methods run in one process, in turn, from the same weights and on the same batches; plain training
runs first and last. Times are those of a step (augmentation, teacher, forward, backward, update; not the
reading of images): the median after the first five. Losses are the distillation losses at full weight, in
evaluation mode, on the first batch without augmentation, before the first step and after the last. Beside
them stands one measure for all: the KD loss (temperature 4) of the same logits.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from mdistiller.analysis.methods import describe_method
from mdistiller.data import Splits, load_data
from mdistiller.engine.distributed import World, pick_device
from mdistiller.engine.log import environment
from mdistiller.engine.teachers import build_model
from mdistiller.engine.trainer import Trainer
from mdistiller.functional import kd_loss
from mdistiller.methods import list_methods
from mdistiller.models import ModelConfig, create_model
from mdistiller.recipes import get_recipe, split_pair
from mdistiller.types import Batch, Outputs

WARMUP = 5


@dataclass
class Command:
    """Steps of every method on one pair."""

    data_root: Path
    """CIFAR-100, unpacked."""
    teacher_checkpoint: Path
    """The teacher's weights."""
    out: Path
    """Folder for methods.json and methods.md."""
    pair: str = "resnet32x4_resnet8x4"
    """TEACHER_STUDENT of family cifar100."""
    methods: tuple[str, ...] = ()
    """Which ones; all by default."""
    steps: int = 24
    """Steps of each."""
    images: int = 256
    """The training images, so few that every one comes several times: memory banks fill only then."""
    device: str = "auto"
    """auto, cpu or cuda."""


def run(name: str, c: Command, splits: Splits, teacher: nn.Module, here: World) -> dict[str, Any]:
    """One method's losses before and after, and the milliseconds of each step."""
    student_name = split_pair(c.pair)[1]
    recipe = f"student.{student_name}" if name == "none" else f"{name}.{c.pair}"
    config = get_recipe(f"cifar100.{recipe}").model_copy(update={"max_steps": c.steps})
    torch.manual_seed(0)
    student = create_model(student_name, splits.num_classes)
    trainer = Trainer(config, splits, student, None if name == "none" else copy.deepcopy(teacher), here)
    batches = (raw for epoch in range(c.steps) for raw in trainer.train_loader.epoch(epoch))
    first = next(iter(trainer.train_loader.epoch(0)))
    before, times = losses(trainer, first, teacher), []
    trainer.learner.train()
    trainer.augment.train()
    for raw in islice(batches, c.steps):
        wait(here)
        start = time.perf_counter()
        trainer.train_step(raw)
        wait(here)
        times.append(1000 * (time.perf_counter() - start))
    return {"name": name, "before": before, "after": losses(trainer, first, teacher), "ms": times[WARMUP:]}


def losses(trainer: Trainer, raw: Batch, teacher: nn.Module) -> tuple[float, float]:
    """The sum of the distillation losses (for plain training: the task's) at full weight, and the KD loss."""
    trainer.learner.eval()
    trainer.augment.eval()
    views = [trainer.augment(raw)] * trainer.views
    batch = Batch(*(torch.cat(parts) for parts in zip(*views, strict=True)))
    torch.manual_seed(0)  # for methods that draw
    with torch.no_grad():
        taught = trainer.teacher(batch.image) if trainer.teacher else Outputs(batch.image.new_zeros(0), {})
        named, logits = trainer.learner(batch, taught, torch.ones((), device=batch.image.device))
        kd = kd_loss(logits, teacher.eval()(batch.image)).item()
    return sum(value.item() for key, value in named.items() if key != "task" or len(named) == 1), kd


def wait(here: World) -> None:
    """Until the device has done its work."""
    if here.device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]], plain: float) -> str:
    """The figures as Markdown."""
    lines = [
        "| method | extra parameters | its loss, before → after | KD loss | ms a step | of plain training |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ms = statistics.median(row["ms"])
        own, kd = (f"{a:.4g} → {b:.4g}" for a, b in zip(row["before"], row["after"], strict=True))
        extra = f"{row['extra_parameters']:,}"
        lines.append(f"| `{row['name']}` | {extra} | {own} | {kd} | {ms:.1f} | {ms / plain:.2f} |")
    return "\n".join(lines) + "\n"


def main(c: Command) -> None:
    """Measure, and write the table."""
    here = World(pick_device(c.device))
    names = split_pair(c.pair)
    data = get_recipe(f"cifar100.kd.{c.pair}").data
    data = data.model_copy(update={"root": c.data_root, "train_limit": c.images, "test_limit": 100})
    splits = load_data(data)
    teacher = build_model(ModelConfig(name=names[0], checkpoint=c.teacher_checkpoint), splits.num_classes)
    teacher.to(here.device)
    student = create_model(names[1], splits.num_classes)
    chosen = c.methods or (*list_methods(), "dkd+reviewkd", "dot", "lskd-dkd", "sdd-dkd", "ctkd-dkd")
    rows = []
    for name in ("none", *(n for n in chosen if n != "none"), "none"):
        row = run(name, c, splits, teacher, here)
        method = "kd" if name == "dot" else name
        row["extra_parameters"] = describe_method(method, student, teacher)["extra_parameters"]
        rows.append(row)
        print(table([row], 1.0).splitlines()[-1], flush=True)
    plain = statistics.median(ms for row in rows if row["name"] == "none" for ms in row["ms"])
    c.out.mkdir(parents=True, exist_ok=True)
    log = {"environment": environment(0), "pair": c.pair, "plain_ms": plain, "rows": rows}
    (c.out / "methods.json").write_text(json.dumps(log, indent=1))
    (c.out / "methods.md").write_text(table(rows[:-1], plain))


if __name__ == "__main__":
    main(tyro.cli(Command))
