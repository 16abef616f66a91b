"""Modules of a distillation step: a frozen teacher, a student with its method, and both in one's own loop."""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods import Method, MethodConfig, method_config
from mdistiller.methods.base import promote
from mdistiller.methods.compose import build, needs_teacher
from mdistiller.models.external import InputConfig
from mdistiller.models.own_input import find_input, with_own_input, without_own_input
from mdistiller.student_with_method import (
    StepOutput,
    StudentWithMethod,
    TaskLoss,
    binary_cross_entropy,
    cross_entropy,
    take_labels,
)
from mdistiller.taps import TappedModel
from mdistiller.types import Batch, DataInfo, LogitsOf, Outputs


class DistillerOutput(NamedTuple):
    """Result of a `Distiller` call.

    loss: scalar to minimise, the sum of all losses.
    losses: weighted losses by name, the task's under "task".
    logits: the student's, [B, classes], or as the model gives them.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    logits: Tensor


class FrozenTeacher(nn.Module):
    """A model that runs in evaluation mode without gradients.

    The model is not changed: its mode is put back after each pass, and its parameters keep `requires_grad`.

    Args:
        model: the teacher.
        taps: names of the features to return with the logits.
        logits_of: the logits in the model's result, see `mdistiller.taps.logits_of`.
    """

    def __init__(self, model: nn.Module, taps: Iterable[str] = (), logits_of: LogitsOf = None) -> None:
        super().__init__()
        self.tapped = TappedModel(model, taps, logits_of)
        self.training = False
        self._parts = list(model.modules())  # walking the tree takes longer than some passes

    @property
    def model(self) -> nn.Module:
        """The model that was given."""
        return self.tapped.model

    def train(self, mode: bool = True) -> Self:
        return self  # the model keeps its own mode

    def forward(self, inputs: Any) -> Outputs:
        """Computes logits and tapped features of a batch, detached."""
        mode = EvalMode(self._parts)
        # Not `inference_mode`: the outputs enter autograd.
        with torch.no_grad():
            if not mode.training:
                return self.tapped(inputs)
            with mode:
                return self.tapped(inputs)


class EvalMode:
    """Context in which modules are in evaluation mode; each gets its own mode back afterwards."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.training = [module for module in modules if module.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *error: object) -> None:
        for module in self.training:
            module.training = True


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


def build_method(
    config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
) -> Method:
    """Builds the method of a config for a pair of models.

    Raises:
        ConfigError: the method needs a teacher and there is none.
    """
    if teacher is None and needs_teacher(config.method_name):
        raise ConfigError(f"method {config.method_name!r} needs a teacher, and none was given")
    return build(config, student, teacher, data)


class Distiller(nn.Module):
    """Distillation in one's own training loop.

    A call returns the loss to minimise, the losses by name and the student's logits. `parameters()` and
    `state_dict()` hold everything that trains (the student's and the method's parts), not the teacher, which
    only moves along with `to()`. Example::

        distiller = mdistiller.Distiller(student, teacher, "dkd", total_steps=epochs * len(loader))
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
        for inputs, target in loader:
            out = distiller(inputs, target)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    A method's settings are given by name, those of the parts of a composed method in a dict::

        Distiller(student, teacher, "dkd", beta=2.0, warmup=0)
        Distiller(student, teacher, "lskd-dkd", base={"beta": 18.0, "warmup": 0})

    A method that compares two views of each image (such as "mlkd") takes both in one batch, first all images
    under ordinary, then the same images under strong augmentation::

        out = distiller(torch.cat([weak, strong]), torch.cat([target, target]))

    Student and teacher are not changed when the distiller is built. A method that adds to the student (SimKD)
    works on a copy: train, evaluate and save `distiller.student`.

    A teacher that is made for other images than those in the batches gets its own, renormalised and scaled::

        images = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        Distiller(student, teacher, student_input=images, teacher_input=teacher.pretrained_cfg)  # timm
        Distiller(student, teacher, student_input=images, teacher_input=ResNet50_Weights.DEFAULT)

    Args:
        student: module whose output is logits [B, classes], or holds them, see `logits_of`. Dense logits are
            [B, C, H, W] or [B, T, C], with labels [B, H, W] or [B, T].
        teacher: another one; None for method "none". Its classes are the student's, except for methods that
            compare only features or relations between samples.
        method: a method's name, or its config, such as `DKDConfig(beta=2.0)`.
        input_shape: (C, H, W) of one image, from which feature methods derive the sizes of their layers; for
            other inputs an example of a batch, a tensor or a mapping.
        labels: int64 [N], the class of every training image, -100 for none, as only distillation losses that
            read no label take. Methods with a memory bank need it, and each call then gives `index`.
        batch_size: images per batch, for methods whose layers depend on it.
        total_steps: training calls in all, from which the progress of a method's schedule follows; without it
            each call gives `progress`.
        label_smoothing: label smoothing of the cross-entropy with the labels.
        multi_label: images have several classes: targets are float [B, classes], 0 or 1, or -100 where
            unknown, the task loss is binary cross-entropy, and the method is "binary_kd", one of features, or
            a sum.
        student_input: mean and standard deviation by which the images in the batches are normalised, in a
            form of `teacher_input`; its size is not read. Needed beside a `teacher_input` that has them.
        teacher_input: mean, standard deviation and size of the images for which the teacher is made: a
            mapping with `mean`, `std` and `image_size`, each of which may be left out, the `pretrained_cfg`
            of a timm model, weights of torchvision, or an image processor of transformers. None: the teacher
            gets the batch as it is.
        logits_of: the logits in what a model returns: a key, an index, or a function of the result. None: the
            result itself, its entry `logits` or `out`, or its only tensor of two or more dimensions.
        settings: the method's hyper-parameters by name.

    Raises:
        UnknownNameError: no such method or tap.
        ConfigError: an unknown or wrong setting; a missing teacher, or one that shares trainable parameters
            with the student.
    """

    learner: Any
    step: Tensor
    _multi_label = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: str | MethodConfig = "dkd",
        *,
        input_shape: tuple[int, int, int] | Tensor | Mapping[str, Any] = (3, 32, 32),
        labels: Tensor | None = None,
        batch_size: int | None = None,
        total_steps: int | None = None,
        label_smoothing: float = 0.0,
        multi_label: bool = False,
        student_input: Any = None,
        teacher_input: Any = None,
        logits_of: LogitsOf = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        shape = input_shape if isinstance(input_shape, Mapping | Tensor) else tuple(input_shape)
        teacher = _with_input(
            teacher, student_input, teacher_input, shape[0] if isinstance(shape, tuple) else 3
        )
        self._label_smoothing, self._multi_label = label_smoothing, multi_label
        self._images = None if labels is None else len(labels)
        self._checked = False
        data = DataInfo(shape, labels, batch_size, logits_of)
        self._build(student, teacher, self._configure(method, settings), data, total_steps)

    def _build(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        config: MethodConfig,
        data: DataInfo,
        total_steps: int | None,
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise ConfigError(f"total_steps: got {total_steps}; allowed: 1 or more")
        check_apart(student, teacher)
        method = self._build_method(config, student, teacher, data)
        if self._multi_label and not method.takes_multi_label:
            raise ConfigError(f"multi_label: method {config.method_name!r} is for images of one class each")
        extended = method.extend_student(student)
        self._logits_of = (data.logits_of if extended is student else None, data.logits_of)
        self.learner = self._student_with_method(extended, method)
        # In a tuple it is no submodule: neither in parameters() nor in state_dict().
        self._teacher: tuple[Any, ...] = ()
        if teacher is not None and method.needs_teacher:
            self._teacher = (self._freeze(teacher, method),)
        self.total_steps = total_steps
        if total_steps is not None:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def _configure(self, method: str | MethodConfig, settings: Mapping[str, Any]) -> MethodConfig:
        if isinstance(method, MethodConfig) and not settings:
            return method
        if isinstance(method, MethodConfig):
            raise ConfigError(
                f"{', '.join(settings)}: settings go with a method's name; with a config, they are its fields"
            )
        if not isinstance(method, str):
            raise ConfigError(f"method must be a method's name or its config; got {type(method).__name__}")
        return self._default_config(method).replace(**settings)

    # Replaced by a distiller of another task.

    def _default_config(self, name: str) -> MethodConfig:
        return method_config(name)

    def _build_method(
        self, config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> Method:
        return build_method(config, student, teacher, data)

    def _student_with_method(self, student: nn.Module, method: Method) -> nn.Module:
        loss: TaskLoss = binary_cross_entropy
        if not self._multi_label:
            loss = cross_entropy(self._label_smoothing, has_unlabelled=method.has_unlabelled)
        return StudentWithMethod(student, method, loss, self._logits_of[0])

    def _freeze(self, teacher: nn.Module, method: Method) -> nn.Module:
        return FrozenTeacher(teacher, method.teacher_taps, self._logits_of[1])

    @property
    def student(self) -> nn.Module:
        """The student to evaluate and save: the given one, or what the method made of a copy of it."""
        return self.learner.student.model

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher that was given; None where the method needs none."""
        return without_own_input(self._teacher[0].model) if self._teacher else None

    def forward(
        self,
        inputs: Tensor | Mapping[str, Any],
        target: Tensor | None = None,
        index: Tensor | None = None,
        progress: float | Tensor | None = None,
    ) -> DistillerOutput:
        """Computes the losses of a batch.

        Args:
            inputs: images [B, C, H, W], or a mapping of keyword arguments: each model gets those it takes.
            target: int64 [B] class ids, -100 for none if `labels` has some, or float [B, classes]
                probabilities (mixup) where the method allows them; each row sums to one. For dense logits,
                int64 [B, ...], -100 for none. None: the entry `labels` of the inputs. See `multi_label`.
            index: int64 [B], positions in the training set, for methods with a memory bank.
            progress: fraction of training done, in [0, 1]. None: counted from `total_steps`.

        Raises:
            ConfigError: a method with a schedule gets neither `progress` nor `total_steps`; float targets
                whose rows do not sum to one; a missing or wrong `index`; a batch without both views; a
                teacher of other classes where the method does not take them. Values are checked on the first
                call, `index` on each call on a CPU.
        """
        if target is None:
            inputs, target = take_labels(inputs)
        if not torch.compiler.is_compiling():
            self._check(target, index)
        if index is None:
            index = torch.arange(len(target), device=target.device)
        done = self._progress(progress, target.device)
        nothing = Outputs(torch.zeros(0, device=target.device), {})
        teacher = self._teacher[0](inputs) if self._teacher else nothing
        batch = Batch(inputs, target, index)  # type: ignore[arg-type]  # a mapping is what the models take
        return self._sum(self.learner(batch, teacher, done))

    def _sum(self, step: StepOutput) -> DistillerOutput:
        losses = {**step.task, **step.distillation}
        return DistillerOutput(reduce(torch.add, map(promote, losses.values())), losses, step.logits)

    def _progress(self, progress: float | Tensor | None, device: torch.device) -> Tensor:
        if progress is not None:
            return torch.as_tensor(progress, dtype=torch.float32, device=device)
        if self.total_steps is None:
            method: Method = self.learner.method
            if method.has_schedule:
                raise ConfigError(
                    f"method {method.config.method_name!r} has a schedule, so it needs the progress of "
                    "training: give Distiller(..., total_steps=N), the number of training calls in all, or "
                    "distiller(..., progress=fraction_done) on each call"
                )
            return torch.ones((), device=device)
        done = (self.step / self.total_steps).clamp(max=1.0).to(device)
        if self.training:
            self.step.add_(1)
        return done

    def _check(self, target: Tensor, index: Tensor | None) -> None:
        method: Method = self.learner.method
        name = method.config.method_name
        if method.needs_index and index is None:
            raise ConfigError(
                f"method {name!r} keeps a memory of every training image, so it needs their positions in the "
                "training set, int64 [B]: distiller(inputs, target, index)"
            )
        if method.needs_index and self._images and index is not None and index.device.type == "cpu":
            low, high = (int(x) for x in index.aminmax())
            if low < 0 or high >= self._images:
                raise ConfigError(
                    f"index must lie in 0 … {self._images - 1}, as labels has {self._images} images; "
                    f"got {low if low < 0 else high}"
                )
        if self._checked:
            return
        if not self._multi_label:
            check_probabilities(target)
        if method.num_views == 2:
            weak, strong = target[: len(target) // 2], target[len(target) // 2 :]
            if not torch.equal(weak, strong):
                raise ConfigError(
                    f"method {name!r} compares two views of each image: inputs must be "
                    "torch.cat([weak, strong]), of the same images under ordinary and under strong "
                    f"augmentation, and target torch.cat([target, target]){_one_view(method)}; "
                    "the halves of this batch have different labels"
                )
        self._checked = True

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _with_input(
    teacher: nn.Module | None, student_input: Any, teacher_input: Any, channels: int
) -> nn.Module | None:
    """Returns the teacher of a `Distiller` for images as they are in the batches.

    Raises:
        ConfigError: an argument without its counterpart, or without values.
    """
    if teacher is None or teacher_input is None:
        for name, value in (("student_input", student_input), ("teacher_input", teacher_input)):
            if value is not None:
                missing = "a teacher" if teacher is None else "teacher_input"
                raise ConfigError(f"{name}: got a value without {missing}; allowed: None")
        return teacher
    own, given = find_input(teacher_input, "teacher_input", channels), InputConfig()
    if student_input is not None:  # the size is that of the batches
        given = find_input(student_input, "student_input", channels)._replace(image_size=None)
    for name in ("mean", "std"):
        if getattr(own, name) is not None and None in (given.mean, given.std):
            raise ConfigError(
                f"student_input: teacher_input has {name}, so mean and std of the images in the batches are "
                'needed; allowed: student_input={"mean": …, "std": …}'
            )
    return with_own_input(teacher, given, own)


def check_probabilities(target: Tensor) -> None:
    """Checks that float targets are class probabilities; it waits for the device.

    Raises:
        ConfigError: float targets whose rows do not sum to one, as of multi-label data.
    """
    if not target.is_floating_point() or target.ndim != 2:
        return
    sums = target.detach().float().sum(-1)
    off = (sums - 1).abs() > 1e-2
    if bool(off.any()):
        raise ConfigError(
            "target: float targets are class probabilities, and each row must sum to one; got a row that "
            f"sums to {sums[off][0].item():g}. Several classes at once need Distiller(..., multi_label=True)"
        )


def _one_view(method: Method) -> str:
    """Returns the setting with which a method of two views takes one, if all of its parts have it."""
    parts = [m for m in method.modules() if isinstance(m, Method) and m.num_views == 2]
    innermost = [m for m in parts if sum(isinstance(x, Method) for x in m.modules()) == 1]
    if not all("num_views" in type(m.config).model_fields for m in innermost):
        return ""
    return f" (or set num_views=1 of {' and '.join(repr(m.name) for m in innermost)}, for one view)"
