"""Recipes: functions that return the `ClassificationConfig` of a known setting, found by dotted names.

`FAMILY.METHOD.TEACHER_STUDENT` distils a pair with any method (`A+B` adds methods up, `A-B` wraps A around B,
`dot-B` trains B with DOT); the teacher `self` is the student's own moving average. `FAMILY.teacher.MODEL` and
`FAMILY.student.MODEL` train one model alone. A family may have short names for some models. Every field can
be overridden afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from mdistiller.config import SELF
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import MethodConfig, get_method, list_methods
from mdistiller.methods.compose import change_all
from mdistiller.models import ModelConfig, list_models
from mdistiller.recipes import cifar100, digits, folder, imagenet
from mdistiller.tasks.classification.config import ClassificationConfig

ALONE = ("teacher", "student")
DOT_DELTA = 0.075
"""The paper's for CIFAR-100 and Tiny-ImageNet."""
DOT = {
    "name": "dot",
    "kind": "optimizer",
    "year": 2023,
    "student_taps": [],
    "teacher_taps": [],
    "extra_parameters": 0,
    "paper": "Zhao, Cui, Song, Liang: DOT: A Distillation-Oriented Trainer, ICCV 2023",
}
"""What is known of it in a list of methods; it is a way to optimise any of them."""


def _defaults(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    return method


def _untrained(name: str) -> ModelConfig:
    return ModelConfig(name=name)


class Family(NamedTuple):
    """Recipes over one data set.

    alone: the config that trains one model on the labels; a pair's differs in teacher and method only.
    pairs: (teacher, student) that are listed.
    tune: a method's hyper-parameters for a pair.
    models: short names of models.
    teacher: the teacher's config by its name, with weights where there are published ones.
    dot_delta: DOT's.
    """

    alone: Callable[[str], ClassificationConfig]
    pairs: tuple[tuple[str, str], ...]
    tune: Callable[[MethodConfig, str, str], MethodConfig] = _defaults
    models: Mapping[str, str] = {}
    teacher: Callable[[str], ModelConfig] = _untrained
    dot_delta: float = DOT_DELTA


FAMILIES = {
    "cifar100": Family(cifar100.alone, tuple(cifar100.PAIRS), cifar100.tune),
    "digits": Family(digits.alone, digits.PAIRS),
    "folder": Family(folder.alone, folder.PAIRS),
    "imagenet": Family(
        imagenet.alone,
        tuple(imagenet.PAIRS),
        imagenet.tune,
        imagenet.MODELS,
        imagenet.teacher,
    ),
}


def list_recipes() -> list[str]:
    """Recipe names of the known pairs; any other two models make a pair as well."""
    names = []
    for family, about in FAMILIES.items():
        pairs = about.pairs
        for method in (*list_methods(), "dot"):
            if method == "dot" or get_method(method).needs_teacher:
                names += [f"{family}.{method}.{teacher}_{student}" for teacher, student in pairs]
        names += [f"{family}.teacher.{m}" for m in dict.fromkeys(teacher for teacher, _ in pairs)]
        names += [f"{family}.student.{m}" for m in dict.fromkeys(student for _, student in pairs)]
    return names


def get_recipe(name: str, method: str | None = None) -> ClassificationConfig:
    """The config of a recipe name, with another method in its place if one is given.

    Raises:
        UnknownNameError: no such family, method or model; the message has the nearest names.
        ConfigError: the name is not of the form FAMILY.METHOD.MODELS.
    """
    if method is not None:
        name = with_method(name, method)
    family, _, rest = name.partition(".")
    if family not in FAMILIES:
        raise UnknownNameError(
            "recipe", name, list_recipes(), "All: mdistiller list recipes; detectors: mdistiller detect train"
        )
    chosen, _, models = rest.partition(".")
    if not chosen or not models:
        raise ConfigError(
            f"recipe {name!r}: a recipe is {family}.METHOD.TEACHER_STUDENT, {family}.teacher.MODEL "
            f"or {family}.student.MODEL"
        )
    about = FAMILIES[family]
    if chosen in ALONE:
        if not _is_model(models, about.models):
            raise UnknownNameError("model", models, [*about.models, *list_models()])
        alone = about.alone(about.models.get(models, models))
        return alone.model_copy(update={"recipe": name})
    teacher, student = (about.models.get(model, model) for model in split_pair(models, about.models))
    config = set_method(about.alone(student), chosen, about.dot_delta)
    if not get_method(config.method.method_name).needs_teacher:
        raise ConfigError(f"recipe {name!r}: method {chosen!r} takes no teacher; use {family}.student.MODEL")
    update = {
        "recipe": name,
        "teacher": _untrained(SELF) if teacher == SELF else about.teacher(teacher),
        "method": change_all(config.method, lambda part: about.tune(part, teacher, student)),
        "ema": 0.999 if teacher == SELF else None,
    }
    return config.model_copy(update=update)


def set_method(config: ClassificationConfig, name: str, dot_delta: float = DOT_DELTA) -> ClassificationConfig:
    """The config with another method, with its default hyper-parameters.

    `dot` is KD, and `dot-METHOD` any method, under DOT, which is a matter of the optimizer.
    """
    dot, base = _without_dot(name)
    update: dict[str, Any] = {"method": get_method(base).Config()}
    if dot:
        update["optim"] = config.optim.model_copy(update={"name": "dot", "delta": dot_delta})
    return config.model_copy(update=update)


def _without_dot(name: str) -> tuple[bool, str]:
    """Whether a method's name asks for DOT, and the method trained under it."""
    first, _, rest = name.partition("-")
    return (True, rest or "kd") if first == "dot" else (False, name)


def with_method(name: str, method: str) -> str:
    """A recipe's name with another method: `cifar100.kd.PAIR` and `dkd` give `cifar100.dkd.PAIR`.

    Raises:
        UnknownNameError: no such method.
        ConfigError: the recipe trains one model alone, so there is no pair to distil.
    """
    family, _, rest = name.partition(".")
    old, _, models = rest.partition(".")
    get_method(_without_dot(method)[1])
    if old in ALONE:
        raise ConfigError(
            f"method: recipe {name!r} trains one model alone; "
            f"to distil, use {family}.{method}.TEACHER_STUDENT"
        )
    return f"{family}.{method}.{models}" if models else name


def split_pair(pair: str, short: Collection[str] = ()) -> tuple[str, str]:
    """`wrn_40_2_wrn_16_2` as its two models: the first underscore with a known model on either side.

    short: further names that models go by.

    Raises:
        UnknownNameError: no underscore separates two models.
    """
    parts = pair.split("_")
    halves = [("_".join(parts[:i]), "_".join(parts[i:])) for i in range(1, len(parts))]
    known = [(_is_model(t, short) or t == SELF, _is_model(s, short)) for t, s in halves]
    if (True, True) in known:
        return halves[known.index((True, True))]
    hint = "All models: mdistiller list models"
    # Where one half is a model, the other is what is wrong.
    for place, what, half in (((False, True), "teacher", 0), ((True, False), "student", 1)):
        if known.count(place) == 1:
            raise UnknownNameError(what, halves[known.index(place)][half], [*short, *list_models()], hint)
    pairs = [f"{t}_{s}" for about in FAMILIES.values() for t, s in about.pairs]
    raise UnknownNameError("pair of models TEACHER_STUDENT", pair, pairs, hint)


def _is_model(name: str, short: Collection[str]) -> bool:
    return name in short or name in list_models() or name.startswith(("timm/", "torchvision/"))
