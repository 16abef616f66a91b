"""Methods made of methods: the sum `A+B`, and the wrapper `A-B` (A around B)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails
from torch import Tensor, nn
from typing_extensions import TypeVar

from mdistiller.errors import ConfigError
from mdistiller.methods.base import LogitMethod, Losses, Method, MethodConfig, Needs, declares_taps
from mdistiller.methods.registry import registered_method
from mdistiller.taps import tap_names
from mdistiller.types import Batch, DataInfo, Outputs

Find = Callable[[str], type[Method]]
"""Function from a method's name to its class: `get_method`, or that of a task."""


def get_method(name: str) -> type[Method]:
    """Returns the class of a method: a registered one, `Sum` for `A+B`, or that of A for `A-B`.

    `+` binds weaker: `lskd-dkd+reviewkd` is the sum of two methods.

    Raises:
        UnknownNameError: no such method; the message has the nearest names.
        ConfigError: methods that cannot be combined.
    """
    if "+" in name:
        check_sum(name, get_method)
        return Sum
    first, dash, base = name.partition("-")
    if first == "dot":
        raise ConfigError(
            f"method {name!r}: DOT is an optimizer and not a method: --optim.name dot, or "
            'OptimConfig(name="dot"), with any method'
        )
    method = registered_method(first)
    if dash:
        if not issubclass(method, Wrapper):
            raise ConfigError(f"method {name!r}: {first!r} wraps no other method")
        method.check_base(get_method(base))
    return method


def check_sum(name: str, find: Find) -> None:
    """Checks the name of a sum.

    Raises:
        UnknownNameError: a part is no method.
        ConfigError: a part appears twice.
    """
    parts = [part.replace("-", "_") for part in name.split("+")]
    for part in name.split("+"):
        find(part)
    if len(set(parts)) < len(parts):
        raise ConfigError(f"method {name!r}: each part may appear once")


def method_config(name: str, find: Find = get_method, /, **values: object) -> MethodConfig:
    """Returns the config of a method, with its defaults beside the given values.

    Raises:
        UnknownNameError: no such method.
        pydantic.ValidationError: an unknown or wrong value.
    """
    return find(name).Config.model_validate({"name": name, **values})


def needs_teacher(name: str, find: Find = get_method) -> bool:
    """Whether a method, or a part of a sum, needs a teacher."""
    return any(find(part).needs.teacher for part in name.split("+"))


def reads_logits(name: str, find: Find = get_method) -> bool:
    """Whether a method, or a part of a sum, reads the teacher's logits or its classifier."""
    return any(find(part).needs.logits for part in name.split("+"))


class ComposedConfig(MethodConfig):
    """Settings of a method that is made of others: those of each part are in a field.

    A part that is not given has its defaults, by the method's name. Without a name, the given parts name it.
    """

    name: str

    @property
    def method_name(self) -> str:
        return self.name

    @classmethod
    def find(cls, name: str) -> type[Method]:
        """Returns the class of a part by its name."""
        return get_method(name)

    @classmethod
    def parts_named(cls, name: str) -> dict[str, str]:
        """Returns the fields of the parts of a method, with the parts' names."""
        raise NotImplementedError

    @classmethod
    def name_of(cls, values: Mapping[str, object]) -> str:
        """Returns the name of a method by the parts among its values."""
        raise NotImplementedError

    @classmethod
    def defaults(cls, name: str) -> dict[str, object]:
        """Returns the default values of the parts of a method, and what follows from them."""
        raise NotImplementedError

    @classmethod
    def known_fields(cls, values: Mapping[str, object]) -> dict[str, type[BaseModel] | None]:
        name = str(values.get("name") or cls.name_of(values))
        kinds = {field: cls.find(part).Config for field, part in cls.parts_named(name).items()}
        names = {**cls.model_fields, **cls.defaults(name)}
        return {field: kinds.get(field) for field in names if field != "name"}

    def field_infos(self) -> dict[str, FieldInfo]:
        parts = {field: FieldInfo(annotation=type(part)) for field, part in self.parts().items()}
        return {name: field for name, field in super().field_infos().items() if name != "name"} | parts

    @model_validator(mode="wrap")
    @classmethod
    def _check_name(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, Mapping):
            return handler(values)
        name = str(values.get("name") or cls.name_of(values))
        defaults = cls.defaults(name)
        found: dict[str, object] = {"name": name, **defaults, **values}
        errors: list[InitErrorDetails] = []
        for field in [field for field in found if field not in {*cls.model_fields, *defaults}]:
            errors.append({"type": "extra_forbidden", "loc": (field,), "input": found.pop(field)})
        for field, part in cls.parts_named(name).items():
            try:
                found[field] = cls._read(part, found[field])
            except ValueError as error:
                errors += _details(error, field, value=found[field])
                found[field] = defaults[field]
        try:
            made = handler(found)
        except ValidationError as error:
            errors += _details(error)
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return made

    @classmethod
    def _read(cls, name: str, value: object) -> MethodConfig:
        """Returns the config of a part, from its values or from a config of that name."""
        if isinstance(value, Mapping):
            value = {"name": name, **value}
        config = cls.find(name).Config.model_validate(value)
        if config.method_name.removesuffix(_KD) != name.removesuffix(_KD):
            raise ValueError(f"these are the settings of {config.method_name!r}, not of {name!r}")
        return config


_KD = "-kd"


def _details(error: ValueError, *field: str, value: object = None) -> list[InitErrorDetails]:
    """Returns the lines of an error about a field."""
    if not isinstance(error, ValidationError):
        return [{"type": "value_error", "loc": field, "input": value, "ctx": {"error": error}}]
    return [
        {"type": e["type"], "loc": (*field, *e["loc"]), "input": e["input"], "ctx": e.get("ctx", {})}
        for e in error.errors()
    ]


def _check_part(config: MethodConfig, field: str) -> None:
    if config.task_weight:
        raise ConfigError(
            f"method.{field}.task_weight: got {config.task_weight}; the task_weight of a part must be 0, as "
            "the whole has method.task_weight"
        )


_WEIGHT = TypeAdapter(Annotated[float, Field(ge=0)])


def _read_extra(value: object) -> object:
    """Checks the weight of a part; its config is checked already."""
    return value if isinstance(value, MethodConfig) else _WEIGHT.validate_python(value)


class SumConfig(ComposedConfig):
    """Settings of a sum of methods: those of each part under its name, and its weight, `PART_weight`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[object, PlainValidator(_read_extra)]]

    @classmethod
    def parts_named(cls, name: str) -> dict[str, str]:
        return {part.replace("-", "_"): part for part in name.split("+")}

    @classmethod
    def name_of(cls, values: Mapping[str, object]) -> str:
        return "+".join(part.method_name for part in values.values() if isinstance(part, MethodConfig))

    @classmethod
    def defaults(cls, name: str) -> dict[str, object]:
        found: dict[str, object] = {}
        for field, part in cls.parts_named(name).items():
            found |= {field: method_config(part, cls.find, task_weight=0.0), f"{field}_weight": 1.0}
        return found

    def field_infos(self) -> dict[str, FieldInfo]:
        found = super().field_infos()
        for field, part in self.parts().items():
            text = f"Weight of {part.method_name!r} in the sum."
            found[f"{field}_weight"] = FieldInfo(annotation=float, description=text)
        return found


class Sum(Method[SumConfig]):
    """Sum of the distillation losses of several methods, each times its weight.

    A name such as `dkd+reviewkd` makes one. Its config has the parts' configs under their names
    (`method.dkd.beta`) and a weight for each (`method.dkd_weight`).

    Args:
        parts: the methods.
        config: their settings and weights. None: those of the parts, with weights of 1.
    """

    Config = SumConfig
    needs = Needs(teacher=False, every_label=False, one_class=False, logits=False)

    def __init__(self, parts: Sequence[Method], config: SumConfig | None = None) -> None:
        if config is None:
            named = {part.config.method_name.replace("-", "_"): part.config for part in parts}
            config = self.Config.model_validate(named)
        super().__init__(config)
        for field, part_config in config.parts().items():
            _check_part(part_config, field)
        self.parts = nn.ModuleDict(dict(zip(config.parts(), parts, strict=True)))
        self.weights: dict[str, float] = {field: getattr(config, f"{field}_weight") for field in self.parts}
        self.teacher_taps = tuple(dict.fromkeys(t for p in parts for t in tap_names(p.teacher_taps)))
        join(self, parts)
        self.name = config.name

    def extend_student(self, student: nn.Module) -> nn.Module:
        for part in self.parts.values():
            extended = part.extend_student(student)  # type: ignore[operator]
            readers = [field for field, p in self.parts.items() if p.needs.classifier]  # type: ignore[union-attr]
            if extended is not student and readers:
                raise ConfigError(
                    f"method {self.name!r}: {part.name!r} replaces the classifier of the student, which "
                    f"{readers[0]!r} reads"
                )
            student = extended
        return student

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        """Returns the losses of all parts; a name that is taken gets the part's name in front of it."""
        losses: Losses = {}
        for field, part in self.parts.items():
            for name, value in part(student, teacher, batch, progress).items():
                losses[name if name not in losses else f"{field}.{name}"] = self.weights[field] * value
        return losses


def join(whole: Method, parts: Sequence[Method]) -> None:
    """Adds needs, student taps and `has_unlabeled` of all parts to those of a method made of them."""
    # Only a part that reads labels can need all of them.
    found = [replace(p.needs, every_label=p.needs.labels and p.needs.every_label) for p in parts]
    whole.needs = Needs(*map(max, zip(*map(astuple, (whole.needs, *found)), strict=True)))
    every = whole, *parts
    whole.student_taps = tuple(dict.fromkeys(tap for m in every for tap in tap_names(m.student_taps)))
    whole.has_unlabeled = any(m.has_unlabeled for m in every)


class WrapperConfig(ComposedConfig):
    """Settings of every wrapper."""

    base: SerializeAsAny[MethodConfig]
    """Config of the wrapped method."""

    @classmethod
    def parts_named(cls, name: str) -> dict[str, str]:
        first, _, base = name.partition("-")
        if first != cls.own_name:
            raise ValueError(f"these are the settings of {name!r}, not of {cls.own_name!r}")
        return {"base": base or "kd"}

    @classmethod
    def name_of(cls, values: Mapping[str, object]) -> str:
        base = values.get("base")
        name = base.method_name if isinstance(base, MethodConfig) else "kd"
        return f"{cls.own_name}-{name}".removesuffix(_KD)

    @classmethod
    def defaults(cls, name: str) -> dict[str, object]:
        base = cls.parts_named(name)["base"]
        outer = registered_method(cls.own_name)
        assert issubclass(outer, Wrapper)
        found: dict[str, object] = {"base": method_config(base, task_weight=0.0, **outer.base_defaults(base))}
        if "task_weight" not in cls.__annotations__:  # else the wrapper has a weight of its own
            found["task_weight"] = method_config(base).task_weight
        return found


WrapperConfigT = TypeVar("WrapperConfigT", bound=WrapperConfig, default=WrapperConfig, covariant=True)


class Wrapper(Method[WrapperConfigT]):
    """Method that changes the logits that another method, its base, reads.

    The name `A` wraps `kd`, and `A-B` is A around B. The base reads only logits, and its config has a
    task_weight of 0: the task loss, of the student's own logits, belongs to the wrapper.

    A subclass overrides `forward`, which calls `self.base`, and may override `check_base` and
    `base_defaults`.

    Args:
        config: the settings, those of the base in `config.base`.
        base: the base.
        student, teacher, data: as in `Method`.
    """

    Config = WrapperConfig

    def __init__(
        self,
        config: WrapperConfigT,
        base: Method,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataInfo,
    ) -> None:
        super().__init__(config, student, teacher, data)
        _check_part(config.base, "base")
        self.base = base
        if base.student_taps or base.teacher_taps:
            raise self._refusal(base.name)
        join(self, [base])
        self.name = config.name

    def extend_student(self, student: nn.Module) -> nn.Module:
        return self.base.extend_student(student)

    @classmethod
    def _refusal(cls, base: str) -> ConfigError:
        name = cls.Config.own_name
        return ConfigError(f"method {name!r} wraps methods that read only logits; {base!r} taps features")

    @classmethod
    def check_base(cls, base: type[Method]) -> None:
        """Checks that a method can be wrapped, as far as its class shows.

        Raises:
            ConfigError: the base taps features.
        """
        if declares_taps(base) and not issubclass(base, LogitMethod):
            raise cls._refusal(base.name)

    @classmethod
    def base_defaults(cls, base: str) -> dict[str, object]:
        """Returns the hyperparameters of a base, by its name, that differ from its own defaults."""
        return {}


def build_method(
    config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
) -> Method:
    """Builds the method of a config for a pair of models; a method that needs no teacher gets none.

    Raises:
        ConfigError: the method needs a teacher and there is none.
    """
    if teacher is None and needs_teacher(config.method_name):
        raise ConfigError(f"method {config.method_name!r} needs a teacher, and none was given")
    parts = [build_method(part, student, teacher, data) for part in config.parts().values()]
    if isinstance(config, SumConfig):
        return Sum(parts, config)
    method = get_method(config.method_name)
    models = student, teacher if method.needs.teacher else None
    if issubclass(method, Wrapper):
        assert isinstance(config, WrapperConfig)
        return method(config, parts[0], *models, data)
    return method(config, *models, data)
