"""Image files of a folder, and the lists of a COCO-format JSON made from other annotations."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mdistiller.data.encoded import IMAGE_SUFFIXES
from mdistiller.errors import DataError

SPLITS = {"train": ("train",), "test": ("val", "valid", "validation", "test")}
"""Usual names of the folders of a split, the first of which that is there counts."""

_ON_THEIR_SIDE = (5, 6, 7, 8)  # values of the EXIF orientation


def images_in(folder: Path) -> list[Path]:
    """Lists the image files in a folder and those below it, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def upright_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) of an image as it is seen, from the head of its file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112) in _ON_THEIR_SIDE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path} cannot be read: {error}") from error
    return (height, width) if turned else (width, height)


class Skipped:
    """Errors of images: raised, or with `skip` collected for one warning."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.errors: list[str] = []

    def add(self, error: DataError) -> None:
        """Takes an error; raises it unless images are skipped."""
        if not self.skip:
            raise error
        self.errors.append(str(error))

    def warn(self, source: Path) -> None:
        """Warns of the images that are left out, if there are any."""
        if self.errors:
            warnings.warn(f"{source}: left out {len(self.errors)} images: {self.errors[0]}", stacklevel=2)


def category_list(names: Iterable[str]) -> list[dict[str, Any]]:
    """Returns categories with the ids 1 … K in the order of the names."""
    return [{"id": number, "name": name} for number, name in enumerate(names, 1)]


def read_names(root: Path, files: Sequence[str]) -> list[str] | None:
    """Reads the class names, one a line, of the first of some files that is there; None without any."""
    for name in files:
        if (root / name).is_file():
            lines = (root / name).read_text(encoding="utf-8").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            if not names or len(set(names)) < len(names):
                raise DataError(
                    f"{root / name}: " + ("two classes have one name" if names else "it is empty")
                )
            return names
    return None
