"""Models by name."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

from pydantic import AfterValidator, Field, model_validator
from torch import nn

from mdistiller.errors import ConfigError, MDistillerError, UnknownNameError, check_free, one_line
from mdistiller.models.cifar.common import with_channels
from mdistiller.models.external import LIBRARIES, check_external, create_external, without_classifier
from mdistiller.settings import Means, Settings, Side, Stds, check_channels
from mdistiller.types import Line

GIVEN = "given/"
"""First part of the name of a model that was given to a run as an object, by `given_models`."""

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_GIVEN: dict[str, nn.Module] = {}
F = TypeVar("F", bound=Callable[..., nn.Module])


def _check_options(value: Line) -> Line:
    if "num_classes" in value:
        raise ValueError("num_classes is no option: a model has as many classes as the data")
    if "name" in value:
        raise ValueError("name is no option: it is the model's field of this name")
    return value


Options = Annotated[Line, AfterValidator(_check_options)]
"""Further arguments of a model function."""


class ModelConfig(Settings):
    """A model and its weights. A plain string validates as the name."""

    name: str
    """Name from `mdistiller list models`, or `timm/NAME`, or `torchvision/NAME`."""
    checkpoint: Path | None = None
    """Weights to load: a .safetensors or torch file, or a run folder. None: random weights."""
    options: Options = Field(default_factory=dict)
    """Further arguments of the model function, such as timm's `img_size` or torchvision's `weights`."""
    mean: Means | None = None
    """Teacher: mean of each channel in its images, scaled to [0, 1]. The teacher sees the student's
    augmented image, renormalized and scaled. None: that of its weights, from its run or from the tables of
    timm and torchvision, and the data's where it is unknown."""
    std: Stds | None = None
    """Teacher: standard deviation of each channel in its images. None: as `mean`."""
    image_size: Side | None = None
    """Teacher: side in pixels to which its images are scaled. None: as `mean`."""

    @property
    def is_given(self) -> bool:
        """Whether the model was given as an object, which has its weights."""
        return self.name.startswith(GIVEN)

    @property
    def own_fields(self) -> list[str]:
        """Names of the fields on a teacher's images that have a value."""
        return [name for name in ("mean", "std", "image_size") if getattr(self, name) is not None]

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    _check_channels = model_validator(mode="after")(check_channels)


@overload
def register_model(function: F, /) -> F: ...
@overload
def register_model(name: str, /) -> Callable[[F], F]: ...
def register_model(given: F | str, /) -> F | Callable[[F], F]:
    """Registers a model function, as `@register_model` under its own name or as `@register_model(name)`.

    The function takes `num_classes` and any options, and returns a module that maps images [B, 3, H, W] to
    logits [B, classes]. An attribute `tap_points` of the module gives its canonical taps, see
    `mdistiller.models.tap_points`.

    Raises:
        ConfigError: Another function has the name, or it has characters other than letters, digits and _.
    """
    if isinstance(given, str):
        return partial(_add, given)
    return _add(given.__name__, given)


def _add(name: str, function: F) -> F:
    check_free("model", name, function, _MODELS)
    if not name.isidentifier():
        raise ConfigError(f"model name {name!r}: allowed are letters, digits and _")
    _MODELS[name] = function
    return function


@contextmanager
def given_models(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context in which models are known by names that begin with `given/`; each is built as a copy."""
    before = dict(_GIVEN)
    _GIVEN.update(models)
    try:
        yield
    finally:
        _GIVEN.clear()
        _GIVEN.update(before)


def list_models() -> list[str]:
    """Returns the names of all registered models, sorted, without those of timm and torchvision."""
    return sorted(_MODELS)


def model_function(name: str) -> Callable[..., nn.Module] | None:
    """Returns the registered function of a model; None for a model of another library, or a given one."""
    return _MODELS.get(name)


def check_model_name(name: str) -> None:
    """Raises UnknownNameError for an unknown name, ConfigError for a library or object that is not there."""
    if name.startswith(GIVEN):
        if name not in _GIVEN:
            raise ConfigError(
                f"model {name!r}: it was given to the run as an object; give it again, as student or teacher "
                "of mdistiller.Run(FOLDER, student=…, teacher=…, data=…)"
            )
    elif name.partition("/")[0] in LIBRARIES and "/" in name:
        check_external(name)
    elif name not in _MODELS:
        raise UnknownNameError("model", name, _MODELS, "Other libraries' models: timm/NAME, torchvision/NAME")


def create_model(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Builds a model, with random weights unless an option asks for pretrained ones.

    Args:
        name: Registered name, `timm/NAME` or `torchvision/NAME`; otherwise UnknownNameError.
        num_classes: Width of the logits. None: the default of the model function or library: 100 for the
            CIFAR models, 1000 for MobileNetV1, as a rule 1000 for timm and torchvision. 0: no classifier; the
            model returns its input, [B, D].
        options: Further arguments of the model function; CIFAR models also take `in_chans`, of the images.

    Raises:
        ConfigError: An option that the model does not take, num_classes < 0, or no such library installed.
        CheckpointError: Pretrained weights that cannot be loaded.
    """
    if num_classes is not None and num_classes < 0:
        raise ConfigError(f"num_classes must be at least 1, or 0 for no classifier; got {num_classes}")
    check_model_name(name)
    if num_classes == 0 and not name.startswith("timm/"):  # timm's argument
        return without_classifier(create_model(name, **options))
    if name.startswith(GIVEN):
        return _copy_given(name)
    if "/" in name:
        return create_external(name, num_classes, **options)
    function = _MODELS[name]
    channels = options.pop("in_chans", 3) if function.__module__.startswith(f"{__package__}.cifar.") else 3
    given = options if num_classes is None else {"num_classes": num_classes, **options}
    signature = inspect.signature(function)
    try:
        signature.bind(**given)
    except TypeError as error:
        allowed = [p for p in signature.parameters if p != "num_classes"]
        raise ConfigError(f"model {name!r}: {error}; its options: {', '.join(allowed) or 'none'}") from None
    try:
        return function(**given) if channels == 3 else with_channels(function(**given), channels)
    except Exception as error:  # a function may fail in any way on a wrong value
        if not options or isinstance(error, MDistillerError):
            raise
        raise ConfigError(f"model {name!r} does not take {options!r}: {one_line(error)}") from error


def _copy_given(name: str) -> nn.Module:
    try:
        return copy.deepcopy(_GIVEN[name]).cpu()  # where models by name are built
    except Exception as error:  # modules may hold anything
        raise ConfigError(f"model {name!r}: it cannot be copied, as a run does: {error}") from error
