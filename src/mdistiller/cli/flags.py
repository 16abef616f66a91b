"""Flags of a command with their values and explanations, from the fields of its settings."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator
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
    """A flag of a command.

    name: with its dashes, such as `--optim.lr`.
    field: dotted name of its field.
    metavar: form of its value; empty for a switch.
    text: explanation.
    default: its value where the flag is not given, as it is typed.
    """

    name: str
    field: str
    metavar: str
    text: str
    default: str

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


def list_flags(command: Any) -> list[Flag]:
    """Lists the flags of a command (a dataclass) with its values, in the order of the fields.

    The flags of the field `config` have no prefix; positional arguments are left out.
    """
    own: type = type(command)
    kinds, texts = get_type_hints(own, include_extras=True), field_texts(own)
    found: list[Flag] = []
    for field in dataclasses.fields(command):
        value, kind = getattr(command, field.name), kinds[field.name]
        if isinstance(value, BaseModel):
            found += _of_settings(value, "" if field.name == "config" else f"{field.name}.")
            continue
        if is_positional(kind):
            continue
        marks = _marks(kind)
        given = next((mark for mark in marks if hasattr(mark, "metavar")), None)
        name = getattr(given, "name", None) or field.name
        metavar = getattr(given, "metavar", None) or _metavar(kind)
        text = texts.get(field.name, "")
        found.append(_flag(name, metavar, text, value, repeats=_REPEATED in marks))
    return found


def is_positional(kind: Any) -> bool:
    """Whether the type of a field marks a positional argument."""
    return _POSITIONAL in _marks(kind)


def _marks(kind: Any) -> tuple[Any, ...]:
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _of_settings(settings: BaseModel, prefix: str, hidden: tuple[str, ...] = ()) -> Iterator[Flag]:
    own = settings if isinstance(settings, Settings) else Settings()
    hidden = (*hidden, *own.hidden_flags)
    texts, values = field_texts(type(settings)), dict(settings)
    for name, info in (settings.field_infos() if settings is own else type(settings).model_fields).items():
        value = values[name]
        if name in hidden:
            continue
        if isinstance(value, BaseModel):
            yield from _of_settings(value, f"{prefix}{name}.", own.hidden_in(name))
            continue
        kind = info.annotation
        if _holds_settings(kind) and value is None:
            continue
        repeats = get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal
        text = texts.get(name) or info.description or ""
        yield _flag(f"{prefix}{name}", _metavar(kind), text, value, repeats=repeats)


def _holds_settings(kind: Any) -> bool:
    return any(inspect.isclass(part) and issubclass(part, BaseModel) for part in get_args(kind))


def _flag(field: str, metavar: str, text: str, value: Any, *, repeats: bool) -> Flag:
    name = f"--{field.replace('_', '-')}"
    return Flag(name, field, metavar, " ".join(text.split()), "repeatable" if repeats else _typed(value))


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
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _metavar(parts[0])
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


@cache
def field_texts(kind: type) -> dict[str, str]:
    """Returns the docstrings under the fields of a class and of its bases, by the field's name."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__ == "builtins" or base in (BaseModel, object):
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
