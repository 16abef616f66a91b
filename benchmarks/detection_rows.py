r"""Students of one teacher on a small detection set: average precision, and differences for each seed.

    python benchmarks/blood_cells.py CELLS
    nice -n 19 python benchmarks/detection_rows.py cells --root CELLS --tiny TINY --work WORK
    nice -n 19 python benchmarks/detection_rows.py voc --root VOC --tiny TINY --work WORK

TINY is Tiny-ImageNet as class folders below train/ and val/: the backbones are trained on it first. VOC has
instances_train.json, instances_val.json and images/; its twenty classes are merged into the four groups of
the PASCAL VOC challenge (person, animal, vehicle, indoor). The students of a seed start from the same weights
and see the same batches.

A call that was stopped goes on within the epoch where it was. Several calls share the runs. `METHOD@WEIGHT`
is a method with a weight other than its recipe's. `--collect` trains nothing; it writes the table of the
finished runs and copies their metrics to results/detection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from flags import read
from resumable import finish, is_done, keep, last_evaluation, run, spread

from mdistiller import RunConfig, get_recipe
from mdistiller.cli.flags import Positional
from mdistiller.runs.environment import environment
from mdistiller.settings import Settings

RESULTS = Path(__file__).resolve().parents[1] / "results" / "detection"
# Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, figure 2.
GROUPS = {
    "person": ("person",),
    "animal": ("bird", "cat", "cow", "dog", "horse", "sheep"),
    "vehicle": ("aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train"),
    "indoor": ("bottle", "chair", "diningtable", "pottedplant", "sofa", "tvmonitor"),
}
SIDES = {"cells": 144, "voc": 160}  # limits of both sides
SPEED: dict[str, Any] = {"precision": "bfloat16", "layout": "channels_last"}
METHODS = ("kd", "dkd", "fitnet", "fgfi", "reviewkd", "dkd+reviewkd", "pkd", "cwd", "mgd", "fgd")


class Command(Settings):
    """Train the backbones, the teacher and the students that are missing, and print the table."""

    set: Positional[Literal["cells", "voc"]]
    """Data set."""
    root: Path
    """Folder of the set."""
    work: Path
    """Folder of the runs, outside the repository."""
    tiny: Path | None = None
    """Folder of Tiny-ImageNet; needed until both backbones are trained."""
    architecture: str = "fasterrcnn"
    """Architecture of teacher and student."""
    teacher: str = "resnet34"
    """Backbone of the teacher."""
    student: str = "resnet18"
    """Backbone of the students."""
    methods: tuple[str, ...] = METHODS
    """Methods beside the student alone, as METHOD or METHOD@WEIGHT."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the students."""
    epochs: int = 3
    """Passes of a student."""
    steps: int | None = None
    """Steps of a student; None: those of its passes."""
    teacher_epochs: tuple[int, ...] = (8,)
    """Passes of the teacher; of several runs, each starts from the weights of the one before."""
    batch_size: int = 4
    """Images of a step."""
    backbone_epochs: int = 12
    """Passes of a backbone over Tiny-ImageNet."""
    collect: bool = False
    """Train nothing."""


def write_groups(root: Path, folder: Path) -> None:
    """Writes annotations with the groups of VOC's classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        file = f"instances_{split}.json"
        whole = json.loads((root / file).read_text(encoding="utf-8"))
        group = {name: i for i, names in enumerate(GROUPS.values(), 1) for name in names}
        label = {category["id"]: group[category["name"]] for category in whole["categories"]}
        for found in whole["annotations"]:
            found["category_id"] = label[found["category_id"]]
        whole["categories"] = [{"id": i, "name": name} for i, name in enumerate(GROUPS, 1)]
        (folder / file).write_text(json.dumps(whole), encoding="utf-8")


def data_of(name: str, root: Path, work: Path) -> dict[str, Any]:
    """Returns the settings of a set's data; VOC's have the annotations of `write_groups` in WORK/voc."""
    if name != "voc":
        return {"root": root, "workers": 0}
    images = (root / "images").absolute()
    return {"root": work / "voc", "workers": 0, "train_images": images, "test_images": images}


def backbone(c: Command, name: str) -> RunConfig:
    """Returns the config of a backbone's training on Tiny-ImageNet at 64 pixels."""
    data = {"root": c.tiny, "image_size": 64, "workers": 0}
    recipe = get_recipe(f"folder.student.torchvision/{name}")
    return recipe.replace(data=data, epochs=c.backbone_epochs, **SPEED, out=folder_of(c, name))


def folder_of(c: Command, name: str, seed: int | None = None) -> Path:
    """Returns the run folder of a backbone, the teacher or a method's student."""
    if name in (c.student, c.teacher):
        return c.work / f"backbone-{name}"
    end = "" if seed is None else f"-s{seed}"
    return c.work / f"{c.set}-{c.architecture}-{name}{end}"


def configure(
    c: Command, recipe: str, model: str, epochs: int, checkpoint: Path | None = None, **changes: Any
) -> RunConfig:
    """Returns the config of a run on the set, from the weights of a checkpoint or of a backbone."""
    side = SIDES[c.set]
    data = data_of(c.set, c.root, c.work)
    # All layers train, as the backbones know 10,000 small images only.
    options: dict[str, Any] = {"backbone_weights": str(folder_of(c, model)), "frozen_stages": 0}
    if c.architecture == "fasterrcnn":
        options["box_batch_size_per_image"] = 64  # an image has few objects
        if c.set == "voc":
            options["rpn_post_nms_top_n_test"] = 200
    return get_recipe(recipe).replace(
        data=data,
        augment={"short_sides": (side,), "long_side": side},
        student={"options": options, "checkpoint": checkpoint},
        epochs=epochs,
        eval_every=epochs,
        batch_size=c.batch_size,
        **SPEED,
        **changes,
    )


def teacher_folders(c: Command) -> list[Path]:
    """Returns the run folders of the teacher; the last has the weights that teach."""
    ends = ["", *(f"-{number}" for number in range(2, len(c.teacher_epochs) + 1))]
    return [folder_of(c, f"teacher{end}") for end in ends]


def teachers(c: Command) -> Iterator[RunConfig]:
    """Yields the configs of the teacher's runs, as far as what they start from is there."""
    before = None
    for folder, epochs in zip(teacher_folders(c), c.teacher_epochs, strict=True):
        if before is None or is_done(before):
            recipe = f"small.teacher.{c.architecture}_{c.teacher}"
            yield configure(c, recipe, c.teacher, epochs, before, out=folder)
        before = folder


def student(c: Command, method: str, seed: int) -> RunConfig:
    """Returns the config of a student."""
    name, _, weight = method.partition("@")
    pair = f"{c.architecture}_{c.teacher}_{c.student}"
    recipe = f"small.student.{c.architecture}_{c.student}" if name == "alone" else f"small.{name}.{pair}"
    changes: dict[str, Any] = {"seed": seed, "max_steps": c.steps, "out": folder_of(c, method, seed)}
    if name != "alone":
        changes["teacher"] = {"checkpoint": teacher_folders(c)[-1]}
    if weight:
        changes["method"] = {"weight": weight}
    return configure(c, recipe, c.student, c.epochs, **changes)


def main(c: Command) -> None:
    """Trains what is missing, seed after seed."""
    torch.set_num_threads(1)
    if not c.collect:
        if c.set == "voc" and not (c.work / "voc" / "instances_val.json").is_file():
            write_groups(c.root, c.work / "voc")
        names = [name for name in (c.student, c.teacher) if not is_done(folder_of(c, name))]
        assert c.tiny is not None or not names, "the backbones are not trained yet: give --tiny"
        finish([folder_of(c, name) for name in names], lambda: (backbone(c, name) for name in names))
        for seed in c.seeds:
            run(student(c, "alone", seed))
        finish(teacher_folders(c), lambda: teachers(c))
        for seed in c.seeds:
            for method in c.methods:
                run(student(c, method, seed))
                report(c)
    report(c)


def report(c: Command) -> None:
    """Prints the table of the finished runs, and copies it with their metrics to the results."""
    found = {
        method: {s: folder_of(c, method, s) for s in c.seeds if is_done(folder_of(c, method, s))}
        for method in ("alone", *c.methods)
    }
    precision = {
        method: {seed: last_evaluation(folder)["AP"] for seed, folder in runs.items()}
        for method, runs in found.items()
        if runs
    }
    *_, teacher = teacher_folders(c)
    if is_done(teacher):
        print(f"teacher {last_evaluation(teacher)['AP']:.2f}")
    alone = precision.get("alone", {})
    for method, values in precision.items():
        gains = [values[seed] - alone[seed] for seed in values if seed in alone]
        print(
            f"{method:13} {spread(list(values.values()))}  {spread(gains, '+')}  "
            f"{', '.join(f'{gain:+.2f}' for gain in gains)}"
        )
    if c.collect:
        env = environment(0)
        del env["command"]
        names = ["architecture", "teacher", "student", "epochs", "steps", "batch_size"]
        names += ["teacher_epochs", "backbone_epochs"]
        settings = {name: getattr(c, name) for name in names}
        table = {
            "environment": env,
            "settings": settings,
            "teacher": last_evaluation(teacher),
            "AP": precision,
        }
        backbones = [folder_of(c, name) for name in (c.student, c.teacher)]
        students = [folder for runs in found.values() for folder in runs.values()]
        keep([*backbones, *teacher_folders(c), *students], table, RESULTS / f"{c.set}-{c.architecture}")


if __name__ == "__main__":
    main(read(Command))
