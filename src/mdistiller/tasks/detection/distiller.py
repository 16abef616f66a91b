"""Modules of a detector's distillation step: the student with its method, and both in one's own loop."""

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distiller import Distiller, DistillerOutput
from mdistiller.errors import ConfigError
from mdistiller.methods import Method, MethodConfig
from mdistiller.student_with_method import StepOutput, StudentWithMethod
from mdistiller.tasks.detection.detector import DetectionTeacher, TappedDetector
from mdistiller.tasks.detection.loader import DetectionBatch
from mdistiller.tasks.detection.methods import (
    DATA,
    build_method,
    default_config,
    held_layer,
    reads_logits,
    tap_pairs,
)
from mdistiller.types import Batch, DataInfo, Outputs


class DetectionStudentWithMethod(StudentWithMethod):
    """Detector and method: everything that trains, hence the module that is wrapped in DDP.

    The given detector is `student.model` of this module.
    """

    def __init__(self, student: nn.Module, method: Method) -> None:
        nn.Module.__init__(self)
        self.student, self.method = TappedDetector(student), method
        self.reads_logits, self.pairs = reads_logits(method), tap_pairs(method)
        self.student.adapter.hold = held_layer(method)

    def forward(  # type: ignore[override]
        self, batch: DetectionBatch, teacher: DetectionTeacher | None, progress: Tensor
    ) -> StepOutput:
        """Computes the detector's own losses, times `task_weight`, and the method's.

        The teacher is called here, as its box head runs on the proposals that the student samples, and its
        levels are sampled on the student's grids.
        """
        losses, result = self.student(batch.image, batch.target)
        task = {name: self.method.config.task_weight * value for name, value in losses.items()}
        student = self.student.outputs(result, self.method.student_taps)
        nothing = student.logits.new_empty(0)
        outputs = Outputs(nothing, {})
        if teacher is not None:
            outputs = teacher(
                batch.image, result, self.pairs, logits=self.reads_logits, hold=self.student.adapter.hold
            )
        labels = nothing if result.labels is None else result.labels
        images = Batch(result.images.tensors, labels, batch.index)
        distillation = self.distillation_losses(student, outputs, images, progress)
        return StepOutput(task, distillation, student.logits)


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
        method: a method's name, with its defaults for detectors, or its config.
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
        method: str | MethodConfig = "dkd",
        *,
        total_steps: int | None = None,
        **settings: Any,
    ) -> None:
        nn.Module.__init__(self)
        self._build(student, teacher, self._configure(method, settings), DATA, total_steps)

    def _default_config(self, name: str) -> MethodConfig:
        return default_config(name)

    def _build_method(
        self, config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> Method:
        return build_method(config, student, teacher)

    def _student_with_method(self, student: nn.Module, method: Method) -> nn.Module:
        return DetectionStudentWithMethod(student, method)

    def _freeze(self, teacher: nn.Module, method: Method) -> nn.Module:
        return DetectionTeacher(teacher)

    def forward(  # type: ignore[override]
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]],
        progress: float | Tensor | None = None,
    ) -> DistillerOutput:
        """Computes the losses of a batch: torchvision's of the student, and the method's.

        Args:
            images: float [3, H, W] each, in [0, 1].
            targets: for each image `boxes` [N, 4] (x1, y1, x2, y2 in pixels), `labels` int64 [N], and for
                Mask R-CNN `masks` uint8 [N, H, W].
            progress: fraction of training done, in [0, 1]. None: counted from `total_steps`.

        Raises:
            ConfigError: the student is in evaluation mode; a method with a schedule gets neither `progress`
                nor `total_steps`.
        """
        if not self.student.training:
            raise ConfigError("a detector has losses in training mode only: call train() first")
        device = images[0].device
        batch = DetectionBatch(images, targets, torch.arange(len(images), device=device))
        teacher = self._teacher[0] if self._teacher else None
        return self._sum(self.learner(batch, teacher, self._progress(progress, device)))
