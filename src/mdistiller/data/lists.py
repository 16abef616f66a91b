"""Lists of image files with their labels: CSV and Parquet, with the columns path and label."""

import csv
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import compress
from pathlib import Path

from mdistiller.data.layout import find_entry
from mdistiller.errors import DataError, MissingPackageError

SUFFIXES = (".csv", ".parquet")
PATH_COLUMNS = ("path", "image", "file", "filename")
LABEL_COLUMNS = ("label", "class")
Row = tuple[str, list[str]]
"""The number of a row in words, for messages, and its values."""
Cells = tuple[str, Sequence[object]]
"""A row as the file has it."""


def find_list(root: Path, names: tuple[str, ...]) -> Path | None:
    """Finds the first of some names among the lists in `root`, in any case; None if none is there."""
    return find_entry(root, (name + suffix for name in names for suffix in SUFFIXES), Path.is_file)


def is_list(path: Path) -> bool:
    """Whether a path is a file with the suffix of a list."""
    return path.is_file() and path.suffix.lower() in SUFFIXES


def read_list(path: Path, on_error: str) -> dict[str, list[Path]]:
    """Reads the image files of a list by label, "" for none; paths are relative to the list's folder.

    Raises:
        ConfigError: a Parquet file without the package that reads it.
        DataError: an unreadable list, a missing column or path, labels that are real numbers, or missing
            files; with on_error=skip those are left out with a warning, unless all are missing.
    """
    columns = (PATH_COLUMNS, LABEL_COLUMNS)
    _, rows = read_rows(path, lambda header: [find_column(path, header, names) for names in columns])
    _check_kind(path, {label for _, (_, label) in rows if label})
    files: dict[str, list[Path]] = {}
    for file, (label,) in sorted(present_files(path, rows, on_error)):
        files.setdefault(label, []).append(file)
    return files


def read_paths(path: Path, on_error: str) -> list[Path]:
    """Reads the image files of a list, whose labels are not read, sorted; errors as `read_list`."""
    _, rows = read_rows(path, lambda header: [find_column(path, header, PATH_COLUMNS)])
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


def read_rows(path: Path, pick: Callable[[list[str]], list[int]]) -> tuple[list[str], list[Row]]:
    """Reads the columns of a list at the positions that `pick` returns for its header.

    Returns the names of these columns, and each row as its number in words and its values, stripped.

    Raises:
        ConfigError: a Parquet file without the package that reads it.
        DataError: an unreadable list.
    """
    header, rows = (_read_parquet if path.suffix.lower() == ".parquet" else _read_csv)(path, pick)
    found = [
        (number, ["" if value is None else str(value).strip() for value in values]) for number, values in rows
    ]
    return [name.strip() for name in header], found


def _read_csv(path: Path, pick: Callable[[list[str]], list[int]]) -> tuple[list[str], list[Cells]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            where = pick(header)
            numbered = [(f"line {lines.line_num}", line) for line in lines if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [header[i] for i in where], [
        (number, [line[i] if i < len(line) else "" for i in where]) for number, line in numbered
    ]


def _read_parquet(path: Path, pick: Callable[[list[str]], list[int]]) -> tuple[list[str], list[Cells]]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingPackageError(f"root: {path}, unlike a CSV file,", "pyarrow", "parquet") from error
    try:
        header = parquet.read_schema(path).names
        names = [header[i] for i in pick(header)]
        table = parquet.read_table(path, columns=names)
        columns = [table.column(name).to_pylist() for name in names]
    except DataError:
        raise
    except Exception as error:  # pyarrow's errors are of many types
        raise DataError(f"{path} cannot be read: {error}") from error
    return names, [(f"row {n}", row) for n, row in enumerate(zip(*columns, strict=True), 1)]


def find_column(path: Path, header: list[str], names: tuple[str, ...]) -> int:
    """Returns the position in a header of the first of some names, in any case; DataError without one."""
    given = [name.strip().lower() for name in header]
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
