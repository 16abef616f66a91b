"""Every error that mdistiller raises on purpose.

`ConfigError` and its children also are `ValueError`s: the caller gave something that cannot work.
The command line ends with exit code 2 for them, and with 1 for every other `MDistillerError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MDistillerError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(MDistillerError, ValueError):
    """A setting is wrong: what it is, what was given, what is allowed."""


class UnknownNameError(ConfigError):
    """A name is in no registry or table; the message lists the nearest ones.

    `command_hint` is what the command line alone adds to the message: a flag is of no use in Python.
    """

    def __init__(
        self, what: str, name: str, known: Iterable[str], hint: str = "", *, command_hint: str = ""
    ) -> None:
        known = sorted(known)
        # Case counts in names (`ResNet50`, `resnet56`) but should not hide the match.
        lowered = {k.lower(): k for k in known}
        near = [lowered[k] for k in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
        if near:
            tail = "nearest: " + ", ".join(near)
        elif known:
            tail = "known: " + ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
        else:
            tail = "none is known"
        super().__init__(f"unknown {what} {name!r}; {tail}" + (f". {hint}" if hint else ""))
        self.name = name
        self.nearest = near
        self.command_hint = command_hint

    def for_command(self) -> str:
        """The message as the command line has it."""
        return f"{self}. {self.command_hint}" if self.command_hint else str(self)


class DataError(MDistillerError):
    """A data set is missing, unreadable, or not what it claims to be."""


class CheckpointError(MDistillerError):
    """A checkpoint is missing, unreadable, or of another architecture."""


class ClassCountError(CheckpointError):
    """A checkpoint fits its model but for the classifier, which is for another number of classes."""

    def __init__(self, message: str, theirs: int, ours: int) -> None:
        super().__init__(message)
        self.theirs, self.ours = theirs, ours


class TapError(MDistillerError):
    """A tapped feature was not produced, or was changed in place after it was read."""


class TrainingError(MDistillerError):
    """A run cannot go on, for example because a loss is not finite."""
