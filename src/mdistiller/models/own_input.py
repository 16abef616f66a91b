"""A model that gets its images as they were prepared for another one: other mean, deviation and size."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.models.external import InputConfig, tap_points

_ALLOWED = (
    "a mapping with mean, std and image_size, the pretrained_cfg of a timm model, weights of torchvision, or "
    "an image processor of transformers"
)
CHANNELS = "a module that picks its channels, or a model of timm, or for CIFAR, with the option in_chans"
"""Models for images of other than three channels; messages add the number of channels."""


class OwnInput(nn.Module):
    """Model that takes images prepared for another model, and prepares them for itself.

    Images are float [B, C, H, W], normalized for the other model. Each channel is renormalized, then the
    images are scaled to squares of the model's own size, bilinear, antialiased where they shrink. Arguments
    that are no such images pass unchanged. Names of taps are those of the model.

    Args:
        model: the model.
        given: mean and standard deviation of the images that it gets; None where they are not needed.
        own: those of the images for which it is made, and their size. None: as given.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, model: nn.Module, given: InputConfig, own: InputConfig) -> None:
        super().__init__()
        self.model, self.own = model, own
        scale = shift = None
        mean, std = own.mean or given.mean, own.std or given.std
        if (mean, std) != (given.mean, given.std):
            assert given.mean is not None
            assert given.std is not None
            assert mean is not None
            assert std is not None
            if len({len(values) for values in (mean, std, given.mean, given.std)}) > 1:
                raise ConfigError(
                    f"teacher: its mean and std have {len(mean)} and {len(std)} numbers, the images "
                    f"{len(given.mean)} channels; allowed: {CHANNELS} {len(given.mean)}"
                )
            # z · s + m is the image in [0, 1], and (z · s + m - m') / s' is the model's own input.
            scale = torch.tensor([s / s2 for s, s2 in zip(given.std, std, strict=True)])
            shift = torch.tensor([(m - m2) / s2 for m, m2, s2 in zip(given.mean, mean, std, strict=True)])
            scale, shift = scale[:, None, None], shift[:, None, None]
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.tap_points = {name: f"model.{path}" for name, path in tap_points(model).items()}

    def forward(self, *images: object, **inputs: object) -> object:
        adapted = {name: self.adapt(value) for name, value in inputs.items()}
        return self.model(*map(self.adapt, images), **adapted)

    def adapt(self, images: object) -> object:
        """Returns images as the model takes them; anything but float [B, C, H, W] is returned unchanged."""
        if not (isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point()):
            return images
        if self.scale is not None and self.shift is not None:
            images = torch.addcmul(self.shift.to(images.dtype), images, self.scale.to(images.dtype))
        size = self.own.image_size
        if size is None or images.shape[-2:] == (size, size):
            return images
        return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)

    def extra_repr(self) -> str:
        """Returns the own values, on which the fingerprint of a teacher depends."""
        return self.describe()

    def describe(self) -> str:
        """Returns the values in which the model's images differ from the given ones, for people."""
        parts = [] if self.own.image_size is None else [f"{self.own.image_size} pixels"]
        if self.scale is not None:
            parts += [
                f"{name} {' '.join(f'{v:g}' for v in values)}"
                for name, values in (("mean", self.own.mean), ("std", self.own.std))
                if values is not None
            ]
        return ", ".join(parts)


def with_own_input(model: nn.Module, given: InputConfig, own: InputConfig) -> nn.Module:
    """Wraps a model that is made for other images than it gets; without a difference, returns the model.

    Arguments are those of `OwnInput`; a size of the given images is that of all of them.
    """
    size = None if own.image_size == given.image_size else own.image_size
    if size is None and own.mean in (None, given.mean) and own.std in (None, given.std):
        return model
    return OwnInput(model, given, own._replace(image_size=size))


def without_own_input(model: nn.Module) -> nn.Module:
    """Returns the model that `with_own_input` was given."""
    return model.model if isinstance(model, OwnInput) else model


def own_inputs(model: nn.Module) -> list[OwnInput]:
    """Lists the parts of a model, or of an ensemble, that prepare their images themselves."""
    return [module for module in model.modules() if isinstance(module, OwnInput)]


def find_input(source: object, name: str, channels: int | None = 3) -> InputConfig:
    """Returns mean, standard deviation and size of the images for which a model is made.

    Args:
        source: a mapping or an object with `mean`, `std` and `image_size` (or `input_size`), as timm's
            `pretrained_cfg`; weights of torchvision; an image processor of transformers.
        name: name of the argument in messages.
        channels: number of the images' channels. None: any.

    Raises:
        ConfigError: none of the values is there, or one is wrong.
    """
    mean, std, size = _values(source)
    if mean is None and std is None and size is None:
        raise ConfigError(f"{name}: got {type(source).__name__} without any value; allowed: {_ALLOWED}")
    return InputConfig(
        _channels(mean, f"{name}: mean", channels),
        _channels(std, f"{name}: std", channels, above_zero=True),
        _side(size, f"{name}: image_size"),
    )


def _first(source: object, *keys: str) -> object:
    """Returns the first entry of a mapping, or attribute of an object, that is there and not None."""
    found = source.get if isinstance(source, Mapping) else partial(getattr, source)
    return next((value for key in keys if (value := found(key, None)) is not None), None)


def _values(source: object) -> tuple[object, object, object]:
    """Returns mean, standard deviation and size as a source has them, None where it lacks one."""
    if callable(transforms := getattr(source, "transforms", None)):  # torchvision's weights
        source = transforms()
    if _first(source, "image_mean", "image_std") is None:
        size = _first(source, "image_size", "input_size", "crop_size")
        return _first(source, "mean"), _first(source, "std"), size
    # An image processor.
    size = _first(source, "crop_size" if _first(source, "do_center_crop") else "size")
    if _first(source, "do_normalize") is False:
        return [0.0] * 3, [1.0] * 3, size
    return _first(source, "image_mean"), _first(source, "image_std"), size


def _channels(
    value: object, name: str, count: int | None, *, above_zero: bool = False
) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(float(x) for x in value) if isinstance(value, Iterable) else ()
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count and (count is not None or not numbers):
        raise ConfigError(
            f"{name}: got {value!r}; allowed are {count or 'some'} numbers, one for each channel"
        )
    if not all(math.isfinite(x) and (x > 0 or not above_zero) for x in numbers):
        raise ConfigError(f"{name}: got {value!r}; allowed are numbers{' above 0' * above_zero}")
    return numbers


def _side(value: object, name: str) -> int | None:
    if value is None:
        return None
    keys = ("height", "width", "shortest_edge")
    sides = [length for key in keys if (length := _first(value, key)) is not None]
    if not sides:
        sides = list(value)[-2:] if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    side = sides[0] if sides else None
    if any(x != side for x in sides) or not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise ConfigError(f"{name}: got {value!r}; allowed is the side of a square in pixels, 1 or more")
    return side


def for_images(
    teacher: nn.Module | None, student_input: object, teacher_input: object, channels: int
) -> nn.Module | None:
    """Returns a distiller's teacher that takes the images of the batches, by the arguments of `Distiller`.

    Raises:
        ConfigError: an argument that lacks its model or its values.
    """
    if teacher is None or teacher_input is None:
        for name, value in (("student_input", student_input), ("teacher_input", teacher_input)):
            if value is not None:
                missing = "a teacher" if teacher is None else "teacher_input"
                raise ConfigError(f"{name}: got a value without {missing}; allowed: None")
        return teacher
    own, given = find_input(teacher_input, "teacher_input", channels), InputConfig()
    if student_input is not None:  # the size is that of the batches
        given = find_input(student_input, "student_input", channels)._replace(image_size=None)
    for name in ("mean", "std"):
        if getattr(own, name) is not None and None in (given.mean, given.std):
            raise ConfigError(
                f"student_input: teacher_input has {name}, so mean and std of the images in the batches are "
                'needed; allowed: student_input={"mean": …, "std": …}'
            )
    return with_own_input(teacher, given, own)
