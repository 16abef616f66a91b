"""Images for embed_rows.py: a part of CIFAR-100, and crops of the objects of a COCO-format set.

    python benchmarks/embed_images.py --cifar DATA --objects shared/data/voc07-mini --out DIR

DIR/cifar and DIR/voc get photos/ (every training image, without classes) and 1/, 10/ and 100/, each with
train/CLASS (that percentage of the same images) and val/CLASS. CIFAR-100: 100 training and 20 test images of
each class. Objects: squares of 96 pixels around the boxes whose shorter side has 48 or more, with a margin
of 5 %; at most 300 training and 60 validation crops of each class.
"""

import json
import pickle
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flags import read
from PIL import Image

from mdistiller.settings import Settings

PARTS = (1, 10, 100)
SMALLEST, SIDE, MARGIN = 48, 96, 1.1  # pixels, pixels, of the longer side
Images = Mapping[str, Sequence[tuple[str, Image.Image]]]
"""The images of each class, with the names of their files."""


class Command(Settings):
    """Write the images of both sets."""

    cifar: Path
    """Folder with cifar-100-python."""
    objects: Path
    """Folder with instances_train.json, instances_val.json and images/."""
    out: Path
    """Folder that gets cifar/ and voc/."""


def save(folder: Path, images: Sequence[tuple[str, Image.Image]]) -> None:
    """Writes images as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images:
        image.save(folder / f"{name}.png")


def write(root: Path, train: Images, val: Images) -> None:
    """Writes the folders of a set; the first images of a class are those that have labels."""
    for name, images in train.items():
        save(root / "photos", images)
        for part in PARTS:
            save(root / str(part) / "train" / name, images[: max(1, round(len(images) * part / 100))])
    for name, images in val.items():
        for part in PARTS:
            save(root / str(part) / "val" / name, images)


def cifar(folder: Path, split: str, count: int, rng: random.Random) -> Images:
    """Draws images of each class of CIFAR-100."""
    with (folder / "cifar-100-python" / split).open("rb") as file:
        found = pickle.load(file, encoding="bytes")
    with (folder / "cifar-100-python" / "meta").open("rb") as file:
        names = pickle.load(file, encoding="bytes")[b"fine_label_names"]
    images = found[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    of_class: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(found[b"fine_labels"]):
        of_class[label].append(i)
    return {
        f"{label:02d}-{names[label].decode()}": [
            (f"{i:05d}", Image.fromarray(images[i])) for i in rng.sample(of_class[label], count)
        ]
        for label in sorted(of_class)
    }


def crops(folder: Path, split: str, count: int) -> dict[str, list[tuple[str, Image.Image]]]:
    """Cuts out the first objects of each class."""
    found: dict[str, Any] = json.loads((folder / f"instances_{split}.json").read_text(encoding="utf-8"))
    files = {image["id"]: image["file_name"] for image in found["images"]}
    names = {category["id"]: category["name"] for category in found["categories"]}
    images: defaultdict[str, list[tuple[str, Image.Image]]] = defaultdict(list)
    for box in sorted(found["annotations"], key=lambda box: box["id"]):
        left, top, width, height = box["bbox"]
        name = names[box["category_id"]]
        if min(width, height) < SMALLEST or len(images.get(name, ())) >= count:
            continue
        image = Image.open(folder / "images" / files[box["image_id"]]).convert("RGB")
        x, y, half = left + width / 2, top + height / 2, max(width, height) * MARGIN / 2
        edges = max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half)
        square = image.crop(edges).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        images[name].append((str(box["id"]), square))
    return images


def main(c: Command) -> None:
    """Writes both sets."""
    rng = random.Random(0)
    train, val = (cifar(c.cifar, *part, rng) for part in (("train", 100), ("test", 20)))
    write(c.out / "cifar", train, val)
    train, val = (crops(c.objects, *part) for part in (("train", 300), ("val", 60)))
    for images in train.values():
        rng.shuffle(images)
    write(c.out / "voc", train, val)


if __name__ == "__main__":
    main(read(Command))
