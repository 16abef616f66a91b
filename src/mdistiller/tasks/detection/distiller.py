"""Distillation of detectors, in the trainer and in one's own loop."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distiller import Distiller, StudentPass
from mdistiller.errors import ConfigError
from mdistiller.methods import Method, MethodConfig
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.detector import DetectionTeacher, outputs_of
from mdistiller.tasks.detection.loader import DetectionBatch
from mdistiller.tasks.detection.methods import (
    build_method,
    default_config,
    held_layer,
    reads_logits,
    tap_pairs,
)
from mdistiller.types import Batch, DataInfo, LogitsOf


class DetectionDistiller(Distiller):
    """Distillation of detectors in one's own training loop.

    It works as `mdistiller.Distiller`, on images and targets in torchvision's form. Example::

        distiller = DetectionDistiller(student, teacher, "dkd+reviewkd")
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)
        for images, targets in loader:
            out = distiller(images, targets)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    Args:
        student: a detector of torchvision, or one with an adapter of its own (see `DetectorAdapter`).
        teacher: another one of the same classes; None for method "none". For methods that compare levels, it
            may be a detector of another kind.
        method: a method's name, with its defaults for detectors, its config, or a built `Method`.
        total_steps, settings: as in `Distiller`.

    Raises:
        UnknownNameError: no such method.
        ConfigError: an unknown or wrong setting; detectors that do not suit the method or each other, or that
            share trainable parameters; on a call, different classes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: str | MethodConfig | Mapping[str, Any] | Method = "dkd",
        *,
        total_steps: int | None = None,
        **settings: Any,
    ) -> None:
        if settings:  # here, as some are named like arguments of `Distiller` that a detector does not read
            method = self._configure(method, settings)
        super().__init__(student, teacher, method, total_steps=total_steps)

    def _default_config(self, name: str) -> MethodConfig:
        return default_config(name)

    def _build_method(
        self, config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> Method:
        return build_method(config, student, teacher)

    def _tap_student(self, taps: tuple[str, ...], logits_of: LogitsOf) -> None:
        self.adapter = adapter_of(self.student)
        self.adapter.hold = held_layer(self.method)

    def _freeze(self, teacher: nn.Module, logits_of: LogitsOf) -> DetectionTeacher:
        return freeze(teacher, self.method)

    def _prepare(self, inputs: Any, target: Any, index: Tensor | None) -> tuple[DetectionBatch, torch.device]:
        """Takes images, float [3, H, W] in [0, 1] each, and their targets in torchvision's form.

        A target has `boxes` [N, 4] (x1, y1, x2, y2 in pixels), `labels` int64 [N], and for Mask R-CNN `masks`
        uint8 [N, H, W].
        """
        if not self.student.training:
            raise ConfigError("a detector has losses in training mode only: call train() first")
        device = inputs[0].device
        if index is None:
            index = torch.arange(len(inputs), device=device)
        return DetectionBatch(inputs, target, index), device

    def _run_student(self, batch: DetectionBatch) -> StudentPass:
        losses, result = self.adapter.train(batch.image, batch.target)
        outputs = outputs_of(self.adapter, result, self.method.student_taps)
        labels = outputs.logits.new_empty(0) if result.labels is None else result.labels
        images = Batch(result.images.tensors, labels, batch.index)
        return StudentPass(outputs, images, losses, result)


def freeze(teacher: nn.Module, method: Method) -> DetectionTeacher:
    """Returns a detector as the teacher of a method."""
    return DetectionTeacher(teacher, tap_pairs(method), logits=reads_logits(method), hold=held_layer(method))
