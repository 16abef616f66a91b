"""CPU time of one step of KD: this project beside a hand-written loop, timm and torchdistill.

    pip install timm torchdistill
    OMP_NUM_THREADS=1 python benchmarks/compare_peers.py --out results/compare_peers

All work on the same images with the same models, loss, optimizer and precision (float32) in one process, and
take turns, a few steps at a time. The others get normalised batches that lie ready in memory; here a step
also reads its images, flips and crops them, and sums up losses and accuracy. timm's step is that of its
`LogitDistillationTask`, torchdistill's that of its `DistillationBox`. One that is not installed is left out.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from mdistiller import create_model, get_recipe
from mdistiller.runs.environment import environment
from mdistiller.runs.progress import Silent
from mdistiller.training.choose import build_fastest
from mdistiller.training.distributed import World
from mdistiller.training.task import get_task

CLASSES, TEMPERATURE, WEIGHT = 100, 4.0, 0.9
Step = Callable[[], None]
Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Command:
    """Steps of all, in turn."""

    out: Path | None = None
    """Folder for compare_peers.json and compare_peers.md."""
    pair: tuple[str, str] = ("timm/resnet34", "timm/resnet18")
    """Teacher and student."""
    image_size: int = 64
    """Side of the images in pixels."""
    batch_size: int = 32
    """Images a step."""
    rounds: int = 6
    """Turns of each; the first is not counted."""
    steps: int = 3
    """Steps a turn."""


def models(c: Command) -> tuple[nn.Module, nn.Module]:
    """Builds teacher and student, the same ones on every call."""
    torch.manual_seed(0)
    teacher, student = (create_model(name, CLASSES) for name in c.pair)
    return teacher.eval().requires_grad_(False), student.train()


def sgd(student: nn.Module) -> torch.optim.SGD:
    """Builds the optimizer of every variant."""
    return torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def hand_written(c: Command, batches: Batches) -> Step:
    """Returns a step as one writes it without a library."""
    teacher, student = models(c)
    optimizer, ready = sgd(student), cycle(batches)

    def step() -> None:
        image, target = next(ready)
        with torch.no_grad():
            soft = (teacher(image) / TEMPERATURE).softmax(1)
        logits = student(image)
        kd = F.kl_div((logits / TEMPERATURE).log_softmax(1), soft, reduction="batchmean") * TEMPERATURE**2
        loss = (1 - WEIGHT) * F.cross_entropy(logits, target) + WEIGHT * kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timm(c: Command, batches: Batches) -> Step:
    """Returns a step of timm's logit distillation task."""
    from timm.task import LogitDistillationTask

    teacher, student = models(c)
    task = LogitDistillationTask(
        student,
        teacher,
        nn.CrossEntropyLoss(),
        task_loss_weight=1 - WEIGHT,
        distill_loss_weight=WEIGHT,
        temperature=TEMPERATURE,
        verbose=False,
    )
    task.train()
    optimizer, ready = sgd(student), cycle(batches)

    def step() -> None:
        loss = task(*next(ready))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def torchdistill(c: Command, batches: Batches) -> Step:
    """Returns a step of torchdistill's distillation box."""
    from torchdistill.core.distillation import DistillationBox

    teacher, student = models(c)
    kd = {"temperature": TEMPERATURE, "alpha": 1 - WEIGHT, "reduction": "batchmean"}
    # The logits: the output of the last linear layer.
    heads = [
        [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1] for model in (teacher, student)
    ]
    kd |= {"teacher_module_path": heads[0], "teacher_module_io": "output"}
    kd |= {"student_module_path": heads[1], "student_module_io": "output"}
    optimizer = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    config = {
        "num_epochs": 1,
        "teacher": {
            "requires_grad": False,
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": heads[:1]},
        },
        "student": {"forward_proc": "forward_batch_only", "forward_hook": {"output": heads[1:]}},
        "optimizer": {"key": "SGD", "kwargs": optimizer},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "model_term": {"weight": 0},
                "sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1}},
            },
        },
    }
    box = DistillationBox(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)
    ready = cycle(batches)

    def step() -> None:
        image, target = next(ready)
        box.pre_forward_process()
        loss = box.forward_process(image, target, supp_dict={})
        box.post_forward_process(loss)

    return step


def ours(c: Command, batches: Batches) -> Step:
    """Returns a step of this project's trainer with the recipe's defaults, in float32."""
    task, world = get_task("classification"), World(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.pt"
        torch.save(models(c)[0].state_dict(), weights)
        config = get_recipe(f"folder.kd.{'_'.join(c.pair)}").replace(
            data={"kind": "synthetic", "synthetic_classes": CLASSES, "image_size": c.image_size},
            teacher={"checkpoint": weights},
            method={"task_weight": 1 - WEIGHT, "weight": WEIGHT, "temperature": TEMPERATURE},
            batch_size=c.batch_size,
            precision="float32",
            epochs=1000,
            diagnostics=False,
        )
        (config,), (trainer,), source = build_fastest(task, [config], world, Silent())
    print(f"layout: {config.layout}", file=sys.stderr)
    source.open(Silent())
    trainer.start_epoch()

    def prepared() -> Iterator[tuple[Any, Any]]:
        while True:
            yield from source.next_batches(trainer.step, 1)[0]

    ready = prepared()

    def step() -> None:
        trainer.train_step(*next(ready))

    return step


def main(c: Command) -> None:
    """Times all variants in turn, and prints their ratios."""
    torch.manual_seed(0)
    shape = (c.batch_size, 3, c.image_size, c.image_size)
    batches = [(torch.randn(shape), torch.randint(CLASSES, (c.batch_size,))) for _ in range(4)]
    makers = {"mdistiller": ours, "hand-written loop": hand_written}
    makers |= {
        maker.__name__: maker for maker in (timm, torchdistill) if importlib.util.find_spec(maker.__name__)
    }
    steps = {name: make(c, batches) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(c.rounds):
        for name in (*list(steps)[turn % len(steps) :], *list(steps)[: turn % len(steps)]):
            start = time.process_time()
            for _ in range(c.steps):
                steps[name]()
            times[name].append(1000 * (time.process_time() - start) / c.steps)
        print(f"round {turn + 1} of {c.rounds}", file=sys.stderr)
    lines = ["| | CPU ms a step | lowest – highest | this / mdistiller |", "| --- |" + " ---: |" * 3]
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found[1:], times["mdistiller"][1:], strict=True))
        low, high = min(found[1:]), max(found[1:])
        lines.append(
            f"| {name} | {statistics.median(found[1:]):.0f} | {low:.0f} – {high:.0f} | {ratio:.2f} |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    if c.out is not None:
        c.out.mkdir(parents=True, exist_ok=True)
        env = environment(0)
        del env["command"]  # it may have paths; the command is at the top of this file
        settings = {name: getattr(c, name) for name in ("pair", "image_size", "batch_size", "steps")}
        result = {"environment": env, "settings": settings, "cpu_ms_a_step_by_turn": times}
        (c.out / "compare_peers.json").write_text(json.dumps(result, indent=1) + "\n")
        (c.out / "compare_peers.md").write_text(table)


if __name__ == "__main__":
    main(tyro.cli(Command))
