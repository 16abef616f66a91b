"""The methods that detectors take: classification's own classes, and those made for detectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mdistiller import methods
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import (
    DKDConfig,
    FitNet,
    FitNetConfig,
    KDConfig,
    LogitMethod,
    Method,
    MethodConfig,
    NoDistillation,
    ReviewKD,
    ReviewKDConfig,
)
from mdistiller.methods.compose import Sum, change_all, sum_of
from mdistiller.tasks.detection.bckd import BCKD
from mdistiller.tasks.detection.detector import OVERLAP, Pyramid, is_two_stage
from mdistiller.tasks.detection.fgfi import FGFI
from mdistiller.types import Batch, DataInfo, Outputs

_OWN: dict[str, type[Method]] = {"fgfi": FGFI, "bckd": BCKD}
_MADE: dict[tuple[str, type[Method]], type[Method]] = {}

# What differs for detectors from a config's own defaults: the reference code base's values for KD and DKD
# (no warm-up, softmax as it is), and a regressor for levels, which have both signs.
_DEFAULTS: dict[type[MethodConfig], dict[str, Any]] = {
    KDConfig: {"task_weight": 1.0, "weight": 1.0, "temperature": 1.0},
    DKDConfig: {"alpha": 1.0, "beta": 0.25, "temperature": 1.0, "warmup": 0.0},
    ReviewKDConfig: {"weight": 1.0, "warmup": 0.0},
    FitNetConfig: {"weight": 1.0, "relu": False},
}


class OnDetector(Method):
    """What a method becomes on a detector, put before its class.

    The detector has losses of its own, so there is no cross-entropy; features are the levels of the pyramid.
    """

    def task_loss(self, student: Outputs, batch: Batch) -> Tensor:
        """Zero."""
        return student.logits.new_zeros(())

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All levels of both pyramids."""
        assert isinstance(student, Pyramid)
        assert isinstance(teacher, Pyramid)
        return student.names, teacher.names

    def read(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """The tapped levels of both, in order, as they are: levels are maps [B, C, H, W] of any size."""
        return (
            [student.features[name] for name in self.student_taps if not name.endswith(OVERLAP)],
            [teacher.features[name] for name in self.teacher_taps],
        )


def list_detection_methods() -> list[str]:
    """Names of the methods that detectors take, sorted; `+` adds them up."""
    return sorted([*_OWN, *(n for n in methods.list_methods() if _applies(methods.get_method(n)))])


def _applies(method: type[Method]) -> bool:
    return issubclass(method, LogitMethod | NoDistillation | FitNet | ReviewKD)


def get_method(name: str) -> type[Method]:
    """The class, for detectors, of a method's name, or of `A+B`.

    Raises:
        UnknownNameError: no method by that name that detectors take.
        ConfigError: a method twice in a sum.
    """
    if "+" in name:
        parts = [get_method(part) for part in name.split("+")]
        key = (name, parts[0])
        if key not in _MADE:
            _MADE[key] = _on_detector(sum_of(name, get_method))
        return _MADE[key]
    method = _OWN.get(name)
    if method is None:
        if name not in list_detection_methods():
            raise UnknownNameError("method for detectors", name, list_detection_methods())
        method = methods.get_method(name)
    if (name, method) not in _MADE:
        _MADE[name, method] = _on_detector(method)
    return _MADE[name, method]


def _on_detector(method: type[Method]) -> type[Method]:
    return type(f"OnDetector[{method.name}]", (OnDetector, method), {"__doc__": method.__doc__})


def for_detectors(config: MethodConfig) -> MethodConfig:
    """A method's config with the defaults for detectors in place of its hyper-parameters, not its parts'."""
    update = dict(_DEFAULTS.get(type(config), {}))
    if not config.task_weight:  # a part of a sum
        update.pop("task_weight", None)
    return config.model_copy(update=update)


def default_config(name: str) -> MethodConfig:
    """A method's config with its defaults for detectors, its parts' too."""
    return change_all(get_method(name).Config(), for_detectors)


def build_method(config: MethodConfig, student: nn.Module, teacher: nn.Module | None) -> Method:
    """The method of a config, for a pair of detectors, which stay as they are.

    Raises:
        ConfigError: a teacher is missing, or the detectors do not suit the method or each other.
    """
    method = get_method(config.method_name)
    if config.label_smoothing:
        raise ConfigError("method.label_smoothing: a detector's own losses take none")
    if not method.needs_teacher:
        return method(config, student, None, DataInfo((3, 64, 64)))
    if teacher is None:
        raise ConfigError(f"method {config.method_name!r} needs a teacher, and none was given")
    parts = list(method.Parts.values()) if issubclass(method, Sum) else [method]
    two_stage = is_two_stage(student), is_two_stage(teacher)
    for part in parts:
        if part.kind != "logit":
            continue
        if two_stage[0] != two_stage[1]:
            raise ConfigError(
                f"method {part.name!r} compares logits, and only one of the detectors has proposals"
            )
        if issubclass(part, LogitMethod) and not two_stage[0]:
            raise ConfigError(
                f"method {part.name!r} compares distributions over classes; one-stage detectors have a "
                "sigmoid for each class: use 'bckd'"
            )
        if issubclass(part, BCKD) and two_stage[0]:
            raise ConfigError("method 'bckd' is for one-stage detectors; use 'kd' or 'dkd' with proposals")
    views = Pyramid(student), Pyramid(teacher)
    if len(views[0].names) != len(views[1].names) and any(part.kind == "feature" for part in parts):
        raise ConfigError(
            f"student and teacher have levels {list(views[0].names)} and {list(views[1].names)}: as many are "
            "needed, or a choice in method.student_taps and method.teacher_taps"
        )
    # Adapters work on maps of any size; what they are built from says the channels alone.
    return method(config, *views, DataInfo((3, 64, 64)))


def reads_logits(method: Method) -> bool:
    """Whether a method, or a part of a sum, reads logits."""
    parts = list(method.parts.values()) if isinstance(method, Sum) else [method]
    return any(isinstance(part, Method) and part.kind == "logit" for part in parts)
