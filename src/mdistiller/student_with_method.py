"""The module that trains, a student with its method, and the task losses of classifiers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.methods.base import count_labelled, promote
from mdistiller.taps import TappedModel
from mdistiller.types import IGNORED, Batch, DenseBatch, LogitsOf, Outputs

TaskLoss = Callable[[Outputs, Batch], Tensor]
"""The student's outputs and the batch to the scalar task loss."""


class StepOutput(NamedTuple):
    """Result of a training pass.

    task: weighted task losses by name.
    distillation: weighted distillation losses by name.
    logits: the student's, [B, classes], or as the model gives them.
    """

    task: dict[str, Tensor]
    distillation: dict[str, Tensor]
    logits: Tensor


class StudentWithMethod(nn.Module):
    """Student, as `student.model`, and method: everything that trains, is compiled and wrapped in DDP."""

    student: Any
    method: Method

    def __init__(
        self, student: nn.Module, method: Method, task_loss: TaskLoss, logits_of: LogitsOf = None
    ) -> None:
        super().__init__()
        self.student = TappedModel(student, method.student_taps, logits_of)
        self.method = method
        self.task_loss = task_loss

    def forward(self, batch: Batch, teacher: Outputs, progress: Tensor) -> StepOutput:
        """Computes the losses of a prepared batch; `progress` is 0-d, the fraction of training done."""
        outputs = self._run_student(batch.image)
        logits = outputs.logits
        if logits.ndim > 2:
            outputs, teacher, batch = as_rows(outputs, teacher, batch)
        task = {"task": self.method.config.task_weight * self.task_loss(outputs, batch)}
        return StepOutput(task, self.distillation_losses(outputs, teacher, batch, progress), logits)

    def evaluate(self, inputs: Any, label: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Computes the task loss, without its weight, and the logits of the student alone.

        Without labels the loss is None.
        """
        outputs = self.student(inputs)
        if label is None:
            return None, outputs.logits
        rows, batch = outputs, Batch(inputs, label, label)
        if outputs.logits.ndim > 2:
            rows, _, batch = as_rows(outputs, Outputs(label.new_zeros(0), {}), batch)
        return self.task_loss(rows, batch), outputs.logits

    def _run_student(self, inputs: Tensor | Mapping[str, Any]) -> Outputs:
        """Runs the student on the whole batch, or view by view where its method has `norm_per_view`."""
        count = self.method.num_views
        if count == 1 or not self.method.norm_per_view:
            return self.student(inputs)
        if isinstance(inputs, Mapping):
            parts = zip(*(value.chunk(count) for value in inputs.values()), strict=True)
            views = [self.student(dict(zip(inputs, part, strict=True))) for part in parts]
        else:
            views = [self.student(part) for part in inputs.chunk(count)]
        features = {name: torch.cat([view.features[name] for view in views]) for name in self.student.names}
        return Outputs(torch.cat([view.logits for view in views]), features)

    def distillation_losses(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """Computes the method's losses by name; raises ConfigError for anything but scalar tensors."""
        method = self.method
        name = method.name or type(method).__name__
        if not torch.compiler.is_compiling():
            student, teacher = (
                outputs._replace(features=_Features(outputs.features, name, model))
                for outputs, model in ((student, "student"), (teacher, "teacher"))
            )
        try:
            losses = method(student, teacher, batch, progress)
        except ConfigError as error:
            raise _explain_classes(error, student.logits, teacher.logits) from error
        # Only types and shapes are checked: no wait for the device, and nothing left once compiled.
        if not isinstance(losses, dict) or (method.needs_teacher and not losses):
            raise self._wrong_losses("an empty one" if losses == {} else type(losses).__name__)
        for key, value in losses.items():
            if not (isinstance(value, Tensor) and value.ndim == 0):
                raise self._wrong_losses(f"{key!r}: {_brief(value)}")
            if key == "task":
                raise self._wrong_losses("'task': the task's own loss is added for every method")
        return losses

    def _wrong_losses(self, got: str) -> ConfigError:
        name = self.method.name or type(self.method).__name__
        return ConfigError(
            f"method {name!r} must return a dict of scalar tensors by name, its distillation losses; "
            f"got {got}"
        )


def take_labels(inputs: Any) -> tuple[dict[str, Any], Tensor]:
    """Splits a mapping into the models' inputs and its entry `labels` (or `label`).

    Raises:
        ConfigError: no mapping, or one without labels.
    """
    names = [name for name in ("labels", "label") if isinstance(inputs, Mapping) and name in inputs]
    if not names:
        got = f"a mapping of {list(inputs)}" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ConfigError(
            f"target: got none, with {got} as inputs; allowed: distiller(inputs, target), or a mapping with "
            "the entry 'labels'"
        )
    return {key: value for key, value in inputs.items() if key != names[0]}, inputs[names[0]]


def as_rows(student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Outputs, Outputs, Batch]:
    """Makes a row of each position of dense predictions, so that losses of [B, classes] take them.

    Logits are [B, C, H, W] or [B, T, C], the teacher's likewise, and labels int64 [B, H, W] or [B, T], or
    float of the logits' shape. Features stay as they are.

    Raises:
        ConfigError: logits and labels, or the logits of student and teacher, of other positions.
    """
    shape, label = student.logits.shape, batch.label
    first, last = (
        (shape[0], *shape[2:]),
        shape[:-1],
    )  # of one label each, with the classes after B, or at the end
    fits = {1: first, len(shape) - 1: last}
    if label.is_floating_point() and label.shape == shape:
        axis = 1 if len(shape) > 3 else len(shape) - 1
    else:
        found = [axis for axis, labels in fits.items() if label.shape == labels]
        if not found:
            raise ConfigError(
                f"logits {list(shape)} and target {list(label.shape)}: a target for each position is "
                f"int64 {list(first)} or {list(last)}; scale logits of another size, or average them to "
                "[B, classes], by Distiller(..., logits_of=function)"
            )
        axis = found[0] if len(shape) > 3 else found[-1]
    has_teacher = teacher.logits.ndim > 1
    if has_teacher:
        own = teacher.logits.shape
        if len(own) != len(shape) or any(own[i] != shape[i] for i in range(len(shape)) if i != axis):
            raise ConfigError(
                f"logits of the student {list(shape)} and of the teacher {list(own)} are of other positions: "
                "scale them to one size by Distiller(..., logits_of=function)"
            )

    def rows(x: Tensor) -> Tensor:
        return x.movedim(axis, -1).flatten(0, -2)

    label = rows(label) if label.shape == shape else label.flatten()
    return (
        student._replace(logits=rows(student.logits)),
        teacher._replace(logits=rows(teacher.logits)) if has_teacher else teacher,
        DenseBatch(*batch._replace(label=label)),
    )


def _explain_classes(error: ConfigError, student: Tensor, teacher: Tensor) -> ConfigError:
    if teacher.ndim < 2 or student.shape[-1] == teacher.shape[-1]:
        return error
    return ConfigError(
        f"{error}: the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}. Give the "
        "teacher a classifier of the student's classes, or take a method of features alone, such as 'fitnet'"
    )


class _Features(dict[str, Tensor]):
    """Tapped features by name, with a clear error for a missing one."""

    def __init__(self, features: dict[str, Tensor], method: str, model: str) -> None:
        super().__init__(features)
        self.method, self.model = method, model

    def __missing__(self, name: str) -> Tensor:
        raise ConfigError(
            f"method {self.method!r} reads the {self.model}'s feature {name!r}, which is not tapped: add it "
            f"to {self.model}_taps; tapped are {list(self)}"
        )


def _brief(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def cross_entropy(
    label_smoothing: float = 0.0, *, weights: Tensor | None = None, has_unlabelled: bool = False
) -> TaskLoss:
    """Returns the task loss of classification: mean cross-entropy with the labels, in at least float32.

    Args:
        label_smoothing: share of the uniform distribution in the labels.
        weights: weight of each class, float [C]. The loss is −(1/B) Σ_b Σ_c w_c y_bc log p_bc.
        has_unlabelled: batches may have images without a class (label -100), which do not count in B.
    """
    if weights is not None or has_unlabelled:
        return _CrossEntropy(label_smoothing, weights)

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        return F.cross_entropy(logits, batch.label, label_smoothing=label_smoothing)

    return loss


class _CrossEntropy(nn.Module):
    """Cross-entropy with weights of classes, over the images that have a class: 0 if there are none."""

    weights: Tensor | None

    def __init__(self, label_smoothing: float, weights: Tensor | None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, label, smoothing = promote(outputs.logits), batch.label, self.label_smoothing
        count = count_labelled(label).clamp(min=1)
        if label.is_floating_point() and smoothing:  # PyTorch's would give an image without a class a loss
            label = (1 - smoothing) * label + smoothing / label.shape[1] * label.sum(1, keepdim=True)
            smoothing = 0.0
        losses = F.cross_entropy(
            logits, label, self.weights, reduction="none", label_smoothing=smoothing, ignore_index=IGNORED
        )
        return losses.sum() / count


def binary_cross_entropy(outputs: Outputs, batch: Batch) -> Tensor:
    """Computes the task loss of images with several classes: the mean over images and classes, in nats.

    Labels are float [B, C] in [0, 1]; those of -100 are left out of the mean.
    """
    logits = promote(outputs.logits)
    known = batch.label != IGNORED
    losses = F.binary_cross_entropy_with_logits(logits, batch.label.to(logits.dtype), reduction="none")
    return losses.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)
