"""Sections that a task adds to the report of its runs, and what they share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from mdistiller.errors import DataError, MDistillerError
from mdistiller.report.markup import Section, from_here, paragraph
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import READING, RunRecord
from mdistiller.runs.folder import CONFIG
from mdistiller.settings import Settings, validate
from mdistiller.training.task import get_task

Part = TypeVar("Part", bound=BaseModel)
T = TypeVar("T")


@dataclass
class RunOutputs:
    """Outputs of the runs' models on the same test images.

    failures: reasons why something is missing, in sentences.
    """

    failures: list[str] = field(default_factory=list)

    def measures(self, rows: PageRows, label: str) -> dict[str, list[float]]:
        """Computes what `MEASURES` names for a row's students, a value for each seed."""
        return {}


class TaskSections(NamedTuple):
    """Additions of a task to the report of its runs. The functions raise a ConfigError for an unknown device.

    shows: what the sections show, for the command that adds them to a page.
    make: makes them from the rows, the largest number of test images, the device, and the result of
        `outputs`.
    outputs: runs the models on test images, also for the table.
    """

    shows: str = ""
    make: Callable[[PageRows, int, str, RunOutputs | None], list[Section]] = lambda *_: []
    outputs: Callable[[PageRows, int, str], RunOutputs | None] = lambda *_: None


_SECTIONS: dict[str, TaskSections] = {}


def register_sections(task: str, sections: TaskSections) -> None:
    """Adds sections to the report of a task's runs."""
    _SECTIONS[task] = sections


def sections_of(task: str) -> TaskSections:
    """Returns what a task adds to the report. The module `report` of a built-in task is imported for it."""
    package = type(get_task(task)).__module__.rpartition(".")[0]
    if task not in _SECTIONS and package.startswith("mdistiller.tasks.") and find_spec(f"{package}.report"):
        import_module(f"{package}.report")
    return _SECTIONS.get(task, TaskSections())


def missing_parts(failures: Sequence[str]) -> list[Section]:
    """Returns a section of sentences, or none."""
    body = "".join(map(paragraph, dict.fromkeys(map(from_here, failures))))
    return [Section("missing", "Missing parts", body, folded=len(failures) > 3)] if body else []


def no_student(run: RunRecord, error: Exception) -> str:
    """Returns the sentence for a student that is left out."""
    return f"The student of {run.path} cannot run on the images: {error}"


def of_first_runs(
    groups: Mapping[str, Sequence[RunRecord]], predict: Callable[[RunRecord], T]
) -> tuple[dict[str, T], list[str]]:
    """Returns what `predict` returns for each row's first run, by label, and sentences about its errors."""
    found: dict[str, T] = {}
    failures = []
    for label, runs in groups.items():
        try:
            found[label] = predict(runs[0])
        except (MDistillerError, OSError) as error:
            failures.append(no_student(runs[0], error))
    return found, failures


def check_same_images(data: Settings, first: Settings, *unused: str) -> None:
    """Checks that two data configs have the same test images, whatever the `unused` fields are.

    Raises:
        DataError: they do not.
    """
    one, other = (config.model_dump(exclude={*READING, *unused}) for config in (data, first))
    if one != other:
        raise DataError("its test images are not those of the first run")


def part_of(run: RunRecord, name: str, kind: type[Part]) -> Part:
    """Validates one part of a run's config. Validating the whole would run the code of its plug-ins.

    Raises:
        ConfigError: a field is unknown or wrong.
    """
    return validate(kind, run.config[name], str(run.path / CONFIG), f"{name}.")
