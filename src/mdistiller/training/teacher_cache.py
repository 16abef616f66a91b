"""Cache of a teacher's outputs on disk, which any run records while it trains and every later run reads.

A row belongs to an image and to the draws of its augmentation. Each kind of output (the logits, or a tapped
vector) of each view of the methods has a file of its own, named after a hash of everything on which its rows
depend.
"""

import hashlib
import inspect
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.methods.registry import PLUGIN
from mdistiller.models import ModelConfig
from mdistiller.models.own_input import own_inputs, without_own_input
from mdistiller.models.registry import model_function
from mdistiller.runs.checkpoint import write_text
from mdistiller.teacher import Teacher
from mdistiller.training.row_store import LARGEST, Format, Numbers, RowFormat, RowStore, Values, row_format
from mdistiller.types import Line

LOGITS = "logits"
_LIBRARIES = ("mdistiller", "timm", "torch", "torchvision", "transformers")
_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that every module has
_TOLERANCE = 0.05  # of the outputs' norm, without their mean; bfloat16 differs from float32 by up to 0.012
_VERSION = 3  # a change of draws, formats or key makes old files foreign


class Stream(NamedTuple):
    """One kind of output for one view of the methods: the content of a file."""

    key: Line  # everything on which the rows depend, as plain values
    size: int  # length of a vector
    format: Format
    rows: int

    @property
    def full_bytes(self) -> int:
        """Size of the file with all rows."""
        return self.rows * RowStore.stride_of(row_format(self.size, self.format).row_bytes)

    def digest(self) -> str:
        """Computes the name of the content, 64 hexadecimal digits."""
        content = {**self.key, "size": self.size, "format": self.format, "version": _VERSION}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TeacherCache:
    """Stored outputs of a teacher, by the methods' view, the kind of output and the row's number.

    Outputs that were just computed are returned as they are stored, so a run has the same bits whether it
    computes or reads them.

    Args:
        folder: folder of the files, which other processes may share.
        views: for each view of the methods, the streams by kind of output; the first kind is `LOGITS`.

    Raises:
        ConfigError: the folder is a file, or its disk cannot hold the rows.
    """

    def __init__(self, folder: Path, views: Sequence[Mapping[str, Stream]]) -> None:
        self.folder, self.is_recording, self._has_warned = folder, True, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"teacher_cache: {folder} is not a folder ({error})") from error
        except OSError as error:
            self._stop_recording(error)
        self._views = [{kind: self._open(stream) for kind, stream in kinds.items()} for kinds in views]
        if self.is_recording:
            self._check_room()

    def fill(
        self,
        view: int,
        numbers: Numbers,
        kinds: Iterable[str],
        compute: Callable[[], Mapping[str, Values]],
    ) -> dict[str, Values]:
        """Returns the outputs of some rows, float32 [B, D] by kind; missing ones are computed and recorded.

        Args:
            view: the methods' view, from 0.
            numbers: the rows, int64 [B].
            kinds: kinds of outputs to return.
            compute: returns outputs of all kinds for all of the rows; called if one of `kinds` is missing.
        """
        files = self._views[view]
        found = {kind: files[kind].read(numbers) for kind in kinds}
        if not all(there.all() for _, there in found.values()):
            for kind, live in compute().items():
                there = found[kind][1] if kind in found else files[kind].read(numbers)[1]
                new = np.flatnonzero(~there)
                stored = self._record(files[kind], numbers[new], live[new])
                if kind in found:
                    found[kind][0][new] = stored
        return {kind: values for kind, (values, _) in found.items()}

    def check(self, outputs: Mapping[str, Values]) -> None:
        """Compares outputs for the probe, [1, D] by kind, with those that each file's first row keeps.

        Raises:
            ConfigError: they differ by more than rounding on another machine explains.
        """
        for kind, file in (pair for files in self._views for pair in files.items()):
            number, own = np.zeros(1, np.int64), outputs[kind]
            kept, there = file.read(number)
            if not there.all():
                self._record(file, number, own)
                continue
            apart, size = np.linalg.norm(kept - own), np.linalg.norm(own - own.mean())
            if apart > _TOLERANCE * size:
                raise ConfigError(
                    f"teacher_cache: {self.folder / file.name}.rows holds outputs of another teacher, though "
                    f"its model, options and weights are the same: {kind} of a test image differ by "
                    f"{apart / size:.0%}. So code that the teacher calls has changed: remove the file, or "
                    "give another folder"
                )

    def describe(self) -> str:
        """Returns a line for people: files, size when full, and size so far."""
        files = self._files()
        stores = [(file.store, file.stream.full_bytes) for file in files if file.store is not None]
        names = ", ".join(str(store.path) for store, _ in stores)
        full = sum(file.stream.full_bytes for file in files)
        used = sum(min(store.used_bytes(), size) for store, size in stores)
        ends = "" if self.is_recording else "; nothing is recorded"
        return f"teacher cache: {names or self.folder}, {_size(full)} when full, {_size(used)} so far{ends}"

    def _files(self) -> "list[_File]":
        """Lists the files; views that fall together share one."""
        return list({file.name: file for files in self._views for file in files.values()}.values())

    def _open(self, stream: Stream) -> "_File":
        digest = stream.digest()
        path = self.folder / f"{digest[:16]}.rows"
        rows = row_format(stream.size, stream.format)
        arguments = (path, rows.row_bytes, stream.rows, int(digest[16:32], 16))
        store = None
        if self.is_recording:
            try:
                store = RowStore(*arguments)
                _describe_file(path.with_suffix(".json"), stream, digest)
            except OSError as error:
                self._stop_recording(error)
        if store is None and path.is_file():
            try:
                store = RowStore(*arguments, writable=False)
            except OSError as error:
                warnings.warn(f"teacher_cache: cannot read {path}: {error}", stacklevel=2)
        return _File(path.stem, rows, stream, store)

    def _check_room(self) -> None:
        needed = sum(
            max(0, file.stream.full_bytes - file.store.used_bytes())
            for file in self._files()
            if file.store is not None
        )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigError(
                f"teacher_cache: {self.folder} needs {_size(needed)} more when it is full, and its disk has "
                f"{_size(free)} left; allowed are a folder on a larger disk, or fewer views of each image "
                "(--teacher-views K)"
            )

    def _record(self, file: "_File", numbers: Numbers, values: Values) -> Values:
        """Stores rows where that is possible; returns the values as they are read."""
        fits = (np.abs(values) <= LARGEST).all(1)  # False for NaN
        if not fits.all():
            if not self._has_warned:
                self._has_warned = True
                problem = "outputs of the teacher that are not finite, or beyond half precision (65,504)"
                warnings.warn(f"teacher_cache: {problem}, are not stored", stacklevel=2)
            kept = values.copy()
            kept[fits] = self._record(file, numbers[fits], values[fits]) if fits.any() else kept[fits]
            return kept
        rows = file.format.encode(values)
        if self.is_recording and file.store is not None:
            try:
                file.store.write(numbers, rows)
            except OSError as error:
                self._stop_recording(error)
        return file.format.decode(rows)

    def _stop_recording(self, error: OSError) -> None:
        if self.is_recording:
            self.is_recording = False
            warnings.warn(f"teacher_cache: nothing more is recorded in {self.folder}: {error}", stacklevel=2)


class _File(NamedTuple):
    """A stream's file; without a `store` it has no rows."""

    name: str
    format: RowFormat
    stream: Stream
    store: RowStore | None

    def read(self, numbers: Numbers) -> tuple[Values, npt.NDArray[np.bool_]]:
        """Returns the vectors of rows, float32 [B, D], and whether each is there."""
        if self.store is None:
            return np.zeros((len(numbers), self.stream.size), np.float32), np.zeros(len(numbers), np.bool_)
        rows, there = self.store.read(numbers)
        return self.format.decode(rows), there


def _describe_file(path: Path, stream: Stream, digest: str) -> None:
    """Writes the description of a file, which no program reads."""
    content = {"sha256": digest, "version": _VERSION, "size": stream.size, "format": stream.format}
    content |= {"key": stream.key}
    text = json.dumps(content, indent=1) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_text(path, text)


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def teacher_key(teacher: Teacher, configs: Sequence[ModelConfig] = ()) -> dict[str, str]:
    """Returns what a teacher's outputs depend on: class, hashes of architecture, code and weights, images.

    The architecture has the options in `configs` and the plain attributes of all modules. The code is that of
    plug-ins, as whole files, and of classes, hooks and functions in attributes outside the libraries.
    `TeacherCache.check` sees what no hash tells. The images are named where they are not
    the student's; buffers hold their mean and deviation exactly.
    """
    model = teacher.model
    options = [sorted(config.options.items()) for config in configs]
    plain = [
        [(k, v) for k, v in vars(m).items() if k not in _OF_MODULES and _is_plain(v)] for m in model.modules()
    ]
    # Addresses differ between processes.
    architecture = re.sub(r" at 0x[0-9a-f]+", "", f"{model} {plain} {options}")
    makers = [model_function(config.name) for config in configs]
    code = sorted({_code(part) for part in (*map(type, model.modules()), *makers) if part is not None})
    code += [
        f"{path} {text}" for path, m in model.named_modules() for text in map(_code, _patches(m)) if text
    ]
    images = [part.describe() for part in own_inputs(model)]
    return {
        "class": type(without_own_input(model)).__name__,
        "architecture": hashlib.sha256(architecture.encode()).hexdigest(),
        "code": hashlib.sha256("\0".join(code).encode()).hexdigest(),
        "weights": teacher.fingerprint,
        **({"images": "; ".join(images)} if images else {}),
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.items()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _patches(module: nn.Module) -> list[object]:
    """Lists what was added to one object: forward hooks, and functions in attributes."""
    own = [value for name, value in vars(module).items() if name not in _OF_MODULES and callable(value)]
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [part for part in (*hooks, *own) if not isinstance(part, nn.Module)]


def _code(part: object) -> str:
    """Returns the source of a plug-in, or of a class or function with the plain values that it reads.

    A library's code, or code without a file, is "".
    """
    if isinstance(part, partial):
        given = [value for value in (*part.args, *part.keywords.items()) if _is_plain(value)]
        return (code := _code(part.func)) and f"{code} {given}"
    part = getattr(part, "__func__", part)
    read = [{} if inspect.isclass(part) else getattr(part, "__dict__", {})]
    if inspect.isfunction(part):
        read += inspect.getclosurevars(part)[:2]
    elif not inspect.isclass(part):
        part = type(part)
    module = inspect.getmodule(part)
    if module is None or module.__name__.partition(".")[0] in _LIBRARIES:
        return ""
    plain = [pair for names in read for pair in names.items() if _is_plain(pair)]
    try:
        source = inspect.getsource(module if module.__name__.startswith(PLUGIN) else part)
    except (OSError, TypeError):
        return ""
    return f"{source} {plain}" if plain else source
