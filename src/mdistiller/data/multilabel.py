"""Lists of images with several classes each: names in one column, or a column of 0 and 1 for each class."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mdistiller.data.encoded import some
from mdistiller.data.lists import PATH_COLUMNS, Row, find_column, pick, present_files, read_rows, sort_classes
from mdistiller.errors import DataError
from mdistiller.types import IGNORED

NAMES_COLUMNS = ("labels", "label", "classes", "class", "tags")
_VALUES = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0, "": float(IGNORED)}


class LabeledFiles(NamedTuple):
    """Image files, sorted, and their classes: float32 [N, C], 1 or 0, or -100 where unknown."""

    files: list[Path]
    classes: tuple[str, ...]
    labels: Tensor


def read_multi_label_list(path: Path, on_error: str, classes: tuple[str, ...] | None = None) -> LabeledFiles:
    """Reads a list with the column path, and either one of names or a column of 0 and 1 for each class.

    Names are separated by `;`, or by spaces where no row has a `;`. An image in several rows has the classes
    of all of them, and one with an empty cell has none. An empty cell in the column of a class means that it
    is unknown whether the image has the class. Paths are relative to the list's folder.

    Args:
        path: the list.
        on_error: as `DataConfig.on_error`, for missing files.
        classes: classes of the training images, in their order. None: those in the list.

    Raises:
        DataError: an unreadable list, a wrong value, or other classes than `classes`.
    """
    header, rows = read_rows(path)
    first, given = find_column(path, header, PATH_COLUMNS), [name.lower() for name in header]
    names = [given.index(name) for name in NAMES_COLUMNS if name in given][:1]
    if names:
        return _from_names(path, pick(rows, [first, *names]), on_error, classes)
    columns = [i for i in range(len(header)) if i != first]
    return _from_columns(path, [header[i] for i in columns], pick(rows, [first, *columns]), on_error, classes)


def _from_names(path: Path, rows: list[Row], on_error: str, classes: tuple[str, ...] | None) -> LabeledFiles:
    separator = ";" if any(";" in cell for _, (_, cell) in rows) else None
    found: dict[Path, set[str]] = {}
    for file, (cell,) in sorted(present_files(path, rows, on_error)):
        names = {name.strip() for name in cell.split(separator)}
        found.setdefault(file, set()).update(names - {""})
    own = set().union(*found.values())
    if classes is None:
        classes = sort_classes(own)
    elif own - set(classes):
        raise DataError(f"{path}: no training image has the classes {some(sorted(own - set(classes)))}")
    labels = torch.tensor([[float(name in names) for name in classes] for names in found.values()])
    return LabeledFiles(list(found), _checked(path, classes), labels)


def _from_columns(
    path: Path, names: list[str], rows: list[Row], on_error: str, classes: tuple[str, ...] | None
) -> LabeledFiles:
    for number, (_, *cells) in rows:
        for name, cell in zip(names, cells, strict=True):
            if cell.lower() not in _VALUES:
                raise DataError(
                    f"{path}, {number}: got {cell!r} in column {name!r}; the column of a class needs 0 or 1, "
                    "or nothing where it is unknown (regression is not supported); names of classes need a "
                    "column labels"
                )
    classes = tuple(names) if classes is None else classes
    if set(names) != set(classes):
        raise DataError(
            f"{path} has columns of other classes than the training images; missing: "
            f"{some(sorted(set(classes) - set(names)))}; added: {some(sorted(set(names) - set(classes)))}"
        )
    order = [names.index(name) for name in classes]
    entries = sorted(present_files(path, rows, on_error))
    labels = torch.tensor([[_VALUES[cells[i].lower()] for i in order] for _, cells in entries])
    return LabeledFiles([file for file, _ in entries], _checked(path, classes), labels)


def _checked(path: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(classes)) < max(2, len(classes)):
        raise DataError(f"{path}: got the classes {some(list(classes))}; need two or more different ones")
    return classes
