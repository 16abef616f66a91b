"""The cells of an experiment: one run each but for its seeds, at three scales.

`paper` is the full recipe; `small` the same on a part of CIFAR-100 for a few epochs, which a CPU can do;
`smoke` tiny models on the embedded digits for a moment, which shows that everything works and nothing else.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from mdistiller.methods import MethodConfig
from mdistiller.recipes import get_recipe, imagenet, split_pair
from mdistiller.tasks.classification.config import ClassificationConfig

Scale = Literal["paper", "small", "smoke"]
Family = Literal["cifar100", "imagenet"]

SMALL, SMOKE = ("resnet56_resnet20",), ("resnet14_resnet8",)
"""What the smaller scales run in place of the paper's pairs, where an experiment does not say."""


def models_of(pair: str) -> tuple[str, str]:
    """Teacher and student of a cell's pair, by the names of their recipes."""
    return split_pair(pair, imagenet.MODELS)


class Teacher(NamedTuple):
    """Whom a cell learns from.

    key: the name under which its weights are kept, of the model and of how it was trained.
    config: how it is trained where no weights are given; None: it is pretrained.
    """

    key: str
    config: ClassificationConfig | None


class Cell(NamedTuple):
    """One figure of a table.

    pair: TEACHER_STUDENT.
    setting: the column. The same setting of the same pair is the same run in every experiment.
    config: the run, less its seed, folder, data and teacher's weights.
    teacher: None for a student alone.
    published: top-1 in the paper, in percent; None: not known, or not at this scale.
    checked: whether that figure was read in the paper or the authors' README, not taken from memory.
    """

    pair: str
    setting: str
    config: ClassificationConfig
    teacher: Teacher | None
    published: float | None
    checked: bool


class Builder:
    """Makes the cells of one experiment at one scale.

    Args:
        scale: of all cells.
        family: the recipes' data at the paper's scale; the smaller ones stay with CIFAR-100 and digits.
    """

    def __init__(self, scale: Scale, family: Family = "cifar100") -> None:
        self.scale: Scale = scale
        self.family = {"paper": family, "small": "cifar100", "smoke": "digits"}[scale]
        self.cells: list[Cell] = []

    def pairs(self, paper: tuple[str, ...], small: tuple[str, ...] = SMALL) -> tuple[str, ...]:
        """The pairs at this scale."""
        return {"paper": paper, "small": small, "smoke": SMOKE}[self.scale]

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
        """Add a cell.

        Args:
            pair: TEACHER_STUDENT.
            setting: its column.
            method: a method's name, `none` for the student alone, or its config.
            published: the paper's figure.
            checked: whether it was read there.
            noise: fraction of wrong training labels.
            policy: of the augmentation.
            early: whether the teacher's training ends after a quarter of the epochs.
        """
        teacher, student = models_of(pair)
        if method == "none":
            config = get_recipe(f"{self.family}.student.{student}")
        elif isinstance(method, str):
            config = get_recipe(f"{self.family}.{method}.{pair}")
        else:
            config = get_recipe(f"{self.family}.{method.method_name}.{pair}")
            config = config.model_copy(update={"method": method})
        config = _scaled(_with(config, noise, policy), self.scale)
        taught = self._teacher(teacher, noise, early) if config.teacher is not None else None
        figure = published if self.scale == "paper" else None
        self.cells.append(Cell(pair, setting, config, taught, figure, checked))

    def _teacher(self, name: str, noise: float, early: bool) -> Teacher:
        if self.family == "imagenet":
            return Teacher(name, None)
        config, key = get_recipe(f"{self.family}.teacher.{name}"), name
        if noise and self.scale == "paper":
            # The paper's teachers learn from the same wrong labels. On a part of the data for a few epochs
            # such a teacher knows little, so the smaller scales keep the one of the clean labels.
            config, key = _with(config, noise, "none"), f"{name}-noise{noise:g}"
        config = _scaled(config, self.scale)
        if early:
            config, key = config.model_copy(update={"epochs": -(-config.epochs // 4)}), f"{key}-early"
        return Teacher(key, config)


def _with(config: ClassificationConfig, noise: float, policy: str) -> ClassificationConfig:
    data = config.data.model_copy(update={"label_noise": noise})
    augment = config.augment.model_copy(update={"policy": policy})
    return config.model_copy(update={"data": data, "augment": augment})


def _scaled(config: ClassificationConfig, scale: Scale) -> ClassificationConfig:
    changes: dict[str, Any] = {}
    if scale == "small":
        data = config.data.model_copy(update={"train_limit": 5000})
        changes = {"data": data, "epochs": 12, "eval_every": 4}
    elif scale == "smoke":
        data = config.data.model_copy(update={"train_limit": 60, "test_limit": 50})
        changes = {"data": data, "epochs": 1, "batch_size": 20}
    return config.model_copy(update=changes)
