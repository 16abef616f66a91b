"""Lists of image files with their labels: CSV files with the columns path and label."""

import csv
import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path

from mdistiller.data.layout import find_entry
from mdistiller.errors import DataError

PATH_COLUMNS = ("path", "image", "file", "filename")
LABEL_COLUMNS = ("label", "class")
Row = tuple[str, list[str]]
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
    header, rows = read_rows(path)
    where = [find_column(path, header, names) for names in (PATH_COLUMNS, LABEL_COLUMNS)]
    rows = pick(rows, where)
    _check_kind(path, {label for _, (_, label) in rows if label})
    files: dict[str, list[Path]] = {}
    for file, (label,) in sorted(present_files(path, rows, on_error)):
        files.setdefault(label, []).append(file)
    return files


def read_paths(path: Path, on_error: str) -> list[Path]:
    """Reads the image files of a list, whose labels are not read, sorted; errors as `read_list`."""
    header, rows = read_rows(path)
    rows = pick(rows, [find_column(path, header, PATH_COLUMNS)])
    return sorted(file for file, _ in present_files(path, rows, on_error))


def present_files(path: Path, rows: Sequence[Row], on_error: str) -> list[tuple[Path, list[str]]]:
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


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Reads the names of a list's columns, and its rows; DataError for an unreadable file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = [name.strip() for name in next(lines, [])]
            rows = [(f"line {lines.line_num}", [*map(str.strip, line)]) for line in lines if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return header, rows


def pick(rows: Sequence[Row], where: Sequence[int]) -> list[Row]:
    """Returns the columns at some positions; a short row has empty cells at its end."""
    return [(number, [cells[i] if i < len(cells) else "" for i in where]) for number, cells in rows]


def find_column(path: Path, header: list[str], names: tuple[str, ...]) -> int:
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
