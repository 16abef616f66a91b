"""Cells of the experiments of the DKD paper: a pair of models in a setting, at a scale."""

from typing import Literal, NamedTuple

from mdistiller.config import RunConfig
from mdistiller.methods import MethodConfig
from mdistiller.recipes import get_recipe
from mdistiller.recipes.experiments import Cell, Scale, Teacher
from mdistiller.recipes.family import split_pair
from mdistiller.tasks.classification.recipes import imagenet
from mdistiller.types import Line

Family = Literal["cifar100", "imagenet"]


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
    config = get_recipe(recipe)
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
    training = _changed(get_recipe(f"{data}.teacher.{model}"), noise, "none", scale)
    key = f"{model}-noise{noise:g}" if noise else model
    if setting.early:
        training, key = training.replace(epochs=-(-training.epochs // 4)), f"{key}-early"
    return Cell(pair, name, config, Teacher(key, training))


def _changed(config: RunConfig, noise: float, policy: str, scale: Scale) -> RunConfig:
    config = config.replace(data={"label_noise": noise}, augment={"policy": policy})
    if scale == "quarter":  # learning-rate drops and warm-ups are fractions, so they shrink with the epochs
        return config.replace(epochs=config.epochs // 4)
    return config.replace(**_SCALES.get(scale, {}))
