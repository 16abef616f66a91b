"""Lists of image files with their labels: CSV files.

An image has one class, in the column label, or several: names in one column, or a column of 0 and 1 for each.
"""

import csv
import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mdistiller.data.encoded import some
from mdistiller.data.layout import find_entry
from mdistiller.errors import DataError
from mdistiller.types import IGNORED

PATH_COLUMNS = ("path", "image", "file", "filename")
LABEL_COLUMNS = ("label", "class")
_NAMES_COLUMNS = ("labels", "label", "classes", "class", "tags")
_VALUES = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0, "": float(IGNORED)}
_Row = tuple[str, list[str]]
"""The number of a row in words, for messages, and its values."""


def find_list(root: Path, names: tuple[str, ...]) -> Path | None:
    """Finds the first of some names among the lists in `root`, in any case; None if none is there."""
    return find_entry(root, [f"{name}.csv" for name in names], Path.is_file)


def is_list(path: Path) -> bool:
    """Whether a path is a file with the suffix of a list."""
    return path.is_file() and path.suffix.lower() == ".csv"


def read_list(path: Path, on_error: str) -> dict[str, list[Path]]:
    """Reads the image files of a list by label, "" for none; paths are relative to the list's folder.

    Raises:
        DataError: an unreadable list, a missing column or path, labels that are real numbers, or missing
            files; with on_error=skip those are left out with a warning, unless all are missing.
    """
    header, rows = _read_rows(path)
    where = [_find_column(path, header, names) for names in (PATH_COLUMNS, LABEL_COLUMNS)]
    rows = _pick(rows, where)
    _check_kind(path, {label for _, (_, label) in rows if label})
    files: dict[str, list[Path]] = {}
    for file, (label,) in sorted(_present_files(path, rows, on_error)):
        files.setdefault(label, []).append(file)
    return files


def read_paths(path: Path, on_error: str) -> list[Path]:
    """Reads the image files of a list, whose labels are not read, sorted; errors as `read_list`."""
    header, rows = _read_rows(path)
    rows = _pick(rows, [_find_column(path, header, PATH_COLUMNS)])
    return sorted(file for file, _ in _present_files(path, rows, on_error))


def _present_files(path: Path, rows: Sequence[_Row], on_error: str) -> list[tuple[Path, list[str]]]:
    """Returns the files that are there, as paths below the list's folder, each with its row's other values.

    Raises:
        DataError: no row, a row without a path, or missing files; with on_error=skip those are left out with
            a warning, unless all are missing.
    """
    if not rows:
        raise DataError(f"{path} lists no image")
    for number, (file, *values) in rows:
        if not file:
            raise DataError(f"{path}, {number}: got path '' and label {' '.join(values)!r}; need a path")
    files = [path.parent / file for _, (file, *_) in rows]
    present = [file.is_file() for file in files]
    if not all(present):
        missing = [str(file) for file, found in zip(files, present, strict=True) if not found]
        message = f"{len(missing)} of {len(files)} images are missing: {', '.join(missing[:5])}"
        if on_error == "raise" or not any(present):
            raise DataError(f"{path}: {message}")
        warnings.warn(f"{path}: left out: {message}", stacklevel=2)
    entries = [(file, values) for file, (_, (_, *values)) in zip(files, rows, strict=True)]
    return list(compress(entries, present))


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts class names as text, or as numbers if all are numbers."""
    found = sorted(names)
    return tuple(sorted(found, key=int) if all(n.isdecimal() for n in found) else found)


def _read_rows(path: Path) -> tuple[list[str], list[_Row]]:
    """Reads the names of a list's columns, and its rows; DataError for an unreadable file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = [name.strip() for name in next(lines, [])]
            rows = [(f"line {lines.line_num}", [*map(str.strip, line)]) for line in lines if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return header, rows


def _pick(rows: Sequence[_Row], where: Sequence[int]) -> list[_Row]:
    """Returns the columns at some positions; a short row has empty cells at its end."""
    return [(number, [cells[i] if i < len(cells) else "" for i in where]) for number, cells in rows]


def _find_column(path: Path, header: list[str], names: tuple[str, ...]) -> int:
    """Returns the position in a header of the first of some names, in any case; DataError without one."""
    given = [name.lower() for name in header]
    found = next((given.index(name) for name in names if name in given), None)
    if found is None:
        raise DataError(
            f"{path} has no column {names[0]!r}; allowed: {', '.join(names)} (columns there: "
            f"{', '.join(header) or 'none'})"
        )
    return found


def _check_kind(path: Path, labels: set[str]) -> None:
    """Raises DataError if all labels are finite numbers and one is not whole."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return
    real = [x for x in numbers if not x.is_integer()]
    if real and all(map(math.isfinite, numbers)):
        raise DataError(
            f"{path}: label: got real numbers such as {real[0]:g}; regression is not supported, "
            "labels are the names or numbers of classes"
        )


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
    header, rows = _read_rows(path)
    first, given = _find_column(path, header, PATH_COLUMNS), [name.lower() for name in header]
    named = [given.index(name) for name in _NAMES_COLUMNS if name in given][:1]
    where = named or [i for i in range(len(header)) if i != first]
    rows = _pick(rows, [first, *where])
    if named:
        return _from_names(path, rows, on_error, classes)
    return _from_columns(path, [header[i] for i in where], rows, on_error, classes)


def _from_names(path: Path, rows: list[_Row], on_error: str, classes: tuple[str, ...] | None) -> LabeledFiles:
    separator = ";" if any(";" in cell for _, (_, cell) in rows) else None
    found: dict[Path, set[str]] = {}
    for file, (cell,) in sorted(_present_files(path, rows, on_error)):
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
    path: Path, names: list[str], rows: list[_Row], on_error: str, classes: tuple[str, ...] | None
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
    entries = sorted(_present_files(path, rows, on_error))
    labels = torch.tensor([[_VALUES[cells[i].lower()] for i in order] for _, cells in entries])
    return LabeledFiles([file for file, _ in entries], _checked(path, classes), labels)


def _checked(path: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(classes)) < max(2, len(classes)):
        raise DataError(f"{path}: got the classes {some(list(classes))}; need two or more different ones")
    return classes
