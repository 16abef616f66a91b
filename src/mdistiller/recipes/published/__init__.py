"""Published runs: settings and accuracies by data set, method and pair, from the files of this folder.

A file `DATA.toml` has groups of runs of one method. A run takes each value from its pair, else from its
group, else from the file's settings. Epochs, drops and warm-ups are those of the authors, counted in epochs.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import Field

from mdistiller.settings import Settings
from mdistiller.types import Line

UNPUBLISHED = "default, not published"
"""Text in place of a figure, for a recipe that nobody published."""


class Values(Settings):
    """Values of a run, of a group or of a file; those that are left out come from the next larger."""

    source: str = ""
    """Origin of the settings, REPOSITORY@COMMIT:PATH or a paper; `NAME:PATH` in the files."""
    figures: str = ""
    """Origin of the figures. Empty: the source."""
    top1: tuple[float, ...] = ()
    """Published top-1 in percent, one for each run, or their mean."""
    epoch: Literal["last", "best", "unstated"] = "unstated"
    """Epoch that the figures are of; the best one was picked on the test set."""
    log: tuple[float, float] | None = None
    """Top-1 of the last and of the best epoch in the authors' log of one run."""
    teacher: float | None = None
    """Top-1 of the teacher there. None: that of the file's teachers."""
    own_teacher: bool = False
    """Whether the authors trained teachers of their own, whose top-1 is not known."""
    unverified: bool = False
    """Whether the figures were noted from memory."""
    tuned: bool = True
    """Whether the hyperparameters are the authors'. False: defaults, because the authors' are unknown."""
    note: str = ""
    """Sentence about the run."""
    optimizer: Literal["sgd", "dot", "deepkd"] = "sgd"
    lr: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    norm_decay: bool = True
    delta: float | None = None
    """Difference of DOT's momenta from the momentum."""
    deltas: tuple[float, float, float] | None = None
    """Differences of DeepKD's momenta from the momentum, for task, target and other classes, as they ran."""
    clip_norm: float | None = None
    batch_size: int = 0
    epochs: int | None = None
    steps: int | None = None
    """Steps of a run whose length is in steps; then drops are in steps too."""
    drops: tuple[int, ...] = ()
    """Epochs after which the rate is divided by 10."""
    schedule: Literal["step", "cosine"] = "step"
    lr_warmup: int = 0
    """Epochs over which the rate first rises."""
    min_lr: float = 0.0
    """Rate at the end of `cosine`."""
    warmup: int | None = None
    """Epochs over which the distillation loss grows: its factor is min(epoch / warmup, 1), epochs from 1."""
    views: int = 1
    """Views of each image in a batch."""
    augment: str = ""
    """Policy of the strong view, a value of `augment.strong_policy`; empty for runs of one view."""
    fields: Line = Field(default_factory=dict)
    """Fields of the method's config, nested for wrappers."""


class PublishedRun(Values):
    """One published run, with all its values. `pair` is TEACHER_STUDENT, or a student alone."""

    data: str
    method: str
    pair: str

    @property
    def method_fields(self) -> Line:
        """Fields of the method's config, with the warm-up as a fraction of training.

        A warm-up over one epoch is none: its factor is 1 from the first step.
        """
        if self.warmup is None or self.epochs is None:
            return self.fields
        return self.fields | {"warmup": self.warmup / self.epochs if self.warmup > 1 else 0.0}


class _Group(Values):
    method: str
    pairs: dict[str, Values] = Field(default_factory=dict)


class _Teachers(Settings):
    source: str
    top1: dict[str, float]


class _File(Settings):
    settings: Values
    rates: dict[str, float] = Field(default_factory=dict)
    teachers: _Teachers | None = None
    groups: tuple[_Group, ...]


class Table(Settings):
    """Top-1 accuracies in percent by pair, in the order of `settings`; those in `checked` were verified."""

    settings: tuple[str, ...]
    checked: tuple[str, ...] = ()
    pairs: dict[str, tuple[float, ...]]


def _load(name: str) -> Line:
    return tomllib.loads((files(__package__) / f"{name}.toml").read_text(encoding="utf-8"))


@cache
def _repositories() -> dict[str, str]:
    found: dict[str, str] = _load("sources")["repositories"]
    return found


def _expand(source: str) -> str:
    """Replaces the name of a repository by owner, name and commit."""
    name, colon, path = source.partition(":")
    return f"{_repositories()[name]}:{path}" if colon and name in _repositories() else source


@cache
def _file(data: str) -> _File:
    return _File.model_validate(_load(data))


@cache
def _reproduced() -> dict[str, tuple[_Group, ...]]:
    return {name: tuple(map(_Group.model_validate, groups)) for name, groups in _load("reproduced").items()}


@cache
def _tables() -> dict[str, Table]:
    return {name: Table.model_validate(table) for name, table in _load("tables")["tables"].items()}


def _merge(values: Line, change: Mapping[str, object]) -> Line:
    """Returns values with changes; nested mappings are merged."""
    merged = dict(values)
    for name, value in change.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _given(values: Settings) -> Line:
    return values.model_dump(exclude_unset=True, exclude={"method", "pairs"})


def _student(data: str, pair: str) -> str:
    """Returns the student of a pair, as far as the file's rates name it; else the pair."""
    return next((name for name in _file(data).rates if pair == name or pair.endswith(f"_{name}")), pair)


def _run(data: str, group: _Group | None, method: str, pair: str, own: Values) -> PublishedRun:
    file = _file(data)
    values = _merge(_given(file.settings), {} if group is None else _given(group))
    rate = file.rates.get(_student(data, pair))
    values = values if rate is None else values | {"lr": rate}
    values = _merge(values, _given(own))
    if file.teachers is not None and not values.get("own_teacher"):
        values.setdefault("teacher", next((v for k, v in file.teachers.top1.items() if _has(pair, k)), None))
    values |= {"source": _expand(values.get("source", "")), "figures": _expand(values.get("figures", ""))}
    return PublishedRun(data=data, method=method, pair=pair, **values)


def _has(pair: str, teacher: str) -> bool:
    return pair.startswith(f"{teacher}_")


def canonical(method: str) -> str:
    """Returns the shortest name of a method: a wrapper around `kd` is the wrapper."""
    return method.removesuffix("-kd")


@cache
def find_runs(data: str, method: str, pair: str) -> tuple[PublishedRun, ...]:
    """Finds the published runs of a method and pair; recipes take the first one.

    Args:
        data: name of a file.
        method: name of a method, `none` for a student alone.
        pair: TEACHER_STUDENT, or a student's name for the method `none`.
    """
    name = canonical(method)
    groups = (g for g in _file(data).groups if g.method == name and pair in g.pairs)
    return tuple(_run(data, group, name, pair, group.pairs[pair]) for group in groups)


@cache
def default_run(data: str, method: str, pair: str) -> PublishedRun:
    """Returns the values that hold for every pair of a method, those of a pair that nobody published.

    A wrapper without values of its own has the schedule of its base, any other method the file's settings.
    """
    name = canonical(method)
    while True:
        group = next((g for g in _file(data).groups if g.method == name), None)
        if group is not None or "-" not in name:
            break
        name = name.partition("-")[2]
    run = _run(data, group, name, pair, Values())
    return run if name == canonical(method) else run.model_copy(update={"fields": {}, "warmup": None})


def run_of(data: str, method: str, pair: str) -> PublishedRun:
    """Returns the run that a recipe takes its values from."""
    runs = find_runs(data, method, pair)
    return runs[0] if runs else default_run(data, method, pair)


@cache
def all_runs(data: str) -> tuple[PublishedRun, ...]:
    """Returns all published runs of a data set, in the order of its file."""
    groups = _file(data).groups
    return tuple(_run(data, g, g.method, pair, own) for g in groups for pair, own in g.pairs.items())


@cache
def find_reproduced(data: str, method: str, pair: str) -> tuple[Values, ...]:
    """Finds runs in which others repeated a published run, as `top1`, `epoch`, `log`, `source` and `note`.

    Args:
        data: name of a file.
        method: name of a method.
        pair: TEACHER_STUDENT.
    """
    groups = (g for g in _reproduced().get(data, ()) if g.method == canonical(method) and pair in g.pairs)
    found = (Values(**_merge(_given(group), _given(group.pairs[pair]))) for group in groups)
    return tuple(run.model_copy(update={"source": _expand(run.source)}) for run in found)


def teacher_top1(data: str, model: str) -> tuple[float, str] | None:
    """Returns the published top-1 of a teacher and its source, if there is one."""
    teachers = _file(data).teachers
    if teachers is None or model not in teachers.top1:
        return None
    return teachers.top1[model], _expand(teachers.source)


def list_tables() -> tuple[str, ...]:
    """Lists the tables of accuracies whose settings are no recipes."""
    return tuple(_tables())


def find_top1(pair: str, setting: str, tables: tuple[str, ...]) -> tuple[float | None, bool]:
    """Returns the top-1 of the first table that has one, or None, and whether it was verified."""
    for table in map(_tables().__getitem__, tables):
        found = dict(zip(table.settings, table.pairs[pair], strict=True)) if pair in table.pairs else {}
        if setting in found:
            return found[setting], setting in table.checked
    return None, False
