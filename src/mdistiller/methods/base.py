"""What every method is: a config, the features it taps, and one forward pass that gives named losses."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.types import Batch, Outputs


class MethodConfig(BaseModel):
    """Settings that every method has. A method's own config adds its hyper-parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method_name: ClassVar[str] = ""

    task_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy with the labels."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of that cross-entropy; the distillation loss never sees it."""

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
        input_shape: (C, H, W) of one image.
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

    def __init__(
        self,
        config: MethodConfig,
        student: nn.Module,
        teacher: nn.Module | None,
        input_shape: tuple[int, ...],
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

    def task_loss(self, student: Outputs, batch: Batch) -> Tensor:
        """Cross-entropy with the labels, times `task_weight`."""
        loss = F.cross_entropy(
            promote(student.logits), batch.label, label_smoothing=self.config.label_smoothing
        )
        return self.config.task_weight * loss


def promote(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def ramp(progress: Tensor, warmup: float) -> Tensor | float:
    """Linear warm-up: 0 at the start, 1 once `progress` has reached `warmup` (a fraction of training)."""
    return (progress / warmup).clamp(max=1.0) if warmup > 0 else 1.0


_METHODS: dict[str, type[Method]] = {}
MethodType = TypeVar("MethodType", bound=type[Method])


def register(name: str) -> Callable[[MethodType], MethodType]:
    """Class decorator: make a `Method` known as `name`.

    Raises:
        ConfigError: the name is taken by another class, or the class has no `Config` of its own.
    """

    def add(cls: MethodType) -> MethodType:
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"method {name!r} is registered already, by {known.__module__}")
        # Looked up in the class itself: a Config that extends another method's inherits that one's name.
        if cls.Config.__dict__.get("method_name", "") not in ("", name) or cls.Config is MethodConfig:
            raise ConfigError(f"method {name!r} needs a Config class of its own, a child of MethodConfig")
        cls.name = name
        cls.Config.method_name = name
        _METHODS[name] = cls
        return cls

    return add


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str) -> type[Method]:
    """The method class of a name.

    Raises:
        UnknownNameError: no such method; the message has the nearest names.
    """
    if name not in _METHODS:
        raise UnknownNameError("method", name, _METHODS, "A method of your own: --plugin FILE")
    return _METHODS[name]


def load_plugin(path: str | Path) -> None:
    """Run a Python file whose `@register` calls add methods (or models).

    The file is code and is trusted as such. A file that was loaded already is left alone.

    Raises:
        ConfigError: the file is missing or raises.
    """
    path = Path(path).resolve()
    # The module's name has to be the same in every process, so that pickles find it.
    name = f"mdistiller_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"plug-in {path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"plug-in {path} failed: {type(error).__name__}: {error}") from error
