"""Layouts of detection data on disk, found by their files."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from mdistiller.errors import DataError
from mdistiller.tasks.detection import voc, yolo
from mdistiller.tasks.detection.coco import parse_coco
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.listing import SPLITS

_ROBOFLOW = "_annotations.coco.json"
_YEAR = {"train": "train2017", "test": "val2017"}
_FLAT = {"train": "instances_train.json", "test": "instances_val.json"}


class SplitFiles(NamedTuple):
    """A split as the lists of a COCO-format JSON, the folder of its files, and where it was read."""

    content: dict[str, Any]
    images: Path
    source: Path


def read_split(config: DetectionDataConfig, split: Literal["train", "test"]) -> SplitFiles:
    """Reads a split in the layout that the config names, or that the files have.

    Raises:
        DataError: no layout fits, or files are missing or damaged.
    """
    root, skip = config.root, config.on_error == "skip"
    annotations = getattr(config, f"{split}_annotations")
    images = getattr(config, f"{split}_images")
    kind = find_kind(config) if config.kind == "auto" else config.kind
    if kind == "coco":
        return _read_coco(root, split, annotations, images)
    if kind == "yolo":
        return SplitFiles(yolo.read_yolo(root, split, images, skip=skip), root, root)
    return SplitFiles(voc.read_voc(root, split, annotations, skip=skip), root, root)


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
    lists = ", no ".join((*yolo.DESCRIPTIONS, *yolo.CLASS_LISTS))
    raise DataError(
        f"{root} has no {' and no '.join(_coco_files('train'))} (COCO, Roboflow), no {lists} (YOLO), and no "
        "XML files in Annotations, train or train/Annotations (VOC); name other files with "
        "--data.train-annotations and --data.test-annotations"
    )


def _coco_files(split: str) -> list[str]:
    usual = [f"annotations/instances_{_YEAR[split]}.json", _FLAT[split]]
    return usual + [f"{name}/{_ROBOFLOW}" for name in SPLITS[split]]


def _read_coco(root: Path, split: str, annotations: Path | None, images: Path | None) -> SplitFiles:
    file = _find(root, annotations, _coco_files(split))
    content = parse_coco(file)
    if file.name != _ROBOFLOW:
        return SplitFiles(content, _find(root, images, [_YEAR[split], "images"]), file)
    content["categories"] = _without_group(content)
    return SplitFiles(content, file.parent if images is None else _find(root, images, []), file)


def _without_group(content: dict[str, Any]) -> list[dict[str, Any]]:
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
    raise DataError(f"{root} has no {' and no '.join(names)}")
