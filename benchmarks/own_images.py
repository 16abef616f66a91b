"""The path of the tutorial on a folder of photographs: teacher, student alone, KD, DKD, feature methods.

    pip install timm
    git clone https://github.com/huggingface/pytorch-image-models TIMM
    python benchmarks/own_images.py --photos DIR --weights FILE --timm TIMM --out runs/own

DIR has train/CLASS and val/CLASS. With a file of pretrained weights the teacher is fine-tuned, without one it
is trained from scratch, both with the recipe's defaults. The students start from random weights. With a clone
of timm, its `train.py --kd-model-name` distils the same teacher into the same student for as many epochs,
with the same optimizer, schedule, temperature and weights. Finished runs are not repeated.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from flags import read
from resumable import run_command

from mdistiller import load_student
from mdistiller.runs.environment import environment
from mdistiller.settings import Settings
from mdistiller.training.task import load_config


class Command(Settings):
    """Train everything, and write the table."""

    photos: Path
    """Folder with train/CLASS and val/CLASS."""
    out: Path
    """Folder of the runs and of own_images.md and .json."""
    weights: Path | None = None
    """File of pretrained weights of the teacher."""
    timm: Path | None = None
    """Clone of timm. None: without its row."""
    teacher: str = "timm/tf_efficientnet_lite0"
    """Model of the teacher."""
    student: str = "timm/resnet10t"
    """Model of the student."""
    image_size: int = 96
    """Side of the images in pixels."""
    teacher_epochs: int = 8
    """Epochs of the teacher."""
    epochs: int = 20
    """Epochs of each student."""
    seeds: int = 3
    """Students of each kind."""
    features: tuple[str, ...] = ("fitnet", "rkd", "srrl")
    """Feature methods, the best of which counts."""


def train(c: Command, recipe: str, name: str, *words: Any) -> dict[str, Any]:
    """Trains a run on the photographs, or resumes it; returns its summary."""
    size = ("--data.root", c.photos, "--data.image-size", c.image_size)
    return run_command(c.out / name, recipe, *size, *words)[-1]


def timm_top1(c: Command, teacher: Path, like: Path, seed: int) -> float:
    """Distils with timm's script, with the settings of the run `like`; returns the last top-1 in percent."""
    from timm.models import save_for_hf

    assert c.timm is not None
    model = load_student(teacher)
    save_for_hf(model, c.out / "timm-teacher", model_config={"num_classes": model.num_classes})
    config = load_config(like / "config.json")
    kd: Any = config.method
    optim, out = config.optim, c.out / f"timm-s{seed}"
    found = list(out.glob("*/summary.csv"))
    if not found:
        words = [
            *("--data-dir", c.photos, "--model", c.student.removeprefix("timm/"), "--img-size", c.image_size),
            *("--num-classes", model.num_classes, "--kd-model-name", f"local-dir:{c.out / 'timm-teacher'}"),
            *("--kd-temperature", kd.temperature, "--task-loss-weight", kd.task_weight),
            *("--distill-loss-weight", kd.weight, "--opt", "momentum", "--lr", optim.lr, "--sched", "cosine"),
            *("--weight-decay", optim.weight_decay, "--momentum", optim.momentum, "--min-lr", 0),
            *("--warmup-epochs", round(optim.lr_warmup * config.epochs), "--epochs", config.epochs),
            *("--batch-size", config.batch_size, "--color-jitter", 0, "--seed", seed, "--workers", 2),
            *("--output", out, "--device", "cpu", "--checkpoint-hist", 1, "--crop-pct", 1),
        ]
        env = os.environ | {"PYTHONPATH": str(c.timm)}
        subprocess.run([sys.executable, c.timm / "train.py", *map(str, words)], check=True, env=env)
        found = list(out.glob("*/summary.csv"))
    with open(found[0], encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["eval_top1"])


def main(c: Command) -> None:
    """Trains teacher and students, and writes the table of last-epoch accuracies."""
    pretrained = () if c.weights is None else ("--student.checkpoint", c.weights)
    teacher = c.out / "teacher"
    top1 = train(c, f"folder.teacher.{c.teacher}", "teacher", *pretrained, "--epochs", c.teacher_epochs)[
        "last"
    ]["top1"]
    rows: dict[str, list[float]] = {f"teacher ({c.teacher})": [top1]}
    for seed in range(c.seeds):
        same = ("--epochs", c.epochs, "--seed", seed)
        for method in ("student", "kd", "dkd", *c.features):
            words = same if method == "student" else ("--teacher", teacher, *same)
            summary = train(c, f"folder.{method}.{c.student}", f"{method}-s{seed}", *words)
            name = "student alone" if method == "student" else method
            rows.setdefault(name, []).append(summary["last"]["top1"])
        if c.timm is not None:
            found = timm_top1(c, teacher, c.out / f"kd-s{seed}", seed)
            rows.setdefault("timm, --kd-model-name", []).append(found)
        write(c, rows)


def write(c: Command, rows: dict[str, list[float]]) -> None:
    """Writes the table of the runs so far."""
    alone = rows["student alone"]
    lines = ["| | top-1, % | difference to the student alone, by seed |", "| --- | ---: | ---: |"]
    for name, found in rows.items():
        text = f"{statistics.mean(found):.2f}"
        text += f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        gains = [] if name.startswith("teacher") or found is alone else zip(found, alone, strict=False)
        lines.append(f"| {name} | {text} | {', '.join(f'{a - b:+.2f}' for a, b in gains)} |")
    best = max(c.features, key=lambda name: statistics.mean(rows.get(name, [0.0])))
    table = "\n".join([*lines, "", f"Best feature method: {best}."]) + "\n"
    print(table)
    env = environment(0)
    del env["command"]
    settings = {
        name: getattr(c, name)
        for name in ("teacher", "student", "image_size", "teacher_epochs", "epochs", "seeds")
    }
    result = {"environment": env, "settings": settings, "top1": rows}
    (c.out / "own_images.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (c.out / "own_images.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main(read(Command))
