"""Errors that mdistiller raises on purpose.

A `ConfigError` is also a `ValueError`: the caller's input cannot work. The command line exits with code 2
for a `ConfigError` and with 1 for every other `MDistillerError`.
"""

import difflib
import shlex
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple


class MDistillerError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(MDistillerError, ValueError):
    """Invalid setting or argument. The message gives its name, its value and the allowed values."""


class UnknownNameError(ConfigError):
    """Name that is in no registry or table of `what`; the message lists the nearest ones.

    The message ends with `hint`; `command_hint` is added on the command line only, where flags make sense.
    `nearest`, unless empty, takes the place of the nearest names of `known`.
    """

    def __init__(
        self,
        what: str,
        name: str,
        known: Iterable[str],
        hint: str = "",
        *,
        command_hint: str = "",
        nearest: Sequence[str] = (),
    ) -> None:
        known = sorted(known)
        near = list(nearest) or nearest_names(name, known)
        tail = "known: " + ", ".join(known[:12]) + ", …" * (len(known) > 12) if known else "none is known"
        if near:
            tail = "nearest: " + ", ".join(near)
        super().__init__(f"unknown {what} {name!r:.200}; {tail}" + (f". {hint}" if hint else ""))
        self.what, self.name, self.nearest, self.command_hint = what, name, near, command_hint

    def for_command(self) -> str:
        """Returns the message for the command line."""
        return f"{self}. {self.command_hint}" if self.command_hint else str(self)


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Returns at most three known names that are like a name, the likest first, whatever their case."""
    lowered = {k.lower(): k for k in known}
    return [lowered[k] for k in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]


def nearest_fields(name: str, known: Iterable[str]) -> list[str]:
    """Returns at most three fields or flags like a name: those of any group that end with it come first.

    Initials count, so that `learning_rate` finds `optim.lr`.
    """
    known, last = list(known), name.lstrip("-").rpartition(".")[2]
    words = last.replace("_", "-").split("-")
    ends = {last, "".join(word[:1] for word in words) if len(words) > 1 else last}
    same = [field for field in known if field.lstrip("-").rpartition(".")[2] in ends]
    return list(dict.fromkeys([*same, *nearest_names(name, known)]))[:3]


def check_free(
    what: str, name: str, new: Callable[..., object], table: Mapping[str, Callable[..., object]]
) -> None:
    """Raises ConfigError if another function has the name in a registry."""
    old = table.get(name, new)
    # A file that is imported again (a plug-in, a reload) replaces its own entry.
    if (old.__module__, old.__qualname__) != (new.__module__, new.__qualname__):
        raise ConfigError(f"{what} name {name!r} is taken by {old.__module__}.{old.__qualname__}")


class Extra(NamedTuple):
    """Packages of an optional extra, and its use."""

    packages: tuple[str, ...]
    use: str


EXTRAS = {
    "detection": Extra(("pycocotools",), "masks and average precision for detectors"),
    "hf": Extra(("datasets",), "Hugging Face data sets, --data.kind hf"),
    "hub": Extra(("huggingface_hub",), "Hugging Face Hub, hf://USER/REPO"),
    "mlflow": Extra(("mlflow-skinny",), "--log mlflow"),
    "onnx": Extra(("onnx", "onnxruntime", "onnxscript"), "mdistiller export --format onnx"),
    "parquet": Extra(("pyarrow",), "stored outputs in Parquet files"),
    "ray": Extra(("ray[tune]",), "mdistiller sweep"),
    "tensorboard": Extra(("tensorboard",), "--log tensorboard"),
    "timm": Extra(("timm",), "models timm/NAME and their pretrained weights"),
    "transformers": Extra(("transformers[torch]",), "mdistiller.integrations.hf"),
    "wandb": Extra(("wandb",), "--log wandb"),
}
"""Optional extras by name."""


def install_command(extra: str) -> str:
    """Returns the command that installs the packages of an extra.

    It names packages, not the extra: so it works in any folder, and while mdistiller itself is on no index.
    """
    return " ".join(["pip install", *map(shlex.quote, EXTRAS[extra].packages)])


class MissingPackageError(ConfigError):
    """Package of an extra that is not installed; the message has the command that installs the extra's."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: {install_command(extra)}")


class DataError(MDistillerError):
    """Data set that is missing, unreadable or malformed."""


class CheckpointError(MDistillerError):
    """Checkpoint that is missing, unreadable or of another architecture."""


class ClassCountError(CheckpointError):
    """Checkpoint that fits its model except for the number of classes (`theirs`, the model has `ours`)."""

    def __init__(self, message: str, theirs: int, ours: int) -> None:
        super().__init__(message)
        self.theirs, self.ours = theirs, ours


class TapError(MDistillerError):
    """Tapped feature that was not produced, is no tensor, or was changed in place after it was read."""


class TrainingError(MDistillerError):
    """Run that cannot continue, for example because a loss is not finite."""


class Interrupted(KeyboardInterrupt, SystemExit):
    """Run that a signal has stopped, with its state saved unless the message says otherwise.

    `except Exception` does not catch it, so a loop over runs ends. An uncaught one ends the process with the
    status that shells report for the signal: 128 plus its number.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        known = signal.Signals.__members__
        self.code = 128 + known.get(name, signal.SIGTERM)  # of another process, it has no name here


def one_line(error: Exception) -> str:
    """Returns kind and beginning of a library's error, which may have pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
