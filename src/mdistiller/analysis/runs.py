"""Read run folders, and sum them up over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mdistiller.errors import DataError
from mdistiller.runs.folder import CONFIG, ENV, METRICS, read_metrics
from mdistiller.settings import explain
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.detection.config import DetectionConfig


@dataclass(frozen=True)
class Run:
    """One run folder: its config, environment, evaluations, training windows, and summary if it is done."""

    path: Path
    config: dict[str, Any]
    env: dict[str, Any]
    evals: list[dict[str, Any]]
    windows: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def label(self) -> str:
        """What was trained, in a few words; the same for all seeds."""
        student = self.config["student"]["name"]
        if self.config["teacher"] is None:
            return f"alone: {student}"
        return f"{self.config['method']['name']}: {self.config['teacher']['name']} → {student}"

    @property
    def detects(self) -> bool:
        """Whether it is a detection run."""
        return bool(self.config.get("task") == "detection")

    @property
    def kind(self) -> type[ClassificationConfig]:
        """The class of its config."""
        return DetectionConfig if self.detects else ClassificationConfig

    @property
    def figure(self) -> str:
        """Of its evaluations, the figure that is compared: `top1`, or `AP` of a detector."""
        return self.kind.metrics[0]


@dataclass(frozen=True)
class Figure:
    """A mean over seeds; std (of the sample, n - 1) is None for a single seed."""

    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class Row:
    """One row of the headline table: runs that differ in their seed alone.

    figure: `top1`, or `AP` of detectors, both in percent. over_alone, over_teacher: the last one less that of
    the same student alone, and less the teacher's, in percentage points; None where that is not known.
    method_parameters: trained besides the student's. folders: the runs'.
    """

    label: str
    figure: str
    seeds: int
    last: Figure
    best: Figure
    over_alone: float | None
    over_teacher: float | None
    seconds: float
    ms_per_step: float
    student_parameters: int | None
    method_parameters: int | None
    finished: bool
    folders: list[str]


# What is read of a run's files: they may be of another version, edited, or damaged.


class _Read(BaseModel):
    model_config = ConfigDict(strict=True)


class _Named(_Read):
    name: str


class _Data(_Read):
    kind: str


class _Config(_Read):
    data: _Data
    student: _Named
    teacher: _Named | None
    method: _Named


class _Versions(_Read):
    torch: str
    mdistiller: str


class _Env(_Read):
    gpus: list[str]
    cpu: str
    threads: int
    versions: _Versions
    commit: str | None


class _Line(_Read):
    kind: str


class _Train(_Read):
    step: int
    loss: float


class _Measured(_Read):
    p_t: float | None = None
    gap: float | None = None
    ece: float | None = None
    agreement: float | None = None
    tckd: float | None = None
    nckd: float | None = None
    teacher_p_t: float | None = None
    teacher_gap: float | None = None
    teacher_top1: float | None = None
    teacher_ece: float | None = None


class _Diagnostics(_Read):
    test: _Measured | None = None
    train: _Measured | None = None


class _Timed(_Read):
    epoch: int
    seconds: float
    ms_per_step: float
    diagnostics: _Diagnostics | None = None


class _Eval(_Timed):
    top1: float
    best_top1: float


class _DetectionEval(_Timed):
    AP: float
    best_AP: float  # noqa: N815  # the figure's name


class _Summary(_Read):
    ms_per_step: float
    student_parameters: int
    method_parameters: int | None = None


_LINES: dict[str, type[_Read]] = {"train": _Train, "eval": _Eval, "summary": _Summary}
Kind = TypeVar("Kind", bound=_Read)


def _check(value: Any, model: type[Kind], path: Path) -> Kind:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise explain(error, path.name) from error


def _load(path: Path, model: type[_Read]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _check(value, model, path)
    return value


def load_run(path: Path) -> Run:
    """Read a run folder; the run may still be under way.

    Raises:
        DataError: the folder holds no run, or no evaluation yet.
    """
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _LINES}
    try:
        config = _load(path / CONFIG, _Config)
        env = _load(path / ENV, _Env)
        for line in read_metrics(path):
            kind = _check(line, _Line, path / METRICS).kind
            if kind in kinds:
                kinds[kind].append(line)
        if not kinds["eval"]:
            raise DataError(f"{path}: no evaluation in metrics.jsonl yet")
        for kind, model in _LINES.items():
            if kind == "eval" and config.get("task") == "detection":
                model = _DetectionEval
            for line in kinds[kind]:
                _check(line, model, path / METRICS)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"it has no {Path(error.filename).name}" if path.is_dir() else "there is no such folder"
        raise DataError(f"{path} is no run folder: {reason}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no run folder: {error}") from error
    return Run(
        path, config, env, kinds["eval"], kinds["train"], kinds["summary"][-1] if kinds["summary"] else None
    )


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Dotted fields whose values differ but for seed and folder, and the values ("" where not set)."""
    flat = [_flat(config) for config in configs]
    found = []
    for name in dict.fromkeys(name for fields in flat for name in fields):
        values = [_shown(fields[name]) if name in fields else "" for fields in flat]
        if name not in ("seed", "out") and len(set(values)) > 1:
            found.append((name, values))
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tested_on(run: Run) -> str:
    """The images on which its figures are: figures on others do not compare."""
    data = run.config["data"]
    name = Path(data.get("root", "")).name if data["kind"] == "folder" else data["kind"]
    limit = data.get("test_limit")
    return f"{name}, {limit} test images" if limit else str(name)


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label. Those of one label whose settings differ beyond the seed are told apart by the fields
    that differ, or, where that would be long, by a number; runs with other test images by these.
    """
    several = len({tested_on(run) for run in runs}) > 1
    settings: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        label = f"{run.label} on {tested_on(run)}" if several else run.label
        rest = {k: v for k, v in run.config.items() if k not in ("seed", "out")}
        settings.setdefault(label, {}).setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    groups: dict[str, list[Run]] = {}
    for label, found in settings.items():
        for name, members in zip(_names(label, list(found.values())), found.values(), strict=True):
            groups[name] = members
    return groups


def _names(label: str, groups: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each of the groups that share a label."""
    if len(groups) == 1:
        return [label]
    # A recipe's name follows from its fields.
    found = [x for x in differing([runs[0].config for runs in groups]) if x[0] != "recipe"]
    names = [label] * len(groups)
    for field, values in found:
        names = [f"{name}, {_short(field)} {value or '–'}" for name, value in zip(names, values, strict=True)]
    if len(set(names)) == len(groups) and max(map(len, names)) <= len(label) + 40:
        return names
    return [label, *(f"{label} ({n})" for n in range(2, len(groups) + 1))]


def _short(name: str) -> str:
    return name.removeprefix("method.").removeprefix("optim.")


READING = ("root", "download", "memory", "memory_limit_gb", "workers", "on_error")
"""Of a data set's settings: how it is read, not what is in it."""


def alone(run: Run, groups: Mapping[str, Sequence[Run]]) -> str | None:
    """The label among `groups` of a run's student trained without a teacher on the same data.

    Of several, the one with the fewest other settings. None where there is none, or the run is one itself.
    """
    if run.config["teacher"] is None:
        return None

    def trained(other: Run) -> tuple[Any, ...]:
        student = other.config["student"]
        # Without what is None: a run of an earlier version lacks the fields that are new.
        data = {k: v for k, v in other.config["data"].items() if k not in READING and v is not None}
        return student["name"], student.get("options"), data

    found = {
        label: sum(members[0].config.get(k) != v for k, v in run.config.items() if k != "data")
        for label, members in groups.items()
        if members[0].config["teacher"] is None and trained(members[0]) == trained(run)
    }
    return min(found, key=found.__getitem__) if found else None


def figure(values: Sequence[float]) -> Figure:
    """Mean and sample standard deviation."""
    return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def summarise(runs: Sequence[Run]) -> list[Row]:
    """The rows of the headline table, in the order in which the runs were given."""
    groups = group(runs)
    last = {
        label: figure([run.evals[-1][run.figure] for run in members]) for label, members in groups.items()
    }
    rows = []
    for label, members in groups.items():
        final = [run.evals[-1] for run in members]
        summaries = [run.summary for run in members if run.summary is not None]
        plain = alone(members[0], groups)
        taught = [teacher for line in final if (teacher := _teacher_top1(line)) is not None]
        rows.append(
            Row(
                label=label,
                figure=members[0].figure,
                seeds=len(members),
                last=last[label],
                best=figure([run.evals[-1][f"best_{run.figure}"] for run in members]),
                over_alone=None if plain is None else last[label].mean - last[plain].mean,
                over_teacher=last[label].mean - statistics.fmean(taught)
                if len(taught) == len(members)
                else None,
                seconds=statistics.fmean(line["seconds"] for line in final),
                ms_per_step=statistics.fmean(
                    run.summary["ms_per_step"] if run.summary else run.evals[-1]["ms_per_step"]
                    for run in members
                ),
                student_parameters=summaries[0]["student_parameters"] if summaries else None,
                method_parameters=summaries[0].get("method_parameters") if summaries else None,
                finished=len(summaries) == len(members),
                folders=[str(run.path) for run in members],
            )
        )
    return rows


def _teacher_top1(line: Mapping[str, Any]) -> float | None:
    return ((line.get("diagnostics") or {}).get("test") or {}).get("teacher_top1")
