"""A teacher whose outputs were computed elsewhere."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.data import ImageSet, StreamSet
from mdistiller.data.encoded import EncodedSet, some
from mdistiller.data.hf import read_column
from mdistiller.data.lists import PATH_COLUMNS
from mdistiller.errors import ConfigError, DataError, MDistillerError, MissingPackageError
from mdistiller.teacher import Teacher
from mdistiller.types import AnyBatch, Outputs

STORED = "stored"
"""Model name of a teacher whose outputs are in a file, which is its checkpoint."""

_FORM = (
    "needed: logits [N, classes], or top_log_probs and top_ids [N, K] with the number of classes; features "
    "[N, ...], names [N] and classes [classes] are optional"
)


class StoredTeacher(Teacher):
    """A teacher that looks up its outputs by the position of an image in the training set.

    Give it to `Distiller` or `distill` as the teacher; on the command line it is `--teacher-outputs FILE`.
    An image has the same outputs in every view and epoch, whatever its augmentation. Example::

        teacher = StoredTeacher({"logits": logits})  # a row for each training image, in their order
        distiller = Distiller(student, teacher, "dkd", total_steps=steps)
        out = distiller(images, labels, index)

    Args:
        outputs: arrays by name, each with a row for every image. `logits` [N, classes]; or, of a teacher that
            tells only its K most likely classes, their log-probabilities `top_log_probs` [N, K] and
            `top_ids` [N, K]. Any other entry is a feature [N, ...], whose tap has the entry's name. `names`:
            files of the images, which a run matches with the ends of its images' paths; without them, row i
            is training image i. `classes`: names in the order of the logits, which a run compares with its
            data's; without them, the data's order is taken.
        classes: number of classes, for `top_ids`.

    Raises:
        ConfigError: missing logits, entries of different lengths, values that are not finite, a name that
            comes twice.
    """

    needs_index = True

    def __init__(self, outputs: Mapping[str, Any], *, classes: int | None = None) -> None:
        given = dict(outputs)
        self_names, class_names = given.pop("names", None), given.pop("classes", None)
        rows = {name: _as_rows(name, value) for name, value in given.items()}
        if "top_ids" in rows and "top_log_probs" in rows:
            rows["logits"] = spread_rest(rows.pop("top_log_probs"), rows.pop("top_ids"), classes)
        logits = rows.pop("logits", None)
        names = None if self_names is None else [str(name) for name in self_names]
        if logits is None or logits.ndim != 2:
            raise ConfigError(
                f"stored outputs: got {some(list(outputs))} without logits [N, classes]; {_FORM}"
            )
        lengths = {name: len(value) for name, value in {"logits": logits, **rows}.items()}
        if names is not None:
            lengths["names"] = len(names)
        if len({*lengths.values()}) > 1:
            raise ConfigError(f"stored outputs: got entries of {lengths} rows; allowed is one number")
        if twice := [name for name, count in Counter(names or ()).items() if count > 1]:
            raise ConfigError(f"stored outputs: names come twice: {some(twice)}")
        super().__init__(_Stored(logits, rows))
        self.names = names
        self.classes = None if class_names is None else [str(name) for name in class_names]
        """Names of the classes; None where they are not known."""
        if self.classes is not None and len({*self.classes}) != logits.shape[1]:
            raise ConfigError(
                f"stored outputs: got classes {some(self.classes)} for logits {list(logits.shape)}; allowed: "
                "a name of its own for each column"
            )

    def __len__(self) -> int:
        return len(self.stored.row_logits)

    @property
    def stored(self) -> "_Stored":
        """The rows."""
        assert isinstance(self.model, _Stored)
        return self.model

    def forward(self, batch: AnyBatch, context: object = None) -> Outputs:
        index = batch.index
        if index.device.type == "cpu" and not all(0 <= i < len(self) for i in index.tolist()):
            raise ConfigError(
                f"index: got positions {index.min()} to {index.max()}; the stored outputs have {len(self)} "
                "rows. Outputs that are not stored go into distiller(..., outputs=Outputs(...))"
            )
        found = {name: value.float() for name, value in self.stored.take(index).items()}
        return Outputs(found.pop("logits"), found)

    def fit(self, images: ImageSet | StreamSet, columns: Sequence[int] | None = None) -> "StoredTeacher":
        """Returns the teacher with its rows in the order of training images.

        `columns`: columns of the logits in their new order; None: all, as they are.

        Raises:
            ConfigError: another number of rows than images; with names, an image without a row, or two images
                of one name.
        """
        files = image_names(images)
        if self.names is None:
            if len(self) != len(images):
                raise ConfigError(
                    f"stored outputs: got {len(self):,} rows without names; the data has {len(images):,} "
                    "training images. With the images' file names as `names`, rows may be in any order"
                )
            return self if columns is None else self._take(torch.arange(len(self)), columns)
        if files is None:
            raise ConfigError(
                "stored outputs: got rows with names, and the data's images are no files; leave the names "
                "out and store the rows in the order of the training images"
            )
        return self._take(torch.tensor(_find_rows(self.names, files)), columns)

    def _take(self, order: Tensor, columns: Sequence[int] | None) -> "StoredTeacher":
        rows = self.stored.take(order)
        if columns is not None:
            rows["logits"] = rows["logits"][:, list(columns)]
        return StoredTeacher(rows)


class _Stored(nn.Module):
    """Rows of outputs, in a module whose outputs have their shapes, from which methods are built."""

    row_logits: Tensor

    def __init__(self, logits: Tensor, features: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(features)
        for name, value in {"logits": logits, **features}.items():
            self.register_buffer(f"row_{name}", value)
        for name in self.names:
            self.add_module(name, nn.Identity())  # the tap of this name

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """Returns the rows at some positions, by name."""
        return {name: self.get_buffer(f"row_{name}")[index] for name in ("logits", *self.names)}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        count = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        shapes = {name: value.float() for name, value in self.take(torch.arange(0)).items()}
        for name in self.names:
            self.get_submodule(name)(shapes[name].new_zeros(count, *shapes[name].shape[1:]))
        return shapes["logits"].new_zeros(count, shapes["logits"].shape[1])


def _as_rows(name: str, value: Any) -> Tensor:
    try:
        rows = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:  # words, rows of other lengths
        raise ConfigError(f"stored outputs: {name!r} is no array of numbers: {error}; {_FORM}") from error
    if name == "top_ids":
        rows = rows.long()
    elif not rows.is_floating_point():
        rows = rows.float()
    if rows.ndim < 2 or not name.isidentifier():
        raise ConfigError(f"stored outputs: got {name!r} of shape {list(rows.shape)}; {_FORM}")
    if rows.is_floating_point() and not rows.isfinite().all():
        raise ConfigError(f"stored outputs: {name!r} holds values that are not finite")
    return rows


def spread_rest(log_probs: Tensor, ids: Tensor, classes: int | None) -> Tensor:
    """Completes log-probabilities of the most likely classes: the others share what is left of one evenly.

    Args:
        log_probs: [N, K], natural logarithms.
        ids: int64 [N, K], their classes, each once in a row.
        classes: number of classes.

    Returns:
        Log-probabilities of all classes, [N, classes].

    Raises:
        ConfigError: no number of classes, other shapes, a class twice or out of range, or probabilities whose
            sum is above one.
    """
    if classes is None:
        raise ConfigError("stored outputs: top_ids needs the number of classes")
    total = log_probs.double().logsumexp(1)
    is_wrong = log_probs.shape != ids.shape or ids.min() < 0 or ids.max() >= classes
    if is_wrong or any(len(row.unique()) < len(row) for row in ids):
        raise ConfigError(
            f"stored outputs: got top_log_probs {list(log_probs.shape)} and top_ids {list(ids.shape)}; "
            f"allowed is one shape, with ids of different classes in 0 ... {classes - 1}"
        )
    if (total > 1e-3).any():
        raise ConfigError(
            f"stored outputs: top_log_probs: the probabilities of row {int(total.argmax())} sum to "
            f"{total.max().exp():.3f}; allowed is 1 or less (logits need all classes)"
        )
    left = (-torch.expm1(total.clamp(max=-1e-12))).clamp(min=1e-12)
    rest = (left / max(1, classes - ids.shape[1])).log()
    found = rest[:, None].expand(-1, classes).clone()
    return found.scatter_(1, ids, log_probs.double()).float()


def image_names(images: ImageSet | StreamSet) -> Sequence[str] | None:
    """Returns the paths of images that are files, in their order; None for others."""
    if isinstance(images, EncodedSet):
        return [images.name(i) for i in range(len(images))]
    return images.names if isinstance(images, ImageSet) else None


def _find_rows(names: Sequence[str], files: Sequence[str]) -> list[int]:
    """Returns the row of each file: that of the name with which its path ends."""
    rows = {PurePath(name).parts: row for row, name in enumerate(names)}
    lengths = {len(parts) for parts in rows}
    found: list[int] = []
    missing: list[str] = []
    for file in files:
        parts = PurePath(file).parts
        match = [rows[end] for n in lengths if (end := parts[-n:]) in rows]
        found += match[:1]
        if len(match) != 1:
            missing.append(file)
    if missing:
        raise ConfigError(
            f"stored outputs: {len(missing):,} of {len(files):,} training images have no name of their own "
            f"among the rows: {some(missing)}; a row's name is {names[0]!r}"
        )
    if twice := [names[row] for row, count in Counter(found).items() if count > 1]:
        raise ConfigError(
            f"stored outputs: several images have the name {twice[0]!r}; store longer paths, such as "
            "CLASS/FILE"
        )
    return found


def read_outputs(path: Path, classes: int | None = None) -> StoredTeacher:
    """Reads a .npz, .safetensors or .parquet file with the entries of a `StoredTeacher`.

    In Parquet they are columns; `path` and `output`, from `mdistiller predict --out`, are names and logits.
    FOLDER:COLUMN reads the logits in a column of the training split of a data set of `datasets`.

    Raises:
        ConfigError: another suffix, or entries that a `StoredTeacher` refuses.
        DataError: a file that is missing or unreadable.
    """
    folder, _, column = str(path).rpartition(":")
    if folder and Path(folder).is_dir():
        return StoredTeacher(read_column(Path(folder), column))
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ConfigError(
            f"teacher_outputs: got {path}; allowed are files {', '.join(readers)}, and "
            "FOLDER:COLUMN of a data set of `datasets`"
        )
    try:
        outputs = readers[path.suffix](path)
    except MDistillerError:
        raise
    except Exception as error:  # each format has errors of its own
        raise DataError(f"{path} cannot be read: {error}") from error
    return StoredTeacher(outputs, classes=classes)


def write_outputs(path: Path, outputs: Mapping[str, Any]) -> None:
    """Writes arrays with a row for each image to a .npz, .parquet or .safetensors file.

    A safetensors file leaves out the names, so its rows must stay in the order of the training images.

    Raises:
        ConfigError: another suffix, a missing package, or a file that cannot be written.
    """
    try:
        if path.suffix == ".npz":
            np.savez(path, **outputs)
        elif path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            arrays = {k: np.ascontiguousarray(v) for k, v in outputs.items() if k not in ("names", "classes")}
            save_file(arrays, path, {"classes": json.dumps(outputs.get("classes"))})
        elif path.suffix == ".parquet":
            arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
            # Arrays in rows of their own type; Arrow takes those of one axis alone.
            columns = {k: v.tolist() if np.ndim(v) > 2 else list(v) for k, v in outputs.items()}
            about = {"classes": json.dumps(columns.pop("classes", None))}
            parquet.write_table(arrow.table(columns, metadata=about), path)
        else:
            raise ConfigError(f"out: got {path}; allowed are files .npz, .safetensors, .parquet")
    except ImportError as error:
        raise MissingPackageError(f"out: {path}", "pyarrow", "parquet") from error
    except OSError as error:
        raise ConfigError(f"out: cannot write to {path}: {error}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        return rows | _read_classes((file.metadata() or {}).get("classes"))


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingPackageError(f"teacher_outputs: {path}", "pyarrow", "parquet") from error
    table = parquet.read_table(path)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    # As `mdistiller predict --out` names them.
    own = {**dict.fromkeys(PATH_COLUMNS, "names"), "output": "logits"}
    rows = {own.get(name, name): value for name, value in columns.items()}
    return rows | _read_classes((table.schema.metadata or {}).get(b"classes"))


def _read_classes(text: str | bytes | None) -> dict[str, Any]:
    names = json.loads(text or "null")
    return {} if names is None else {"classes": names}
