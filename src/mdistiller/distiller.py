"""Student, teacher, method and task loss in one module: everything that trains, in any loop and task."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mdistiller.checks import (
    NamedFeatures,
    check_apart,
    check_index,
    check_losses,
    check_target,
    check_teacher,
    check_views,
    explain_classes,
    one_each,
    reads_labels,
    take_labels,
    without_logits,
)
from mdistiller.errors import ConfigError
from mdistiller.losses import TaskLoss, as_rows, binary_cross_entropy, cross_entropy, labeled_rows
from mdistiller.methods import Method, MethodConfig, method_config
from mdistiller.methods.compose import build_method
from mdistiller.methods.several import Several
from mdistiller.models.language import has_known_logits, predicts_next
from mdistiller.models.own_input import for_images, without_own_input
from mdistiller.stored import StoredTeacher
from mdistiller.taps import Taps, logits_if_any, tap_names
from mdistiller.teacher import LiveTeacher, Teacher, Teachers
from mdistiller.types import AnyBatch, Batch, DataInfo, Inputs, LogitsOf, Outputs, Targets, with_shapes

AnyMethod = str | MethodConfig | Mapping[str, object] | Method
"""A method's name, its config, a mapping with its name and settings, or a built one."""


class DistillerOutput(NamedTuple):
    """Result of a `Distiller` call.

    loss: scalar to minimize, the sum of all losses.
    losses: weighted losses by name, the task's under "task".
    logits: the student's, [B, classes], or as the model gives them.
    task: the task's part of `losses`.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    logits: Tensor
    task: dict[str, Tensor]

    def __repr__(self) -> str:
        return with_shapes(self)


class StudentPass(NamedTuple):
    """A pass of the student on a batch.

    outputs: the logits, and the features that the method and the task loss read.
    batch: the batch as the method sees it.
    losses: the student's own task losses by name; None: the distiller's `task_loss` computes them.
    context: what a teacher that depends on this pass reads.
    """

    outputs: Outputs
    batch: Batch
    losses: dict[str, Tensor] | None = None
    context: object = None


class Distiller(nn.Module):
    """Distillation in one's own training loop.

    A call returns the loss to minimize, the losses by name and the student's logits. `parameters()` and
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

    A teacher that is made for other images than those in the batches gets its own, renormalized and scaled::

        images = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        Distiller(student, teacher, student_input=images, teacher_input=teacher.pretrained_cfg)  # timm
        Distiller(student, teacher, student_input=images, teacher_input=ResNet50_Weights.DEFAULT)

    Args:
        student: module whose output is logits [B, classes], or holds them, see `logits_of`. Dense logits are
            [B, C, H, W] or [B, T, C], with labels [B, H, W] or [B, T]; those of a causal language model of
            transformers are its tokens, unshifted, unless `logits_of` is a function.
        teacher: another one, a `Teacher`, or a list of them; None for method "none". Its classes are the
            student's. Methods that compare only features take any classes, and a teacher without logits.
        method: a method's name, its config, such as `DKDConfig(beta=2.0)`, or a mapping with its `name` and
            settings. Or a built `Method`, whose student is then what its `extend_student` returned. Several
            teachers have one method, or a list with one for each; their losses are added.
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
        student_input: mean and standard deviation by which the images in the batches are normalized, in a
            form of `teacher_input`; its size is not read. Needed beside a `teacher_input` that has them.
        teacher_input: mean, standard deviation and size of the images for which the teacher is made: a
            mapping with `mean`, `std` and `image_size`, each of which may be left out, the `pretrained_cfg`
            of a timm model, weights of torchvision, or an image processor of transformers. None: the teacher
            gets the batch as it is. Of several teachers, a list.
        logits_of: the logits in what a model returns: a key, an index, or a function of the result. None: the
            result itself, its entry `logits` or `out`, or its only tensor of two or more dimensions.
        task_loss: function of the student's `Outputs` and the `Batch`. None: cross-entropy with the labels,
            or binary cross-entropy with `multi_label`.
        task_taps: features of the student that `task_loss` reads.
        per_position: make a row of each position of dense logits, for methods that compare rows of [B,
            classes]. False: task loss and method get them as they are.
        classes: number of the teacher's classes, in place of a teacher whose outputs are given to each call.
        teacher_weights: factors of the losses of several teachers. None: 1 each.
        teacher_dropout: probability that one of several teachers is left out of a training call.
        settings: the method's hyperparameters by name.

    Raises:
        UnknownNameError: no such method or tap.
        ConfigError: an unknown or wrong setting; a missing teacher, or one that shares trainable parameters
            with the student.
    """

    student: nn.Module
    """The student to evaluate and save: the given one, or the model that the method built from a copy."""
    method: Method
    step: Tensor

    if TYPE_CHECKING:

        def __call__(
            self,
            inputs: Inputs,
            target: Targets = None,
            index: Tensor | None = None,
            progress: float | Tensor | None = None,
            outputs: Outputs | None = None,
        ) -> DistillerOutput: ...

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None,
        method: AnyMethod | Sequence[AnyMethod] = "dkd",
        *,
        input_shape: tuple[int, int, int] | Tensor | Mapping[str, object] = (3, 32, 32),
        labels: Tensor | None = None,
        batch_size: int | None = None,
        total_steps: int | None = None,
        label_smoothing: float = 0.0,
        multi_label: bool = False,
        student_input: object = None,
        teacher_input: object = None,
        logits_of: LogitsOf = None,
        task_loss: TaskLoss | None = None,
        task_taps: Iterable[str] = (),
        per_position: bool = True,
        classes: int | None = None,
        teacher_weights: Sequence[float] | None = None,
        teacher_dropout: float = 0.0,
        **settings: object,
    ) -> None:
        super().__init__()
        if teacher is None and classes is not None:
            teacher = StoredTeacher({"logits": torch.zeros(0, classes)})
        shape = input_shape if isinstance(input_shape, Mapping | Tensor) else tuple(input_shape)
        channels = shape[0] if isinstance(shape, tuple) else 3
        if total_steps is not None and total_steps < 1:
            raise ConfigError(f"total_steps: got {total_steps}; allowed: 1 or more")
        own_logits, data = logits_of, DataInfo(shape, labels, batch_size, logits_of)
        teachers: list[nn.Module | None] = [*teacher] if isinstance(teacher, Sequence) else [teacher]
        several = isinstance(teacher, Sequence)
        if not several and (teacher_weights is not None or teacher_dropout):
            raise ConfigError("teacher_weights, teacher_dropout: they go with a list of teachers")
        methods = one_each("method", method, len(teachers))
        for i, images in enumerate(one_each("teacher_input", teacher_input, len(teachers))):
            theirs = student_input if not several or images is not None else None
            teachers[i] = one = for_images(teachers[i], theirs, images, channels)
            check_apart(student, one)
            if settings or not isinstance(methods[i], Method):
                config = self._configure(methods[i], settings)
                model = one.model if isinstance(one, Teacher) else one
                methods[i] = self._build_method(config, student, model, data)
        is_built = isinstance(method, Method) and not settings
        method = Several(methods, teacher_weights, teacher_dropout) if several else methods[0]
        if not is_built:
            extended = method.extend_student(student)
            student, own_logits = extended, logits_of if extended is student else None
        if multi_label and method.needs.one_class:
            raise ConfigError(
                f"multi_label: method {method.config.method_name!r} is for images of one class each"
            )
        self._has_classes = task_loss is None and not multi_label
        if task_loss is None:
            task_loss = binary_cross_entropy
            if not multi_label:
                task_loss = cross_entropy(label_smoothing, has_unlabeled=method.has_unlabeled)
        self.student, self.method, self.task_loss = student, method, task_loss
        # A function of the user's own may have cut the logits already.
        predict_next = not callable(logits_of) and any(map(predicts_next, (student, *teachers)))
        is_known = callable(logits_of) or has_known_logits(student)
        rows = partial(as_rows, predict_next=predict_next, is_known=is_known)
        self._as_rows = rows if per_position else None
        self._images = None if labels is None else len(labels)
        self._checked = False
        self._tap_student((*tap_names(method.student_taps), *tap_names(task_taps)), own_logits)
        pairs = zip(teachers, methods, strict=True)
        asked = [self._ask(t, own, logits_of) for t, own in pairs if t is not None and own.needs.teacher]
        # In a tuple it is no submodule: neither in parameters() nor in state_dict().
        self._teacher: tuple[Teacher, ...] = (Teachers(asked),) if several else tuple(asked)
        self.total_steps = total_steps
        if total_steps is not None:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def _ask(self, teacher: nn.Module, method: Method, logits_of: LogitsOf) -> Teacher:
        if method.needs.logits and getattr(teacher, "num_classes", None) == 0:  # timm's
            raise without_logits(method.config.method_name, "its classifier was left out (num_classes=0)")
        theirs = logits_of if method.needs.logits else partial(logits_if_any, where=logits_of)
        return teacher if isinstance(teacher, Teacher) else self._freeze(teacher, method, theirs)

    def _configure(self, method: AnyMethod, settings: Mapping[str, object]) -> MethodConfig:
        if isinstance(method, MethodConfig) and not settings:
            return method
        if isinstance(method, MethodConfig | Method):
            got = "a built method" if isinstance(method, Method) else "a config, whose fields they are"
            raise ConfigError(f"{', '.join(settings)}: settings go with a method's name; got {got}")
        if isinstance(method, Mapping) and isinstance(name := method.get("name"), str):
            settings = {key: value for key, value in {**method, **settings}.items() if key != "name"}
            method = name
        if not isinstance(method, str):
            raise ConfigError(
                f"method: got a {type(method).__name__}; allowed: a method's name, its config, a mapping "
                "with its name, or a Method"
            )
        return self._default_config(method).replace(**settings)

    # Replaced by a distiller of another kind of model.

    def _default_config(self, name: str) -> MethodConfig:
        return method_config(name)

    def _build_method(
        self, config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> Method:
        return build_method(config, student, teacher, data)

    def _tap_student(self, taps: tuple[str, ...], logits_of: LogitsOf) -> None:
        self._taps = Taps(self.student, taps, logits_of)

    def _freeze(self, teacher: nn.Module, method: Method, logits_of: LogitsOf) -> Teacher:
        return LiveTeacher(teacher, method.teacher_taps, logits_of)

    def _prepare(
        self, inputs: Inputs, target: Targets, index: Tensor | None
    ) -> tuple[AnyBatch, torch.device]:
        """Returns the batch of a call, checked, and the device of its values."""
        if target is None:
            inputs, target = take_labels(inputs, self.method)
        if not torch.compiler.is_compiling():
            if self.method.needs.index:
                check_index(self.method, index, self._images)
            if self.method.needs.views == 2 and not self._checked:
                check_views(self.method, target)
        if index is None:
            index = torch.arange(len(target), device=target.device)
        return Batch(inputs, target, index), target.device

    def _run_student(self, batch: Any) -> StudentPass:
        """Runs the student on the whole batch, or view by view where its method needs `norm_per_view`."""
        count, inputs = self.method.needs.views, batch.image
        if count == 1 or not self.method.needs.norm_per_view:
            return StudentPass(self._taps(inputs), batch)
        if isinstance(inputs, Mapping):
            parts = zip(*(value.chunk(count) for value in inputs.values()), strict=True)
            views = [self._taps(dict(zip(inputs, part, strict=True))) for part in parts]
        else:
            views = [self._taps(part) for part in inputs.chunk(count)]
        features = {name: torch.cat([view.features[name] for view in views]) for name in self._taps.names}
        return StudentPass(Outputs(torch.cat([view.logits for view in views]), features), batch)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher that was given, of several their list; None where the method needs none."""
        return without_own_input(self._teacher[0].model) if self._teacher else None

    @property
    def teachers(self) -> list[nn.Module]:
        """The teachers that were given, one after another; none where the method needs none."""
        return [without_own_input(one.model) for asked in self._teacher for one in asked.members]

    @property
    def asked(self) -> Teacher | None:
        """The teacher as it is asked for its outputs; None where the method needs none."""
        return self._teacher[0] if self._teacher else None

    def ask_ahead(self, batches: Sequence[AnyBatch]) -> list[Outputs] | list[None]:
        """Asks the teacher for some batches at once; None for each where there is none to ask so early."""
        if self.asked is None or self.asked.needs_student:
            return [None] * len(batches)
        return self.asked.ask(batches)

    def forward(
        self,
        inputs: Inputs,
        target: Targets = None,
        index: Tensor | None = None,
        progress: float | Tensor | None = None,
        outputs: Outputs | None = None,
    ) -> DistillerOutput:
        """Computes the losses of a batch.

        Args:
            inputs: images [B, C, H, W], or a mapping of keyword arguments: each model gets those it takes.
            target: int64 [B] class ids, -100 for none if `labels` has some, or float [B, classes]
                probabilities (mixup) where the method allows them; each row sums to one. For dense logits,
                int64 [B, ...], -100 for none. None: the entry `labels` of the inputs, or no labels where no
                loss reads them (`task_weight` 0). See `multi_label`.
            index: int64 [B], positions in the training set, for methods with a memory bank.
            progress: fraction of training done, in [0, 1]. None: counted from `total_steps`.
            outputs: the teacher's outputs for the batch, where they are known. None: the teacher is asked.

        Raises:
            ConfigError: no progress for a schedule; a wrong target or `index`; a batch without both views; a
                teacher of other classes where the method does not take them. Values are checked on the first
                call, and on each call on a CPU.
            TrainingError: a loss is not finite because of the teacher's outputs, checked likewise.
        """
        if outputs is None and index is None and self.asked is not None and self.asked.needs_index:
            raise ConfigError(
                "index: the teacher's outputs are stored by position in the training set, int64 [B]: "
                "distiller(inputs, target, index)"
            )
        given, device = self._prepare(inputs, target, index)
        done = self._progress(progress, device)
        student, batch, task, context = self._run_student(given)
        if outputs is None and self._teacher:
            outputs = self._teacher[0](given, context).promote(student.logits.dtype)
        teacher = Outputs(torch.zeros(0, device=device), {}) if outputs is None else outputs
        logits = student.logits
        if self._as_rows and logits.ndim > 2:
            if isinstance(self.asked, Teachers):
                raise ConfigError("several teachers need logits [B, classes], or per_position=False")
            reads = target is not None or reads_labels(self.method)
            student, teacher, batch = self._as_rows(student, teacher, batch, reads_labels=reads)
        checks = not torch.compiler.is_compiling() and (device.type == "cpu" or not self._checked)
        if checks and self._has_classes and task is None and logits.ndim == 2:
            check_target(self.method, batch.label, logits)
        labeled = target is not None or self.method.config.task_weight > 0
        tap = self.method.needs.task_tap
        judged = student._replace(logits=student.features[tap]) if tap else student
        own = task if task is not None else self.task_loss(judged, batch) if labeled else {}
        has_class: Tensor | None = None
        if self._as_rows and logits.ndim > 2 and not batch.label.is_floating_point():
            student, teacher, batch, has_class = labeled_rows(student, teacher, batch)
        losses: dict[str, Tensor] = {}
        for key, value in (own if isinstance(own, dict) else {"task": own}).items():
            losses[key] = self.method.config.task_weight * value
        task = dict(losses)
        name = self.method.name or type(self.method).__name__
        if not torch.compiler.is_compiling():
            student = student._replace(features=NamedFeatures(student.features, name, "student"))
            teacher = teacher._replace(features=NamedFeatures(teacher.features, name, "teacher"))
        try:
            found = self.method(student, teacher, batch, done)
        except ConfigError as error:
            raise explain_classes(error, student.logits, teacher.logits) from error
        check_losses(name, found, some=self.method.needs.teacher)
        for key, value in found.items():
            losses[key] = value if has_class is None else value * has_class
        parts = torch.stack(list(losses.values()))
        total = parts.sum(dtype=torch.promote_types(parts.dtype, torch.float32))
        if checks and not math.isfinite(total.item()):
            check_teacher(teacher, inputs)
        self._checked |= checks
        return DistillerOutput(total, losses, logits, task)

    def try_step(self, batch: AnyBatch) -> None:
        """Computes the losses of a batch on a copy of everything that trains.

        Raises:
            ValueError: a layer that cannot train on the batch, such as a batch norm on a single value.
        """
        teacher = self.asked
        copied = copy.deepcopy(self, {} if teacher is None else {id(teacher): teacher}).train()
        copied._teacher = () if teacher is None else (teacher.live,)
        copied(batch[0], batch[1], batch[2], 0.0)

    def evaluate(self, inputs: Inputs, label: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Computes the task loss without its weight, None without labels, and the student's logits."""
        outputs = self._taps(inputs)
        if label is None:
            return None, outputs.logits
        rows, batch = outputs, Batch(inputs, label, label)
        if self._as_rows and outputs.logits.ndim > 2:
            rows, _, batch = self._as_rows(outputs, Outputs(label.new_zeros(0), {}), batch)
        loss = self.task_loss(rows, batch)
        return sum(loss.values(), label.new_zeros(())) if isinstance(loss, dict) else loss, outputs.logits

    def _progress(self, progress: float | Tensor | None, device: torch.device) -> Tensor:
        if progress is not None:
            return torch.as_tensor(progress, dtype=torch.float32, device=device)
        if self.total_steps is None:
            method = self.method
            if method.needs.progress:
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)
