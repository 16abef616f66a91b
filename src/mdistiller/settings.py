"""Base class of every configuration, and pydantic's errors as one message."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeGuard, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from mdistiller.errors import ConfigError, UnknownNameError, nearest_fields
from mdistiller.types import Line

Mean = Annotated[float, Field(ge=0, le=1)]
"""Mean of a channel, for images scaled to [0, 1]."""
Std = Annotated[float, Field(gt=0, le=1)]
"""Standard deviation of a channel, for images scaled to [0, 1]."""
Means = Annotated[tuple[Mean, ...], Field(min_length=1)]
Stds = Annotated[tuple[Std, ...], Field(min_length=1)]
Side = Annotated[int, Field(ge=1, le=8192)]
"""Side of square images in pixels; a larger one exhausts any memory."""


def check_channels(values: Any) -> Any:
    """Checks settings: `mean` and `std` have one number for each channel. For `model_validator`."""
    counts = [3 if x is None else len(x) for x in (values.mean, values.std)]
    if counts[0] != counts[1]:
        got = f"got {counts[0]} and {counts[1]} numbers (None: three, for red, green and blue)"
        raise ValueError(f"mean, std: {got}; allowed: one number for each channel, in both")
    return values


class Settings(BaseModel):
    """Immutable settings without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    hidden_flags: ClassVar[tuple[str, ...]] = ()
    """Fields without a flag on the command line; `FIELD.NAME` is one of the settings in a field."""
    relative_paths: ClassVar[tuple[str, ...]] = ()
    """Fields whose paths are relative to another field, not to the working directory."""

    def replace(self, **changes: object) -> Self:
        """Returns a copy with some fields changed, validated as if it came from a file.

        A mapping changes some fields of nested settings; with another `name` in it, it replaces them::

            config.replace(epochs=2, optim={"lr": 0.01}, method={"name": "dkd", "beta": 2.0})

        Raises:
            ConfigError: an unknown field (the message has the nearest names) or a wrong value.
        """
        return validate(type(self), self.merge(changes), self.label())

    def label(self) -> str:
        """Returns the subject of an error about these settings."""
        return type(self).__name__

    def merge(self, changes: Mapping[str, object]) -> Line:
        """Returns the values of all fields, with changes, not validated yet."""
        values: Line = dict(self)
        for name, change in changes.items():
            old = values.get(name)
            if isinstance(old, Settings) and isinstance(change, Mapping) and not old.is_renamed_by(change):
                change = old.merge(change)
            values[name] = change
        return values

    def is_renamed_by(self, changes: Mapping[str, object]) -> bool:
        """Whether the changes name something else, whose settings these are not."""
        return "name" in changes and changes["name"] != getattr(self, "name", None)

    def absolute(self) -> Self:
        """Returns the same settings with absolute paths, valid from any folder."""
        changed = {name: _absolute(value) for name, value in self if name not in self.relative_paths}
        return self.model_copy(update=changed)

    def field_infos(self) -> dict[str, FieldInfo]:
        """Returns the fields by name; they depend on the values where a method is made of others."""
        return dict(type(self).model_fields)

    @classmethod
    def known_fields(cls, values: Mapping[str, object]) -> dict[str, type[BaseModel] | None]:
        """Returns the fields of settings with these values; a field of nested settings with their type."""
        return {name: nested_settings(field.annotation) for name, field in cls.model_fields.items()}


def is_settings(kind: object) -> TypeGuard[type[BaseModel]]:
    """Whether a type is a class of settings."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def nested_settings(annotation: object) -> type[BaseModel] | None:
    """Returns the class of settings in a field's annotation, alone or as a part; None without one."""
    return next(filter(is_settings, (annotation, *get_args(annotation))), None)


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Returns values by dotted name; those of a nested mapping take its place."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def unflatten(values: Mapping[str, object]) -> Line:
    """Returns nested values, from those by dotted name."""
    found: Line = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        inner = found
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return found


_PLAIN = (str, int, float, bool, type(None), Path)


def _absolute(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    return value.absolute() if isinstance(value, Path | Settings) else value


M = TypeVar("M", bound=BaseModel)


def validate(kind: type[M], values: object, source: str, prefix: str = "") -> M:
    """Returns values as a model; raises the ConfigError of `explain` for wrong ones."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise explain(error, source, prefix, values, kind) from error


def explain(
    error: ValidationError,
    source: str,
    prefix: str = "",
    values: object = None,
    kind: type[BaseModel] | None = None,
) -> ConfigError:
    """Converts pydantic's report to one message: each field's dotted name, what is wrong, what was given.

    `source` names the origin of the values, `prefix` precedes each field's name (`--` for flags). With the
    `values` as given and the `kind` that was validated, an unknown field gets its nearest names.
    """
    lines = []
    for e in error.errors():
        # A key may be any text, line breaks too.
        field = ".".join(part if (part := str(p)).isprintable() else ascii(part) for p in e["loc"])
        if prefix.startswith("--"):
            field = field.replace("_", "-")
        message = " ".join(e["msg"].removeprefix("Value error, ").split())
        cause = e.get("ctx", {}).get("error")
        if isinstance(cause, UnknownNameError):
            message = cause.for_command()
        if e["type"] == "extra_forbidden":
            message = "unknown field"
        if message == "unknown field" and values is not None and kind is not None:
            name, known = str(e["loc"][-1]), _fields_beside(e["loc"], values, kind)
            # A field of nested settings is shown as it is set in Python.
            near = [re.sub(r"(\w+)\.(\w+)", r'\1={"\2": …}', field) for field in nearest_fields(name, known)]
            plain = [field for field in known if "." not in field]
            message += "; " + str(UnknownNameError("field", name, plain, nearest=near)).partition("; ")[2]
        given = e["input"]
        if (
            all(isinstance(v, _PLAIN) for v in (given if isinstance(given, list | tuple) else [given]))
            and field
        ):
            text = repr(given)
            message += f" (got {text[:100]}{'…' * (len(text) > 100)})"
        lines.append(f"{prefix}{field}: {message}" if field else message)
    return ConfigError(f"{source}: " + "; ".join(lines))


def _fields_beside(loc: tuple[int | str, ...], values: object, kind: type[BaseModel]) -> list[str]:
    """Returns the known fields beside an unknown one at `loc` from the root, and dotted ones below them."""
    model: type[BaseModel] | None = kind
    for part in (part for part in loc[:-1] if not isinstance(part, int)):
        if model is None or not issubclass(model, Settings):
            return []
        given = values if isinstance(values, Mapping) else {}
        model, values = model.known_fields(given).get(part), given.get(part)
    if model is None or not issubclass(model, Settings):
        return list(model.model_fields) if model is not None else []
    given = values if isinstance(values, Mapping) else {}
    found: list[str] = []
    for name, group in model.known_fields(given).items():
        inner = given.get(name)
        group = type(inner) if isinstance(inner, Settings) else group
        if get_origin(model.model_fields[name].annotation) is tuple:  # of a list of groups, none is meant
            group = None
        found += [name, *(f"{name}.{field}" for field in (group.model_fields if group is not None else ()))]
    return found
