"""The lists of a COCO-format JSON, and how they are made from images with other annotations."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from mdistiller.data.decoder import plain, read_image
from mdistiller.errors import DataError
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.types import Line

SPLITS = {"train": ("train",), "test": ("val", "valid", "validation", "test")}
"""Usual names of the folders of a split, the first of which that is there counts."""

_ON_THEIR_SIDE = (5, 6, 7, 8)  # values of the EXIF orientation


Content = dict[str, list[Line]]
"""Content of a COCO-format JSON, lists of three kinds.

images: `id`, `file_name`, `width` and `height`.
categories: `id`, `name`, and perhaps `supercategory`.
annotations: objects: `image_id`, `category_id`, `bbox` (x, y, width, height), and perhaps `id`, `iscrowd`,
    `area`, and `segmentation`: polygons x1, y1, x2, y2 …, or an RLE. A predicted one has a `score`.
"""

Source = TypeVar("Source")


def as_coco(
    config: DetectionDataConfig,
    names: Sequence[str],
    sources: Iterable[Source],
    read: Callable[[Source], tuple[Path, tuple[int, int], Iterable[Line]]],
) -> Content:
    """Makes the lists of a COCO-format JSON; category ids are 1 … K in the order of the names.

    Args:
        config: settings of the data; `file_name` is relative to its root. With `on_error="skip"` images for
            which `read` raises DataError are left out, with a warning.
        names: names of the classes.
        sources: what there is of each image.
        read: finds its file, its (width, height) and its objects.
    """
    root = config.root
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    content: Content = {"images": [], "annotations": [], "categories": categories}
    errors = []
    for number, source in enumerate(sources, 1):
        try:
            path, (width, height), objects = read(source)
        except DataError as error:
            if config.on_error == "raise":
                raise
            errors.append(str(error))
            continue
        name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path.absolute())
        content["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        for found in objects:
            identity = {"id": len(content["annotations"]) + 1, "image_id": number}
            content["annotations"].append(identity | found)
    if errors:
        warnings.warn(f"{root}: left out {len(errors)} images: {errors[0]}", stacklevel=2)
    return content


def find_folder(root: Path, name: str) -> Path:
    """Returns the folder of a name in root, as it is spelled or in other case, or where it would be."""
    if (root / name).is_dir() or not root.is_dir():
        return root / name
    found = sorted(p for p in root.iterdir() if p.name.lower() == name.lower() and p.is_dir())
    return found[0] if found else root / name


def read_sized(path: Path, size: tuple[int, int]) -> Image.Image:
    """Reads an image upright, or as it is stored if only that has the (width, height) of its annotations.

    Raises:
        DataError: the file cannot be read.
    """
    image = read_image(path)
    return image if image.size == size else read_image(path, upright=False)


def upright_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) of an image as it is seen, from the head of its file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Image.open(plain(path)) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112) in _ON_THEIR_SIDE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path} cannot be read: {error}") from error
    return (height, width) if turned else (width, height)


def read_names(root: Path, files: Sequence[str]) -> list[str] | None:
    """Reads the class names, one a line, of the first of some files that is there; None without any."""
    for name in files:
        if (root / name).is_file():
            lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            if not names or len(set(names)) < len(names):
                raise DataError(
                    f"{root / name}: " + ("two classes have one name" if names else "it is empty")
                )
            return names
    return None
