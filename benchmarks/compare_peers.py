"""CPU time of a step of KD: this project beside a hand-written loop, timm, torchdistill and the reference.

    pip install timm torchdistill
    export OMP_NUM_THREADS=1
    python benchmarks/compare_peers.py --out results/compare_peers
    python benchmarks/compare_peers.py --out results/compare_peers --name photos --photos DIR
    python benchmarks/compare_peers.py --out results/compare_peers --name cifar --pair resnet32x4 resnet8x4
        --image-size 32 --batch-size 64 --reference REF

Each variant is a process of its own with the same models, loss and optimizer, and they take turns of some
steps. A step is all that a trainer does for a batch. With `--photos`, each reads, crops and flips the images
of the folder (train/CLASS, val/CLASS) by its own loader, in its own process, so a turn of as many steps as
the folder has batches is an epoch. Without it, the peers get normalized batches that lie ready in memory,
while ours still crops and flips; the reference reads arrays through PIL. timm's step is that of its
`LogitDistillationTask`, which takes timm's models alone, torchdistill's that of its `DistillationBox`, the
reference's that of its trainer.
The time is the processor's. A package that is not installed is left out.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from turns import paired_ratio, serve, take_turns

CLASSES, TEMPERATURE, WEIGHT = 100, 4.0, 0.9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Step = Callable[[], None]
Batches = Iterator[tuple[Tensor, Tensor]]


class Command(BaseModel):
    """Steps of all variants, in turn."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str = "plain"
    """Name of the result."""
    out: Path | None = None
    """Folder for NAME.json and NAME.md."""
    pair: tuple[str, str] = ("timm/resnet34", "timm/resnet18")
    """Teacher and student, with random weights."""
    photos: Path | None = None
    """Folder of photographs with train/CLASS and val/CLASS."""
    reference: Path | None = None
    """Clone of the reference code base, which knows CIFAR's models only."""
    image_size: int = 64
    """Side of the images in pixels."""
    batch_size: int = 32
    """Images a step."""
    rounds: int = 8
    """Turns of each; the first is not counted."""
    steps: int = 3
    """Steps a turn."""


def classes(c: Command) -> int:
    """Returns the number of classes: of the photographs, or of CIFAR-100."""
    return CLASSES if c.photos is None else sum(path.is_dir() for path in (c.photos / "train").iterdir())


def models(c: Command) -> tuple[nn.Module, nn.Module]:
    """Builds teacher and student, the same ones on every call."""
    from mdistiller import create_model

    torch.manual_seed(0)
    teacher, student = (create_model(name, classes(c)) for name in c.pair)
    return teacher.eval().requires_grad_(False), student.train()


def sgd(student: nn.Module) -> torch.optim.SGD:
    """Builds the optimizer of every variant."""
    return torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def batches(c: Command) -> Batches:
    """Yields batches without end: read by torchvision and torch's loader, or ready in memory."""
    if c.photos is None:
        torch.manual_seed(0)
        shape = (c.batch_size, 3, c.image_size, c.image_size)
        return cycle([(torch.randn(shape), torch.randint(CLASSES, (c.batch_size,))) for _ in range(4)])
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    change = T.Compose(
        [T.RandomResizedCrop(c.image_size), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
    )
    images = ImageFolder(str(c.photos / "train"), change)
    return endless(torch.utils.data.DataLoader(images, c.batch_size, shuffle=True, drop_last=True))


def timm_batches(c: Command) -> Batches:
    """Yields batches as timm's script reads them, or those that lie ready."""
    if c.photos is None:
        return batches(c)
    from timm.data.loader import create_loader
    from torchvision.datasets import ImageFolder

    return endless(
        create_loader(
            ImageFolder(str(c.photos / "train")),
            (3, c.image_size, c.image_size),
            c.batch_size,
            is_training=True,
            use_prefetcher=False,
            color_jitter=0,
            num_workers=0,
            persistent_workers=False,
            device=torch.device("cpu"),
        )
    )


def endless(loader: Any) -> Batches:
    """Yields the batches of epoch after epoch."""
    while True:
        yield from loader


def autocast(precision: str) -> Any:
    """Returns the context of a forward pass."""
    return nullcontext() if precision == "float32" else torch.autocast("cpu", torch.bfloat16)


def hand_written(c: Command, precision: str) -> Step:
    """Returns a step as one writes it without a library."""
    teacher, student = models(c)
    optimizer, ready = sgd(student), batches(c)

    def step() -> None:
        image, target = next(ready)
        with autocast(precision):
            with torch.no_grad():
                soft = (teacher(image) / TEMPERATURE).softmax(1)
            logits = student(image)
            kd = F.kl_div((logits / TEMPERATURE).log_softmax(1), soft, reduction="batchmean")
            loss = (1 - WEIGHT) * F.cross_entropy(logits, target) + WEIGHT * kd * TEMPERATURE**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timm(c: Command, precision: str) -> Step:
    """Returns a step of timm's logit distillation task."""
    from timm.task import LogitDistillationTask

    teacher, student = models(c)
    weights = {"task_loss_weight": 1 - WEIGHT, "distill_loss_weight": WEIGHT}
    task = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), **weights, temperature=TEMPERATURE, verbose=False
    )
    task.train()
    optimizer, ready = sgd(student), timm_batches(c)

    def step() -> None:
        with autocast(precision):
            loss = task(*next(ready))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def torchdistill(c: Command, precision: str) -> Step:
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
    ready = batches(c)

    def step() -> None:
        image, target = next(ready)
        box.pre_forward_process()
        loss = box.forward_process(image, target, supp_dict={})
        box.post_forward_process(loss)

    return step


def reference(c: Command, precision: str) -> Step:
    """Returns a step of the reference's trainer, which reads arrays through PIL."""
    from compare_reference import reference_step

    random = np.random.default_rng(0)
    images = random.integers(256, size=(50_000, 32, 32, 3), dtype=np.uint8)
    return reference_step(c, images, random.integers(CLASSES, size=50_000), method="KD", workers=0)


def ours(c: Command, precision: str, *, cached: bool = False) -> Step:
    """Returns a step of this project's trainer with the defaults of the recipe for one's own images."""
    from steps import steps_of

    from mdistiller import get_recipe
    from mdistiller.runs.progress import Reporter
    from mdistiller.training.batches import ImageBatches
    from mdistiller.training.choose import build_fastest
    from mdistiller.training.distributed import World
    from mdistiller.training.task import get_task

    task, world = get_task("classification"), World(torch.device("cpu"))
    data: dict[str, Any] = {"kind": "synthetic", "synthetic_classes": CLASSES, "synthetic_samples": 5000}
    if c.photos is not None:
        data = {"kind": "folder", "root": c.photos, "workers": 0, "mean": MEAN, "std": STD}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.pt"
        torch.save(models(c)[0].state_dict(), weights)
        config = get_recipe(f"folder.kd.{'_'.join(c.pair)}").replace(
            data=data | {"image_size": c.image_size},
            teacher={"checkpoint": weights},
            method={"task_weight": 1 - WEIGHT, "weight": WEIGHT, "temperature": TEMPERATURE},
            batch_size=c.batch_size,
            precision=precision,
            epochs=1000,
            diagnostics=False,
            teacher_cache=Path(tempfile.mkdtemp()) if cached else None,
            teacher_views=1 if cached else None,
        )
        config, trainer, source = build_fastest(task, config, world, Reporter())
    print(f"precision: {config.precision}, layout: {config.layout}", file=sys.stderr)
    assert isinstance(source, ImageBatches)
    return steps_of(trainer, source, fill=len(source.splits.train) if cached else 0)


OURS = "mdistiller, float32"
VARIANTS: dict[str, tuple[Callable[..., Step], str, dict[str, Any]]] = {
    OURS: (ours, "float32", {}),
    "mdistiller, defaults": (ours, "auto", {}),
    "mdistiller, float32, cached": (ours, "float32", {"cached": True}),
    "mdistiller, defaults, cached": (ours, "auto", {"cached": True}),
    "hand-written loop, float32": (hand_written, "float32", {}),
    "hand-written loop, bfloat16": (hand_written, "bfloat16", {}),
    "timm, float32": (timm, "float32", {}),
    "timm, bfloat16": (timm, "bfloat16", {}),
    "torchdistill, float32": (torchdistill, "float32", {}),
    "reference, float32": (reference, "float32", {}),
}


def is_at_hand(c: Command, name: str) -> bool:
    """Whether a variant can run: its package is installed, or its clone is given."""
    make = VARIANTS[name][0]
    if make is reference:
        return c.reference is not None
    if make is timm and not all(model.startswith("timm/") for model in c.pair):
        return False  # its task reads attributes of timm's own models
    return make in (ours, hand_written) or importlib.util.find_spec(make.__name__) is not None


def main(c: Command) -> None:
    """Times all variants in turn, and prints their ratios."""
    from mdistiller.runs.environment import environment

    commands = {
        name: [sys.executable, __file__, "--worker", name, c.model_dump_json()]
        for name in VARIANTS
        if is_at_hand(c, name)
    }
    found = take_turns(commands, c.rounds, c.steps)
    times = {name: [cpu for cpu, _ in turns] for name, turns in found.items()}
    lines = ["| | CPU ms a step | lowest – highest | this / mdistiller, float32 |", "| --- |" + " ---: |" * 3]
    for name, turns in times.items():
        low, high = min(turns), max(turns)
        ratio = paired_ratio(turns, times[OURS])
        lines.append(f"| {name} | {statistics.median(turns):.0f} | {low:.0f} – {high:.0f} | {ratio:.2f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if c.out is not None:
        c.out.mkdir(parents=True, exist_ok=True)
        env = environment(0)
        del env["command"]  # it may have paths; the command is at the top of this file
        paths = ("out", "photos", "reference")
        settings = c.model_dump(exclude={*paths})
        result = {"environment": env, "settings": settings, "cpu_ms_a_step_by_turn": times}
        (c.out / f"{c.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (c.out / f"{c.name}.md").write_text(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        make, precision, options = VARIANTS[sys.argv[2]]
        serve(make(Command.model_validate_json(sys.argv[3]), precision, **options))
    else:
        from flags import read

        main(read(Command))
