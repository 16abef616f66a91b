"""Loading of weights from a file: strictly, and without running code from a pickle."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from torch import Tensor, nn

from mdistiller.errors import CheckpointError, ClassCountError
from mdistiller.models.layers import classifier_paths
from mdistiller.models.registry import Options
from mdistiller.settings import Means, Side, Stds, check_channels, explain
from mdistiller.types import Line

STUDENT_FILE = "student.safetensors"  # the trained student in a run folder

_NESTINGS = ("model", "state_dict", "model_ema", "state_dict_ema", "ema")


class _Method(BaseModel, extra="allow"):
    name: str


class _Extension(BaseModel, extra="forbid"):
    method: _Method
    teacher: str
    teacher_options: Options
    image_size: Side
    teacher_image_size: Side = 1


class _Metadata(BaseModel, extra="allow"):
    """Metadata of a student; a task requires some of the fields, and may add others."""

    task: str = ""
    model: str = ""
    options: Options = Field(default_factory=dict)
    classes: list[str] = Field(default=[""], min_length=1)
    num_classes: int = Field(default=2, ge=2, le=2**16)
    labels: list[int] = Field(default_factory=list)
    image_size: Side = 1
    short_side: Side | None = None
    mean: Means = (0, 0, 0)
    std: Stds = (1, 1, 1)
    extension: _Extension | None = None

    _check_channels = model_validator(mode="after")(check_channels)

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if "labels" in self.model_fields_set and self.labels != [*range(1, len(self.classes) + 1)]:
            raise ValueError(
                f"labels: got {self.labels!r:.60}; allowed: 1 to {len(self.classes)}, the classes'"
            )
        return self


def load_weights(
    model: nn.Module, path: str | Path, name: str | None = None, *, new_classifier: bool = False
) -> None:
    """Loads a checkpoint strictly, in the dtypes and on the devices of the model.

    Args:
        model: Model to fill. On an error it keeps its weights.
        path: A `.safetensors` file; a torch file with a bare state dict or one under "model", "state_dict",
            "model_ema", "state_dict_ema" or "ema", the first that is there; or a run folder, for its student.
            Prefixes `module.` (DDP), `_orig_mod.` (torch.compile) and `model.` are removed if all keys share
            them. Files of before 2019 have no counters `num_batches_tracked`; the model keeps its own.
            A model without a classifier leaves out that of the file.
        name: Name of the model in messages. None: its class name.
        new_classifier: If only the number of classes differs, or the file has no classifier, start a new one
            from small weights, and warn.

    Raises:
        CheckpointError: The file is missing or damaged, holds more than tensors and plain values (none of
            its code runs), has weights that are not finite, or belongs to another architecture.
        ClassCountError: The file fits except for the number of classes.
    """
    source, path = path, find_weights(path)
    state = read_weights(path)
    own = model.state_dict()
    if not any(key.startswith("model.") for key in own):
        state = _without_prefix(state, "model.")
    counters = [key for key in own if key.endswith(".num_batches_tracked")]
    if not any(key in state for key in counters):
        state |= {key: own[key] for key in counters}
    heads = classifier_paths(model)
    left_out = [f"{head}." for head, m in model.named_modules() if head in heads and type(m) is nn.Identity]
    state = {key: tensor for key, tensor in state.items() if not key.startswith(tuple(left_out))}
    try:
        problem = _difference(model, state, path)
        if problem is not None:
            metadata = read_metadata(path)
            held = metadata.get("model")
            if name is not None and isinstance(held, str) and held != name:
                raise CheckpointError(f"{source} holds a {held}; you asked for {name}: {problem}")
            asked = type(model).__name__ if name is None else name
            raise CheckpointError(f"{path} belongs to another architecture than {asked}: {problem}")
    except ClassCountError as error:
        if not new_classifier:
            raise
        lack = f"{error.theirs} classes and is to be trained on {error.ours}: its classifier is left out, and"
        warnings.warn(
            f"{path} has {lack if error.theirs else 'no classifier:'} a new one starts from random weights",
            stacklevel=2,
        )
        reshaped = [key for key in own if key not in state or own[key].shape != state[key].shape]
        initialize_classifier(model, {key.rpartition(".")[0] for key in reshaped})
        own = model.state_dict()
        state |= {key: own[key] for key in reshaped}
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise CheckpointError(f"{path}: {key} is no plain tensor of real numbers")
        tensor = state[key] = tensor.to(own[key].dtype)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite")
    model.load_state_dict(state)


def initialize_classifier(model: nn.Module, paths: Iterable[str]) -> None:
    """Gives new linear layers small weights, so that the first steps do not have to undo large ones."""
    for path in sorted(paths):
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the state dict in a file, on the CPU; path and errors as in `load_weights`."""
    path = find_weights(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with _readable(path, "safetensors"):
            state = _state_dict(load_file(path, device="cpu"), path)
    else:
        state = _state_dict(_read_torch(path), path)
    if all(key.startswith("module.") or key == "n_averaged" for key in state):  # torch's AveragedModel
        state.pop("n_averaged", None)
    for prefix in ("module.", "_orig_mod."):
        state = _without_prefix(state, prefix)
    return state


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    shared = all(key.startswith(prefix) for key in state)
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()} if shared else state


def find_weights(path: str | Path) -> Path:
    """Returns the path, or the student's file in a run folder; CheckpointError if there is no such file."""
    path = Path(path)
    try:
        path = path / STUDENT_FILE if path.is_dir() else path
        if path.is_file():
            return path
    except OSError as error:  # for example a name that is too long
        raise CheckpointError(f"no such checkpoint: {path} ({error.strerror})") from error
    hint = "; hf:// is opened only where it is typed, not from a config" if path.parts[:1] == ("hf:",) else ""
    raise CheckpointError(f"no such checkpoint: {path}{hint}")


def read_metadata(path: str | Path) -> Line:
    """Reads the metadata that a run stored with its student's weights; {} for a file from elsewhere.

    Raises:
        CheckpointError: the file is missing or damaged, or an entry is missing or wrong.
    """
    from safetensors import safe_open

    path = find_weights(path)
    if path.suffix != ".safetensors":
        return {}
    with _readable(path, "safetensors"), safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("mdistiller", "{}")
        try:
            _Metadata.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise CheckpointError(str(explain(error, f"{path}: metadata"))) from error
        metadata: Line = json.loads(text)
        return metadata


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds objects beside tensors and plain values, which "
            f"could run code: {_why(error)}"
        ) from error
    except Exception as error:  # a damaged file may fail in any way
        raise CheckpointError(f"{path} is not a readable {kind} file: {_why(error)}") from error


def _read_torch(path: Path) -> object:
    with _readable(path, "torch"):
        if zipfile.is_zipfile(path):
            # torch does not check the checksums.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged: wrong checksum of its part {damaged!r}")
        return torch.load(path, map_location="cpu", weights_only=True)


def _why(error: Exception) -> str:
    """Returns the first sentence; torch's next ones explain how to load an unsafe file."""
    text = str(error)
    text = " ".join((text.partition("WeightsUnpickler error: ")[2] or text).split())
    return text.partition(". ")[0] or type(error).__name__


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        inner = (content.get(key) for key in _NESTINGS)
        content = next((state for state in inner if isinstance(state, dict)), content)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no state dict but a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds no state dict: {key!r} is a {type(value).__name__}. Allowed: a state dict, "
                f"bare or under one of the keys {', '.join(_NESTINGS)}"
            )
    return content


def _difference(model: nn.Module, state: dict[str, Tensor], path: Path) -> str | None:
    """Describes how a state dict differs from the model, or returns None; may raise ClassCountError."""
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or unexpected or reshaped):
        return None
    heads = tuple(f"{head}." for head in classifier_paths(model))
    if not (unexpected or reshaped) and missing == [key for key in own if key.startswith(heads)]:
        raise ClassCountError(f"{path} has no classifier", 0, len(own[missing[0]]))
    problems = [
        f"{len(keys)} key{'s' * (len(keys) > 1)} {what} ({', '.join(keys[:3])}{', …' * (len(keys) > 3)})"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if reshaped:
        first = reshaped[0]
        theirs, ours = tuple(state[first].shape), tuple(own[first].shape)
        problems.append(f"{first} has shape {theirs} in the file and {ours} in the model")
        if len(problems) == 1 and _only_outputs_differ(model, own, state, reshaped):
            classes = f"{theirs[0]} classes, the model has {ours[0]}: build it with num_classes={theirs[0]}"
            raise ClassCountError(f"{path} was trained on {classes}", theirs[0], ours[0])
    return "; ".join(problems)


def _only_outputs_differ(
    model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor], reshaped: list[str]
) -> bool:
    """Whether only the classifier's number of outputs differs (two classifiers with a distillation token)."""
    modules = dict(model.named_modules())
    layers = all(
        isinstance(modules.get(key.rpartition(".")[0]), nn.Linear | nn.Conv2d)
        and state[key].shape[1:] == own[key].shape[1:]
        for key in reshaped
    )
    counts = {(state[key].shape[:1], own[key].shape[:1]) for key in reshaped}
    # A layer after a reshaped one would have another number of inputs.
    return layers and len(counts) == 1 and all(a and b for a, b in counts)
