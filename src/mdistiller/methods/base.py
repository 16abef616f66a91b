"""What every method is: a config, the features it taps, and one forward pass that gives named losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn

from mdistiller.settings import Settings
from mdistiller.types import Batch, DataInfo, Outputs


class MethodConfig(Settings):
    """Settings that every method has. A method's own config adds its hyper-parameters."""

    method_name: ClassVar[str] = ""

    task_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy with the labels."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of that cross-entropy; the distillation loss never sees it."""

    def merge(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values of all fields and the method's name, with changes, not validated yet."""
        return {"name": self.method_name, **super().merge(changes)}

    def is_renamed_by(self, changes: Mapping[str, Any]) -> bool:
        """Whether the changes name another method."""
        return changes.get("name", self.method_name) != self.method_name

    @model_validator(mode="before")
    @classmethod
    def _check_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "name" not in values:
            return values
        if values["name"] != cls.method_name:
            raise ValueError(f"these are the settings of {values['name']!r}, not of {cls.method_name!r}")
        return {key: value for key, value in values.items() if key != "name"}

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.method_name, **handler(self)}


class Method(nn.Module):
    """A distillation method.

    A subclass sets `Config`, its taps (here or in `__init__`), and `forward`. What it trains besides the
    student are ordinary submodules. It may read both models in `__init__` (shapes through
    `mdistiller.taps.probe`), and leaves them as they are.

    Args:
        config: an instance of the class's `Config`.
        student: the student, untapped.
        teacher: the teacher, untapped; None for a method that needs none.
        data: what is known of the training data: the images' shape, and perhaps labels and batch size.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Authors, title, venue."""
    year: ClassVar[int | None] = None
    kind: ClassVar[Literal["task", "logit", "feature", "relation"]] = "logit"
    needs_teacher: ClassVar[bool] = True

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    views: int = 1
    """2: the batch is [2B], all images under ordinary augmentation, then all under strong augmentation."""
    needs_index: bool = False
    """Whether `forward` reads `batch.index`: it keeps something for each training image."""

    def __init__(
        self,
        config: MethodConfig,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
    ) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """Weighted scalar losses by name; the step minimises their sum.

        Args:
            student: logits [B, classes] and the features of `student_taps`.
            teacher: the same of the teacher, without gradient.
            batch: image [B, C, H, W], label int64 [B] or float [B, classes], index int64 [B].
            progress: 0-d tensor, the fraction of training done, in [0, 1].
        """
        raise NotImplementedError

    def deployed(self, student: nn.Module) -> nn.Module:
        """The model that makes the predictions: it is trained, evaluated and saved in the student's place.

        Called once, after `__init__`; `student_taps` are read from what it returns. Most methods distil
        into the student as it is.
        """
        return student

    def task_loss(self, student: Outputs, batch: Batch) -> Tensor:
        """Cross-entropy with the labels, times `task_weight`."""
        loss = F.cross_entropy(
            promote(student.logits), batch.label, label_smoothing=self.config.label_smoothing
        )
        return self.config.task_weight * loss


class LogitMethod(Method):
    """A method whose distillation loss is a mean over samples, each a function of its logits alone.

    A subclass has `sample_losses`; what wraps it (a learned temperature, logits by region) calls that too.
    """

    def __init__(
        self, config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        self.warmup: float = getattr(config, "warmup", 0.0)

    def sample_losses(
        self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor
    ) -> dict[str, Tensor]:
        """Weighted losses [B] of every sample by name, at full weight; without the task's."""
        raise NotImplementedError

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """The task's loss, and the means of `sample_losses`, ramped up over `config.warmup`, if any."""
        losses = self.sample_losses(student.logits, teacher.logits, batch.label)
        weight = ramp(progress, self.warmup)
        means = {name: weight * value.mean() for name, value in losses.items()}
        return {"task": self.task_loss(student, batch), **means}


def promote(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exact(x: Tensor) -> torch.autocast:
    """A context without autocast, for losses with matrix products: half precision would spoil them."""
    return torch.autocast(x.device.type, enabled=False)


def ramp(progress: Tensor, warmup: float) -> Tensor | float:
    """Linear warm-up: 0 at the start, 1 once `progress` has reached `warmup` (a fraction of training)."""
    return (progress / warmup).clamp(max=1.0) if warmup > 0 else 1.0
