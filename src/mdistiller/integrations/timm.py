"""Distillation as a training task of timm."""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from mdistiller.distiller import Distiller
from mdistiller.errors import MissingPackageError
from mdistiller.types import Line

try:
    from timm.models import group_parameters, model_parameters
    from timm.task import TrainingTask
    from timm.utils.model import unwrap_model
except ImportError as error:
    raise MissingPackageError("mdistiller.integrations.timm", "timm", "timm") from error

_STUDENT = "student."  # before the student's keys in a distiller's state dict


class DistillTask(TrainingTask):
    """Task of timm that trains the student and the method of a `Distiller`.

    A call returns `loss`, `output` (the student's logits) and each loss by name, such as `dkd_loss`. The
    optimizer is made of `get_trainable_module()`, which has the method's layers; `get_eval_model()` is the
    student, the model of a checkpoint, whose task state has the rest. `layer_decay` and exceptions from
    weight decay follow the student's own tables, with the method's layers beside its last. A schedule needs
    `Distiller(..., total_steps=N)`.

    Args:
        distiller: the distiller.
        device: where it trains; None: the CPU.
        dtype: of floating point inputs; None: torch's default.
        verbose: whether timm logs what the task does.
    """

    trainable_module: nn.Module

    def __init__(
        self,
        distiller: Distiller,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = distiller.to(device=self.device)
        # Where `create_optimizer_v2` looks for them.
        distiller.no_weight_decay = partial(_without_decay, distiller)  # type: ignore[assignment]
        distiller.group_matcher = partial(_layer_of, distiller)  # type: ignore[assignment]

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        out = self.trainable_module(input, target)
        losses = {f"{name}_loss": value.detach() for name, value in out.losses.items()}
        return {"loss": out.loss, "output": out.logits, **losses}

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp: Any) -> Self:
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp
        )
        return self

    def compile(self, *arguments: Any, **options: Any) -> Any:
        self.trainable_module.compile(*arguments, **options)
        return self.get_eval_model()

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        return getattr(self, "trainable_module_ema", None) if ema else self.trainable_module

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        whole = unwrap_model(self.trainable_module)
        rest = [value for name, value in whole.named_parameters() if not name.startswith(_STUDENT)]
        return [*model_parameters(whole.student, exclude_head), *rest]

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        module = self.get_trainable_module(ema=ema) if module is None else module
        return None if module is None else unwrap_model(module).student

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> Line:
        module = self.get_trainable_module(ema=ema) if module is None else module
        state = {} if module is None else unwrap_model(module).state_dict()
        return {key: value for key, value in state.items() if not key.startswith(_STUDENT)}

    def load_task_state(
        self,
        state: Line | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        module = self.get_trainable_module(ema=ema) if module is None else module
        if module is not None:
            whole = unwrap_model(module)
            student = {key: v for key, v in whole.state_dict().items() if key.startswith(_STUDENT)}
            whole.load_state_dict(student | (state or {}), strict=strict)


def _without_decay(distiller: Distiller) -> set[str]:
    """Names the parameters for which the student asks for no weight decay."""
    find = getattr(distiller.student, "no_weight_decay", set)
    return {_STUDENT + name for name in find()}


def _layer_of(distiller: Distiller, coarse: bool = False) -> Callable[[str], int]:
    """Returns the function from a parameter's name to its layer in the student, for `layer_decay`."""
    student: Any = distiller.student
    found = student.group_matcher(coarse=coarse) if hasattr(student, "group_matcher") else {}
    layers = group_parameters(student, found, reverse=True)
    layers, last = {_STUDENT + name: layer for name, layer in layers.items()}, max(layers.values())
    return lambda name: layers.get(name, last)
