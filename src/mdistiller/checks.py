"""Checks of what a distiller is given, and of what a method returns, with their messages."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.data.encoded import some
from mdistiller.errors import CheckpointError, ConfigError, MDistillerError, TrainingError
from mdistiller.methods import Method, get_method, list_methods
from mdistiller.types import IGNORED, Inputs, Outputs


def check_apart(student: nn.Module, teacher: nn.Module | None) -> None:
    """Checks that student and teacher are modules, and that the student trains nothing of its teacher.

    Raises:
        ConfigError: one is no module, or they share trainable parameters.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module | None):
            raise ConfigError(
                f"{role}: got a {type(model).__name__}; allowed: a module, such as that of "
                "mdistiller.create_model(NAME)"
            )
    if teacher is None:
        return
    taught = {id(p) for p in teacher.parameters()}
    if teacher is student or any(id(p) in taught for p in student.parameters() if p.requires_grad):
        raise ConfigError(
            "student and teacher share parameters, so the teacher would change with the student: make one of "
            "them a copy (copy.deepcopy)"
        )


def class_order(
    theirs: Sequence[str],
    ours: Sequence[str],
    where: object,
    *,
    strict: bool = True,
    error: type[MDistillerError] = CheckpointError,
    advice: str = ". Use a model that was trained on classes of these names",
) -> list[int] | None:
    """Returns the places of the data's classes among a model's, and warns; None where nothing moves.

    `theirs` is empty for a model without names. With `strict` other names are an `error`.
    """
    if not theirs or [*theirs] == [*ours]:
        return None
    if sorted(theirs) == sorted(ours) and len({*ours}) == len(ours):
        warnings.warn(f"{where}: its classes were put into the data's order, by their names", stacklevel=3)
        return [[*theirs].index(name) for name in ours]
    if not strict:
        return None
    i = next((i for i, (one, two) in enumerate(zip(theirs, ours, strict=False)) if one != two), 0)
    lacks, more = ([n for n in a if n not in b] for a, b in ((ours, theirs), (theirs, ours)))
    raise error(
        f"{where} was trained on other classes than the data's: class {i} is {theirs[i]!r} for the model and "
        f"{ours[i]!r} in the data; only in the data: {some(lacks)}; only in the model: {some(more)}{advice}"
    )


def check_index(method: Method, index: Tensor | None, images: int | None) -> None:
    """Checks the positions of a batch in a training set of `images` images; their range only on a CPU.

    Raises:
        ConfigError: no positions, or one that is not in the training set.
    """
    if index is None:
        raise ConfigError(
            f"method {method.config.method_name!r} keeps a memory of every training image, so it needs their "
            "positions in the training set, int64 [B]: distiller(inputs, target, index)"
        )
    if images and index.device.type == "cpu":
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= images:
            raise ConfigError(
                f"index must lie in 0 … {images - 1}, as labels has {images} images; "
                f"got {low if low < 0 else high}"
            )


def check_views(method: Method, target: Tensor) -> None:
    """Checks that both halves of a batch have the same targets, as both views of the same images do.

    Raises:
        ConfigError: the halves have different targets.
    """
    if not torch.equal(target[: len(target) // 2], target[len(target) // 2 :]):
        raise ConfigError(
            f"method {method.config.method_name!r} compares two views of each image: inputs must be "
            "torch.cat([weak, strong]), of the same images under ordinary and under strong augmentation, and "
            f"target torch.cat([target, target]){_one_view(method)}; the halves of this batch have different "
            "labels"
        )


def _one_view(method: Method) -> str:
    """Returns the setting with which a method of two views takes one, if all of its parts have it."""
    parts = [m for m in method.modules() if isinstance(m, Method) and m.needs.views == 2]
    innermost = [m for m in parts if sum(isinstance(x, Method) for x in m.modules()) == 1]
    if not all("num_views" in type(m.config).model_fields for m in innermost):
        return ""
    return f" (or set num_views=1 of {' and '.join(repr(m.name) for m in innermost)}, for one view)"


def check_target(method: Method, target: Tensor, logits: Tensor) -> None:
    """Checks that a target gives each row of logits [B, C] a class, or a probability for every class.

    It waits for the device. Rows of probabilities sum to one, or to less where they are mixed with images
    without a class.

    Raises:
        ConfigError: another type or shape, an id that is no class, -100 where the method reads labels, or
            rows of another sum, as of multi-label data.
    """
    rows, classes = logits.shape
    got, fix = f"{target.dtype} {list(target.shape)}".removeprefix("torch."), ""
    if target.is_floating_point():
        fits = target.shape == logits.shape
    elif fits := target.dtype == torch.int64 and target.shape == logits.shape[:1]:
        low, high = (int(x) for x in target.aminmax()) if rows else (0, 0)
        if low < 0 or high >= classes:
            wrong = target[(target >= classes) | ((target < 0) & (target != IGNORED))]
            fits, got = not len(wrong), f"the class {wrong[0]}" if len(wrong) else got
        if fits and low < 0 and method.needs.labels and not method.has_unlabeled:
            raise ConfigError(
                f"target: got -100, an image without a class, and method {method.config.method_name!r} reads "
                "labels; allowed: Distiller(..., labels=…) with the training set's, -100 among them, or a "
                "method that reads none, such as 'kd'"
            )
    elif target.shape == logits.shape:
        fix = "; for one-hot rows, target.argmax(1)"
    elif target.numel() == rows:
        fix = "; here target.flatten().long()"
    if not fits:
        raise ConfigError(
            f"target: got {got}; allowed for logits {list(logits.shape)}: int64 [{rows}], classes 0 … "
            f"{classes - 1} or -100 for none, or float [{rows}, {classes}], probabilities{fix}"
        )
    if target.is_floating_point():
        sums = target.detach().float().sum(1)
        off = sums > 1.01 if method.has_unlabeled else (sums - 1).abs() > 1e-2
        if off.any():
            raise ConfigError(
                "target: float targets are class probabilities, and each row must sum to one; got a row that "
                f"sums to {sums[off][0].item():g}. Several classes at once need "
                "Distiller(..., multi_label=True)"
            )


def check_teacher(outputs: Outputs, inputs: Inputs) -> None:
    """Checks the teacher's outputs for finite images; it waits for the device.

    Logits may be -inf, of classes without a part.

    Raises:
        TrainingError: NaN or an infinite value.
    """
    if isinstance(inputs, Tensor) and not inputs.isfinite().all():
        return
    values = {"logits": outputs.logits.masked_fill(outputs.logits == -torch.inf, 0.0), **outputs.features}
    bad = [name for name, x in values.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        raise TrainingError(
            f"the teacher's outputs are NaN or infinite ({', '.join(bad)}): check its weights, the "
            "normalization of its inputs, and its precision (float16 overflows at 65,504)"
        )


def reads_labels(method: Method) -> bool:
    """Whether a loss of a distiller with this method reads labels."""
    return method.needs.labels or method.config.task_weight > 0


def take_labels(inputs: object, method: Method | None = None) -> tuple[Inputs, Tensor]:
    """Splits a mapping into the models' inputs and its entry `labels` (or `label`).

    Without them every sample gets -100, if no loss of a distiller's method reads labels.

    Raises:
        ConfigError: no mapping, or one without labels.
    """
    names = [name for name in ("labels", "label") if isinstance(inputs, Mapping) and name in inputs]
    values = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if (
        method is not None
        and not reads_labels(method)
        and not names
        and values
        and isinstance(values[0], Tensor)
    ):
        return inputs, torch.full(values[0].shape[:1], IGNORED, device=values[0].device)
    if not isinstance(inputs, Mapping) or not names:
        got = f"a mapping of {list(inputs)}" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise ConfigError(
            f"target: got none, with {got} as inputs; allowed: distiller(inputs, target), a mapping with the "
            "entry 'labels', or no target for a method that reads no label, with task_weight=0"
        )
    return {key: value for key, value in inputs.items() if key != names[0]}, inputs[names[0]]


def check_losses(name: str, found: object, *, some: bool) -> None:
    """Checks the types and shapes of a method's losses; with `some`, that there is one.

    No value is read: no wait for the device, and nothing left once compiled.
    """
    got = ""
    if not isinstance(found, dict) or (some and not found):
        got = "an empty one" if found == {} else type(found).__name__
    elif wrong := [key for key, x in found.items() if not (isinstance(x, Tensor) and x.ndim == 0)]:
        got = f"{wrong[0]!r}: {brief(found[wrong[0]])}"
    elif "task" in found:
        got = "'task': the task's own loss is added for every method"
    if got:
        allowed = "a dict of scalar tensors by name, its distillation losses"
        raise ConfigError(f"method {name!r} must return {allowed}; got {got}")


def without_logits(name: str, got: str) -> ConfigError:
    """Returns the error of a method that reads logits, for a teacher that has none for these classes."""
    parts = {method: get_method(method).needs for method in list_methods()}
    allowed = ", ".join(method for method, needs in parts.items() if needs.teacher and not needs.logits)
    return ConfigError(
        f"teacher: {got}, and method {name!r} reads the teacher's logits. Methods that read features alone "
        f"take this teacher: {allowed}"
    )


def explain_classes(error: ConfigError, student: Tensor, teacher: Tensor) -> ConfigError:
    """Returns a method's error with both numbers of classes, where logits [B, classes] differ in them."""
    if teacher.ndim < 2 or student.shape[-1] == teacher.shape[-1]:
        return error
    return ConfigError(
        f"{error}: the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}. Give the "
        "teacher a classifier of the student's classes, or use a method that reads features alone, such as "
        "'fitnet'"
    )


class NamedFeatures(dict[str, Tensor]):
    """Tapped features by name, with a clear error for a missing one."""

    def __init__(self, features: Mapping[str, Tensor], method: str, model: str) -> None:
        super().__init__(features)
        self.method, self.model = method, model

    def __missing__(self, name: str) -> Tensor:
        raise ConfigError(
            f"method {self.method!r} reads the {self.model}'s feature {name!r}, which is not tapped: add it "
            f"to {self.model}_taps; tapped are {list(self)}"
        )


def brief(value: object) -> str:
    """Returns a tensor's shape, or the type of another value."""
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def one_each(name: str, given: object, count: int) -> list[Any]:
    """Returns one of several arguments for each teacher; a single one, as a named tuple is, serves all."""
    found = list(given) if type(given) in (list, tuple) else [given] * count  # type: ignore[call-overload]
    if not count or len(found) != count:
        raise ConfigError(
            f"{name}: got {len(found)} for {count} teachers; allowed: one for each, or one for all"
        )
    return found
