"""Flags of a command with their types, values and explanations, from the fields of its settings.

Parsing, help and completion all read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mdistiller.config import TeacherConfig
from mdistiller.models import ModelConfig
from mdistiller.settings import Settings, is_settings, nested_settings


@dataclass(frozen=True)
class Arg:
    """Mark of a field that is not a flag of its own name and type.

    name: the flag's name in place of the field's; empty: the flags of settings have no prefix.
    metavar: form of the value.
    positional: an argument without a flag.
    repeats: each use of the flag adds one value.
    """

    name: str | None = None
    metavar: str = ""
    positional: bool = False
    repeats: bool = False


T = TypeVar("T")
Positional = Annotated[T, Arg(positional=True)]
Repeated = Annotated[T, Arg(repeats=True)]


@dataclass(frozen=True)
class Flag:
    """A flag of a command, or a positional argument.

    field: dotted name of its field, such as `optim.lr`.
    path: names that lead from the command to the value.
    kind: type of the value.
    text: explanation.
    value: where the flag is not given; PydanticUndefined if it has to be.
    arg: the mark of its field.
    """

    field: str
    path: tuple[str, ...]
    kind: object
    text: str
    value: object
    arg: Arg

    @property
    def name(self) -> str:
        """Returns the flag with its dashes, or the name of a positional argument."""
        return self.field.upper() if self.arg.positional else f"--{self.field.replace('_', '-')}"

    @property
    def is_required(self) -> bool:
        """Whether it has to be given."""
        return self.value is PydanticUndefined

    @property
    def repeats(self) -> bool:
        """Whether each use of the flag adds one value."""
        of_choices = get_origin(self.kind) is tuple and get_origin(get_args(self.kind)[0]) is Literal
        return of_choices or self.arg.repeats

    @property
    def metavar(self) -> str:
        """Returns the form of the value; empty for a switch."""
        return self.arg.metavar or _form(self.one)[0]

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
        """Returns its value where the flag is not given, as it is typed; empty if it has to be given."""
        if self.repeats:
            return "repeatable"
        return "" if self.is_required else _typed(self.value)

    @property
    def count(self) -> int | None:
        """Number of words of a value; None for any number."""
        return _form(self.one)[1]

    @property
    def one(self) -> Any:
        """Returns the type of the value that one use of the flag takes."""
        return get_args(self.kind)[0] if self.repeats else self.kind

    def read(self, words: Sequence[str]) -> object:
        """Returns the words after the flag in the form of its type, not validated yet; raises ValueError."""
        kind = self.one
        if get_origin(kind) is dict:
            return {key: _scalar(word) for key, word in zip(words[::2], words[1::2], strict=True)}
        choices = {str(part): part for part in get_args(kind)} if get_origin(kind) is Literal else {}
        several = self.count != 1 and list(words) != ["None"]
        value = tuple(words) if several else choices.get(words[0], words[0])
        return None if value == "None" and NoneType in get_args(kind) else value


def list_flags(
    settings: BaseModel | type[BaseModel],
    prefix: str = "",
    path: tuple[str, ...] = (),
    hidden: tuple[str, ...] = (),
) -> list[Flag]:
    """Lists flags and positional arguments of settings, or of their class, in the order of the fields.

    Settings in them get a flag for each field but the hidden ones, with a prefix.
    """
    kind = settings if isinstance(settings, type) else type(settings)
    hidden += kind.hidden_flags if issubclass(kind, Settings) else ()
    infos = settings.field_infos() if isinstance(settings, Settings) else kind.model_fields
    found: list[Flag] = []
    for name, info in infos.items():
        value = info.get_default(call_default_factory=True)
        value = value if isinstance(settings, type) else getattr(settings, name, value)
        if name in hidden or (value is None and nested_settings(info.annotation)):
            continue
        arg = arg_of(info)
        field = name if arg.name is None else arg.name
        inner = value if isinstance(value, BaseModel) else info.annotation
        if isinstance(inner, BaseModel) or is_settings(inner):
            group = f"{prefix}{field}." if field else prefix
            theirs = tuple(key.removeprefix(f"{name}.") for key in hidden if key.startswith(f"{name}."))
            found += list_flags(inner, group, (*path, name), theirs)
            continue
        text = " ".join((info.description or "").split())
        found.append(Flag(f"{prefix}{field}", (*path, name), info.annotation, text, value, arg))
    return found


def arg_of(info: FieldInfo) -> Arg:
    """Returns the mark of a field."""
    return next((mark for mark in info.metadata if isinstance(mark, Arg)), Arg())


def _typed(value: object) -> str:
    """Returns a value as it is typed after its flag."""
    if isinstance(value, ModelConfig):
        return f"{value.name}={value.checkpoint}"
    if isinstance(value, dict):
        return " ".join(f"{key} {_typed(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, tuple | list):
        return " ".join(map(_typed, value)) or "none"
    return str(value)


_METAVARS: dict[object, str] = {
    **{str: "TEXT", Path: "PATH", NoneType: "None", bool: ""},
    TeacherConfig: "NAME=CHECKPOINT",
}


def _form(kind: Any) -> tuple[str, int | None]:
    """Returns the form of a type's values and the number of their words; None for any number."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(map(str, parts)), 1
    if origin is dict:
        return "KEY VALUE …", None
    forms = [_form(part) for part in parts if part is not Ellipsis]
    if origin in (Union, UnionType):
        counts = (count for part, (_, count) in zip(parts, forms, strict=True) if part is not NoneType)
        return "|".join(metavar for metavar, _ in forms), next(counts)
    if origin is tuple and parts[-1] is Ellipsis:
        return f"{forms[0][0]} …", None
    if origin is tuple:
        return " ".join(metavar for metavar, _ in forms), len(parts)
    return _METAVARS.get(kind, getattr(kind, "__name__", str(kind)).upper()), 1


def _scalar(word: str) -> object:
    """Returns the number or truth value that a word is, or the word."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(word, word)
