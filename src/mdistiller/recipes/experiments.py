"""The paper's experiments as grids of runs: pairs × settings × seeds, at three scales.

`paper` is the full recipe; `small` the same on a part of CIFAR-100 for a few epochs, which a CPU can do;
`smoke` tiny models on the embedded digits for a moment, which shows that everything works and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mdistiller.engine.config import TrainConfig
from mdistiller.errors import UnknownNameError
from mdistiller.methods import DKDConfig, KDConfig, MethodConfig
from mdistiller.recipes import get_recipe, split_pair

Scale = Literal["paper", "small", "smoke"]

# What the smaller scales run in place of the paper's pairs.
_PAIRS = {"small": "resnet56_resnet20", "smoke": "resnet14_resnet8"}


class Cell(NamedTuple):
    """One figure of a table.

    pair: TEACHER_STUDENT.
    setting: the column.
    config: the run, less its seed, folder, data and teacher's weights.
    published: top-1 in the paper, in percent; None: not known, or not at this scale.
    checked: whether that figure was read in the paper or the authors' README, not taken from memory.
    """

    pair: str
    setting: str
    config: TrainConfig
    published: float | None
    checked: bool


class Experiment(NamedTuple):
    """A table of the paper: its title, and the cells at a scale."""

    title: str
    cells: Callable[[Scale], list[Cell]]


def teacher_config(name: str, scale: Scale) -> TrainConfig:
    """How a teacher is trained where none is given."""
    family = "digits" if scale == "smoke" else "cifar100"
    return _scaled(get_recipe(f"{family}.teacher.{name}"), scale)


def _scaled(config: TrainConfig, scale: Scale) -> TrainConfig:
    changes: dict[str, Any] = {}
    if scale == "small":
        data = config.data.model_copy(update={"train_limit": 5000})
        changes = {"data": data, "epochs": 12, "eval_every": 4}
    elif scale == "smoke":
        data = config.data.model_copy(update={"train_limit": 60, "test_limit": 50})
        changes = {"data": data, "epochs": 1, "batch_size": 20}
    return config.model_copy(update=changes)


def _cell(
    pair: str,
    setting: str,
    method: str | MethodConfig,
    published: float | None,
    checked: bool,
    scale: Scale,
) -> Cell:
    family = "digits" if scale == "smoke" else "cifar100"
    if method == "none":
        config = get_recipe(f"{family}.student.{split_pair(pair)[1]}")
    elif isinstance(method, str):
        config = get_recipe(f"{family}.{method}.{pair}")
    else:
        config = get_recipe(f"{family}.{method.method_name}.{pair}").model_copy(update={"method": method})
    figure = published if scale == "paper" else None
    return Cell(pair, setting, _scaled(config, scale), figure, checked)


def _pairs(pairs: tuple[str, ...], scale: Scale) -> tuple[str, ...]:
    return pairs if scale == "paper" else (_PAIRS[scale],)


# Each at weight 1. KD is TCKD + (1 - p_t) NCKD, with p_t the teacher's confidence.
_TCKD, _NCKD = DKDConfig(alpha=1.0, beta=0.0), DKDConfig(alpha=0.0, beta=1.0)
_KD_FULL = KDConfig(task_weight=1.0, weight=1.0)

# Tables 6 and 7 for KD and DKD (in the authors' README too, there with 76.23 for wrn_16_2).
_MAIN = {
    "resnet32x4_resnet8x4": (73.33, 76.32),
    "wrn_40_2_wrn_16_2": (74.92, 76.24),
    "wrn_40_2_ShuffleV1": (74.83, 76.70),
    "vgg13_vgg8": (72.98, 74.68),
    "vgg13_MobileNetV2": (67.37, 69.71),
    "resnet56_resnet20": (70.66, 71.97),
    "resnet32x4_ShuffleV2": (74.45, 77.07),
}
# Of the first pair; ReviewKD, CRD, DIST and LSKD as their authors or the paper give them.
_MORE: dict[str, tuple[str | MethodConfig, float]] = {
    "TCKD alone": (_TCKD, 68.63),
    "NCKD alone": (_NCKD, 74.26),
    "ReviewKD": ("reviewkd", 75.63),
    "CRD": ("crd", 75.51),
    "DIST": ("dist", 76.31),
    "LSKD+DKD": ("lskd-dkd", 77.01),
}
_STUDENT_ALONE = 72.50  # resnet8x4


def _cifar100(scale: Scale) -> list[Cell]:
    cells = []
    for pair in _pairs(tuple(_MAIN), scale):
        first = pair == next(iter(_MAIN)) or scale != "paper"
        kd, dkd = _MAIN.get(pair, (None, None))
        cells.append(_cell(pair, "alone", "none", _STUDENT_ALONE if first else None, False, scale))
        cells.append(_cell(pair, "KD", "kd", kd, True, scale))
        cells.append(_cell(pair, "DKD", "dkd", dkd, True, scale))
        for setting, (method, published) in _MORE.items() if first else ():
            cells.append(_cell(pair, setting, method, published, False, scale))
    return cells


_TABLE1: dict[str, tuple[float, ...]] = {
    "resnet32x4_resnet8x4": (72.50, 73.63, 68.63, 74.26),
    "resnet32x4_ShuffleV1": (),
    "wrn_40_2_wrn_16_2": (),
    "wrn_40_2_ShuffleV1": (),
}


def _table1(scale: Scale) -> list[Cell]:
    settings: tuple[tuple[str, str | MethodConfig], ...] = (
        ("alone", "none"),
        ("KD (TCKD + NCKD)", _KD_FULL),
        ("TCKD alone", _TCKD),
        ("NCKD alone", _NCKD),
    )
    cells = []
    for pair in _pairs(tuple(_TABLE1), scale):
        published = _TABLE1.get(pair, ())
        for i, (setting, method) in enumerate(settings):
            known = published[i] if published else None
            cells.append(_cell(pair, setting, method, known, False, scale))
    return cells


EXPERIMENTS = {
    "cifar100": Experiment(
        "CIFAR-100: students alone, by KD, by DKD, and other methods on the first pair", _cifar100
    ),
    "table1": Experiment("Table 1: what the target-class and the non-target-class part do alone", _table1),
}


def get_experiment(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        UnknownNameError: no such experiment.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
