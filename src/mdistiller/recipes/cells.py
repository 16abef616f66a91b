"""Cells of an experiment, each of which is one run per seed, at three scales.

`paper` is the full recipe; `small` the same on a part of CIFAR-100 for a few epochs, for a CPU; `smoke` tiny
models on the embedded digits for one epoch, which only shows that everything works.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from mdistiller.methods import MethodConfig
from mdistiller.recipes import get_recipe, imagenet
from mdistiller.recipes.family import split_pair
from mdistiller.tasks.classification.config import ClassificationConfig

Scale = Literal["paper", "small", "smoke"]
Family = Literal["cifar100", "imagenet"]

SMALL, SMOKE = ("resnet56_resnet20",), ("resnet14_resnet8",)
"""Pairs of the smaller scales, unless an experiment has its own."""


def classification_recipe(name: str) -> ClassificationConfig:
    """Returns the config of a classification recipe."""
    config = get_recipe(name)
    assert isinstance(config, ClassificationConfig)
    return config


def models_of(pair: str) -> tuple[str, str]:
    """Splits a cell's pair into teacher and student, by their names in recipes."""
    return split_pair(pair, imagenet.MODELS)


class Teacher(NamedTuple):
    """Teacher of a cell.

    key: name of its weights, made of the model and of its training.
    config: its training, where no weights are given; None for a pretrained model.
    """

    key: str
    config: ClassificationConfig | None


class Cell(NamedTuple):
    """One accuracy of a table.

    pair: TEACHER_STUDENT.
    setting: the column. The same setting of the same pair is the same run in every experiment.
    config: the run, without its seed, folder, data folder and teacher's weights.
    teacher: None for a student alone.
    published: top-1 in the paper, in percent; None if unknown, or at another scale.
    checked: whether `published` was read in the paper or the authors' README, not noted from memory.
    """

    pair: str
    setting: str
    config: ClassificationConfig
    teacher: Teacher | None
    published: float | None
    checked: bool


class Builder:
    """Builds the cells of one experiment at one scale.

    Args:
        scale: the scale of all cells.
        family: the recipes' data at the paper's scale; the smaller scales use CIFAR-100 and digits.
    """

    def __init__(self, scale: Scale, family: Family = "cifar100") -> None:
        self.scale: Scale = scale
        self.family = {"paper": family, "small": "cifar100", "smoke": "digits"}[scale]
        self.cells: list[Cell] = []

    def add(
        self,
        pair: str,
        setting: str,
        method: str | MethodConfig,
        published: float | None = None,
        *,
        checked: bool = False,
        noise: float = 0.0,
        policy: Literal["none", "autoaugment"] = "none",
        early: bool = False,
    ) -> None:
        """Adds a cell.

        Args:
            pair: TEACHER_STUDENT.
            setting: its column.
            method: a method's name or its config; `none` for the student alone.
            published: the paper's accuracy.
            checked: whether it was read there.
            noise: fraction of wrong training labels.
            policy: augmentation policy.
            early: end the teacher's training after a quarter of the epochs.
        """
        teacher, student = models_of(pair)
        name = method if isinstance(method, str) else method.method_name
        config = classification_recipe(
            f"{self.family}.student.{student}" if name == "none" else f"{self.family}.{name}.{pair}"
        )
        if isinstance(method, MethodConfig):
            config = config.replace(method=method)
        config = _scaled(_with(config, noise, policy), self.scale)
        taught_by = self._teacher(teacher, noise, early) if config.teacher is not None else None
        known = published if self.scale == "paper" else None
        self.cells.append(Cell(pair, setting, config, taught_by, known, checked))

    def _teacher(self, name: str, noise: float, early: bool) -> Teacher:
        if self.family == "imagenet":
            return Teacher(name, None)
        config, key = classification_recipe(f"{self.family}.teacher.{name}"), name
        if noise and self.scale == "paper":
            # The paper's teachers train on the same wrong labels. With little data and few epochs such a
            # teacher is too weak, so at the smaller scales the teacher has clean labels.
            config, key = _with(config, noise, "none"), f"{name}-noise{noise:g}"
        config = _scaled(config, self.scale)
        if early:
            config, key = config.replace(epochs=-(-config.epochs // 4)), f"{key}-early"
        return Teacher(key, config)


def _with(config: ClassificationConfig, noise: float, policy: str) -> ClassificationConfig:
    return config.replace(data={"label_noise": noise}, augment={"policy": policy})


_SCALES: dict[Scale, dict[str, Any]] = {
    "paper": {},
    "small": {"data": {"train_limit": 5000}, "epochs": 12, "eval_every": 4},
    "smoke": {"data": {"train_limit": 60, "test_limit": 50}, "epochs": 1, "batch_size": 20},
}


def _scaled(config: ClassificationConfig, scale: Scale) -> ClassificationConfig:
    return config.replace(**_SCALES[scale])
