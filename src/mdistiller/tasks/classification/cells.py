"""Cells of an experiment, each of which is one run per seed, at four scales.

`paper` is the full recipe; `quarter` the same for a quarter of the epochs; `small` the same on a part of
CIFAR-100 for a few epochs, for a CPU; `smoke` tiny models on the embedded digits for one epoch, which only
shows that everything works.
"""

from typing import Literal, NamedTuple

from mdistiller.methods import MethodConfig
from mdistiller.recipes import get_recipe
from mdistiller.recipes.family import split_pair
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.recipes import imagenet
from mdistiller.types import Line

Scale = Literal["paper", "quarter", "small", "smoke"]
Family = Literal["cifar100", "imagenet"]


def classification_recipe(name: str) -> ClassificationConfig:
    """Returns the config of a classification recipe."""
    config = get_recipe(name)
    assert isinstance(config, ClassificationConfig)
    return config


def models_of(pair: str) -> tuple[str, str]:
    """Splits a cell's pair into teacher and student, by their names in recipes."""
    return split_pair(pair, imagenet.MODELS)


class Setting(NamedTuple):
    """Column of a table.

    method: a method's name or its config; `none` for the student alone.
    noise: fraction of wrong training labels.
    policy: augmentation policy.
    early: end the teacher's training after a quarter of the epochs.
    """

    method: str | MethodConfig
    noise: float = 0.0
    policy: Literal["none", "autoaugment"] = "none"
    early: bool = False


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
    status: published top-1 in percent with its epoch, or a text in place of it; empty on other data.
    """

    pair: str
    setting: str
    config: ClassificationConfig
    teacher: Teacher | None
    status: str = ""


_SCALES: dict[Scale, Line] = {
    "small": {"data": {"train_limit": 5000}, "epochs": 12, "eval_every": 4},
    "smoke": {"data": {"train_limit": 60, "test_limit": 50}, "epochs": 1, "batch_size": 20},
}


def build_cell(pair: str, name: str, setting: Setting, scale: Scale, family: Family) -> Cell:
    """Builds a cell, without its published accuracy; `family` has the recipes of the paper's scale."""
    data = {"small": "cifar100", "smoke": "digits"}.get(scale, family)
    (model, student), method = models_of(pair), setting.method
    method_name = method if isinstance(method, str) else method.method_name
    recipe = f"{data}.student.{student}" if method == "none" else f"{data}.{method_name}.{pair}"
    config = classification_recipe(recipe)
    if isinstance(method, MethodConfig):
        config = config.replace(method=method)
    config = _changed(config, setting.noise, setting.policy, scale)
    if config.teacher is None:
        return Cell(pair, name, config, None)
    if data == "imagenet":
        return Cell(pair, name, config, Teacher(model, None))
    # The paper's teachers train on the same wrong labels. With little data and few epochs such a teacher is
    # too weak, so at the small scales the teacher has clean labels.
    noise = setting.noise if scale in ("paper", "quarter") else 0.0
    training = _changed(classification_recipe(f"{data}.teacher.{model}"), noise, "none", scale)
    key = f"{model}-noise{noise:g}" if noise else model
    if setting.early:
        training, key = training.replace(epochs=-(-training.epochs // 4)), f"{key}-early"
    return Cell(pair, name, config, Teacher(key, training))


def _changed(config: ClassificationConfig, noise: float, policy: str, scale: Scale) -> ClassificationConfig:
    config = config.replace(data={"label_noise": noise}, augment={"policy": policy})
    if scale == "quarter":  # learning-rate drops and warm-ups are fractions, so they shrink with the epochs
        return config.replace(epochs=config.epochs // 4)
    return config.replace(**_SCALES.get(scale, {}))
