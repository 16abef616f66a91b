"""Command lines to commands by tyro, with every error of a setting under its full name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from mdistiller.methods import MethodConfig
from mdistiller.settings import explain

Command = TypeVar("Command")


class _Values(dict[str, Any]):
    """What was given for the fields of a config, not validated yet."""

    model: type[BaseModel]


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    asking = False

    # tyro would validate the inner configs first, each alone, where a field's full name isn't known.
    @registry.struct_rule
    def values(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not (inspect.isclass(info.type) and issubclass(info.type, BaseModel)):
            return None
        model: type[BaseModel] = info.type
        asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False

        def collect(**given: Any) -> _Values:
            found = _Values(given)
            found.model = model
            if issubclass(model, MethodConfig):
                found["name"] = model.method_name
            return found

        collect.__doc__ = model.__doc__  # shown by --help
        return replace(spec, instantiate=collect) if isinstance(spec, StructConstructorSpec) else None

    return registry


def parse_command(
    command: type[Command], args: Sequence[str], *, prog: str, default: Command | None = None
) -> Command:
    """The command (a dataclass) that the arguments describe; tyro ends the process for a wrong word.

    Raises:
        ConfigError: a setting is out of range, or settings contradict each other.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    parsed = tyro.cli(
        command, args=args, prog=prog, config=(tyro.conf.AvoidSubcommands,), registry=_registry(), **options
    )
    found = {f.name: getattr(parsed, f.name) for f in fields(parsed)}
    for name, value in found.items():
        if not isinstance(value, _Values):
            continue
        # A config whose flags have no prefix is the command's own.
        prefix = "--" if name == "config" else f"--{name}."
        try:
            found[name] = value.model.model_validate(value)
        except ValidationError as error:
            raise explain(error, "options", prefix) from error
    return command(**found)
