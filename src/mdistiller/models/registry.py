"""Models by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import tyro
from pydantic import Field, field_validator
from torch import nn

from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.models.external import LIBRARIES, check_external, create_external
from mdistiller.settings import Settings

_MODELS: dict[str, Callable[..., nn.Module]] = {}

F = TypeVar("F", bound=Callable[..., nn.Module])


# On the command line: `--options img_size 32 drop_rate 0.1`. Any value is allowed elsewhere.
Options = Annotated[dict[str, Any], tyro.conf.arg(constructor=dict[str, bool | int | float | str])]


class ModelConfig(Settings):
    """Which model, with which weights."""

    name: str
    """A name from `mdistiller list models`, or `timm/NAME`, or `torchvision/NAME`."""

    checkpoint: Path | None = None
    """Weights to load: a .safetensors or torch file, or a run folder. Random weights when not given."""

    options: Options = Field(default_factory=dict)
    """Further arguments of the model function, such as timm's `img_size` or torchvision's `weights`."""

    @field_validator("options")
    @classmethod
    def _classes_come_from_the_data(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "num_classes" in value:
            raise ValueError("num_classes is no option: a model has as many classes as the data")
        return value


@overload
def register_model(function: F, /) -> F: ...
@overload
def register_model(name: str, /) -> Callable[[F], F]: ...
def register_model(given: Any, /) -> Any:
    """Function decorator: make a model known, under the function's own name, or as `register_model(name)`.

    The function takes `num_classes` and whatever options it likes, and returns a module that maps images
    [B, 3, H, W] to logits [B, classes]. Give the module an attribute `tap_points` (see
    `mdistiller.models.tap_points`) to make canonical names of taps work on it.

    Raises ConfigError when another function has the name, or where the name cannot be part of a recipe's.
    """
    if isinstance(given, str):
        return lambda function: _add(given, function)
    return _add(given.__name__, given)


def _add(name: str, function: F) -> F:
    old = _MODELS.get(name)
    # A file that is imported again (a plug-in, a reload) may replace what it registered before.
    if old is not None and (old.__module__, old.__qualname__) != (function.__module__, function.__qualname__):
        raise ConfigError(f"model name {name!r} is taken by {old.__module__}.{old.__qualname__}")
    if not name.isidentifier():
        raise ConfigError(f"model name {name!r}: allowed are letters, digits and _")
    _MODELS[name] = function
    return function


def list_models() -> list[str]:
    """The names of all registered models, sorted. timm's and torchvision's are not among them."""
    return sorted(_MODELS)


def check_model_name(name: str) -> None:
    """Raises UnknownNameError for an unknown name, and ConfigError for a library that isn't installed."""
    if name.partition("/")[0] in LIBRARIES and "/" in name:
        check_external(name)
    elif name not in _MODELS:
        raise UnknownNameError(
            "model", name, _MODELS, hint="Other libraries' models: timm/NAME, torchvision/NAME"
        )


def create_model(name: str, num_classes: int = 100, **options: Any) -> nn.Module:
    """Builds a model with random weights (unless an option asks for pretrained ones).

    name: a registered name, `timm/NAME`, or `torchvision/NAME`.
    num_classes: the width of its logits.
    options: further arguments of the model function.

    Raises UnknownNameError for an unknown name and ConfigError for an option that the model doesn't
    take, for num_classes < 1, and for a library that isn't installed.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, got {num_classes}")
    check_model_name(name)
    if "/" in name:
        return create_external(name, num_classes, **options)
    function = _MODELS[name]
    try:
        inspect.signature(function).bind(num_classes=num_classes, **options)
    except TypeError as error:
        allowed = [p for p in inspect.signature(function).parameters if p != "num_classes"]
        raise ConfigError(f"model {name!r}: {error}; its options: {', '.join(allowed) or 'none'}") from None
    return function(num_classes=num_classes, **options)
