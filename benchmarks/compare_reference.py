"""One training step of DKD here and in the reference code base, on the same images and models.

    git clone https://github.com/megvii-research/mdistiller REF    # and: pip install yacs tqdm
    python benchmarks/compare_reference.py --reference REF --out results/compare_reference

Both packages are called mdistiller, so each variant is a process of its own. They take turns, a few steps at
a time, and only one works at a time: what disturbs the machine hits all. A step is what the trainer does for
a batch, reading it included: the reference reads through PIL, torchvision and two loader processes, and looks
at loss and accuracy each step; here images lie on the device, and figures are added up there. The table of
the teacher's logits has made-up values: only the look-up counts. A turn has whole passes of a teacher that
runs ahead, which it does on a GPU.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from turns import serve, take_turns

IMAGES = 50_000  # an epoch as long as CIFAR's: the reference starts its loader's processes in each
# Ours, by name: precision, and whether a full cache takes the teacher's place.
OURS = {
    "float32, teacher live": ("float32", False),
    "float32, teacher cached": ("float32", True),
    "bfloat16, teacher live": ("bfloat16", False),
    "bfloat16, teacher cached": ("bfloat16", True),
}
REFERENCE = "reference code base"


class Command(BaseModel):
    """Steps of both, in turn."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    reference: Path
    """A clone of the reference code base."""
    out: Path | None = None
    """Folder for compare.json and compare.md."""
    pair: tuple[str, str] = ("resnet32x4", "resnet8x4")
    """Teacher and student."""
    batch_size: int = 64
    """Images a step."""
    rounds: int = 5
    """Turns of each; the first is not counted."""
    steps: int = 6
    """Steps a turn; on a GPU rounded up to whole passes of the teacher, 16 steps at batch 64."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """torch.compile for ours."""


def reference_step(
    c: Any, images: np.ndarray, labels: np.ndarray, *, method: str = "DKD", workers: int = 2
) -> Callable[[], None]:
    """A step of the reference's trainer."""
    sys.path.insert(0, str(c.reference))
    board: Any = type(sys)("tensorboardX")
    board.SummaryWriter = object  # never called
    sys.modules.setdefault("tensorboardX", board)
    from mdistiller.engine.cfg import CFG
    from mdistiller.engine.trainer import BaseTrainer
    from mdistiller.engine.utils import AverageMeter
    from PIL import Image
    from torchvision import transforms as T

    from mdistiller import distillers
    from mdistiller.models import cifar_model_dict  # type: ignore[attr-defined]

    class Images(torch.utils.data.Dataset):
        change = T.Compose(
            [
                T.RandomCrop(32, padding=4),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
            ]
        )

        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, i: int) -> tuple[Any, int, int]:
            return self.change(Image.fromarray(images[i])), int(labels[i]), i

    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, **options: self  # type: ignore[method-assign]
    student, teacher = (cifar_model_dict[name][0](num_classes=100) for name in reversed(c.pair))
    distiller = getattr(distillers, method)(student, teacher, CFG)
    trainer = BaseTrainer.__new__(BaseTrainer)  # its constructor opens logs
    trainer.distiller = torch.nn.DataParallel(distiller.cuda() if torch.cuda.is_available() else distiller)
    trainer.optimizer = trainer.init_optimizer(CFG)
    trainer.distiller.train()
    loader = torch.utils.data.DataLoader(Images(), c.batch_size, shuffle=True, num_workers=workers)
    names = ("training_time", "data_time", "losses", "top1", "top5")
    meters = {name: AverageMeter() for name in names}
    batches = (batch for _ in count() for batch in loader)
    return lambda: trainer.train_iter(next(batches), 30, meters)


def our_step(c: Command, images: np.ndarray, labels: np.ndarray, name: str) -> Callable[[], None]:
    """Returns a step of this project's trainer; the teacher runs ahead where that is the default."""
    from steps import steps_of

    from mdistiller import ImageSet, Splits, create_model, get_recipe, register_dataset
    from mdistiller.training.build import build_run
    from mdistiller.training.distributed import World, pick_device
    from mdistiller.training.task import get_task

    precision, cached = OURS[name]
    data = ImageSet(images=torch.from_numpy(images), labels=torch.from_numpy(labels))
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    classes = tuple(map(str, range(100)))
    splits = Splits(train=data, test=data, classes=classes, mean=mean, std=std, image_size=32, description="")
    register_dataset("computed")(lambda config: splits)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.pt"
        torch.save(create_model(c.pair[0], 100).state_dict(), weights)
        config = get_recipe(f"cifar100.dkd.{'_'.join(c.pair)}").replace(
            data={"kind": "computed"},
            teacher={"checkpoint": weights},
            batch_size=c.batch_size,
            precision=precision,
            compile=c.compile,
            diagnostics=False,
            teacher_cache=Path(tempfile.mkdtemp()) if cached else None,
            teacher_views=1 if cached else None,
        )
        world = World(pick_device("auto"))
        trainer, source = build_run(get_task("classification"), config, world)
    return steps_of(trainer, source, fill=len(data) if cached else 0)


def work(c: Command, file: str, name: str) -> None:
    """Serves the steps of a variant."""
    content = np.load(file)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = torch.cuda.is_available()  # as both code bases do
    if name == REFERENCE:
        step = reference_step(c, content["images"], content["labels"])
    else:
        step = our_step(c, content["images"], content["labels"], name)
    serve(step, torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)


def main(c: Command) -> None:
    """Start the workers, let them take turns, and print the ratios."""
    from mdistiller.runs.environment import environment

    if torch.cuda.is_available():  # whole passes of a teacher that runs ahead
        ahead = max(1, 1024 // c.batch_size)
        c.steps = ahead * math.ceil(c.steps / ahead)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "images.npz")
        labels = random.integers(100, size=IMAGES)
        np.savez(file, images=random.integers(256, size=(IMAGES, 32, 32, 3), dtype=np.uint8), labels=labels)
        worker = [sys.executable, __file__, "--worker", file]
        commands = {name: [*worker, name, c.model_dump_json()] for name in (REFERENCE, *OURS)}
        found = take_turns(commands, c.rounds, c.steps)
    # By the clock: the loader's processes and a GPU work beside this one.
    times = {name: [clock for _, clock in turns] for name, turns in found.items()}
    medians = {name: statistics.median(turns) for name, turns in times.items()}
    lines = ["| | ms a step | lowest – highest | images/s | reference / this |", "| --- |" + " ---: |" * 4]
    for name, median in medians.items():
        low, high = min(times[name]), max(times[name])
        rate, ratio = 1000 * c.batch_size / median, medians[REFERENCE] / median
        lines.append(f"| {name} | {median:.1f} | {low:.1f} – {high:.1f} | {rate:,.0f} | {ratio:.2f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if c.out is not None:
        c.out.mkdir(parents=True, exist_ok=True)
        env = environment(0)
        del env["command"]  # it has paths; how to run this stands at the top
        settings = {name: getattr(c, name) for name in ("pair", "batch_size", "rounds", "steps", "compile")}
        result = {"environment": env, "settings": settings, "ms_a_step_by_turn": times}
        (c.out / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
        (c.out / "compare.md").write_text(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Command.model_validate_json(sys.argv[4]), *sys.argv[2:4])
    else:
        from flags import read

        main(read(Command))
