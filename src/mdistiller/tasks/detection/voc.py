"""Images with objects, read from the XML files of Pascal VOC's layout."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mdistiller.data.encoded import IMAGE_SUFFIXES
from mdistiller.errors import DataError
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.listing import (
    SPLITS,
    Content,
    as_coco,
    find_folder,
    read_names,
    upright_size,
)
from mdistiller.training.dense import Split
from mdistiller.types import Line

CLASS_LISTS = ("classes.txt", "labels.txt")
_LISTS = "ImageSets/Main"
# Lists of a training and a test set; the first pair of which both are there.
_PAIRS = (("train", "val"), ("trainval", "test"), ("train", "test"))
_IMAGE_FOLDERS = ("JPEGImages", "images")


def is_voc(root: Path) -> bool:
    """Whether a folder has VOC's XML files: in Annotations, or in a folder of training images."""
    folders = (find_folder(root, "Annotations"), root / "train", root / "train/Annotations", root)
    return any(any(folder.glob("*.xml")) for folder in folders)


def read_voc(config: DetectionDataConfig, split: Split) -> Content:
    """Reads a split in VOC's layout and returns it as the lists of a COCO-format JSON.

    Either `Annotations/*.xml` and `JPEGImages` with lists of names in `ImageSets/Main` (train and val, or
    trainval and test), or the folders `train` and `val` (valid, validation, test) with XML files beside the
    images or in folders of these names; or, with `val_fraction`, XML files in `annotations` (in any case) or
    beside the images, without a split. Class names are in classes.txt or, sorted, those of all XML files.

    Pixels count from 1 and the last one belongs to the box: 1, 1, 10, 10 is the box of 10 by 10 pixels in the
    corner. A difficult object becomes a crowd (`iscrowd`), so it is neither learned nor expected.

    Raises:
        DataError: a list, a file or an image is missing, or a file is no annotation.
    """
    root = config.root
    names = read_names(root, CLASS_LISTS)
    if names is None:
        names = sorted({name for file in root.rglob("*.xml") for name, _, _ in _parse(file).objects})
    ids = {name: number for number, name in enumerate(names, 1)}

    def objects(xml: _Xml) -> Iterator[Line]:
        for name, (x1, y1, x2, y2), difficult in xml.objects:
            if name not in ids:
                raise DataError(f"{xml.file}: object {name!r}; allowed: {', '.join(ids)}")
            box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            yield {"iscrowd": int(difficult), "category_id": ids[name], "bbox": box}

    def read(xml: _Xml) -> tuple[Path, tuple[int, int], Iterator[Line]]:
        image = _image_of(root, xml.file, xml.image)
        return image, xml.size or upright_size(image), objects(xml)

    return as_coco(config, names, map(_parse, _files(config, split)), read)


class _Xml(NamedTuple):
    """Content of an XML file; an object is its name, its corners, and whether it is difficult."""

    file: Path
    image: str
    size: tuple[int, int] | None
    objects: list[tuple[str, list[float], bool]]


def _files(config: DetectionDataConfig, split: Split) -> list[Path]:
    """Lists the XML files of a split."""
    root, given = config.root, getattr(config, f"{split}_annotations")
    if given is not None:
        if not (root / given).exists():
            raise DataError(f"{root} has no {given}")
        return _listed(root, root / given) if (root / given).is_file() else _below(root / given)
    lists, position = root / _LISTS, ("train", "test").index(split)
    for pair in _PAIRS:
        if all((lists / f"{name}.txt").is_file() for name in pair):
            return _listed(root, lists / f"{pair[position]}.txt")
    for name in SPLITS[split]:
        if (root / name).is_dir():
            return _below(root / name)
    if config.val_fraction is not None:
        return _below(folder if (folder := find_folder(root, "Annotations")).is_dir() else root)
    pairs = ", ".join(f"{one}.txt with {other}.txt" for one, other in _PAIRS)
    folders = ", no ".join(SPLITS[split])
    raise DataError(
        f"{root} has no VOC images for {split}: in {_LISTS} no {pairs}; and no folder {folders}. "
        "--data.val-fraction 0.2 splits a set"
    )


def _listed(root: Path, file: Path) -> list[Path]:
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    folder = find_folder(root, "Annotations")
    found = [folder / f"{name}.xml" for name in names]
    missing = [path.name for path in found if not path.is_file()]
    if missing or not found:
        what = f"{len(missing)} of {len(found)} files that {file} lists are not in {folder}"
        raise DataError(f"{what}: {', '.join(missing[:5])}" if found else f"{file} lists no image")
    return found


def _below(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.xml"))
    if not found:
        raise DataError(f"{folder} has no XML files")
    return found


def _parse(file: Path) -> _Xml:
    try:
        tree = ET.parse(file).getroot()
    except (OSError, ET.ParseError, ValueError) as error:
        raise DataError(f"{file} cannot be read as XML: {error}") from error
    sides = [_number(tree.findtext(f"size/{side}")) for side in ("width", "height")]
    size = (int(sides[0]), int(sides[1])) if all(side >= 1 for side in sides) else None
    objects: list[tuple[str, list[float], bool]] = []
    for number, found in enumerate(tree.findall("object"), 1):
        name = (found.findtext("name") or "").strip()
        corners = [_number(found.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or any(map(math.isnan, corners)):
            raise DataError(f"{file}: object {number} needs a name and a bndbox of xmin, ymin, xmax, ymax")
        objects.append((name, corners, _number(found.findtext("difficult")) == 1))
    return _Xml(file, (tree.findtext("filename") or "").strip(), size, objects)


def _number(text: str | None) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _image_of(root: Path, file: Path, name: str) -> Path:
    """Finds the image of an XML file, by its file name or by the XML file's."""
    folders = [file.parent, *(find_folder(file.parent.parent, folder) for folder in _IMAGE_FOLDERS)]
    for folder in folders:
        for candidate in (name, *(file.stem + suffix for suffix in IMAGE_SUFFIXES)):
            if candidate and (folder / candidate).is_file():
                return folder / candidate
    looked = ", ".join(str(folder.relative_to(root)) for folder in folders)
    raise DataError(f"{file}: no image {name or file.stem} in {looked} of {root}")
