"""Experiments of papers by name: grids of cells, each of which is one run per seed, at four scales.

`paper` is the full recipe; `quarter` the same for a quarter of the epochs; `small` the same on a part of the
data for a few epochs, for a CPU; `smoke` tiny models for one epoch, which only shows that everything works.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Literal, NamedTuple, Protocol

from mdistiller.config import RunConfig
from mdistiller.errors import UnknownNameError

Scale = Literal["paper", "quarter", "small", "smoke"]


class Teacher(NamedTuple):
    """Teacher of a cell.

    key: name of its weights, made of the model and of its training.
    config: its training, where no weights are given; None for a pretrained model.
    """

    key: str
    config: RunConfig | None


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
    config: RunConfig
    teacher: Teacher | None
    status: str = ""


class Experiment(Protocol):
    """Table or figure of a paper."""

    @property
    def title(self) -> str:
        """Subject of the table."""

    def cells(self, scale: Scale) -> list[Cell]:
        """Builds the cells at a scale; only those on the paper's data have published accuracies."""


_EXPERIMENTS: dict[str, Experiment] = {}


def register_experiments(experiments: Mapping[str, Experiment]) -> None:
    """Makes experiments known by their names, of a task in a plug-in too."""
    _EXPERIMENTS.update(experiments)


def list_experiments() -> list[str]:
    """Lists the experiments by name."""
    for task in import_module("mdistiller.tasks").EXPERIMENTS:
        import_module(f"mdistiller.tasks.{task}.experiments")
    return list(_EXPERIMENTS)


def get_experiment(name: str) -> Experiment:
    """Returns an experiment.

    Raises:
        UnknownNameError: no such experiment.
    """
    if name not in (known := list_experiments()):
        raise UnknownNameError("experiment", name, known)
    return _EXPERIMENTS[name]
