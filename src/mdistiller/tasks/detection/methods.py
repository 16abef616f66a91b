"""Methods that detectors take: classification's own classes, and those made for detectors."""

import re

import torch
from torch import nn

from mdistiller import methods
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import LogitMethod, Method, MethodConfig, NoDistillation
from mdistiller.methods.base import own_example
from mdistiller.methods.changes import with_defaults
from mdistiller.methods.compose import Sum, SumConfig, check_sum, method_config, needs_teacher
from mdistiller.methods.features import FeatureConfig, FeatureMethod
from mdistiller.methods.several import Several
from mdistiller.tasks.detection.adapter import DetectorAdapter
from mdistiller.tasks.detection.adapters import BackboneAdapter, adapter_of
from mdistiller.tasks.detection.dense_methods import BCKD, CrossKD
from mdistiller.tasks.detection.level_methods import CWD, FGD, FGFI, MGD, PKD
from mdistiller.tasks.detection.levels import (
    OBJECTS,
    OVERLAP,
    LevelMethod,
    Pyramid,
    octave,
    pair_levels,
    say_pairs,
)
from mdistiller.tasks.detection.queries import LD, DETRDistill, QueryMethod
from mdistiller.types import DataInfo, Line

_STAGE = re.compile(r"stage\d+")
# Adapters work on maps of any size and depend on the channels only.
DATA = DataInfo((3, 512, 512), are_maps=True)
_SIDE = 512  # of the image in which anchors are compared

_OWN: dict[str, type[Method]] = {
    "bckd": BCKD,
    "crosskd": CrossKD,
    "cwd": CWD,
    "detrdistill": DETRDistill,
    "fgd": FGD,
    "fgfi": FGFI,
    "ld": LD,
    "mgd": MGD,
    "pkd": PKD,
}

# Defaults that differ from classification's: the reference's values for KD and DKD, no warm-up, and no ReLU
# behind FitNet's regressor, as levels have both signs.
_DEFAULTS: dict[type[MethodConfig], dict[str, object]] = {
    methods.KDConfig: {"task_weight": 1.0, "weight": 1.0, "temperature": 1.0},
    methods.DKDConfig: {"alpha": 1.0, "beta": 0.25, "temperature": 1.0, "warmup": 0.0},
    methods.ReviewKDConfig: {"weight": 1.0, "warmup": 0.0},
    methods.FitNetConfig: {"weight": 1.0, "relu": False},
    methods.TokensConfig: {"global_weight": 0.0},
}


def why_not(method: type[Method]) -> str | None:
    """Returns the reason, by what a method declares, for which detectors do not take it; None: they do."""
    if issubclass(method, LogitMethod | NoDistillation):
        return None
    if not issubclass(method, FeatureMethod):
        return "it is neither a LogitMethod nor a FeatureMethod"
    if not method.in_pairs:
        return "its taps are no pairs, as the levels of two detectors are"
    example = own_example(method)
    taps = example.student_taps if example is not None else ()
    reads_pooled = method.taps_by_default in ("pooled", "embedding")
    if reads_pooled or (taps and not any(_STAGE.fullmatch(tap) for tap in taps)):
        return "it reads other taps than stages, for which the levels of a detector stand"
    needs = [name for name in ("index", "classifier", "labels") if getattr(method.needs, name)]
    return f"it needs {needs[0]}, which images with several objects do not give" if needs else None


def list_detection_methods() -> list[str]:
    """Lists the names of the methods that detectors take, sorted; `A+B` adds methods up."""
    return sorted([*_OWN, *(n for n in methods.list_methods() if why_not(methods.get_method(n)) is None)])


def takes_softmax(name: str) -> bool:
    """Whether a method suits detectors with a softmax over classes, such as those with proposals."""
    method = get_method(name)
    if issubclass(method, QueryMethod):
        return False
    return not _compares_logits(method) or method.needs.one_class


def get_method(name: str) -> type[Method]:
    """Returns the class of a method for detectors by its name, or the sum `A+B`.

    A feature method is given the levels of the detectors in place of the stages of classifiers.

    Raises:
        UnknownNameError: no such method for detectors.
        ConfigError: a method appears twice in a sum.
    """
    if "+" in name:
        check_sum(name, get_method)
        return DetectionSum
    if name in _OWN:
        return _OWN[name]
    if name not in list_detection_methods():
        hint = "A method of your own: --plugin FILE, with a FeatureMethod or LogitMethod"
        if name in methods.list_methods():
            hint = f"{name} is not for detectors: {why_not(methods.get_method(name))}"
        raise UnknownNameError("method for detectors", name, list_detection_methods(), hint)
    return methods.get_method(name)


class DetectionSumConfig(SumConfig):
    """Settings of a sum of methods for detectors."""

    @classmethod
    def find(cls, name: str) -> type[Method]:
        return get_method(name)


class DetectionSum(Sum):
    """Sum of methods for detectors."""

    Config = DetectionSumConfig


def describe(name: str) -> Line:
    """Returns the properties of a method for a list: what it compares, for which detectors, and its paper."""
    method = get_method(name)
    reads = {"levels": issubclass(method, FeatureMethod), "logits": _compares_logits(method)}
    reads["queries"] = issubclass(method, QueryMethod)
    detectors = "set" if reads["queries"] else "all"
    if reads["logits"]:
        detectors = "softmax" if method.needs.one_class else "sigmoid"
    compares = [what for what, is_read in reads.items() if is_read]
    about = {"year": method.card.year, "compares": compares, "detectors": detectors}
    return {"name": name, **about, "paper": method.card.paper, "when": method.card.use}


def default_config(name: str) -> MethodConfig:
    """Returns a method's config with the defaults for detectors."""
    return with_defaults(method_config(name, get_method), _DEFAULTS)


def build_method(config: MethodConfig, student: nn.Module, teacher: nn.Module | None) -> Method:
    """Builds the method of a config for a pair of detectors, which are not changed.

    Raises:
        ConfigError: a teacher is missing, or the detectors do not suit the method or each other.
    """
    if teacher is None and needs_teacher(config.method_name, get_method):
        raise ConfigError(f"method {config.method_name!r} needs a teacher, and none was given")
    if isinstance(config, DetectionSumConfig):
        parts = [build_method(part, student, teacher) for part in config.parts().values()]
        whole = DetectionSum(parts, config)
        _check_grids(whole, adapter_of(student))
        return whole
    method, ours = get_method(config.method_name), adapter_of(student)
    if teacher is None or not method.needs.teacher:
        return method(config, student, None, DATA)
    theirs = adapter_of(teacher)
    theirs.names = getattr(config, "teacher_taps", ())
    if _compares_logits(method):
        _check_logits(method, ours, theirs)
    for whose, adapter in (("student", ours), ("teacher", theirs)):
        lacks = [name for name in method.teacher_taps if name not in adapter.query_taps]
        if issubclass(method, QueryMethod) and lacks:
            has = "D-FINE" if adapter.query_taps else "detectors that predict a set, as transformers/d_fine"
            what = f"method {method.name!r} reads {lacks[0]!r}, which the {whose} lacks"
            raise ConfigError(f"{what}; allowed: {has}")
    data, levels = DATA, dict(theirs.levels)
    if isinstance(config, FeatureConfig):
        student_taps, teacher_taps = config.student_taps, config.teacher_taps
        if not (student_taps and teacher_taps):
            pairs = pair_levels(ours.levels, theirs.levels)
            if not isinstance(theirs, BackboneAdapter):  # which has one level
                say_pairs(pairs, ours.levels, theirs.levels)
            pairs = method.choose(pairs, ours.kind) if issubclass(method, LevelMethod) else pairs
            defaults = tuple(name for name, _ in pairs), tuple(name for _, name in pairs)
            data = DATA._replace(taps=defaults)
            student_taps, teacher_taps = student_taps or defaults[0], teacher_taps or defaults[1]
        # Layers are built for what a step has: the teacher's levels on the student's grids.
        for mine, name in zip(student_taps, teacher_taps, strict=False):
            if mine in ours.levels and name in levels:
                levels[name] = levels[name]._replace(stride=ours.levels[mine].stride)
    built = method(config, Pyramid(ours.levels, ours.kind), Pyramid(levels), data)
    _check_grids(built, ours)
    return built


def _check_logits(method: type[Method], ours: DetectorAdapter, theirs: DetectorAdapter) -> None:
    what = f"method {method.name!r} compares"
    levels = "methods that compare levels, such as 'pkd', take detectors of two kinds"
    for whose, adapter in (("student", ours), ("teacher", theirs)):
        if adapter.activation is None:
            raise ConfigError(
                f"{what} logits row by row, and those of the {whose} have no rows in common with another "
                f"detector's ({type(adapter).__name__}.activation is None); {levels}"
            )
    if ours.has_proposals != theirs.has_proposals:
        raise ConfigError(f"{what} logits, and only one of the detectors has proposals; {levels}")
    if ours.activation != theirs.activation:
        both = f"the student's are of a {ours.activation}, the teacher's of a {theirs.activation}"
        raise ConfigError(f"{what} logits, and {both}; {levels}")
    if method.needs.one_class and ours.activation == "sigmoid":
        raise ConfigError(
            f"{what} distributions over classes; these detectors have a sigmoid for each class: use 'bckd'"
        )
    if not method.needs.one_class and ours.activation == "softmax":
        raise ConfigError(
            f"{what} a sigmoid for each class; these detectors have a softmax over classes: use 'kd' or 'dkd'"
        )
    if not ours.has_proposals:
        _check_anchors(what, ours, theirs, levels)


def _check_anchors(what: str, ours: DetectorAdapter, theirs: DetectorAdapter, advice: str) -> None:
    device = next(ours.model.parameters(), torch.empty(0)).device
    images = ours.prepare([torch.zeros(3, _SIDE, _SIDE, device=device)])
    first, second = (adapter.anchors(images)[0].cpu() for adapter in (ours, theirs))
    if len(first) == len(second) and not (wrong := (first - second).abs().amax(1) > 1e-3).any():
        return
    if len(first) != len(second):
        height, width = images.tensors.shape[2:]
        difference = (
            f"the student has {len(first)} in an image of {height} x {width}, the teacher {len(second)}"
        )
    else:
        number = int(wrong.nonzero()[0])
        boxes = [[round(x, 1) for x in anchors[number].tolist()] for anchors in (first, second)]
        difference = f"number {number} is {boxes[0]} in the student and {boxes[1]} in the teacher"
    raise ConfigError(f"{what} anchor by anchor, and {difference}; allowed: equal ones; {advice}")


def check_unlabeled(method: Method) -> None:
    """Raises a ConfigError unless a method compares levels alone, and no objects, which may be unknown."""
    for part in _parts(method):
        taps = (*part.student_taps, *part.teacher_taps)
        if not isinstance(part, FeatureMethod) or any(tap.endswith((OBJECTS, OVERLAP)) for tap in taps):
            raise ConfigError(
                f"unlabeled images: method {part.config.method_name!r} does not compare levels alone; "
                "allowed: pkd, cwd, mgd, fitnet and others that do, or a pseudo_score (--data.pseudo-score)"
            )


def _parts(method: Method) -> list[Method]:
    if isinstance(method, Several):
        return [part for own in method.parts for part in _parts(own)]
    parts = method.parts.values() if isinstance(method, Sum) else [method]
    return [part for part in parts if isinstance(part, Method)]


def reads_logits(method: Method) -> bool:
    """Whether a method, or a part of a sum, reads logits."""
    return any(part.needs.teacher and _compares_logits(type(part)) for part in _parts(method))


def _compares_logits(method: type[Method]) -> bool:
    return issubclass(method, LogitMethod) or getattr(method, "reads_logits", False)


def held_layer(method: Method) -> int | None:
    """Returns the convolution of the student's head whose output a method, or a part of a sum, reads.

    Raises:
        ConfigError: the parts read different ones.
    """
    found = {int(part.settled["hold"]) for part in _parts(method) if isinstance(part, CrossKD)}
    if len(found) > 1:
        raise ConfigError(f"method {method.name!r}: hold: got {sorted(found)}; allowed: one number")
    return next(iter(found), None)


def tap_pairs(method: Method) -> dict[str, str]:
    """Returns the teacher's taps of a method, each with the student's level whose grid it gets."""
    return {theirs: ours for ours, theirs in _all_pairs(method)}


def _all_pairs(method: Method) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for part in _parts(method):
        if isinstance(part, FeatureMethod):  # taps that are derived from the student's come after them
            pairs += zip(part.student_taps, part.teacher_taps, strict=False)
        else:
            pairs += [(tap, tap) for tap in part.teacher_taps]
    return pairs


def _check_grids(method: Method, student: DetectorAdapter) -> None:
    on: dict[str, str] = {}
    for ours, theirs in _all_pairs(method):
        other = on.setdefault(theirs, ours)
        if ours in student.levels:
            strides = [student.levels[name].stride for name in (other, ours)]
            if octave(strides[0]) != octave(strides[1]):
                raise ConfigError(
                    f"the teacher's level {theirs!r} is compared with the student's {other!r} and {ours!r}, "
                    f"of strides {strides[0]:g} and {strides[1]:g}; allowed: levels of one stride"
                )
