"""Students that learned from unlabeled images, beside the same students from scratch and by KD.

    python benchmarks/embed_rows.py --images DIR --teacher resnet56 --teacher-weights FILE --student resnet20

embed_images.py writes DIR: photos/ (every training image, without classes) and 1/, 10/ and 100/, each with
train/CLASS (that percentage of the same images) and val/CLASS. Each student is trained on the labels of each
percentage three times: from random weights, from the weights that `embed` found on photos/, and from random
weights by KD. KD's teacher is the same network: with its own classifier (`--teacher-classifies`), or
fine-tuned on the same labels first. Every run uses its recipe's defaults. Runs continue where they stopped.
"""

import json
from pathlib import Path
from typing import Any

from flags import read
from resumable import keep, last_evaluation, run_command, spread

from mdistiller.runs.environment import environment
from mdistiller.settings import Settings


class Command(Settings):
    """Train everything, and write the table."""

    images: Path
    """Folder with photos/, 1/, 10/ and 100/."""
    teacher: str
    """Model of the teacher."""
    teacher_weights: Path
    """Its weights."""
    student: str
    """Model of the student."""
    out: Path = Path("runs/embed")
    """Folder of the runs and of embed_rows.json and .md."""
    teacher_classifies: bool = False
    """The teacher's classifier knows the classes of DIR."""
    image_size: int = 32
    """Side of the images in pixels."""
    padding: int | None = None
    """Padding of the random crops. None: the recipe's augmentation."""
    embed_epochs: int = 10
    """Epochs without labels."""
    epochs: tuple[int, int, int] = (150, 40, 10)
    """Epochs with 1, 10 and 100 percent of the labels."""
    seeds: int = 3
    """Students of each kind."""
    precision: str = "float32"
    """Autocast precision of every run."""
    logs: Path | None = None
    """Folder that gets the runs' thinned logs and the table."""


PARTS = (1, 10, 100)


def train(c: Command, name: str, recipe: str, data: str, epochs: int, *words: Any) -> list[dict[str, Any]]:
    """Trains a run on a folder of the images, or resumes it; returns the lines of its metrics."""
    same = ["--data.root", c.images / data, "--data.image-size", c.image_size, "--epochs", epochs]
    same += ["--eval-every", max(1, epochs // 2), "--precision", c.precision]
    same += [] if c.padding is None else ["--augment.padding", c.padding]
    return run_command(c.out / name, recipe, *same, *words)


def main(c: Command) -> None:
    """Trains every run, seed by seed, and writes the table after each."""
    teacher: tuple[Any, ...] = ("--teacher", c.teacher, "--teacher.checkpoint", c.teacher_weights)
    found: dict[str, list[float]] = {}

    def add(row: str, value: float) -> None:
        found.setdefault(row, []).append(value)
        write(c, found)

    for seed in range(c.seeds):
        same = ("--seed", seed)
        probe = ("--data.probe", c.images / "100")
        embed = f"embed.tokens.{c.student}"
        train(c, f"embed-s{seed}", embed, "photos", c.embed_epochs, *teacher, *probe, *same)
        last = last_evaluation(c.out / f"embed-s{seed}")
        for metric in ("knn", "linear", "agreement"):
            add(f"embed, no labels: {metric}", last[metric])
        backbone = ("--student.checkpoint", c.out / f"embed-s{seed}")
        for part, epochs in zip(PARTS, c.epochs, strict=True):
            guide = teacher
            if not c.teacher_classifies:
                recipe = f"folder.teacher.{c.teacher}"
                weights = ("--student.checkpoint", c.teacher_weights)
                lines = train(c, f"teacher-{part}", recipe, str(part), epochs, *weights)
                guide = ("--teacher", c.out / f"teacher-{part}")
                if not seed:
                    add(f"{part} % of the labels: KD's teacher", lines[-1]["last"]["top1"])
            kinds: dict[str, tuple[str, tuple[Any, ...]]] = {
                "from scratch": ("student", ()),
                "KD": ("kd", guide),
                "from embed": ("finetune", backbone),
            }
            for kind, (method, words) in kinds.items():
                name = f"{kind.replace(' ', '-')}-{part}-s{seed}"
                lines = train(c, name, f"folder.{method}.{c.student}", str(part), epochs, *words, *same)
                add(f"{part} % of the labels: {kind}", lines[-1]["last"]["top1"])


def write(c: Command, found: dict[str, list[float]]) -> None:
    """Writes the table of the runs so far."""
    lines = ["| | seeds | % |", "| --- | ---: | ---: |"]
    for name, values in found.items():
        lines.append(f"| {name} | {len(values)} | {spread(values)} |")
    env = environment(0)
    del env["command"]
    settings = c.model_dump(mode="json", exclude={"images", "out", "teacher_weights", "logs"})
    result = {"environment": env, "settings": settings, "percent": found}
    (c.out / "embed_rows.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (c.out / "embed_rows.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if c.logs is not None:
        runs = (path.parent for path in sorted(c.out.glob("*/metrics.jsonl")))
        keep(runs, result, c.logs, without=("classes", "diagnostics", "ema"))


if __name__ == "__main__":
    main(read(Command))
