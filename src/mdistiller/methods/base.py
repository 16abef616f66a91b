"""Base classes of distillation methods and their configs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn
from typing_extensions import TypeVar  # with a default

from mdistiller.settings import Settings
from mdistiller.types import IGNORED, Batch, DataInfo, Outputs

Losses = dict[str, Tensor]
"""Weighted losses by name."""
Scalar = Float[Tensor, ""]
Logits = Float[Tensor, "b c"]
"""Logits [B, C], C ≥ 2; the teacher's are detached, else a loss has a gradient for the teacher too."""
Labels = Int[Tensor, " b"] | Float[Tensor, "b c"]
"""Class ids int64 [B], or soft labels float [B, C] whose rows sum to one."""


class MethodConfig(Settings):
    """Settings of every method; a method's own config adds its hyperparameters."""

    own_name: ClassVar[str] = ""
    """Name under which the method of these settings is registered."""

    task_weight: float = Field(default=1.0, ge=0)
    """Weight of the task loss."""

    @property
    def method_name(self) -> str:
        """Name of the method."""
        return self.own_name

    def parts(self) -> "dict[str, MethodConfig]":
        """Returns the configs of the method's parts by field."""
        return {field: value for field, value in self if isinstance(value, MethodConfig)}

    def label(self) -> str:
        """Returns the method's name, for an error about these settings."""
        return f"method {self.method_name!r}"

    def merge(self, changes: Mapping[str, object]) -> dict[str, object]:
        """Returns the values of all fields and the method's name, with changes, not validated yet."""
        return {"name": self.method_name, **super().merge(changes)}

    def is_renamed_by(self, changes: Mapping[str, object]) -> bool:
        """Whether the changes name another method."""
        return changes.get("name", self.method_name) != self.method_name

    @model_validator(mode="before")
    @classmethod
    def _check_name(cls, values: object) -> object:
        if not isinstance(values, dict) or "name" not in values:
            return values
        if values["name"] != cls.own_name:
            raise ValueError(f"these are the settings of {values['name']!r}, not of {cls.own_name!r}")
        return {key: value for key, value in values.items() if key != "name"}

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {"name": self.method_name, **handler(self)}


STAGES = ("stage1", "stage2", "stage3")
"""Stages of the models for which a method's `example` holds."""
PREACTIVATIONS = tuple(f"{name}.preact" for name in STAGES)


class Example(NamedTuple):
    """Facts of a method with its default settings for resnet32x4 → resnet8x4 on CIFAR-100."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    extra_parameters: int = 0
    """Number of parameters that train besides the student's."""
    reads_logits: bool = False
    """Whether a method with taps reads logits as well."""


@dataclass(frozen=True)
class Card:
    """Facts about a method for lists and documentation."""

    paper: str = ""
    """Authors, title, venue and year."""
    use: str = ""
    """Case that the method is for, in one line without a full stop."""
    example: Example | None = None
    """Facts for `mdistiller list methods`, of the class itself, as a subclass may add taps or layers. None:
    a method with taps or layers is listed without them."""

    year: int | None = None
    """Year of the paper. None: the last four characters of `paper`."""

    def __post_init__(self) -> None:
        if self.year is None and self.paper[-4:].isdigit():
            object.__setattr__(self, "year", int(self.paper[-4:]))


@dataclass(frozen=True)
class Needs:
    """Requirements of a method; the defaults suit most."""

    teacher: bool = True
    views: int = 1
    """2: a batch is [2B], all images under ordinary and then the same images under strong augmentation."""
    norm_per_view: bool = False
    """The student runs once on each view, so that batch norm sees the statistics of one view."""
    index: bool = False
    """`batch.index`, for a memory of all training images."""
    classifier: bool = False
    """The weights of the student's classifier."""
    progress: bool = False
    """The losses depend on `progress`."""
    labels: bool = False
    """The losses depend on the images' classes."""
    every_label: bool = True
    """With `labels`: a class for each image. False: the means leave out images without one (label -100)."""
    one_class: bool = True
    """At most one class for each image. False: the losses contain neither labels nor a softmax."""
    logits: bool = True
    """The teacher's logits, or its classifier. False: any teacher with the tapped features serves."""
    task_tap: str = ""
    """Tap of the student whose logits the task loss reads; empty: those that the student returns."""


ConfigT = TypeVar("ConfigT", bound=MethodConfig, default=MethodConfig, covariant=True)


class Method(nn.Module, Generic[ConfigT]):
    """Base class of a distillation method.

    A subclass sets `Config` to its config class, sets its taps and needs (as class attributes or in
    `__init__`) and overrides `forward`. Layers that train with the student are ordinary submodules.
    `__init__` may read both models, for shapes through `mdistiller.taps.probe`, and changes neither.

    A method reads only logits if and only if it taps nothing. It may then be the base of a wrapper.

    Args:
        config: instance of the class's `Config`.
        student: the student, untapped.
        teacher: the teacher, untapped; None for a method that needs none.
        data: the shape of the images, and the labels and the batch size where they are known.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    name: str = ""
    card: ClassVar[Card] = Card()
    needs: Needs = Needs()
    """An instance adds `progress` for a config with a `warmup`, and `norm_per_view` from its config."""
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    def __init__(
        self,
        config: ConfigT,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        data: DataInfo | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.warmup: float = getattr(config, "warmup", 0.0)
        self.needs = replace(
            self.needs,
            progress=self.needs.progress or self.warmup > 0,
            norm_per_view=getattr(config, "norm_per_view", self.needs.norm_per_view),
        )
        self.only_labeled = data is not None and data.only_labeled
        labels = None if data is None else data.labels
        self.has_unlabeled = labels is not None and bool((labels == IGNORED).any())
        """Whether a training image is without a class."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        """Computes the weighted distillation losses, scalars by name, without the task loss.

        Args:
            student: logits [B, classes] and the features of `student_taps`.
            teacher: logits and the features of `teacher_taps`, without gradient.
            batch: image [B, C, H, W], label int64 [B] (-100: none) or float [B, classes], index int64 [B].
            progress: 0-d tensor, the fraction of training done, in [0, 1].
        """
        raise NotImplementedError

    def extend_student(self, student: nn.Module) -> nn.Module:
        """Returns the model that is trained, evaluated and saved as the student.

        It is called once, after `__init__`, and `student_taps` are read from its result. A method that adds
        layers to the student's predictions returns a new model made of a copy.
        """
        return student


def own_example(method: type[Method]) -> Example | None:
    """Returns the example on a class's own card."""
    return vars(method).get("card", Card()).example


def declares_taps(method: type[Method]) -> bool:
    """Whether a class has taps, or config fields for them; `__init__` may still add some."""
    fields = method.Config.model_fields.keys() & {"student_taps", "teacher_taps"}
    return bool(method.student_taps or method.teacher_taps or fields)


class LogitMethod(Method[ConfigT]):
    """Base class of methods whose loss is a mean over samples, each a function of the sample's logits.

    A subclass overrides `sample_losses`, which wrappers (CTKD, SDD) also call. If it reads labels, its means
    are over the images that have a class.
    """

    needs = Needs(every_label=False)

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        """Computes the weighted distillation losses [B] of every sample by name, without warm-up."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        """Returns the means of `sample_losses`, which grow over `config.warmup` if there is one."""
        weight = ramp(progress, self.warmup)
        label, absent, count = batch.label, None, None
        if self.only_labeled or (self.needs.labels and self.has_unlabeled):
            count = count_labeled(label).clamp(min=1)
            if not label.is_floating_point():  # of soft labels, a row of zeros gives no loss
                absent = label == IGNORED
                label = label.masked_fill(absent, 0)
        losses = self.sample_losses(student.logits, teacher.logits, label)
        for name, value in losses.items():
            value = value if absent is None else value.masked_fill(absent, 0.0)
            losses[name] = weight * (value.mean() if count is None else value.sum() / count)
        return losses


def count_labeled(label: Tensor) -> Tensor:
    """Counts the images with a class, a 0-d tensor; of soft labels [B, C] it is the sum of all rows."""
    return label.sum() if label.is_floating_point() else (label != IGNORED).sum()


def promote(x: Tensor) -> Tensor:
    """Converts half precision to float32; returns float32 and float64 unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exact(x: Tensor) -> torch.autocast:
    """Returns a context without autocast, for losses whose matrix products need full precision."""
    return torch.autocast(x.device.type, enabled=False)


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Scales rows [B, D] to unit length; epsilon under the root gives a zero vector a finite gradient."""
    return x / (x.square().sum(1, keepdim=True) + eps).sqrt()


def standardize(x: Tensor, eps: float) -> Tensor:
    """Standardizes each column of [B, D] over the batch (divisor B), as batch norm without parameters."""
    variance, mean = torch.var_mean(x, dim=0, keepdim=True, correction=0)
    return (x - mean) / (variance + eps).sqrt()


def ramp(progress: Tensor, warmup: float) -> Tensor | float:
    """Returns the weight of a linear warm-up: 0 at the start, 1 from `progress` = `warmup` on."""
    return (progress / warmup).clamp(max=1.0) if warmup > 0 else 1.0


def not_negative(value: float | str) -> float | str:
    """Checks a number or a word of a config; raises a ValueError for a number below 0."""
    if isinstance(value, float) and not value >= 0:
        raise ValueError("Input should be greater than or equal to 0")
    return value
