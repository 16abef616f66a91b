"""Experiments of the paper, of the file experiments.toml, as grids of cells with published accuracies."""

import tomllib
from importlib.resources import files
from typing import Literal

from pydantic import TypeAdapter

from mdistiller.config import RunConfig
from mdistiller.methods import get_method, list_methods, method_config
from mdistiller.recipes import get_recipe
from mdistiller.recipes.describe import find_published, status
from mdistiller.recipes.experiments import Cell, Scale, Teacher, register_experiments
from mdistiller.recipes.family import split_pair
from mdistiller.recipes.published import UNPUBLISHED, find_top1, list_tables
from mdistiller.settings import Settings
from mdistiller.tasks.classification.recipes import IMAGENET_MODELS
from mdistiller.types import Line

Family = Literal["cifar100", "imagenet"]


def models_of(pair: str) -> tuple[str, str]:
    """Splits a cell's pair into teacher and student, by their names in recipes."""
    return split_pair(pair, IMAGENET_MODELS)


class Setting(Settings):
    """Column of a table."""

    method: str | Line
    """A method's name, or its config with `name`; `none` for the student alone."""
    noise: float = 0.0
    """Fraction of wrong training labels."""
    policy: Literal["none", "autoaugment"] = "none"
    """Augmentation policy."""
    early: bool = False
    """End the teacher's training after a quarter of the epochs."""


_SCALES: dict[Scale, Line] = {
    "small": {"data": {"train_limit": 5000}, "epochs": 12, "eval_every": 4},
    "smoke": {"data": {"train_limit": 60, "test_limit": 50}, "epochs": 1, "batch_size": 20},
}


def build_cell(pair: str, name: str, setting: Setting, scale: Scale, family: Family) -> Cell:
    """Builds a cell, without its published accuracy; `family` has the recipes of the paper's scale."""
    data = {"small": "cifar100", "smoke": "digits"}.get(scale, family)
    (model, student), method = models_of(pair), setting.method
    method_name = method if isinstance(method, str) else method["name"]
    recipe = f"{data}.student.{student}" if method == "none" else f"{data}.{method_name}.{pair}"
    config = get_recipe(recipe)
    if not isinstance(method, str):
        config = config.replace(method=method_config(method_name, **method))
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


class Experiment(Settings):
    """Table or figure of the paper."""

    title: str
    """Subject of the table or figure."""
    pairs: tuple[str, ...]
    """Pairs TEACHER_STUDENT at the paper's scale."""
    settings: tuple[str, ...]
    """Names of its columns."""
    more: tuple[str, ...] = ()
    """More columns, at the paper's scale of the first pair alone."""
    every_method: bool = False
    """Whether all other methods are columns too."""
    family: Family = "cifar100"
    """The recipes' data at the paper's scale."""
    small: tuple[str, ...] = ("resnet56_resnet20",)
    """Pairs at the small scale."""
    tables: tuple[str, ...] = list_tables()
    """Tables of accuracies of settings that are no recipes; the first one with the cell counts."""

    def columns(self, pair: str, scale: Scale) -> tuple[str, ...]:
        """Returns the names of a pair's columns at a scale."""
        found = self.settings + (self.more if pair == self.pairs[0] or scale != "paper" else ())
        if not self.every_method:
            return found
        known = {name.lower() for name in found}
        return (*found, *(m for m in list_methods() if m not in known and get_method(m).needs.teacher))

    def cells(self, scale: Scale) -> list[Cell]:
        """Builds the cells at a scale, each run of a pair once; those on the paper's data have accuracies."""
        found: list[Cell] = []
        for pair in {"small": self.small, "smoke": ("resnet14_resnet8",)}.get(scale, self.pairs):
            for name in self.columns(pair, scale):
                setting = SETTINGS.get(name, Setting(method=name.lower()))
                cell = build_cell(pair, name, setting, scale, self.family)
                if any((cell.pair, cell.config) == (known.pair, known.config) for known in found):
                    continue  # such as DKD, where the tuned β of the pair is a fixed one of the experiment
                if scale in ("paper", "quarter"):
                    cell = cell._replace(status=self._status(cell, setting))
                found.append(cell)
        return found

    def _status(self, cell: Cell, setting: Setting) -> str:
        """Returns the published accuracy of a recipe, or of a setting in a table, in words."""
        is_recipe = isinstance(setting.method, str)
        runs = find_published(cell.config.recipe).runs if is_recipe and not setting.early else ()
        if runs:
            return status(runs)
        top1, checked = find_top1(cell.pair, cell.setting, self.tables)
        if top1 is None:
            return UNPUBLISHED if is_recipe else "not published"
        return f"{top1:.2f} (best)" if checked else f"{top1:.2f} (best, unverified)"


_FILE = tomllib.loads((files(__package__) / "experiments.toml").read_text(encoding="utf-8"))
SETTINGS = TypeAdapter(dict[str, Setting]).validate_python(_FILE["settings"])
EXPERIMENTS = TypeAdapter(dict[str, Experiment]).validate_python(_FILE["experiments"])
register_experiments(EXPERIMENTS)
