"""Data sets of Hugging Face's `datasets` on disk: `save_to_disk`'s folders, Parquet files, tar shards."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import Splits
from mdistiller.data.encoded import EncodedSet, SetMaker, make_splits, set_maker, some
from mdistiller.data.layout import ADVICE, TEST, TRAIN, VALIDATION, evaluation_split
from mdistiller.data.lists import LABEL_COLUMNS, sort_classes
from mdistiller.data.registry import register_dataset
from mdistiller.errors import DataError, MissingPackageError, UnknownNameError
from mdistiller.types import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

_LABELS = (*LABEL_COLUMNS, "labels", "cls")  # the last one in WebDataset's shards


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """Image in a row of a `datasets.Dataset`."""

    rows: "Dataset"  # with the column of images alone, whose items are {"bytes": …, "path": …}
    column: str
    origin: Path  # of the split, for messages
    index: int

    def __str__(self) -> str:
        return str(self.origin / f"row {self.index}")

    def file(self) -> Path | BinaryIO:
        image = self.rows[self.index][self.column]
        if image is None:
            raise OSError("the row has no image")
        return Path(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])


@register_dataset("hf")
def load_hf(config: DataConfig) -> Splits:
    """Reads a data set of `datasets` below `root`; images are decoded in each epoch, as those of files.

    Rows without a label, or with -1, have the label -100. Class ids are those of the column's class names,
    or follow the sorted values of the column.

    Raises:
        MissingPackageError: the package `datasets` is missing.
        DataError: no data set is there, or it has no such split, column or image.
    """
    found = _open(config.root)
    splits = {
        split: next((found[name] for name in names if name in found), None)
        for split, names in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))
    }
    train = splits["train"]
    if train is None:
        raise DataError(f"{config.root} has no split train; splits there: {some(sorted(found))}")
    test = evaluation_split(config, splits["validation"], splits["test"])
    if test is None and config.val_fraction is None and config.labeled:
        raise DataError(f"{config.root} has no split {', '.join(VALIDATION + TEST)}: {ADVICE}")
    image, label = _columns(config, train)
    classes: tuple[str, ...] = ()
    if label is not None:
        classes, class_ids = _classes(config, train, label)
    make = set_maker(config, 224)

    def rows_of(rows: "Dataset", split: str) -> EncodedSet:
        if missing := {image, *([label] if label else [])} - set(rows.column_names):
            raise DataError(f"{config.root}: split {split} has no column {missing.pop()!r}")
        labels = class_ids(rows, split) if label else torch.full((len(rows),), IGNORED)
        return _row_set(rows, image, labels, config.root / split, make)

    first = rows_of(train, "train")
    second = first.select(torch.arange(0)) if test is None else rows_of(test, config.eval_split)
    return make_splits(first, second, classes, f"images of the data set in {config.root}")


def read_column(root: Path, column: str) -> dict[str, object]:
    """Reads logits in a column of the training split, with the names of its rows.

    Raises:
        MissingPackageError, DataError: as `load_hf`.
    """
    rows = _open(root).get("train")
    there = [] if rows is None else rows.column_names
    if rows is None or column not in there:
        raise DataError(f"{root}: split train has no column {column!r}; columns there: {some(there)}")
    return {"logits": np.array(rows[column]), "names": [f"train/row {i}" for i in range(len(rows))]}


def _open(root: Path) -> "dict[str, Dataset]":
    """Opens a data set, memory-mapped, as its splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError("data.kind: hf", "datasets", "hf") from error
    if not root.is_dir():
        raise DataError(
            f"{root} is no folder; kind hf reads a folder of save_to_disk, Parquet files or tar shards"
        )
    try:
        if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(root))
        elif any(path.suffix in (".parquet", ".tar") for path in root.rglob("*")):
            found = datasets.load_dataset(str(root))
        else:
            raise DataError(f"{root} has no data set of save_to_disk, no Parquet files and no tar shards")
    except DataError:
        raise
    except Exception as error:  # of many types, also of pyarrow and pandas
        raise DataError(f"the data set in {root} cannot be read: {error}") from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _columns(config: DataConfig, rows: "Dataset") -> tuple[str, str | None]:
    """Returns the columns of images and of labels, if those are read."""
    import datasets

    names: list[str] = rows.column_names
    images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name in names if name.lower() in _LABELS]
    labels = labels or [n for n, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]

    def pick(field: str, kind: str, allowed: list[str], found: list[str], what: str) -> str:
        given: str | None = getattr(config, field)
        if given is not None and given not in allowed:
            raise UnknownNameError(f"{kind} in data.{field}", given, allowed)
        if given is None and len(found) != 1:
            raise DataError(
                f"{config.root} has {len(found)} columns {what} ({some(found)}), need one or "
                f"--data.{field.replace('_', '-')}; columns there: {some(names)}"
            )
        return found[0] if given is None else given

    image = pick("image_column", "column of images", images, images, "of images")
    if not config.labeled:
        return image, None
    return image, pick("label_column", "column", names, labels, "that may be the label")


def _classes(
    config: DataConfig, rows: "Dataset", column: str
) -> "tuple[tuple[str, ...], Callable[[Dataset, str], Tensor]]":
    """Returns the names of the classes, and a function from the rows of a split to class ids, int64 [N].

    A split's own class names may be in another order.
    """
    import datasets

    kind = rows.features[column]
    if isinstance(kind, datasets.ClassLabel):
        names = tuple(kind.names)
        position: dict[object, int] = {name: i for i, name in enumerate(names)}
    else:
        dtype = getattr(kind, "dtype", "list")
        if not dtype.startswith(("int", "uint", "string", "large_string")):
            raise DataError(
                f"{config.root}: column {column!r} has values of type {dtype}; allowed are class ids and "
                "names, one for an image"
            )
        text = {str(value): value for value in rows.unique(column) if value not in (None, -1)}
        names = sort_classes(text)
        position = {text[name]: i for i, name in enumerate(names)}
    position |= {-1: IGNORED, None: IGNORED}
    if len(names) < 2:
        raise DataError(f"{config.root}: column {column!r} has {len(names)} classes; need at least two")

    def class_ids(rows: "Dataset", split: str) -> Tensor:
        kind, values = rows.features[column], list(rows[column])
        if isinstance(kind, datasets.ClassLabel):
            values = [value if value in (-1, None) else kind.names[value] for value in values]
        if unknown := set(values) - set(position):
            raise DataError(
                f"{config.root}: split {split} has classes of its own: {some(sorted(map(str, unknown)))}"
            )
        return torch.tensor([position[value] for value in values], dtype=torch.int64)

    return names, class_ids


def _row_set(rows: "Dataset", column: str, labels: Tensor, origin: Path, make: SetMaker) -> EncodedSet:
    import datasets

    images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    samples = [DatasetRow(images, column, origin, i) for i in range(len(images))]
    return make(samples=np.array(samples, dtype=object), labels=labels)
