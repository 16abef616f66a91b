"""One step of `embed`, from a live and a cached teacher, beside a hand-written loop.

    OMP_NUM_THREADS=1 python benchmarks/embed_step.py [--rounds 16] [--out results/embed_step]

All rows match the teacher's embedding and patches by cosine behind linear heads, in float32, and take turns,
a step each. The loop flips, crops and normalizes whole batches in memory; `embed` draws crops and flips for
each image. Processor milliseconds; medians after the first two rounds, or with a cache after its first epoch.
A ratio is the median over rounds of a row's time divided by the loop's in the same round.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from flags import read
from steps import steps_of
from torch import nn
from turns import paired_ratio

from mdistiller.methods import method_config
from mdistiller.models import ModelConfig
from mdistiller.report.markup import markdown_table
from mdistiller.runs.environment import environment
from mdistiller.settings import Settings
from mdistiller.tasks.embed.config import EmbedConfig, EmbedData
from mdistiller.tasks.embed.recipes import embed
from mdistiller.training.build import build_run
from mdistiller.training.distributed import World, process_group
from mdistiller.training.task import get_task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOOP, EPOCH = "hand-written loop", 4
Step = Callable[[int], None]


class Command(Settings):
    """Time the steps in turn, and write the table."""

    teacher: str = "vit_small_patch16_224"
    """timm's name of the teacher, a transformer with random weights."""
    student: str = "resnet18"
    """timm's name of the student."""
    image_size: int = 96
    """Side of the images in pixels."""
    batch_size: int = 32
    """Images of a step."""
    rounds: int = 16
    """Turns of each row."""
    out: Path | None = None
    """Folder of embed_step.md and .json. None: only print."""


def hand_written(c: Command) -> Step:
    """Returns a step as one writes it without a library."""
    teacher: Any = timm.create_model(c.teacher, num_classes=0, img_size=c.image_size).eval()
    student: Any = timm.create_model(c.student, num_classes=0)
    heads = nn.ModuleList(nn.Linear(student.num_features, teacher.num_features) for _ in range(2))
    optimizer = torch.optim.AdamW([*student.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.05)
    images = torch.randint(0, 256, (EPOCH, c.batch_size, 3, c.image_size, c.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def step(number: int) -> None:
        batch = images[number % EPOCH]
        batch = batch.flip(3) if number % 2 else batch
        batch = F.pad(batch, [c.image_size // 8] * 4)[..., : c.image_size, : c.image_size]
        x = ((batch / 255) - mean) / std
        with torch.no_grad():
            tokens = teacher.forward_features(x)
            theirs = teacher.forward_head(tokens), tokens[:, teacher.num_prefix_tokens :]
        side = teacher.patch_embed.grid_size
        found = student.forward_features(x)
        patches = F.interpolate(found, side, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        ours = student.forward_head(found), patches
        losses = [
            (1 - F.cosine_similarity(head(a), b, dim=-1)).mean()
            for head, a, b in zip(heads, ours, theirs, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def config_of(c: Command, folder: Path) -> EmbedConfig:
    """Returns the recipe's run, on computed images, with the teacher's weights in a folder."""
    size, file = {"image_size": c.image_size}, folder / "teacher.pt"
    teacher = timm.create_model(c.teacher, num_classes=0, img_size=c.image_size)
    torch.save(teacher.state_dict(), file)
    return embed(f"timm/{c.student}").replace(
        data=EmbedData(kind="synthetic", synthetic_samples=EPOCH * c.batch_size, test_limit=8, **size),
        teacher=ModelConfig(name=f"timm/{c.teacher}", options={"img_size": c.image_size}, checkpoint=file),
        method=method_config("tokens", EmbedConfig.method_class, task_weight=0.0),
        batch_size=c.batch_size,
        precision="float32",
        layout="contiguous",
        epochs=200,
        device="cpu",
    )


def ours(config: EmbedConfig, world: World) -> Step:
    """Returns a step of the run of a config."""
    step = steps_of(*build_run(get_task("embed"), config, world))
    return lambda number: step()


def main(c: Command) -> None:
    """Prints the table, and writes it with the times of all rounds."""
    torch.manual_seed(0)
    with process_group("cpu") as world, tempfile.TemporaryDirectory() as folder:
        config = config_of(c, Path(folder))
        cached = config.replace(
            teacher_cache=Path(folder) / "cache", teacher_cache_taps=("norm", "pooled"), teacher_views=1
        )
        steps = {
            LOOP: hand_written(c),
            "embed": ours(config, world),
            "embed, cached teacher": ours(cached, world),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(c.rounds):
            for name, step in steps.items():
                start = time.process_time()
                step(number)
                times[name].append(1000 * (time.process_time() - start))
    times = {
        name: found[2 if number < 2 else EPOCH + 1 :] for number, (name, found) in enumerate(times.items())
    }
    rows: list[Any] = []
    for name, found in times.items():
        ratio = paired_ratio(found, times[LOOP][-len(found) :])
        rows.append([name, f"{statistics.median(found):.0f}", f"{ratio:.2f}"])
    table = markdown_table(["", "CPU ms a step", "of the loop's"], rows)
    print(table)
    if c.out is not None:
        c.out.mkdir(parents=True, exist_ok=True)
        (c.out / "embed_step.md").write_text(table, encoding="utf-8")
        log = {"environment": environment(0), "command": c.model_dump(mode="json"), "times": times}
        (c.out / "embed_step.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(read(Command))
