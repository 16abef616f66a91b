"""Methods that segmentation models take: classification's own classes on pixels, and those made for masks."""

import math

from torch import nn

from mdistiller import methods
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import AT, FitNet, LogitMethod, Method, MethodConfig, NoDistillation, ReviewKD
from mdistiller.methods.changes import with_defaults
from mdistiller.methods.compose import Sum, SumConfig, check_sum, method_config, needs_teacher
from mdistiller.methods.features import TapPair, match_stages, stages, to_map
from mdistiller.methods.tokens import Tokens, TokensConfig, last_patches
from mdistiller.taps import logits_if_any, probe, tap_layouts
from mdistiller.tasks.segmentation.maps import CIRKD, CWD, SKD
from mdistiller.tasks.segmentation.pixels import PixelMethod
from mdistiller.types import DataInfo


class StageFitNet(FitNet):
    """Regresses the teacher's last stage, which the head reads, from the student's."""

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        return stages(student)[-1:], stages(teacher)[-1:]


class StageReviewKD(ReviewKD):
    """Guides each stage of the student's backbone and all deeper ones by each stage of the teacher's."""

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        return match_stages(student, teacher)


class StageTokens(Tokens):
    """Matches the teacher's last patches and the student's stage whose map is nearest to theirs in size."""

    def __init__(self, config: TokensConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        last, sides = last_patches(teacher), []
        for model, names in ((student, stages(student)), (teacher, (last,))):
            found = probe(model, names, data._replace(logits_of=logits_if_any)).features
            layouts = tap_layouts(model, found, data)
            sides.append({n: to_map(x, layouts[n], data.input_shape).shape[3] for n, x in found.items()})
        ours, theirs = sides
        nearest = min(reversed(ours), key=lambda name: abs(math.log(ours[name] / theirs[last])))
        super().__init__(config, student, teacher, data._replace(taps=((nearest,), (last,))))


_OWN: dict[str, type[Method]] = {
    **{"cwd": CWD, "skd": SKD, "cirkd": CIRKD},
    **{"fitnet": StageFitNet, "at": AT, "reviewkd": StageReviewKD, "tokens": StageTokens},
}

# Defaults that differ from classification's. KD, FitNet and AT: CIRKD's code. The others have no published
# value: temperature 1 as of KD, and no warm-up.
_DEFAULTS: dict[type[MethodConfig], dict[str, object]] = {
    methods.KDConfig: {"task_weight": 1.0, "weight": 1.0, "temperature": 1.0},
    methods.DKDConfig: {"alpha": 1.0, "beta": 2.0, "temperature": 1.0, "warmup": 0.0},
    methods.ReviewKDConfig: {"weight": 1.0, "warmup": 0.0},
    methods.FitNetConfig: {"weight": 10.0, "relu": False},
    methods.ATConfig: {"weight": 10_000.0},
    TokensConfig: {"global_weight": 0.0},
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
        check_sum(name, get_method)
        return SegmentationSum
    if name in _OWN:
        return _OWN[name]
    if name in list_segmentation_methods():
        return methods.get_method(name)
    if name.partition("-")[0] in methods.list_methods():
        raise ConfigError(
            f"method {name!r} compares whole images and not their pixels; allowed for segmentation: "
            f"{', '.join(list_segmentation_methods())}, and their sums"
        )
    raise UnknownNameError("method for segmentation", name, list_segmentation_methods())


class SegmentationSumConfig(SumConfig):
    """Settings of a sum of methods for segmentation."""

    @classmethod
    def find(cls, name: str) -> type[Method]:
        return get_method(name)


class SegmentationSum(Sum):
    """Sum of methods for segmentation."""

    Config = SegmentationSumConfig


def default_config(name: str) -> MethodConfig:
    """Returns a method's config with the defaults for segmentation."""
    return with_defaults(method_config(name, get_method), _DEFAULTS)


def build_method(
    config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
) -> Method:
    """Builds the method of a config for a pair of models, which are not changed.

    Raises:
        ConfigError: a teacher is missing, or the models do not suit the method or each other.
    """
    if teacher is None and needs_teacher(config.method_name, get_method):
        raise ConfigError(f"method {config.method_name!r} needs a teacher, and none was given")
    if isinstance(config, SegmentationSumConfig):
        parts = [build_method(part, student, teacher, data) for part in config.parts().values()]
        return SegmentationSum(parts, config)
    method = get_method(config.method_name)
    only_labeled = data._replace(only_labeled=True)
    built = method(config, student, teacher if method.needs.teacher else None, only_labeled)
    return PixelMethod(built) if isinstance(built, LogitMethod) else built
