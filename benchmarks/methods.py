"""Every method on real CIFAR-100 images: does its loss fall, and what does a step cost beside plain training?

    python benchmarks/methods.py --data-root DIR --teacher-checkpoint FILE --out results/methods

All methods run in one process, one step of each in turn, so that a disturbance hits all alike; from the same
weights and on the same batches. Times are those of a step (augmentation, teacher, forward, backward, update;
not the reading of images): the median after the first five. Losses are at full weight, on the first batch
without augmentation, with the batch norm of training, before the first step and after the last: the whole
loss, its distillation part, and as one measure for all the KD loss (temperature 4) of the same logits.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
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
    steps: int = 40
    """Steps of each."""
    images: int = 256
    """The training images, so few that every one comes several times: memory banks fill only then."""
    device: str = "auto"
    """auto, cpu or cuda."""


def prepare(name: str, c: Command, splits: Splits, teacher: nn.Module, here: World) -> Trainer:
    """A trainer of one method, with the recipe's settings."""
    student_name = split_pair(c.pair)[1]
    recipe = f"student.{student_name}" if name == "none" else f"{name}.{c.pair}"
    config = get_recipe(f"cifar100.{recipe}").model_copy(update={"max_steps": c.steps})
    torch.manual_seed(0)
    student = create_model(student_name, splits.num_classes)
    return Trainer(config, splits, student, None if name == "none" else copy.deepcopy(teacher), here)


def losses(trainer: Trainer, raw: Batch, teacher: nn.Module) -> tuple[float, float, float]:
    """The whole loss, its distillation part, and the KD loss; the trainer stays as it is."""
    trainer.augment.eval()
    views = [trainer.augment(raw)] * trainer.views
    trainer.augment.train()
    batch = Batch(*(torch.cat(parts) for parts in zip(*views, strict=True)))
    learner = copy.deepcopy(trainer.learner)  # batch norm and memory banks are about to change
    torch.manual_seed(0)  # for methods that draw
    with torch.no_grad():
        taught = trainer.teacher(batch.image) if trainer.teacher else Outputs(batch.image.new_zeros(0), {})
        named, logits = learner(batch, taught, torch.ones((), device=batch.image.device))
        kd = kd_loss(logits, teacher.eval()(batch.image)).item()
    whole = sum(value.item() for value in named.values())
    return whole, whole - named["task"].item(), kd


def wait(here: World) -> None:
    """Until the device has done its work."""
    if here.device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]], plain: float) -> str:
    """The figures as Markdown."""
    lines = [
        "| method | extra parameters | loss | distillation | KD loss | ms a step | of plain training |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ms = statistics.median(row["ms"])
        falls = " | ".join(f"{a:.4g} → {b:.4g}" for a, b in zip(row["before"], row["after"], strict=True))
        extra = f"{row['extra_parameters']:,}"
        lines.append(f"| `{row['name']}` | {extra} | {falls} | {ms:.1f} | {ms / plain:.2f} |")
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
    names_in_turn = ["none", *(n for n in chosen if n != "none")]
    trainers = {name: prepare(name, c, splits, teacher, here) for name in names_in_turn}
    loader = trainers["none"].train_loader
    raws = islice((raw for epoch in range(c.steps) for raw in loader.epoch(epoch)), c.steps)
    first = next(iter(loader.epoch(0)))
    before = {name: losses(trainer, first, teacher) for name, trainer in trainers.items()}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for step, raw in enumerate(raws):
        for name, trainer in trainers.items():
            wait(here)
            start = time.perf_counter()
            trainer.train_step(raw)
            wait(here)
            times[name].append(1000 * (time.perf_counter() - start))
        print(f"step {step + 1} of {c.steps}", file=sys.stderr)
    rows = []
    for name, trainer in trainers.items():
        method = "kd" if name == "dot" else name
        extra = describe_method(method, student, teacher)["extra_parameters"]
        row = {"name": name, "extra_parameters": extra, "ms": times[name][WARMUP:]}
        rows.append(row | {"before": before[name], "after": losses(trainer, first, teacher)})
    plain = statistics.median(rows[0]["ms"])
    c.out.mkdir(parents=True, exist_ok=True)
    about = environment(0)
    del about["command"]  # the module's docstring has it, without the paths of this machine
    log = {"environment": about, "pair": c.pair, "steps": c.steps, "images": c.images}
    log |= {"plain_ms": plain, "rows": rows}
    (c.out / "methods.json").write_text(json.dumps(log, indent=1))
    (c.out / "methods.md").write_text(table(rows, plain))


if __name__ == "__main__":
    main(tyro.cli(Command))
