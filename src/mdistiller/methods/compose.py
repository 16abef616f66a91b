"""Methods made of methods: `A+B` adds losses up, `A-B` wraps A around B, several teachers' losses average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field, create_model
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Method, MethodConfig
from mdistiller.taps import resolve, tap_names
from mdistiller.types import Batch, DataInfo, Outputs

Lookup = Callable[[str], type[Method]]


def _without_task(config: MethodConfig, where: str) -> None:
    if config.task_weight or config.label_smoothing:
        raise ConfigError(
            f"method.{where}: task_weight and label_smoothing of a part must be 0; "
            "the whole has method.task_weight and method.label_smoothing"
        )


def _distillation(method: Method, *args: Any) -> dict[str, Tensor]:
    """A part's losses but the task's, which the whole adds once."""
    return {name: value for name, value in method(*args).items() if name != "task"}


def _config(
    name: str, base: type[MethodConfig], doc: str | None, fields: dict[str, Any]
) -> type[MethodConfig]:
    config = create_model(f"{base.__name__}[{name}]", __base__=base, __doc__=doc, **fields)
    config.method_name = name
    return config


# Sums


def change_all(config: MethodConfig, change: Callable[[MethodConfig], MethodConfig]) -> MethodConfig:
    """A method's config with a change made to those that it is made of, and then to itself."""
    parts = {field: getattr(config, field) for field in type(config).model_fields}
    update = {f: change_all(part, change) for f, part in parts.items() if isinstance(part, MethodConfig)}
    return change(config.model_copy(update=update))


class Sum(Method):
    """The losses of several methods, each times its weight, and the task's loss once.

    Made by a name such as `dkd+reviewkd`. Its config has the parts' configs under their names
    (`method.dkd.beta`) and a weight for each (`method.dkd_weight`).
    """

    Parts: ClassVar[dict[str, type[Method]]] = {}

    def __init__(
        self, config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        parts: dict[str, Method] = {}
        self.weights: dict[str, float] = {}
        for field, method in self.Parts.items():
            part = getattr(config, field)
            _without_task(part, field)
            parts[field] = method(part, student, teacher if method.needs_teacher else None, data)
            self.weights[field] = getattr(config, f"{field}_weight")
        self.parts = nn.ModuleDict(parts)
        self.student_taps = tuple(dict.fromkeys(t for p in parts.values() for t in tap_names(p.student_taps)))
        self.teacher_taps = tuple(dict.fromkeys(t for p in parts.values() for t in tap_names(p.teacher_taps)))
        self.views = max(p.views for p in parts.values())
        self.needs_index = any(p.needs_index for p in parts.values())

    def deployed(self, student: nn.Module) -> nn.Module:
        """What the parts make of the student, one after another."""
        for part in self.parts.values():
            assert isinstance(part, Method)
            student = part.deployed(student)
        return student

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """The task's loss and every part's; a name that two parts share gets the part's before it."""
        losses = {"task": self.task_loss(student, batch)}
        for field, part in self.parts.items():
            assert isinstance(part, Method)
            for name, value in _distillation(part, student, teacher, batch, progress).items():
                losses[name if name not in losses else f"{field}.{name}"] = self.weights[field] * value
        return losses


def sum_of(name: str, lookup: Lookup) -> type[Sum]:
    """The class of `A+B+…`, from the classes that `lookup` gives.

    Raises:
        ConfigError: a method twice.
    """
    names = name.split("+")
    parts = {part.replace("-", "_"): lookup(part) for part in names}
    if len(parts) < len(names):
        raise ConfigError(f"method {name!r}: each part may stand there once")
    fields: dict[str, Any] = {}
    for field, method in parts.items():
        default = method.Config(task_weight=0.0)
        fields[field] = (method.Config, Field(default=default, description=f"The method {method.name!r}."))
        weight = Field(default=1.0, ge=0, description=f"Weight of {method.name!r} in the sum.")
        fields[f"{field}_weight"] = (float, weight)
    methods = list(parts.values())
    config = _config(name, MethodConfig, f"Settings of {name!r}.", fields)
    return type(
        f"Sum[{name}]",
        (Sum,),
        {
            "__doc__": Sum.__doc__,
            "Config": config,
            "Parts": parts,
            "name": name,
            "paper": "; ".join(m.paper for m in methods),
            "year": max((m.year for m in methods if m.year), default=None),
            "kind": "logit" if all(m.kind == "logit" for m in methods) else "feature",
            "needs_teacher": any(m.needs_teacher for m in methods),
        },
    )


class Average(Method):
    """One method under several teachers: the mean of the losses, with adapters for each teacher.

    Not registered: a run with several teachers makes it of its method.

    Args:
        make: the method's class.
        teachers: the teachers and where each lies in the module that is tapped as the teacher. That place's
            output are the teacher's logits.
    """

    def __init__(
        self,
        make: type[Method],
        config: MethodConfig,
        student: nn.Module,
        teachers: dict[str, nn.Module],
        data: DataInfo,
    ) -> None:
        super().__init__(config, student, None, data)
        self.methods = nn.ModuleList([make(config, student, t, data) for t in teachers.values()])
        self.places: list[tuple[str, dict[str, str]]] = []
        for method, (path, teacher) in zip(self.methods, teachers.items(), strict=True):
            assert isinstance(method, Method)
            inner = resolve(teacher, method.teacher_taps)
            self.places.append((path, {name: f"{path}.{place}" for name, place in inner.items()}))
            self.student_taps += tap_names(method.student_taps)
            self.teacher_taps += (path, *self.places[-1][1].values())
            self.views, self.needs_index = method.views, method.needs_index

    def deployed(self, student: nn.Module) -> nn.Module:
        """The student.

        Raises:
            ConfigError: the method makes another model of the student for each teacher.
        """
        for method in self.methods:
            assert isinstance(method, Method)
            if method.deployed(student) is not student:
                raise ConfigError(f"method {self.config.method_name!r} takes one teacher alone")
        return student

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """The mean over teachers of each loss."""
        losses: dict[str, Tensor] = {}
        for method, (path, places) in zip(self.methods, self.places, strict=True):
            features = {name: teacher.features[place] for name, place in places.items()}
            for name, value in method(
                student, Outputs(teacher.features[path], features), batch, progress
            ).items():
                value = value / len(self.methods)
                losses[name] = losses[name] + value if name in losses else value
        return losses


# Wrappers


class WrapperConfig(MethodConfig):
    """Settings that every wrapper has; a wrapper's own config gives `base` the type of its default."""

    base: MethodConfig
    """The wrapped method."""


class Wrapper(Method):
    """A method that changes what another one, its base, gets to see.

    `A` wraps `A.default_base`, and the name `A-B` stands for A around B. The task's loss is the wrapper's,
    of the student's own logits; the base's config has none.

    A subclass overrides `forward`, calling `self.base`, and may override `check_base` and `base_defaults`.
    """

    Config: ClassVar[type[WrapperConfig]]
    config: WrapperConfig
    default_base: ClassVar[str] = "kd"
    Base: ClassVar[type[Method] | None] = None
    """The base's class; None for the default one."""

    def __init__(
        self, config: WrapperConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        assert self.Base is not None
        _without_task(config.base, "base")
        self.base = self.Base(config.base, student, teacher, data)
        self.student_taps, self.teacher_taps = self.base.student_taps, self.base.teacher_taps
        self.views, self.needs_index = self.base.views, self.base.needs_index

    def deployed(self, student: nn.Module) -> nn.Module:
        """What the base makes of the student."""
        return self.base.deployed(student)

    def base_losses(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """The base's losses, without the task's."""
        return _distillation(self.base, student, teacher, batch, progress)

    @classmethod
    def check_base(cls, base: type[Method]) -> None:
        """Raise ConfigError for a base that cannot be wrapped; as it is, only logit methods can."""
        if base.kind != "logit":
            raise ConfigError(
                f"method {cls.name!r} wraps logit methods; {base.name!r} is a {base.kind} method"
            )

    @classmethod
    def base_defaults(cls, base: type[Method]) -> dict[str, Any]:
        """Hyper-parameters of the base that differ from its own defaults when it is wrapped."""
        return {}

    @classmethod
    def task_default(cls, base: type[Method]) -> float:
        """Default weight of the task's loss: the base's."""
        return base.Config().task_weight


def wrap(name: str, outer: type[Method], lookup: Lookup) -> type[Wrapper]:
    """The class of `A-B`, or of `A` around its default base; `outer` is A, and `lookup` gives B.

    Raises:
        ConfigError: A is no wrapper, or does not take B.
    """
    if not issubclass(outer, Wrapper):
        raise ConfigError(f"method {name!r}: {outer.name!r} wraps no other method")
    base = lookup(name.partition("-")[2] or outer.default_base)
    outer.check_base(base)
    default = base.Config(task_weight=0.0, **outer.base_defaults(base))
    description = f"The wrapped method, {base.name!r}."
    task = Field(default=outer.task_default(base), ge=0, description="Weight of the task.")
    fields = {
        "base": (base.Config, Field(default=default, description=description)),
        "task_weight": (float, task),
    }
    config = _config(name, outer.Config, outer.Config.__doc__, fields)
    about = {"__doc__": outer.__doc__, "Config": config, "Base": base, "name": name}
    return type(f"{outer.__name__}[{base.name}]", (outer,), about)
