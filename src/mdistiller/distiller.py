"""The modules of a training step: a frozen teacher, and the Learner (student and method) that trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods import Method, MethodConfig, get_method
from mdistiller.settings import explain
from mdistiller.taps import TappedModel
from mdistiller.types import Batch, DataInfo, Outputs


class LearnerOutput(NamedTuple):
    """losses: weighted scalar losses by name; logits: the student's, [B, classes]."""

    losses: dict[str, Tensor]
    logits: Tensor


class _Features(dict[str, Tensor]):
    """Tapped features by name, which say what to do about one that is missing."""

    def __init__(self, features: dict[str, Tensor], method: str, model: str) -> None:
        super().__init__(features)
        self.method, self.model = method, model

    def __missing__(self, name: str) -> Tensor:
        raise ConfigError(
            f"method {self.method!r} reads the {self.model}'s feature {name!r}, which is not tapped: add it "
            f"to {self.model}_taps; tapped are {list(self)}"
        )


class LearnerBase(nn.Module):
    """All that trains: a wrapped student, itself at `student.model`, and a method."""

    student: Any
    method: Method

    def method_losses(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """The method's losses by name.

        Raises:
            ConfigError: the method reads a feature that it does not tap, or returns something else.
        """
        name = self.method.name or type(self.method).__name__
        if not torch.compiler.is_compiling():
            student, teacher = (
                seen._replace(features=_Features(seen.features, name, model))
                for seen, model in ((student, "student"), (teacher, "teacher"))
            )
        losses = self.method(student, teacher, batch, progress)
        # Types and shapes alone are looked at: it costs nothing that counts, and nothing once compiled.
        if not isinstance(losses, dict):
            got = type(losses).__name__
        else:
            wrong = [k for k, v in losses.items() if not (isinstance(v, Tensor) and v.ndim == 0)]
            if losses and not wrong:
                return losses
            got = ", ".join(f"{k!r}: {_brief(losses[k])}" for k in wrong) or "an empty one"
        raise ConfigError(f"method {name!r} must return a dict of scalar tensors by name; got {got}")

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
        return LearnerOutput(self.method_losses(outputs, teacher, batch, progress), outputs.logits)

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


def check_apart(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise ConfigError for a student that would be frozen with its teacher, as a whole or in part."""
    frozen = set() if teacher is None else {id(p) for p in teacher.parameters()}
    if teacher is student or any(id(p) in frozen for p in student.parameters() if p.requires_grad):
        raise ConfigError(
            "student and teacher share parameters, which would be frozen with the teacher: make one of them "
            "a copy (copy.deepcopy)"
        )


def _brief(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


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


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with changes, which are nested likewise."""
    new = dict(values)
    for key, change in changes.items():
        old = new.get(key)
        new[key] = _merged(old, change) if isinstance(old, dict) and isinstance(change, Mapping) else change
    return new


def _configure(method: str | MethodConfig, settings: Mapping[str, Any]) -> MethodConfig:
    """The config of a method's name and settings, or the one that was given."""
    if isinstance(method, MethodConfig):
        if settings:
            raise ConfigError(
                f"{', '.join(settings)}: settings go with a method's name; here they belong into its config"
            )
        return method
    if not isinstance(method, str):
        raise ConfigError(f"method must be a method's name or its config; got {type(method).__name__}")
    kind = get_method(method).Config
    values = _merged(kind().model_dump(), settings)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise explain(error, f"method {method!r}", values=values, kind=kind) from error


def _one_view(method: Method) -> str:
    """How a method of two views does with one, if all of it can."""
    parts = [m for m in method.modules() if isinstance(m, Method) and m.views == 2]
    innermost = [m for m in parts if sum(isinstance(x, Method) for x in m.modules()) == 1]
    if not all("views" in type(m.config).model_fields for m in innermost):
        return ""
    return f" (or set views=1 of {' and '.join(repr(m.name) for m in innermost)}, for one view)"


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

    Settings of a method differ from its defaults by name, those of methods that it is made of in a dict::

        Distiller(student, teacher, "dkd", beta=2.0, warmup=0)
        Distiller(student, teacher, "lskd-dkd", base={"beta": 18.0})

    A method that compares two views of each image ("mlkd", "crld") takes them in one batch, all images
    under ordinary, then the same images under strong augmentation::

        losses = distiller(torch.cat([weak, strong]), torch.cat([label, label]))

    Args:
        student: any module whose output is logits [B, classes].
        teacher: another one; None for method "none". It is frozen. Its classes are the student's; a method
            that compares features or relations between samples alone takes a teacher of any others.
        method: a method's name, or its config, such as `DKDConfig(beta=2.0)`.
        input_shape: (C, H, W) of one image, which feature methods need to know their sizes.
        labels: int64 [N], the class of every training image, for methods with a memory bank; `index`
            in the call then says which images a batch has.
        batch_size: images a batch, for methods whose layers depend on it.
        settings: the method's hyper-parameters, by name.

    Raises:
        UnknownNameError: no such method or tap.
        ConfigError: a setting that is unknown or wrong; a missing teacher, or one that shares what trains
            with the student. On a call: a teacher with other classes where the method does not take them, a
            missing `index`, a batch that does not have both views.
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
        **settings: Any,
    ) -> None:
        super().__init__()
        config = _configure(method, settings)
        check_apart(student, teacher)
        data = DataInfo(tuple(input_shape), labels, batch_size)
        built = build_method(config, student, teacher, data)
        self.learner = Learner(built.deployed(student), built)
        # In a tuple it is no submodule: neither in parameters() nor in state_dict().
        self._teacher = () if teacher is None else (Teacher(teacher, built.teacher_taps),)
        self._images = None if labels is None else len(labels)
        self._views_seen = False

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

        Raises:
            ConfigError: see the class. Whether both views have the same labels is seen on the first call, and
                whether `index` fits `labels` on a CPU: a GPU would have to be waited for.
        """
        if not torch.compiler.is_compiling():
            self._check(label, index)
        if index is None:
            index = torch.arange(len(image), device=image.device)
        progress = torch.as_tensor(progress, dtype=torch.float32, device=image.device)
        teacher = self._teacher[0](image) if self._teacher else Outputs(image.new_zeros(0), {})
        losses: dict[str, Tensor] = self.learner(Batch(image, label, index), teacher, progress).losses
        return losses

    def _check(self, label: Tensor, index: Tensor | None) -> None:
        method = self.learner.method
        name = method.config.method_name
        if method.needs_index and index is None:
            raise ConfigError(
                f"method {name!r} keeps a memory of every training image, so it needs their positions in the "
                "training set, int64 [B]: distiller(image, label, index)"
            )
        if method.needs_index and self._images and index is not None and index.device.type == "cpu":
            low, high = (int(x) for x in index.aminmax())
            if low < 0 or high >= self._images:
                raise ConfigError(
                    f"index must lie in 0 … {self._images - 1}, as labels has {self._images} images; "
                    f"got {low if low < 0 else high}"
                )
        if method.views == 2 and not self._views_seen:
            weak, strong = label[: len(label) // 2], label[len(label) // 2 :]
            if not torch.equal(weak, strong):
                raise ConfigError(
                    f"method {name!r} compares two views of each image: image must be "
                    "torch.cat([weak, strong]), of the same images under ordinary and under strong "
                    f"augmentation, and label torch.cat([label, label]){_one_view(method)}; "
                    "the halves of this batch have different labels"
                )
            self._views_seen = True

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)
