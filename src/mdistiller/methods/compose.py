"""Methods made of methods: the sum `A+B`, the wrapper `A-B` (A around B), the average over teachers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, get_args

from pydantic import Field, create_model
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import LogitMethod, Losses, Method, MethodConfig
from mdistiller.taps import resolve, tap_names
from mdistiller.types import Batch, DataInfo, Outputs

Lookup = Callable[[str], type[Method]]


def _check_part(config: MethodConfig, field: str) -> None:
    if config.task_weight:
        raise ConfigError(
            f"method.{field}.task_weight: got {config.task_weight}; the task_weight of a part must be 0, as "
            "the whole has method.task_weight"
        )


def _make_config(
    name: str, base: type[MethodConfig], doc: str | None, fields: dict[str, Any]
) -> type[MethodConfig]:
    config = create_model(f"{base.__name__}[{name}]", __base__=base, __doc__=doc, **fields)
    config.method_name = name
    return config


def change_all(config: MethodConfig, change: Callable[[MethodConfig], MethodConfig]) -> MethodConfig:
    """Applies a change to the configs of a method's parts, and then to the method's own config."""
    parts = {field: getattr(config, field) for field in type(config).model_fields}
    update = {f: change_all(part, change) for f, part in parts.items() if isinstance(part, MethodConfig)}
    return change(config.model_copy(update=update))


def with_defaults(
    config: MethodConfig, defaults: Mapping[type[MethodConfig], Mapping[str, Any]]
) -> MethodConfig:
    """Gives a method's config and its parts other defaults, by class; a part of a sum has no task weight."""

    def change(own: MethodConfig) -> MethodConfig:
        update = dict(defaults.get(type(own), {}))
        if not own.task_weight:
            update.pop("task_weight", None)
        return own.model_copy(update=update)

    return change_all(config, change)


def takes_auto(config: MethodConfig) -> bool:
    """Whether a method's `weight` may be `auto`: it is then measured when a run starts."""
    field = type(config).model_fields.get("weight")
    return field is not None and "auto" in [v for t in get_args(field.annotation) for v in get_args(t)]


def open_weights(config: MethodConfig) -> list[str]:
    """Lists the fields `weight` of a method and of its parts with the value `auto`, by dotted name."""
    found = ["weight"] if getattr(config, "weight", None) == "auto" else []
    for field in type(config).model_fields:
        part = getattr(config, field)
        if isinstance(part, MethodConfig):
            found += [f"{field}.{name}" for name in open_weights(part)]
    return found


class Sum(Method):
    """Sum of the distillation losses of several methods, each times its weight.

    A name such as `dkd+reviewkd` makes one. Its config has the parts' configs under their names
    (`method.dkd.beta`) and a weight for each (`method.dkd_weight`).
    """

    skips_unlabelled = True
    Parts: ClassVar[dict[str, type[Method]]] = {}

    def __init__(
        self, config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        parts: dict[str, Method] = {}
        for field, method in self.Parts.items():
            _check_part(getattr(config, field), field)
            own_teacher = teacher if method.needs_teacher else None
            parts[field] = method(getattr(config, field), student, own_teacher, data)
        self.parts = nn.ModuleDict(parts)
        self.weights: dict[str, float] = {field: getattr(config, f"{field}_weight") for field in parts}
        self.student_taps = tuple(dict.fromkeys(t for p in parts.values() for t in tap_names(p.student_taps)))
        self.teacher_taps = tuple(dict.fromkeys(t for p in parts.values() for t in tap_names(p.teacher_taps)))
        _derive(self, parts.values())

    def extend_student(self, student: nn.Module) -> nn.Module:
        for part in self.parts.values():
            extended = part.extend_student(student)  # type: ignore[operator]
            readers = [field for field, p in self.parts.items() if p.reads_classifier]
            if extended is not student and readers:
                raise ConfigError(
                    f"method {self.name!r}: {part.name!r} replaces the classifier of the student, which "
                    f"{readers[0]!r} reads"
                )
            student = extended
        return student

    @classmethod
    def declares_taps(cls) -> bool:
        return any(part.declares_taps() for part in cls.Parts.values())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        """Returns the losses of all parts; a name that is taken gets the part's name in front of it."""
        losses: Losses = {}
        for field, part in self.parts.items():
            for name, value in part(student, teacher, batch, progress).items():
                losses[name if name not in losses else f"{field}.{name}"] = self.weights[field] * value
        return losses


def _derive(whole: Method, parts: Iterable[Method]) -> None:
    """Sets what a composed method needs to what any of its parts needs."""
    parts = list(parts)
    whole.num_views = max(p.num_views for p in parts)
    whole.norm_per_view = any(p.norm_per_view for p in parts)
    whole.needs_index = any(p.needs_index for p in parts)
    whole.has_schedule = any(p.has_schedule for p in parts) or type(whole).has_schedule
    readers = [p for p in parts if p.reads_label]
    whole.reads_label = bool(readers) or type(whole).reads_label
    whole.skips_unlabelled = type(whole).skips_unlabelled and all(p.skips_unlabelled for p in readers)


def sum_of(name: str, lookup: Lookup) -> type[Sum]:
    """Makes the class of `A+B+…` from the classes that `lookup` returns.

    Raises:
        ConfigError: a method appears twice.
    """
    names = name.split("+")
    parts = {part.replace("-", "_"): lookup(part) for part in names}
    if len(parts) < len(names):
        raise ConfigError(f"method {name!r}: each part may appear once")
    fields: dict[str, Any] = {}
    for field, method in parts.items():
        default = method.Config(task_weight=0.0)
        fields[field] = (method.Config, Field(default=default, description=f"The method {method.name!r}."))
        weight = Field(default=1.0, ge=0, description=f"Weight of {method.name!r} in the sum.")
        fields[f"{field}_weight"] = (float, weight)
    methods = list(parts.values())
    attributes = {
        "__doc__": Sum.__doc__,
        "Config": _make_config(name, MethodConfig, f"Settings of {name!r}.", fields),
        "Parts": parts,
        "name": name,
        "paper": "; ".join(m.paper for m in methods),
        "year": max((m.year for m in methods if m.year), default=None),
        "needs_teacher": any(m.needs_teacher for m in methods),
        "takes_multi_label": all(m.takes_multi_label for m in methods),
    }
    return type(f"Sum[{name}]", (Sum,), attributes)


class Average(Method):
    """Average of one method's losses over several teachers, with adapters for each teacher.

    It has no name: a run with several teachers makes it from its method, of class `make`. The teachers are
    given by their module paths in the module that is tapped as the teacher. The output at each path is that
    teacher's logits.
    """

    skips_unlabelled = True

    def __init__(
        self,
        make: type[Method],
        config: MethodConfig,
        student: nn.Module,
        teachers: dict[str, nn.Module],
        data: DataInfo,
    ) -> None:
        super().__init__(config, student, None, data)
        methods = [make(config, student, teacher, data) for teacher in teachers.values()]
        self.methods = nn.ModuleList(methods)
        self.paths: list[tuple[str, dict[str, str]]] = []
        for method, (path, teacher) in zip(methods, teachers.items(), strict=True):
            inner = resolve(teacher, method.teacher_taps)
            self.paths.append((path, {name: f"{path}.{inner_path}" for name, inner_path in inner.items()}))
            self.student_taps += tap_names(method.student_taps)
            self.teacher_taps += (path, *self.paths[-1][1].values())
        _derive(self, methods)

    def extend_student(self, student: nn.Module) -> nn.Module:
        if any(m.extend_student(student) is not student for m in self.methods):  # type: ignore[operator]
            raise ConfigError(f"method {self.config.method_name!r} takes only one teacher")
        return student

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses: Losses = {}
        for method, (path, inner) in zip(self.methods, self.paths, strict=True):
            features = {name: teacher.features[inner_path] for name, inner_path in inner.items()}
            outputs = Outputs(teacher.features[path], features)
            for name, value in method(student, outputs, batch, progress).items():
                value = value / len(self.methods)
                losses[name] = losses[name] + value if name in losses else value
        return losses


class WrapperConfig(MethodConfig):
    """Settings of every wrapper; a wrapper's own config gives `base` the type of its default."""

    base: MethodConfig
    """Config of the wrapped method."""


class Wrapper(Method):
    """Method that changes the logits that another method, its base, reads.

    The name `A` wraps `A.default_base`, and `A-B` is A around B. The base reads only logits, and its config
    has a task_weight of 0: the task loss, of the student's own logits, belongs to the wrapper.

    A subclass overrides `forward`, which calls `self.base`, and may override `check_base` and
    `base_defaults`.
    """

    config: WrapperConfig
    default_base: ClassVar[str] = "kd"
    Base: ClassVar[type[Method] | None] = None
    """Class of the base; None before a name has composed the wrapper."""

    def __init__(
        self, config: WrapperConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        assert self.Base is not None
        _check_part(config.base, "base")
        self.base = self.Base(config.base, student, teacher, data)
        if self.base.student_taps or self.base.teacher_taps:
            raise self._refusal(self.Base)
        _derive(self, [self.base])

    def extend_student(self, student: nn.Module) -> nn.Module:
        return self.base.extend_student(student)

    @classmethod
    def declares_taps(cls) -> bool:
        return super().declares_taps() or (cls.Base is not None and cls.Base.declares_taps())

    @classmethod
    def _refusal(cls, base: type[Method]) -> ConfigError:
        return ConfigError(
            f"method {cls.name!r} wraps methods that read only logits; {base.name!r} taps features"
        )

    @classmethod
    def check_base(cls, base: type[Method]) -> None:
        """Checks that a method can be wrapped, as far as its class shows.

        Raises:
            ConfigError: the base taps features.
        """
        if base.declares_taps() and not issubclass(base, LogitMethod):
            raise cls._refusal(base)

    @classmethod
    def base_defaults(cls, base: type[Method]) -> dict[str, Any]:
        """Returns the base's hyper-parameters that differ from its own defaults when it is wrapped."""
        return {}


def wrap(name: str, outer: type[Method], lookup: Lookup) -> type[Wrapper]:
    """Makes the class of `A-B`, or of `A` around its default base; `outer` is A, and `lookup` returns B.

    Raises:
        ConfigError: A is no wrapper, or does not take B.
    """
    if not issubclass(outer, Wrapper):
        raise ConfigError(f"method {name!r}: {outer.name!r} wraps no other method")
    base = lookup(name.partition("-")[2] or outer.default_base)
    outer.check_base(base)
    default = base.Config(task_weight=0.0, **outer.base_defaults(base))
    fields: dict[str, Any] = {
        "base": (base.Config, Field(default=default, description=f"The wrapped method, {base.name!r}."))
    }
    if "task_weight" not in outer.Config.__annotations__:  # else the wrapper has a weight of its own
        task_weight = base.Config().task_weight
        fields["task_weight"] = (
            float,
            Field(default=task_weight, ge=0, description="Weight of the task loss."),
        )
    config = _make_config(name, outer.Config, outer.Config.__doc__, fields)
    attributes: dict[str, Any] = {"__doc__": outer.__doc__, "Config": config, "Base": base, "name": name}
    if name == outer.name:  # the example is that of the default base
        attributes["example"] = outer.example
    return type(f"{outer.__name__}[{base.name}]", (outer,), attributes)
