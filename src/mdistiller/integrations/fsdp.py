"""Distillation with models that are sharded over processes by PyTorch's FSDP2."""

import re
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mdistiller.distiller import Distiller
from mdistiller.errors import ConfigError
from mdistiller.models import tap_points
from mdistiller.types import Line


def shard(distiller: Distiller, *, mesh: DeviceMesh | None = None, **options: Any) -> Distiller:
    """Shards a distiller in place: its student with the method's layers, and its teacher.

    Each stage of the models (their taps `stage1` …) is a unit, gathered while it runs, and so is the rest of
    each model. The optimizer is made afterwards, of `distiller.parameters()`. Models that are sharded already
    stay as they are.

    Args:
        distiller: the distiller.
        mesh: device mesh; None: all processes.
        options: further arguments of `fully_shard`, such as `mp_policy`.

    Returns:
        The distiller.

    Raises:
        ConfigError: a method that reads the weights of the student's classifier.
    """
    method = distiller.method
    if method.needs.classifier:
        raise ConfigError(
            f"method {method.config.method_name!r} reads the weights of the student's classifier, which no "
            "process has whole when the student is sharded; allowed: DDP, or another method"
        )
    student = distiller.student
    if not isinstance(student, FSDPModule):
        _shard_stages(student, mesh, options)
    fully_shard(distiller, mesh=mesh, **options)
    for teacher in distiller.teachers:
        if not isinstance(teacher, FSDPModule):
            _shard_stages(teacher, mesh, options)
            fully_shard(teacher, mesh=mesh, **{"reshard_after_forward": True, **options})
    return distiller


def _shard_stages(model: nn.Module, mesh: DeviceMesh | None, options: Line) -> None:
    for name, path in tap_points(model).items():
        if re.fullmatch(r"stage\d+", name) and ":" not in path:
            stage = model.get_submodule(path)
            if any(True for _ in stage.parameters()):
                fully_shard(stage, mesh=mesh, **options)
