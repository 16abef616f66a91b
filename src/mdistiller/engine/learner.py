"""The modules of a training step: a frozen teacher, and the Learner (student and method) that trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods import Method, MethodConfig, get_method
from mdistiller.taps import TappedModel
from mdistiller.types import Batch, DataInfo, Outputs


class LearnerOutput(NamedTuple):
    """losses: weighted scalar losses by name; logits: the student's, [B, classes]."""

    losses: dict[str, Tensor]
    logits: Tensor


class LearnerBase(nn.Module):
    """All that trains: a wrapped student, itself at `student.model`, and a method."""

    student: Any
    method: Method

    @staticmethod
    def figures(batch: Any, logits: Tensor) -> dict[str, Tensor]:
        """Sums over a batch's images that are shown while training, beside the losses; none here."""
        return {}


class Learner(LearnerBase):
    """Student and method: all that trains, hence what is compiled and then wrapped in DDP.

    Args:
        student: the student, untapped.
        method: the method; its `student_taps` are read from the student.
    """

    def __init__(self, student: nn.Module, method: Method) -> None:
        super().__init__()
        self.student = TappedModel(student, method.student_taps)
        self.method = method

    def forward(self, batch: Batch, teacher: Outputs, progress: Tensor) -> LearnerOutput:
        """Losses of a batch, given the teacher's outputs for it and the fraction of training done."""
        outputs = self.student(batch.image)
        return LearnerOutput(self.method(outputs, teacher, batch, progress), outputs.logits)

    @staticmethod
    def figures(batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """Sums over a batch's images that are shown while training: `top1`, 100 for a hit."""
        label = batch.label if batch.label.ndim == 1 else batch.label.argmax(1)
        return {"top1": (logits.argmax(1) == label).sum() * 100.0}


class Teacher(nn.Module):
    """A frozen model: eval mode for good, no gradient, no part of any checkpoint.

    Not `inference_mode`: its outputs enter autograd. The given model is put into eval mode and its
    parameters stop requiring gradients; no weight or buffer of it changes.
    """

    def __init__(self, model: nn.Module, taps: Iterable[str] = ()) -> None:
        super().__init__()
        self.tapped = TappedModel(model, taps)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is asked for."""
        return super().train(False)

    def forward(self, image: Tensor) -> Outputs:
        """Logits and tapped features of images [B, C, H, W], detached."""
        with torch.no_grad():
            return self.tapped(image)


def build_method(
    config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
) -> Method:
    """The method of a config, built for a pair of models.

    Raises:
        ConfigError: the method needs a teacher and there is none.
    """
    method_class = get_method(config.method_name)
    if teacher is None and method_class.needs_teacher:
        raise ConfigError(f"method {config.method_name!r} needs a teacher, and none was given")
    return method_class(config, student, teacher, data)


class Distiller(nn.Module):
    """Distillation for one's own training loop.

    A call gives the named losses; their sum is what to minimise. `parameters()` are all that trains (the
    student's and the method's), `state_dict()` likewise; the teacher is neither, but moves along with
    `to()`. Example::

        distiller = mdistiller.Distiller(student, teacher, "dkd")
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
        for image, label in loader:
            losses = distiller(image, label)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()

    Args:
        student: any module whose output is logits [B, classes].
        teacher: another one with the same classes; None for method "none". It is frozen.
        method: a method's name (with its default hyper-parameters), or its config, such as
            `DKDConfig(beta=2.0)`.
        input_shape: (C, H, W) of one image, which feature methods need to know their sizes.
        labels: int64 [N], the class of every training image, for methods with a memory bank; `index`
            in the call then says which images a batch has.
        batch_size: images a batch, for methods whose layers depend on it.

    Raises:
        UnknownNameError: no such method or tap.
        ConfigError: a missing teacher; on the first call, a teacher with another number of classes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: str | MethodConfig = "dkd",
        *,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        labels: Tensor | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        config = get_method(method).Config() if isinstance(method, str) else method
        data = DataInfo(tuple(input_shape), labels, batch_size)
        built = build_method(config, student, teacher, data)
        self.learner = Learner(built.deployed(student), built)
        # In a tuple it is no submodule: neither in parameters() nor in state_dict().
        self._teacher = () if teacher is None else (Teacher(teacher, built.teacher_taps),)

    @property
    def student(self) -> nn.Module:
        """The student, whose plain call gives logits: as it was given, unless the method adds to it."""
        return self.learner.student.model

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher as it was given, frozen."""
        return self._teacher[0].tapped.model if self._teacher else None

    def forward(
        self,
        image: Tensor,
        label: Tensor,
        index: Tensor | None = None,
        progress: float | Tensor = 1.0,
    ) -> dict[str, Tensor]:
        """Weighted losses by name.

        Args:
            image: [B, C, H, W].
            label: int64 [B], or float [B, classes] soft labels where the method allows them.
            index: int64 [B], positions in the training set, for methods with a memory bank.
            progress: fraction of training done, in [0, 1], for warm-ups; 1 means full weight.
        """
        if index is None:
            index = torch.arange(len(image), device=image.device)
        progress = torch.as_tensor(progress, dtype=torch.float32, device=image.device)
        teacher = self._teacher[0](image) if self._teacher else Outputs(image.new_zeros(0), {})
        losses: dict[str, Tensor] = self.learner(Batch(image, label, index), teacher, progress).losses
        return losses

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)
