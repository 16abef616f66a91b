"""Commands from their arguments: flags from settings, and all wrong settings in one message."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from pydantic import BaseModel, ValidationError
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from mdistiller.errors import ConfigError
from mdistiller.methods import MethodConfig, load_plugin
from mdistiller.models import ModelConfig
from mdistiller.settings import Settings, explain

Command = TypeVar("Command")

_Pairs = dict[str, bool | int | float | str]
# As a constructor, the type shows an empty default in --help.
Options = Annotated[_Pairs, tyro.conf.arg(constructor=_Pairs)]
"""Options of a model; the words of its flag are KEY VALUE …"""


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """Flags of most commands."""

    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Python file that registers methods, models, detectors or data sets (it is run). May be given again."""
    json: bool = False
    """Print the result as JSON on stdout."""


class _Values(dict[str, Any]):
    """Values given for the fields of settings, not validated yet."""

    model: type[BaseModel]


# Words are split by `_read_model`: tyro would print a ConfigError as its own message.
_MODELS = PrimitiveConstructorSpec[Any](
    nargs="*",
    metavar="[NAME=CHECKPOINT [NAME=CHECKPOINT ...]]",
    instance_from_str=tuple,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda models: [f"{model.name}={model.checkpoint}" for model in models],
)


def _read_model(field: str, word: Any) -> Any:
    if not isinstance(word, str):
        return word
    name, _, checkpoint = word.partition("=")
    if not name or not checkpoint:
        raise ConfigError(f"{field}: got {word!r}; allowed: NAME=CHECKPOINT")
    return {"name": name, "checkpoint": checkpoint}


def _is_models(annotation: Any) -> bool:
    return get_origin(annotation) is tuple and get_args(annotation)[0] is ModelConfig


def _as_flag(field: StructFieldSpec, model: type[BaseModel], annotation: Any) -> StructFieldSpec:
    """Chooses the form of a field's flag by the type of the field."""
    kind: Any = field.type
    if issubclass(model, Settings) and field.name in model.hidden_flags:
        kind = Annotated[kind, tyro.conf.Suppress]
    elif get_origin(annotation) is tuple and get_origin(get_args(annotation)[0]) is Literal:
        kind = Annotated[kind, tyro.conf.UseAppendAction]
    elif isinstance(field.default, ModelConfig) and issubclass(model, Settings):
        # A default of another type than the field's would have the flags of its own type.
        hidden = {"hidden_flags": model.hidden_in(field.name), "__doc__": ModelConfig.__doc__}
        kind = type("ModelConfig", (ModelConfig,), {**hidden, "__module__": __name__})
        return replace(field, type=kind, default=kind.model_construct(**dict(field.default)))
    elif _is_models(annotation):
        kind = Annotated[kind, _MODELS]
    elif annotation == dict[str, Any]:
        kind = Options
    return replace(field, type=kind)


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    asking = False

    # tyro would validate nested settings by themselves, where a field's full name is not known.
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
            if isinstance(info.default, MethodConfig):
                found["name"] = info.default.method_name
            return found

        collect.__doc__ = model.__doc__  # shown by --help
        if not isinstance(spec, StructConstructorSpec):
            return None
        default = info.default
        listed = default.field_infos() if isinstance(default, Settings) else model.model_fields
        known = {field.name: field for field in spec.fields}
        flags = (
            _as_flag(
                known.get(name) or StructFieldSpec(name, field.annotation, dict(default)[name]),  # type: ignore[arg-type]
                model,
                field.annotation,
            )
            for name, field in listed.items()
        )
        return replace(spec, instantiate=collect, fields=tuple(flags))

    return registry


def parse_command(
    command: type[Command], args: Sequence[str], *, prog: str, default: Command | None = None
) -> Command:
    """Parses the arguments of a command (a dataclass), and loads its plug-ins.

    Settings get a flag for each field but their `hidden_flags`; those in `default` choose the flags.
    tyro ends the process for a wrong word.

    Raises:
        ConfigError: a plug-in fails, a setting is out of range, or settings contradict each other.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    parsed = tyro.cli(
        command, args=args, prog=prog, config=(tyro.conf.AvoidSubcommands,), registry=_registry(), **options
    )
    for path in getattr(parsed, "plugin", ()):
        load_plugin(path)
    found = {f.name: getattr(parsed, f.name) for f in fields(parsed)}
    for name, value in found.items():
        if not isinstance(value, _Values):
            continue
        # Settings whose flags have no prefix are the command's own.
        prefix = "--" if name == "config" else f"--{name}."
        for field, info in value.model.model_fields.items():
            if _is_models(info.annotation):
                value[field] = [_read_model(field, word) for word in value[field]]
        try:
            found[name] = value.model.model_validate(value)
        except ValidationError as error:
            raise explain(error, "options", prefix) from error
    return command(**found)
