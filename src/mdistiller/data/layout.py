"""Names of the splits of a data set on disk, and the choice of the two that a run reads."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from mdistiller.data.config import DataConfig
from mdistiller.errors import ConfigError, DataError

T = TypeVar("T")

TRAIN = ("train",)
VALIDATION = ("val", "valid", "validation", "dev")
TEST = ("test",)
UNLABELED = ("unlabeled", "unlabelled")
"""Folders of training images without a class."""
ADVICE = "--data.val-fraction 0.1 takes a tenth of the training images for evaluation"


def visible(folder: Path) -> list[Path]:
    """Lists the entries of a folder without hidden ones, sorted."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def find_entry(root: Path, names: Iterable[str], is_kind: Callable[[Path], bool]) -> Path | None:
    """Finds the first of some names among the entries of a kind in `root`, in any case; None without one."""
    # Of Val and val, the last in the order of the names, which is val, stays.
    found = {entry.name.lower(): entry for entry in visible(root) if is_kind(entry)}
    return next((found[name] for name in names if name in found), None)


def subfolder(root: Path, names: tuple[str, ...]) -> Path | None:
    """Finds the first of some names among the folders in `root`, in any case; None if none is there."""
    return find_entry(root, names, Path.is_dir)


def evaluation_split(config: DataConfig, validation: T | None, test: T | None) -> T | None:
    """Chooses the split that a run evaluates on; None if `load_data` cuts it from the training images.

    Raises:
        ConfigError: val_fraction for a set that has a validation split.
        DataError: no test split is there, or no split to evaluate on.
    """
    if config.val_fraction is not None and validation is not None:
        raise ConfigError(
            f"val_fraction: got {config.val_fraction}; {config.root} has a validation split, allowed is None"
        )
    if config.eval_split == "test":
        if test is None:
            raise DataError(f"eval_split: got 'test', but {config.root} has no test split")
        return test
    return validation or (test if config.val_fraction is None else None)
