"""Table of the teacher's logits for every crop and flip of every training image, computed once.

Padding and flipping give an image a finite number of variants (162 for CIFAR), all equally likely. A run that
looks up the logits of the drawn variant equals the run with the live teacher up to half precision's rounding.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mdistiller.data import Augment
from mdistiller.data.dataset import ImageSet
from mdistiller.errors import ConfigError
from mdistiller.runs.checkpoint import atomically
from mdistiller.training.precision import autocast
from mdistiller.types import Batch, Outputs

_FORMAT = 1  # a change of what a table holds makes old files foreign
_PIXELS = {"cpu": 64 * 32 * 32, "gpu": 4096 * 32 * 32}  # in one pass of the teacher


class TeacherTable:
    """Half-precision logits [N, variants, classes] of N images, memory-mapped on the CPU."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def lookup(self, index: Tensor, variant: Tensor) -> Outputs:
        """Returns the teacher's outputs for images `index` in the variants `variant`, both int64 [B]."""
        return Outputs(self.logits[index, variant].float(), {})


def open_table(
    folder: Path,
    teacher: nn.Module,
    images: ImageSet,
    augment: Augment,
    precision: torch.dtype,
    device: torch.device,
    *,
    build: Callable[[], Tensor] | None,
) -> TeacherTable:
    """Opens the table of a teacher for a training set, or builds and writes it.

    The folder has one file for each teacher, data set, augmentation and (autocast) precision. `device` is
    that of the lookups. `build` computes the logits if the file is missing, damaged or of something else;
    None: another process has just written it.

    Raises:
        ConfigError: logits beyond half precision, or a folder that cannot be written.
    """
    key = table_key(teacher, images, augment, precision)
    path = folder / f"teacher-{key[:16]}.safetensors"
    logits = _read(path, key)
    if logits is None:
        assert build is not None, f"{path} was to be there"
        logits = build()
        _write(path, key, logits)
    return TeacherTable(logits.to(device))


def build_logits(
    teacher: Callable[[Tensor], Outputs],
    images: ImageSet,
    augment: Augment,
    precision: torch.dtype,
    device: torch.device,
    *,
    num_classes: int,
    memory_format: torch.memory_format,
    done: Callable[[int], None],
) -> Tensor:
    """Runs the teacher on all variants of all images; returns half precision [N, variants, classes].

    `done` is called now and then with the number of finished images, of N · variants.

    Raises:
        ConfigError: a logit beyond half precision.
    """
    variants = augment.variants(images.images)
    logits = torch.empty(len(images), variants, num_classes, dtype=torch.float16)
    augment.train()
    finished = 0
    at_once = max(1, _PIXELS["cpu" if device.type == "cpu" else "gpu"] // images.images[0, :, :, 0].numel())
    for rows in torch.arange(len(images)).split(at_once):
        raw = Batch(images.images[rows].to(device), images.labels[rows].to(device), rows.to(device))
        found = []
        for variant in range(variants):
            image = augment.change([raw], [augment.draw_of(raw.image, variant)])[0].image
            with torch.no_grad(), autocast(device, precision):
                found.append(teacher(image.contiguous(memory_format=memory_format)).logits.half())
            done(finished := finished + len(rows))
        logits[rows] = torch.stack(found, 1).cpu()
    if not logits.isfinite().all():
        problem = "logits that are not finite, or beyond half precision (65,504)"
        raise ConfigError(f"teacher_table: the teacher has {problem}")
    return logits


def table_key(teacher: nn.Module, images: ImageSet, augment: Augment, precision: torch.dtype) -> str:
    """Computes a hash (64 hexadecimal digits) of everything on which the logits depend."""
    digest = hashlib.sha256()
    architecture = re.sub(r" at 0x[0-9a-f]+", "", str(teacher))  # addresses differ between processes
    about = [_FORMAT, architecture, str(precision), augment.config.flip, augment.variants(images.images)]
    about += [augment.mean.tolist(), augment.std.tolist()]
    digest.update(json.dumps(about).encode())
    for name, tensor in (*teacher.state_dict().items(), ("images", images.images)):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _read(path: Path, key: str) -> Tensor | None:
    """Reads the logits; None if there is no file, or, with a warning, if it is damaged or another one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["mdistiller"])
            logits: Tensor = file.get_tensor("logits")
        if about["key"] != key:
            raise ValueError("it belongs to another teacher, data set or augmentation")
        if hashlib.sha256(_bytes(logits)).hexdigest() != about["sha256"]:
            raise ValueError("wrong checksum")
    except Exception as error:  # a damaged file may fail in any way
        warnings.warn(f"teacher_table: {path} is built again: {error}", stacklevel=2)
        return None
    return logits


def _write(path: Path, key: str, logits: Tensor) -> None:
    about = {"key": key, "sha256": hashlib.sha256(_bytes(logits)).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda to: save_file({"logits": logits}, to, {"mdistiller": json.dumps(about)}))
    except OSError as error:
        raise ConfigError(f"teacher_table: cannot write {path}: {error}") from error
