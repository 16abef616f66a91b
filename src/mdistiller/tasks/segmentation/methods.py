"""Methods that segmentation models take: classification's own classes on pixels, and those made for masks."""

from typing import Any

from torch import nn

from mdistiller import methods
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import AT, FitNet, LogitMethod, Method, MethodConfig, NoDistillation, ReviewKD
from mdistiller.methods.compose import sum_of, with_defaults
from mdistiller.methods.features import TapPair, match_stages, stages
from mdistiller.tasks.segmentation.cirkd import CIRKD
from mdistiller.tasks.segmentation.cwd import CWD
from mdistiller.tasks.segmentation.pixels import PixelMethod
from mdistiller.tasks.segmentation.skd import SKD
from mdistiller.types import DataInfo


class StageFitNet(FitNet):
    """Regresses the teacher's last stage, which the head reads, from the student's."""

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        return stages(student)[-1:], stages(teacher)[-1:]


class StageReviewKD(ReviewKD):
    """Guides each stage of the student's backbone and all deeper ones by each stage of the teacher's."""

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        return match_stages(student, teacher)


_OWN: dict[str, type[Method]] = {
    **{"cwd": CWD, "skd": SKD, "cirkd": CIRKD},
    **{"fitnet": StageFitNet, "at": AT, "reviewkd": StageReviewKD},
}
# A config belongs to a method by its class, so a class is made once.
_MADE: dict[Any, type[Method]] = {}

# Defaults that differ from classification's. KD, FitNet and AT: CIRKD's code. The others have no published
# value: temperature 1 as of KD, and no warm-up.
_DEFAULTS: dict[type[MethodConfig], dict[str, Any]] = {
    methods.KDConfig: {"task_weight": 1.0, "weight": 1.0, "temperature": 1.0},
    methods.DKDConfig: {"alpha": 1.0, "beta": 2.0, "temperature": 1.0, "warmup": 0.0},
    methods.ReviewKDConfig: {"weight": 1.0, "warmup": 0.0},
    methods.FitNetConfig: {"weight": 10.0, "relu": False},
    methods.ATConfig: {"weight": 10_000.0},
}


def list_segmentation_methods() -> list[str]:
    """Lists the names of the methods that segmentation models take, sorted; `A+B` adds methods up."""
    taken = LogitMethod | NoDistillation
    return sorted({*_OWN, *(n for n in methods.list_methods() if issubclass(methods.get_method(n), taken))})


def get_method(name: str) -> type[Method]:
    """Returns the class of a method for segmentation by its name, or the sum `A+B`.

    Raises:
        UnknownNameError: no such method.
        ConfigError: a method that is not for segmentation, or that appears twice in a sum.
    """
    if "+" in name:
        key = (name, *map(get_method, name.split("+")))
        if key not in _MADE:
            _MADE[key] = sum_of(name, get_method)
        return _MADE[key]
    if name in _OWN:
        return _OWN[name]
    if name in list_segmentation_methods():
        base = methods.get_method(name)
        if not issubclass(base, LogitMethod):
            return base
        if base not in _MADE:
            attributes = {"__doc__": base.__doc__, "Config": base.Config, "name": base.name}
            _MADE[base] = type(f"Pixels[{base.__name__}]", (PixelMethod, base), attributes)
        return _MADE[base]
    if name.partition("-")[0] in methods.list_methods():
        raise ConfigError(
            f"method {name!r} compares whole images and not their pixels; allowed for segmentation: "
            f"{', '.join(list_segmentation_methods())}, and their sums"
        )
    raise UnknownNameError("method for segmentation", name, list_segmentation_methods())


def default_config(name: str) -> MethodConfig:
    """Returns a method's config with the defaults for segmentation."""
    return with_defaults(get_method(name).Config(), _DEFAULTS)


def build_method(
    config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
) -> Method:
    """Builds the method of a config for a pair of models, which are not changed.

    Raises:
        ConfigError: a teacher is missing, or the models do not suit the method or each other.
    """
    method = get_method(config.method_name)
    if method.needs_teacher and teacher is None:
        raise ConfigError(f"method {config.method_name!r} needs a teacher, and none was given")
    return method(config, student, teacher if method.needs_teacher else None, data)
