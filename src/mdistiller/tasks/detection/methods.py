"""Methods that detectors take: classification's own classes, and those made for detectors."""

from typing import Any

from torch import nn

from mdistiller import methods
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import FitNet, LogitMethod, Method, MethodConfig, NoDistillation, ReviewKD
from mdistiller.methods.compose import Sum, change_all, sum_of
from mdistiller.tasks.detection.bckd import BCKD
from mdistiller.tasks.detection.detector import Pyramid, is_two_stage
from mdistiller.tasks.detection.fgfi import FGFI, LevelMethod
from mdistiller.types import DataInfo


class LevelFitNet(LevelMethod, FitNet):
    """Regresses the teacher's levels from the student's."""


class LevelReviewKD(LevelMethod, ReviewKD):
    """Guides the student's level and all deeper ones by every level of the teacher."""


# Adapters work on maps of any size and depend on the channels only.
DATA = DataInfo((3, 64, 64))

_OWN: dict[str, type[Method]] = {"bckd": BCKD, "fgfi": FGFI, "fitnet": LevelFitNet, "reviewkd": LevelReviewKD}
_SUMS: dict[tuple[Any, ...], type[Method]] = {}

# Defaults that differ from classification's: the reference's values for KD and DKD, no warm-up, and no ReLU
# behind FitNet's regressor, as levels have both signs.
_DEFAULTS: dict[type[MethodConfig], dict[str, Any]] = {
    methods.KDConfig: {"task_weight": 1.0, "weight": 1.0, "temperature": 1.0},
    methods.DKDConfig: {"alpha": 1.0, "beta": 0.25, "temperature": 1.0, "warmup": 0.0},
    methods.ReviewKDConfig: {"weight": 1.0, "warmup": 0.0},
    methods.FitNetConfig: {"weight": 1.0, "relu": False},
}


def list_detection_methods() -> list[str]:
    """Lists the names of the methods that detectors take, sorted; `A+B` adds methods up."""
    taken = LogitMethod | NoDistillation
    return sorted([*_OWN, *(n for n in methods.list_methods() if issubclass(methods.get_method(n), taken))])


def get_method(name: str) -> type[Method]:
    """Returns the class of a method for detectors by its name, or the sum `A+B`.

    Raises:
        UnknownNameError: no such method for detectors.
        ConfigError: a method appears twice in a sum.
    """
    if "+" in name:
        # A config belongs to a method by its class, so a sum of the same classes is made once.
        key = (name, *map(get_method, name.split("+")))
        if key not in _SUMS:
            _SUMS[key] = sum_of(name, get_method)
        return _SUMS[key]
    if name not in list_detection_methods():
        raise UnknownNameError("method for detectors", name, list_detection_methods())
    return _OWN[name] if name in _OWN else methods.get_method(name)


def default_config(name: str) -> MethodConfig:
    """Returns a method's config with the defaults for detectors."""
    return change_all(get_method(name).Config(), _for_detectors)


def _for_detectors(config: MethodConfig) -> MethodConfig:
    update = dict(_DEFAULTS.get(type(config), {}))
    if not config.task_weight:  # a part of a sum
        update.pop("task_weight", None)
    return config.model_copy(update=update)


def build_method(config: MethodConfig, student: nn.Module, teacher: nn.Module | None) -> Method:
    """Builds the method of a config for a pair of detectors, which are not changed.

    Raises:
        ConfigError: a teacher is missing, or the detectors do not suit the method or each other.
    """
    method = get_method(config.method_name)
    if not method.needs_teacher:
        return method(config, student, None, DATA)
    if teacher is None:
        raise ConfigError(f"method {config.method_name!r} needs a teacher, and none was given")
    two_stage = is_two_stage(student), is_two_stage(teacher)
    for part in method.Parts.values() if issubclass(method, Sum) else [method]:
        if part.declares_taps() or not part.needs_teacher:
            continue
        what = f"method {part.name!r} compares"
        if two_stage[0] != two_stage[1]:
            raise ConfigError(f"{what} logits, and only one of the detectors has proposals")
        if issubclass(part, LogitMethod) and not two_stage[0]:
            each = "one-stage detectors have a sigmoid for each class: use 'bckd'"
            raise ConfigError(f"{what} distributions over classes; {each}")
        if issubclass(part, BCKD) and two_stage[0]:
            raise ConfigError("method 'bckd' is for one-stage detectors; use 'kd' or 'dkd' with proposals")
    return method(config, Pyramid(student), Pyramid(teacher), DATA)


def reads_logits(method: Method) -> bool:
    """Whether a method, or a part of a sum, reads logits."""
    if isinstance(method, Sum):
        return any(reads_logits(part) for part in method.parts.values())  # type: ignore[arg-type]
    return method.needs_teacher and not (method.student_taps or method.teacher_taps)
