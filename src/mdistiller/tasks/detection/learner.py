"""The modules of a detector's training step: the Learner, which trains, beside a frozen teacher."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from mdistiller.distiller import LearnerBase, LearnerOutput, check_apart
from mdistiller.errors import ConfigError
from mdistiller.methods import Method, MethodConfig
from mdistiller.tasks.detection.detector import DetectionTeacher, TappedDetector, outputs_of
from mdistiller.tasks.detection.loader import DetectionBatch
from mdistiller.tasks.detection.methods import build_method, default_config, reads_logits
from mdistiller.types import Batch, Outputs


class DetectionLearner(LearnerBase):
    """A detector and a method: all that trains, hence what is wrapped in DDP.

    Args:
        student: the detector, untapped.
        method: the method, built for it.
    """

    def __init__(self, student: nn.Module, method: Method) -> None:
        super().__init__()
        self.student = TappedDetector(student)
        self.method = method
        self.reads_logits = reads_logits(method)

    def forward(
        self, batch: DetectionBatch, teacher: DetectionTeacher | None, progress: Tensor
    ) -> LearnerOutput:
        """The detector's losses (times the method's `task_weight`) and the method's, and class logits.

        The teacher is no part of the learner. It is called in here because its box head runs on the
        proposals that the student samples.
        """
        losses, seen = self.student(batch.image, batch.target)
        losses = {name: self.method.config.task_weight * value for name, value in losses.items()}
        student = outputs_of(seen, self.method.student_taps)
        taught = Outputs(student.logits.new_empty(0), {})
        if teacher is not None:
            taught = teacher(batch.image, seen, self.method.teacher_taps, logits=self.reads_logits)
        images = Batch(seen.images.tensors, seen.labels, batch.index)
        for name, value in self.method_losses(student, taught, images, progress).items():
            if name != "task":
                losses[name] = value
        return LearnerOutput(losses, student.logits)


class DetectionDistiller(nn.Module):
    """Distillation of detectors for one's own training loop.

    A call gives the named losses; their sum is what to minimise. `parameters()` are all that trains (the
    student's and the method's), `state_dict()` likewise; the teacher is neither, but moves along with
    `to()`. Example::

        distiller = DetectionDistiller(student, teacher, "dkd+reviewkd")
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)
        for images, targets in loader:
            losses = distiller(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()

    Args:
        student: a torchvision detector: a GeneralizedRCNN, RetinaNet or FCOS.
        teacher: another one of the same classes; None for method "none". It is frozen.
        method: a method's name (with its defaults for detectors), or its config.

    Raises:
        UnknownNameError: no such method.
        ConfigError: the detectors do not suit the method or each other, or share what trains; on a call,
            other classes.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, method: str | MethodConfig = "dkd"
    ) -> None:
        super().__init__()
        config = default_config(method) if isinstance(method, str) else method
        check_apart(student, teacher)
        built = build_method(config, student, teacher)
        self.learner = DetectionLearner(student, built)
        # In a tuple it is no submodule: neither in parameters() nor in state_dict().
        self._teacher = () if teacher is None or not built.needs_teacher else (DetectionTeacher(teacher),)

    @property
    def student(self) -> nn.Module:
        """The student as it was given."""
        return self.learner.student.model

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher as it was given, frozen; None where the method needs none."""
        return self._teacher[0].model if self._teacher else None

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]], progress: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """Weighted losses by name: torchvision's own of the student, and the method's.

        Args:
            images: float [3, H, W] each, in [0, 1].
            targets: for each image `boxes` [N, 4] (x1, y1, x2, y2 in pixels), `labels` int64 [N], and for
                Mask R-CNN `masks` uint8 [N, H, W].
            progress: fraction of training done, in [0, 1], for warm-ups; 1 means full weight.
        """
        if not self.training:
            raise ConfigError("a distiller's losses are those of training: call train() first")
        device = images[0].device
        batch = DetectionBatch(images, targets, torch.arange(len(images), device=device))
        progress = torch.as_tensor(progress, dtype=torch.float32, device=device)
        teacher = self._teacher[0] if self._teacher else None
        losses: dict[str, Tensor] = self.learner(batch, teacher, progress).losses
        return losses

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)
