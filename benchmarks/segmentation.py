r"""Five students of one teacher on a small set of photographs with masks: mean intersection over union.

    nice -n 19 python benchmarks/segmentation.py --coco COCO --tiny TINY --work WORK \
        --out results/segmentation

COCO has instances_train.json, instances_val.json and images/; TINY is Tiny-ImageNet as class folders below
train/ and val/. The objects are drawn as masks of five supercategories and background, with a short side of
128 pixels, in VOC's layout. The backbone of both is trained on TINY first. The
students of a seed start from the same weights and see the same batches. A call that was stopped
goes on where it was.
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path

import torch
from flags import read
from PIL import Image
from resumable import keep, last_evaluation, run

from mdistiller import get_recipe
from mdistiller.settings import Settings
from mdistiller.tasks.segmentation.config import SegmentationDataConfig
from mdistiller.tasks.segmentation.data import load_split, palette

CLASSES = ("person", "animal", "vehicle", "furniture", "food")
TEACHER, STUDENT = "deeplabv3_mobilenet_v3_small", "lraspp_mobilenet_v3_small"
METHODS = ("alone", "kd", "dkd", "cwd", "skd")
BACKBONE = "mobilenet_v3_small"
SIDE = 128


class Command(Settings):
    """Backbone, teacher and students, and a table of their metrics."""

    coco: Path
    """Folder of COCO-format data."""
    tiny: Path
    """Folder of Tiny-ImageNet."""
    work: Path
    """Folder of masks and runs."""
    out: Path | None = None
    """Folder for the runs' metrics and table.json."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the students."""
    teacher_epochs: int = 20
    """Passes of the teacher."""
    epochs: int = 10
    """Passes of a student."""
    crop: int = 64
    """Side of the training crops, and short side of all images."""


def draw_masks(coco: Path, folder: Path) -> None:
    """Writes images and masks in VOC's layout."""
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    config = SegmentationDataConfig(kind="coco", root=coco, classes=CLASSES)
    for split, name in (("train", "train"), ("test", "val")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it counts the images without masks
            images = load_split(config, split)
        names = []
        for i in range(len(images)):
            image, mask = images.read(i)
            factor = SIDE / min(image.size)
            size = (round(image.width * factor), round(image.height * factor))
            stem = images.path(i).stem
            image.resize(size, Image.Resampling.BILINEAR).save(folder / "JPEGImages" / f"{stem}.png")
            drawn = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
            drawn.putpalette(palette(256).flatten().tolist())
            drawn.save(folder / "SegmentationClass" / f"{stem}.png")
            names.append(stem)
        (folder / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(names) + "\n")
    (folder / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")


def main(c: Command) -> None:
    """Runs what is missing, and prints the table."""
    torch.set_num_threads(1)
    runs, masks = c.work / "runs", c.work / "masks"
    if not (masks / "classes.txt").is_file():
        draw_masks(c.coco, masks)
    recipe = get_recipe(f"folder.student.torchvision/{BACKBONE}")
    data = {"root": c.tiny, "image_size": 64, "workers": 0}
    backbone = runs / f"backbone-{BACKBONE}"
    run(recipe.replace(data=data, epochs=12, eval_every=4, precision="float32", out=backbone))
    shared = {
        "data": {"kind": "voc", "root": masks, "workers": 0},
        "augment": {"crop": (c.crop, c.crop), "short_side": c.crop},
        "precision": "bfloat16",
        "layout": "channels_last",
        "eval_every": 5,
    }
    recipe = get_recipe(f"coco-seg.teacher.{TEACHER}")
    options = {"backbone_weights": str(backbone)}
    teacher = runs / f"teacher-{TEACHER}"
    run(recipe.replace(**shared, student={"options": options}, epochs=c.teacher_epochs, out=teacher))
    for seed in c.seeds:
        for method in METHODS:
            change = shared | {"epochs": c.epochs, "eval_every": c.epochs, "seed": seed}
            change |= {"student": {"options": options}, "out": runs / f"{method}-s{seed}"}
            if method == "alone":
                recipe = get_recipe(f"coco-seg.student.{STUDENT}")
            else:
                recipe = get_recipe(f"coco-seg.{method}.{TEACHER}_{STUDENT}")
                change["teacher"] = {"checkpoint": teacher}
            run(recipe.replace(**change))
    report(c, teacher)


def report(c: Command, teacher: Path) -> None:
    """Prints mIoU and pixel accuracy of the last epochs, and copies the metrics."""
    table, everything = {}, [c.work / "runs" / f"backbone-{BACKBONE}"]
    for method in ("teacher", *METHODS):
        folders = [teacher] if method == "teacher" else [c.work / "runs" / f"{method}-s{s}" for s in c.seeds]
        everything += folders
        last = [last_evaluation(folder) for folder in folders]
        row = {name: [line[name] for line in last] for name in ("mIoU", "pixel_accuracy")}
        table[method] = row | {"classes": [line["classes"] for line in last]}
        numbers = "  ".join(f"{value:6.2f}" for value in row["mIoU"])
        means = [statistics.fmean(values) for values in row.values()]
        print(f"{method:8}  mIoU {means[0]:6.2f} ({numbers})  pixel accuracy {means[1]:6.2f}")
    if c.out is not None:
        keep(everything, table, c.out)


if __name__ == "__main__":
    main(read(Command))
