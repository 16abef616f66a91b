"""Flags of a command with their types, values and explanations, from the fields of its settings.

Parsing, help and completion all read them.
"""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from pydantic import BaseModel

from mdistiller.models import ModelConfig
from mdistiller.settings import Settings

_POSITIONAL, _REPEATED = (
    get_args(kind)[1] for kind in (tyro.conf.Positional[int], tyro.conf.UseAppendAction[int])
)


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command, or a positional argument.

    field: dotted name of its field, such as `optim.lr`.
    path: names that lead from the command to the value.
    kind: type of the value, with the marks of its annotation.
    text: explanation.
    value: where the flag is not given; MISSING if it has to be.
    """

    field: str
    path: tuple[str, ...]
    kind: Any
    text: str
    value: Any

    @property
    def name(self) -> str:
        """Returns the flag with its dashes, or the name of a positional argument."""
        return self.field.upper() if self.positional else f"--{self.field.replace('_', '-')}"

    @property
    def positional(self) -> bool:
        """Whether it is an argument without a flag."""
        return _POSITIONAL in _marks(self.kind)

    @property
    def repeats(self) -> bool:
        """Whether each use of the flag adds one value."""
        kind = _bare(self.kind)
        of_choices = get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal
        return of_choices or _REPEATED in _marks(self.kind)

    @property
    def metavar(self) -> str:
        """Returns the form of the value; empty for a switch."""
        own = (getattr(mark, "metavar", None) for mark in _marks(self.kind))
        return next(filter(None, own), None) or _metavar(self.kind)

    @property
    def is_switch(self) -> bool:
        """Whether the flag is a pair `--x` and `--no-x`."""
        return not self.metavar

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the flag, and its opposite if it is a switch."""
        if not self.is_switch:
            return (self.name,)
        group, dot, last = self.name.removeprefix("--").rpartition(".")
        return (self.name, f"--{group}{dot}no-{last}")

    @property
    def default(self) -> str:
        """Returns its value where the flag is not given, as it is typed."""
        return "repeatable" if self.repeats else _typed(self.value)

    @property
    def count(self) -> int | None:
        """Number of words of a value; None for any number."""
        return _count(self.one)

    @property
    def one(self) -> Any:
        """Returns the type of the value of one use."""
        kind = _bare(self.kind)
        return get_args(kind)[0] if self.repeats else kind

    def read(self, words: Sequence[str]) -> Any:
        """Returns the words after the flag in the form of its type, not validated yet; raises ValueError."""
        kind = self.one
        if get_origin(kind) is dict:
            return {key: _scalar(word) for key, word in zip(words[::2], words[1::2], strict=True)}
        choices = {str(part): part for part in get_args(kind)} if get_origin(kind) is Literal else {}
        several = self.count != 1 and list(words) != ["None"]
        value = tuple(words) if several else choices.get(words[0], words[0])
        return None if value == "None" and NoneType in get_args(kind) else value


def list_flags(command: Any) -> list[Flag]:
    """Lists flags and positional arguments of a command, a dataclass or its class, by the order of fields.

    Settings get a flag for each field but their `hidden_flags`, with a prefix except for the field `config`.
    """
    own: type = command if inspect.isclass(command) else type(command)
    kinds, texts = get_type_hints(own, include_extras=True), field_texts(own)
    found: list[Flag] = []
    for field in dataclasses.fields(own):
        value, kind = getattr(command, field.name, MISSING), kinds[field.name]
        if value is MISSING and field.default_factory is not MISSING:
            value = field.default_factory()
        if isinstance(value, BaseModel) or _is_settings(_bare(kind)):
            prefix = "" if field.name == "config" else f"{field.name}."
            found += _of_settings(_bare(kind), value, prefix, (field.name,))
            continue
        given = next((mark for mark in _marks(kind) if hasattr(mark, "metavar")), None)
        name = getattr(given, "name", None) or field.name
        text = texts.get(field.name) or getattr(given, "help", None) or ""
        found.append(Flag(name, (field.name,), kind, " ".join(text.split()), value))
    return found


def _of_settings(
    kind: type[BaseModel], value: Any, prefix: str, path: tuple[str, ...], hidden: tuple[str, ...] = ()
) -> Iterator[Flag]:
    kind = type(value) if isinstance(value, BaseModel) else kind
    own: type[Settings] = kind if issubclass(kind, Settings) else Settings
    infos = value.field_infos() if isinstance(value, Settings) else kind.model_fields
    for name, info in infos.items():
        now = getattr(value, name, info.get_default(call_default_factory=True))
        if name in (*hidden, *own.hidden_flags) or (now is None and _holds_settings(info.annotation)):
            continue
        if isinstance(now, BaseModel):
            yield from _of_settings(type(now), now, f"{prefix}{name}.", (*path, name), own.hidden_in(name))
            continue
        text = " ".join((info.description or "").split())
        yield Flag(f"{prefix}{name}", (*path, name), info.annotation, text, now)


def _holds_settings(kind: Any) -> bool:
    return any(map(_is_settings, get_args(kind)))


def _is_settings(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _marks(kind: Any) -> tuple[Any, ...]:
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _typed(value: Any) -> str:
    """Returns a value as it is typed after its flag."""
    if isinstance(value, ModelConfig):
        return f"{value.name}={value.checkpoint}"
    if isinstance(value, dict):
        return " ".join(f"{key} {_typed(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, tuple | list):
        return " ".join(map(_typed, value)) or "none"
    return str(value)


def _metavar(kind: Any) -> str:
    kind = _bare(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, UnionType):
        return "|".join(_metavar(part) for part in parts)
    if origin is tuple and parts[-1] is Ellipsis:
        return f"{_metavar(parts[0])} …" if get_origin(parts[0]) is not Literal else _metavar(parts[0])
    if origin is tuple:
        return " ".join(_metavar(part) for part in parts)
    if origin is dict:
        return "KEY VALUE …"
    if kind is bool:
        return ""
    names: dict[Any, str] = {str: "TEXT", Path: "PATH", NoneType: "None", ModelConfig: "NAME=CHECKPOINT"}
    return names.get(kind, getattr(kind, "__name__", str(kind)).upper())


def _count(kind: Any) -> int | None:
    kind = _bare(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _count(next(part for part in parts if part is not NoneType))
    if origin is tuple:
        return None if parts[-1] is Ellipsis else len(parts)
    return None if origin is dict else 1


def _scalar(word: str) -> bool | int | float | str:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(word, word)


@cache
def field_texts(kind: type) -> dict[str, str]:
    """Returns the docstrings under the fields of a dataclass and of its bases, by the field's name."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is object:
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError, ValueError):  # a class that was made while running
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    found[name] = words
    return found
