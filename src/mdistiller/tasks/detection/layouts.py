"""Detection data sets of a config, in a layout that is found by their files."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from mdistiller.data.encoded import IMAGE_SUFFIXES
from mdistiller.data.folder import images_below
from mdistiller.errors import DataError
from mdistiller.tasks.detection import voc, yolo
from mdistiller.tasks.detection.coco import DetectionSet, ObjectImage, make_set, parse_coco
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.listing import SPLITS, Content, find_folder
from mdistiller.training.dense import DenseSplits, Split, check_apart, check_fraction
from mdistiller.types import Line

_ROBOFLOW = "_annotations.coco.json"
_YEAR = {"train": "train2017", "test": "val2017"}
_FLAT = {"train": "instances_train.json", "test": "instances_val.json"}


def load_detection(config: DetectionDataConfig) -> DenseSplits[DetectionSet]:
    """Reads both splits.

    Raises:
        DataError: as `load_split`; other categories, or an image in both.
        ConfigError: val_fraction for a set with test images.
    """
    train, test = load_split(config, "train"), load_split(config, "test")
    check_fraction(config, [*train.files, *test.files], lambda own: load_split(own, "test").files)
    if train.categories != test.categories:
        ours, theirs = ([f"{c} {name}" for _, c, name in s.categories] for s in (train, test))
        apart = [", ".join(c for c in a if c not in b) or "none" for a, b in ((ours, theirs), (theirs, ours))]
        raise DataError(
            f"{config.root}: the categories of training and test images differ: only training has "
            f"{apart[0]}; only test has {apart[1]}"
        )
    unlabeled = [] if config.unlabeled is None else _unlabeled(config.unlabeled, train)
    more = f", {len(unlabeled):,} unlabeled" * bool(unlabeled)
    check_apart(config.root, [*train.files, *(image.path for image in unlabeled)], test.files)
    objects = sum(len(image.labels) for image in train.images)
    line = (
        f"{config.root.name}: {len(train):,} training images with {objects:,} objects{more}, {len(test):,} "
    )
    line += f"test images, {len(train.categories)} categories{', masks' if config.masks else ''}"
    train = replace(train, images=(*train.images, *unlabeled))
    return DenseSplits(train=train, test=test, description=line)


def _unlabeled(folder: Path, labeled: DetectionSet) -> list[ObjectImage]:
    """Lists the images below a folder, without those of a set."""
    known = {image.path.resolve() for image in labeled.images}
    files = [file for file in images_below(folder) if file.resolve() not in known] if folder.is_dir() else []
    if not files:
        raise DataError(
            f"data.unlabeled: {folder} has no further images; they end in {', '.join(IMAGE_SUFFIXES)}"
        )
    boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    one = partial(ObjectImage, id=-1, size=(0, 0), boxes=boxes, labels=labels, is_labeled=False)
    return [one(path=file) for file in files]


def load_split(config: DetectionDataConfig, split: Split) -> DetectionSet:
    """Reads a split in the layout that the config names, or that the files have.

    Raises:
        DataError: no layout fits, or files are missing or damaged.
    """
    source, kind = config.source(split), find_kind(config) if config.kind == "auto" else config.kind
    if kind == "coco":
        return make_set(*_read_coco(config, source), config, split)
    read = yolo.read_yolo if kind == "yolo" else voc.read_voc
    return make_set(read(config, source), config.root, config.root, config, split)


def find_kind(config: DetectionDataConfig) -> Literal["coco", "yolo", "voc"]:
    """Finds the layout of a data set; raises DataError where none fits."""
    root, given = config.root, [config.train_annotations, config.test_annotations]
    is_coco = any(path is not None and path.suffix.lower() == ".json" for path in given)
    if is_coco or any((root / name).is_file() for split in SPLITS for name in _coco_files(split)):
        return "coco"
    if yolo.is_yolo(root):
        return "yolo"
    if voc.is_voc(root):
        return "voc"
    if _only_json(root):
        return "coco"
    lists = ", no ".join((*yolo.DESCRIPTIONS, *yolo.CLASS_LISTS))
    raise DataError(
        f"{root} has no {' and no '.join(_coco_files('train'))} (COCO, Roboflow), no {lists} (YOLO), and no "
        "XML files in Annotations, train or train/Annotations (VOC); name other files with "
        "--data.train-annotations and --data.test-annotations"
    )


def _coco_files(split: str) -> list[str]:
    usual = [f"annotations/instances_{_YEAR[split]}.json", _FLAT[split]]
    return usual + [f"{name}/{_ROBOFLOW}" for name in SPLITS[split]]


def _only_json(root: Path) -> list[str]:
    """Lists the only JSON in a folder or in its `annotations` (in any case), of a set without a split."""
    found = [*root.glob("*.json"), *find_folder(root, "annotations").glob("*.json")]
    return [str(path.relative_to(root)) for path in found if len(found) == 1]


def _read_coco(config: DetectionDataConfig, split: Split) -> tuple[Content, Path, Path]:
    """Reads a JSON; returns its content, the folder of its images, and the JSON's path."""
    root, images = config.root, getattr(config, f"{split}_images")
    usual = _coco_files(split) + (_only_json(root) if split == "train" else [])
    file = _find(root, getattr(config, f"{split}_annotations"), usual)
    content = parse_coco(file)
    if file.name != _ROBOFLOW:
        return content, _find(root, images, [_YEAR[split], find_folder(root, "images").name]), file
    content["categories"] = _without_group(content)
    return content, file.parent if images is None else _find(root, images, []), file


def _without_group(content: Content) -> list[Line]:
    """Returns the categories without the one that Roboflow adds as the group of all others."""
    categories = content["categories"]
    groups = {entry.get("supercategory") for entry in categories}
    used = {entry["category_id"] for entry in content["annotations"]}
    return [
        entry
        for entry in categories
        if entry["id"] in used or entry["name"] not in groups or entry.get("supercategory") != "none"
    ]


def _find(root: Path, given: Path | None, candidates: list[str]) -> Path:
    names = candidates if given is None else [str(given)]
    for name in names:
        if (root / name).exists():
            return root / name
    advice = "" if given else "; --data.val-fraction 0.2 splits a set without a test split"
    raise DataError(f"{root} has no {' and no '.join(names)}{advice}")
