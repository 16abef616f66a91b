"""Compares settings of methods on ten classes of small images: superclasses of CIFAR-100.

    python benchmarks/ten_classes.py --data DIR --out runs/ten

DIR has cifar-100-python. Ten superclasses have 1,000 training images each (of 2,500) and 500 test images.
The recipes are those of CIFAR-10, with short schedules; the images stand in for CIFAR-10's. Runs continue
where they stopped.
"""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

from flags import read
from PIL import Image
from resumable import keep, last_evaluation, run_command, spread

from mdistiller.runs.environment import environment
from mdistiller.settings import Settings

IMAGES = 1000
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_outdoor_things": "bridge castle house road skyscraper",
}
WARM = 20 / 240
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kd, T 4": ("kd", {}),
    "kd, T 1, weights 0.5": ("kd", {"temperature": 1.0, "weight": 0.5, "task_weight": 0.5}),
    "dkd, beta 8, T 4, warmup": ("dkd", {"beta": 8.0, "temperature": 4.0, "warmup": WARM}),
    "dkd, beta 2, T 4, warmup": ("dkd", {"beta": 2.0, "temperature": 4.0, "warmup": WARM}),
    "dkd, beta 1, T 4": ("dkd", {"beta": 1.0, "temperature": 4.0, "warmup": 0.0}),
    "dkd, beta 1, T 1": ("dkd", {"beta": 1.0, "temperature": 1.0, "warmup": 0.0}),
    "fitnet, weight 100": ("fitnet", {"weight": 100.0}),
    "fitnet, weight auto": ("fitnet", {"weight": "auto"}),
    "at, weight 1000": ("at", {"weight": 1000.0}),
    "at, weight auto": ("at", {"weight": "auto"}),
}


class Command(Settings):
    """Train a teacher, then the student with every setting and seed, and write the table."""

    data: Path
    """Folder with cifar-100-python."""
    out: Path = Path("runs/ten")
    """Folder of the images, the runs and the table."""
    logs: Path | None = None
    """Folder that gets the runs' thinned logs and the table."""
    teacher: str = "resnet20"
    """Model of the teacher."""
    student: str = "resnet8"
    """Model of the student."""
    teacher_epochs: int = 40
    """Epochs of the teacher."""
    epochs: int = 15
    """Epochs of a student."""
    seeds: int = 3
    """Students of each setting."""
    precision: str = "float32"
    """Autocast precision of every run."""


def write_images(source: Path, root: Path) -> None:
    """Writes ROOT/train/CLASS and ROOT/val/CLASS."""
    meta = pickle.loads((source / "meta").read_bytes(), encoding="bytes")
    names = [name.decode() for name in meta[b"fine_label_names"]]
    superclass = {fine: name for name, group in SUPERCLASSES.items() for fine in group.split()}
    for split, name, count in (("train", "train", IMAGES // 5), ("test", "val", 100)):
        found = pickle.loads((source / split).read_bytes(), encoding="bytes")
        images = found[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        written: Counter[str] = Counter()
        for i, label in enumerate(found[b"fine_labels"]):
            fine = names[label]
            if fine in superclass and written[fine] < count:
                folder = root / name / superclass[fine]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[i]).save(folder / f"{i:05d}.png")
                written[fine] += 1


def main(c: Command) -> None:
    """Trains what is missing, and prints the table."""
    images = c.out / "images"
    if not (images / "val").is_dir():
        write_images(c.data / "cifar-100-python", images)
    data = ["--data.kind", "folder", "--data.root", images, "--data.image-size", 32]
    same = [*data, "--precision", c.precision, "--no-diagnostics"]
    teacher = c.out / "teacher"
    pair = f"{c.teacher}_{c.student}"
    run_command(
        teacher, f"cifar10.teacher.{c.teacher}", *same, "--epochs", c.teacher_epochs, "--eval-every", 20
    )
    table: dict[str, Any] = {"environment": environment(0), "teacher": last_evaluation(teacher)["top1"]}
    rows: dict[str, list[float]] = {"student alone": [], **{name: [] for name in METHODS}}
    folders = [teacher]
    for seed in range(c.seeds):
        for name in rows:
            folder = c.out / f"{name.replace(',', '').replace(' ', '-')}-s{seed}"
            words: list[Any] = [f"cifar10.student.{c.student}"]
            if name in METHODS:
                method, settings = METHODS[name]
                words = [f"cifar10.{method}.{pair}", "--teacher.checkpoint", teacher]
                words += [
                    word
                    for key, value in settings.items()
                    for word in (f"--method.{key.replace('_', '-')}", value)
                ]
            run_command(folder, *words, *same, "--epochs", c.epochs, "--eval-every", 5, "--seed", seed)
            rows[name].append(last_evaluation(folder)["top1"])
            folders.append(folder)
    table["top1"] = rows
    (c.out / "table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    print("| | top-1, % | by seed |\n| --- | ---: | --- |")
    print(f"| teacher ({c.teacher}) | {table['teacher']:.2f} | |")
    for name, values in rows.items():
        print(f"| {name} | {spread(values)} | {', '.join(f'{value:.2f}' for value in values)} |")
    if c.logs is not None:
        keep(folders, table, c.logs, without=("classes",))


if __name__ == "__main__":
    main(read(Command))
