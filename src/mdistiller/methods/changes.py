"""Changes of the settings of methods and of their parts."""

from collections.abc import Callable, Mapping
from typing import get_args

from mdistiller.methods.base import MethodConfig


def change_all(config: MethodConfig, change: Callable[[MethodConfig], MethodConfig]) -> MethodConfig:
    """Applies a change to the configs of a method's parts, and then to the method's own config."""
    parts = {field: change_all(part, change) for field, part in config.parts().items()}
    return change(config.model_copy(update=parts))


def with_defaults(
    config: MethodConfig, defaults: Mapping[type[MethodConfig], Mapping[str, object]]
) -> MethodConfig:
    """Gives a method's config and its parts other defaults, by class; a part of a sum has no task weight."""

    def change(own: MethodConfig) -> MethodConfig:
        update = dict(defaults.get(type(own), {}))
        if not own.task_weight:
            update.pop("task_weight", None)
        return own.model_copy(update=update)

    return change_all(config, change)


def takes_auto(config: MethodConfig) -> bool:
    """Whether a method's `weight` may be `auto`: it is then measured when a run starts."""
    field = type(config).model_fields.get("weight")
    return field is not None and "auto" in _values(field.annotation)


def _values(annotation: object) -> list[object]:
    """Lists the words and types that an annotation allows."""
    parts = get_args(annotation)
    return [value for part in parts for value in _values(part)] if parts else [annotation]


def unset(config: MethodConfig) -> list[str]:
    """Lists the fields of a method and of its parts that are None, by dotted name."""
    found = [name for name, value in config if value is None]
    return found + [f"{field}.{name}" for field, part in config.parts().items() for name in unset(part)]


def open_weights(config: MethodConfig) -> list[str]:
    """Lists the fields `weight` of a method and of its parts with the value `auto`, by dotted name."""
    found = ["weight"] if getattr(config, "weight", None) == "auto" else []
    for field, part in config.parts().items():
        found += [f"{field}.{name}" for name in open_weights(part)]
    return found
