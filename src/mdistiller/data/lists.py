"""Lists of image files with their labels: CSV and Parquet, with the columns path and label."""

import csv
import warnings
from collections.abc import Iterable
from importlib import import_module
from itertools import compress
from pathlib import Path
from typing import Any

from mdistiller.data.layout import visible
from mdistiller.errors import ConfigError, DataError

SUFFIXES = (".csv", ".parquet")
_COLUMNS = {"path": ("path", "image", "file", "filename"), "label": ("label", "class")}


def find_list(root: Path, names: tuple[str, ...]) -> Path | None:
    """Finds the first of some names among the lists in `root`, in any case; None if none is there."""
    found = {entry.name.lower(): entry for entry in visible(root) if entry.is_file()}
    return next((found[name + s] for name in names for s in SUFFIXES if name + s in found), None)


def is_list(path: Path) -> bool:
    """Whether a path is a file with the suffix of a list."""
    return path.is_file() and path.suffix.lower() in SUFFIXES


def read_list(path: Path, on_error: str) -> dict[str, list[Path]]:
    """Reads the image files of a list by label; their paths are relative to the list's folder.

    Raises:
        ConfigError: a Parquet file without the package that reads it.
        DataError: an unreadable list, a missing column or value, or missing files; with on_error=skip those
            are left out with a warning, unless all are missing.
    """
    rows = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    entries = [(path.parent / file, label) for file, label in rows]
    if not entries:
        raise DataError(f"{path} lists no image")
    present = [file.is_file() for file, _ in entries]
    if not all(present):
        missing = [str(file) for (file, _), found in zip(entries, present, strict=True) if not found]
        message = f"{len(missing)} of {len(entries)} images are missing: {', '.join(missing[:5])}"
        if on_error == "raise" or not any(present):
            raise DataError(f"{path}: {message}")
        warnings.warn(f"{path}: left out: {message}", stacklevel=2)
    files: dict[str, list[Path]] = {}
    for file, label in sorted(compress(entries, present)):
        files.setdefault(label, []).append(file)
    return files


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts class names as text, or as numbers if all are numbers."""
    found = sorted(names)
    return tuple(sorted(found, key=int) if all(n.isdecimal() for n in found) else found)


def _read_csv(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            where = _columns(path, header)
            numbered = [(f"line {lines.line_num}", line) for line in lines if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [
        _pair(path, number, [line[i] if i < len(line) else "" for i in where]) for number, line in numbered
    ]


def _read_parquet(path: Path) -> list[tuple[str, str]]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"root: {path} needs pyarrow (pip install 'mdistiller[parquet]'); CSV needs no package"
        ) from error
    try:
        header = parquet.read_schema(path).names
        where = _columns(path, header)
        table = parquet.read_table(path, columns=[header[i] for i in where])
        columns = [table.column(header[i]).to_pylist() for i in where]
    except DataError:
        raise
    except Exception as error:  # pyarrow's errors are of many types
        raise DataError(f"{path} cannot be read: {error}") from error
    return [_pair(path, f"row {n}", row) for n, row in enumerate(zip(*columns, strict=True), 1)]


def _columns(path: Path, header: list[str]) -> list[int]:
    """Returns the positions of path and label in a header."""
    given = [name.strip().lower() for name in header]
    where = []
    for column, names in _COLUMNS.items():
        found = next((given.index(name) for name in names if name in given), None)
        if found is None:
            raise DataError(
                f"{path} has no column {column!r}; allowed: {', '.join(names)} (columns there: "
                f"{', '.join(header) or 'none'})"
            )
        where.append(found)
    return where


def _pair(path: Path, number: str, row: Iterable[Any]) -> tuple[str, str]:
    file, label = ("" if value is None else str(value).strip() for value in row)
    if not file or not label:
        raise DataError(f"{path}, {number}: got path {file!r} and label {label!r}; need both")
    return file, label
