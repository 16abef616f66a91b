"""Reads run folders and summarises them over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from mdistiller.config import complete
from mdistiller.errors import DataError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.runs.folder import CONFIG, ENV, METRICS, read_metrics
from mdistiller.settings import explain
from mdistiller.training.task import DEFAULT_TASK, get_task
from mdistiller.types import Metric


@dataclass(frozen=True)
class Run:
    """Contents of one run folder.

    evals, windows: lines of metrics.jsonl for evaluations and for training windows.
    summary: the summary line; None while the run is under way.
    metric: field of the metric that picks its best epoch; `main_metric` shows it.
    """

    path: Path
    config: dict[str, Any]
    env: dict[str, Any]
    evals: list[dict[str, Any]]
    windows: list[dict[str, Any]]
    summary: dict[str, Any] | None
    task: str
    metric: str

    @property
    def main_metric(self) -> Metric:
        """The metric that picks the best epoch, with its presentation."""
        return get_task(self.task).Config.main_metric()

    @property
    def data(self) -> dict[str, Any]:
        """Settings of the data set; empty for a task that has none in a field `data`."""
        return self.config.get("data") or {}

    @property
    def is_trained(self) -> bool:
        """Whether the folder is of a training run, and not of `mdistiller eval --out`."""
        return self.summary is None or self.summary.get("step") != 0

    @property
    def label(self) -> str:
        """Method and models, without the seed."""
        student = self.config["student"]["name"]
        if not self.is_trained:
            return f"evaluated: {student}"
        if self.config["teacher"] is None:
            return f"baseline: {student}"
        return f"{self.config['method']['name']}: {self.config['teacher']['name']} → {student}"


@dataclass(frozen=True)
class MeanStd:
    """Mean over seeds, and sample standard deviation (n - 1), which is None for a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanStd:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, spec: str) -> str:
        mean = format(self.mean, spec)
        return mean if self.std is None else f"{mean} ± {format(self.std, spec)}"

    def __str__(self) -> str:
        return format(self, ".2f")


def welch_p(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Computes Welch's two-sided p; None where a sample has one value, or both have no spread."""
    if min(len(one), len(other)) < 2:
        return None
    samples = [(statistics.fmean(values), statistics.stdev(values), len(values)) for values in (one, other)]
    if not any(std for _, std, _ in samples):
        return None
    from scipy.stats import ttest_ind_from_stats  # takes a second to load

    return float(ttest_ind_from_stats(*samples[0], *samples[1], equal_var=False).pvalue)


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Computes half the width of the confidence interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Row:
    """One row of the headline table: runs that differ only in their seed.

    last, best: the metric at the last epoch and at the best epoch.
    over_baseline, over_teacher: `last` minus that of the student alone, and minus the teacher's; None
        where unknown.
    seconds, ms_per_step: means over seeds; None for a student that was evaluated only.
    method_parameters: number of parameters that train besides the student's.
    method: name of the method; empty for a student that was evaluated only.
    teacher: the teacher's metric, the mean over the runs; None where unknown.
    values: the metric at the last epoch, by seed.
    """

    label: str
    metric: str
    seeds: int
    last: MeanStd
    best: MeanStd
    over_baseline: float | None
    over_teacher: float | None
    seconds: float | None
    ms_per_step: float | None
    student_parameters: int | None
    method_parameters: int | None
    finished: bool
    folders: list[str]
    method: str = "none"
    teacher: float | None = None
    values: tuple[float, ...] = ()


class _Read(BaseModel):
    model_config = ConfigDict(strict=True)


def _object(**fields: Any) -> type[_Read]:
    """Returns the type of a JSON object with these fields; a pair is a type and a default."""
    types: dict[str, Any] = {k: v if isinstance(v, tuple) else (v, ...) for k, v in fields.items()}
    return create_model("_Object", __base__=_Read, **types)


# Types of the values that are read. A file may be damaged, edited, or written by another version.
_NAMED = _object(name=str)
_DATA = _object(kind=(str, "folder"), root=(str, ""), test_limit=(int | None, None))
_CONFIG = _object(
    task=(str, DEFAULT_TASK), data=(_DATA | None, None), student=_NAMED, teacher=_NAMED | None, method=_NAMED
)
_VERSIONS = _object(torch=str, mdistiller=str)
_ENV = _object(
    command=(list[str], []), gpus=list[str], cpu=str, threads=int, versions=_VERSIONS, commit=str | None
)
_VALUES = "p_t gap ece agreement tckd nckd teacher_p_t teacher_gap teacher_top1 teacher_ece"
_NUMBER = (float | None, None)
_DIAGNOSTICS = _object(**dict.fromkeys(_VALUES.split(), _NUMBER))
_BOTH = _object(test=(_DIAGNOSTICS | None, None), train=(_DIAGNOSTICS | None, None))
_LINE, _TRAIN = _object(kind=str), _object(step=int, loss=float)
_SUMMARY = _object(
    step=(int | None, None), ms_per_step=_NUMBER, student_parameters=int, method_parameters=(int | None, None)
)
_EVAL = {"epoch": int, "seconds": _NUMBER, "ms_per_step": _NUMBER, "diagnostics": (_BOTH | None, None)}


def _checked(value: Any, model: type[_Read], name: str) -> dict[str, Any]:
    try:
        model.model_validate(value)
    except ValidationError as error:
        raise explain(error, name) from error
    return value


def load_run(path: Path) -> Run:
    """Reads a run folder, finished or under way.

    Raises:
        DataError: the folder holds no run, a run of an unknown task, or no evaluation yet.
    """
    try:
        config = complete(_checked(json.loads((path / CONFIG).read_text(encoding="utf-8")), _CONFIG, CONFIG))
        env = _checked(json.loads((path / ENV).read_text(encoding="utf-8")), _ENV, ENV)
        task = config.get("task", DEFAULT_TASK)
        metric = get_task(task).Config.metrics[0]
        evaluation = _object(**_EVAL, **{metric: float, f"best_{metric}": float})
        types = {"train": _TRAIN, "eval": evaluation, "summary": _SUMMARY}
        read = [_checked(line, _LINE, METRICS) for line in read_metrics(path)]
        train, evals, ends = ([line for line in read if line["kind"] == kind] for kind in types)
        if not evals:
            raise DataError(f"{path}: no evaluation in metrics.jsonl yet")
        for kind, model in types.items():
            for line in read:
                if line["kind"] == kind:
                    _checked(line, model, METRICS)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"it has no {Path(error.filename).name}" if path.is_dir() else "there is no such folder"
        if (path.suffix == ".safetensors" and path.is_file()) or (path / STUDENT_FILE).is_file():
            reason = (
                "a student by itself has no metrics to report; "
                f"`mdistiller eval {path} --data.root DIR --out FOLDER` writes a folder that the report takes"
            )
        raise DataError(f"{path} is no run folder: {reason}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no run folder: {error}") from error
    return Run(path, config, env, evals, train, ends[-1] if ends else None, task, metric)


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns the dotted fields whose values differ, and their values ("" where not set), one per config.

    Seed and output folder do not count.
    """
    flat = [_flat(config) for config in configs]
    names = dict.fromkeys(name for fields in flat for name in fields if name not in ("seed", "out"))
    found = [(name, [fields.get(name, "") for fields in flat]) for name in names]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


# Kinds of data that are named by their folder
_AT_ROOT = ("folder", "hf", "auto", "coco", "yolo", "voc")


def test_set_of(run: Run) -> str:
    """Returns the name of a run's test set; metrics on different test sets do not compare."""
    data = run.data
    if not data:
        return run.task
    kind, limit = data.get("kind", "folder"), data.get("test_limit")
    name: str = Path(data.get("root", "")).name if kind in _AT_ROOT else kind
    return f"{name}, {limit} test images" if limit else name


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs that differ only in their seed, under unique labels.

    Where settings differ at one label, the fields that differ are added to it, or a number if that is long.
    The test set is added if there are several.
    """
    several = len({test_set_of(run) for run in runs}) > 1
    settings: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        label = f"{run.label} on {test_set_of(run)}" if several else run.label
        rest = {k: v for k, v in run.config.items() if k not in ("seed", "out")}
        settings.setdefault(label, {}).setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    groups: dict[str, list[Run]] = {}
    for label, found in settings.items():
        groups |= zip(_names(label, list(found.values())), found.values(), strict=True)
    return groups


def _names(label: str, groups: Sequence[Sequence[Run]]) -> list[str]:
    if len(groups) == 1:
        return [label]
    names = [label] * len(groups)
    for field, values in differing([runs[0].config for runs in groups]):
        if field != "recipe":  # its name follows from the other fields
            short = field.removeprefix("method.").removeprefix("optim.")
            names = [f"{name}, {short} {value or '–'}" for name, value in zip(names, values, strict=True)]
    if len(set(names)) == len(groups) and max(map(len, names)) <= len(label) + 40:
        return names
    return [label, *(f"{label} ({n})" for n in range(2, len(groups) + 1))]


READING = ("root", "eval_split", "download", "memory", "memory_limit_gb", "workers", "on_error")
"""Fields of a data config that change how a data set is read, and not its content."""


def find_baseline(run: Run, groups: Mapping[str, Sequence[Run]]) -> str | None:
    """Returns the label of a run's baseline: the same student without a teacher on the same data.

    Of several, it is the one with the fewest other settings. None without any, or without a teacher.
    """
    if run.config["teacher"] is None:
        return None

    def trained(other: Run) -> tuple[Any, ...]:
        student = other.config["student"]
        # A run of an earlier version lacks new fields, whose value here is None.
        data = {k: v for k, v in other.data.items() if k not in READING and v is not None}
        return student["name"], student.get("options"), data

    found = {
        label: sum(members[0].config.get(k) != v for k, v in run.config.items() if k != "data")
        for label, members in groups.items()
        if members[0].config["teacher"] is None
        and members[0].is_trained
        and trained(members[0]) == trained(run)
    }
    return min(found, key=found.__getitem__) if found else None


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Returns the rows of the headline table, in the order of the runs."""
    groups = group(runs)
    rows = {label: make_row(label, members) for label, members in groups.items()}
    for label, row in rows.items():
        if (baseline := find_baseline(groups[label][0], groups)) is not None:
            rows[label] = replace(row, over_baseline=row.last.mean - rows[baseline].last.mean)
    return list(rows.values())


def make_row(label: str, runs: Sequence[Run]) -> Row:
    """Summarises runs that differ only in their seed; `over_baseline` is None."""
    metric, final = runs[0].metric, [run.evals[-1] for run in runs]
    summaries = [run.summary for run in runs if run.summary is not None]
    last = MeanStd.of([line[metric] for line in final])
    tests = [(line.get("diagnostics") or {}).get("test") or {} for line in final]
    teachers = [top1 for test in tests if (top1 := test.get("teacher_top1")) is not None]
    if not teachers:
        teachers = [value for run in runs if (value := _teachers_result(run)) is not None]
    teacher = statistics.fmean(teachers) if len(teachers) == len(runs) else None
    return Row(
        label=label,
        metric=metric,
        seeds=len(runs),
        last=last,
        best=MeanStd.of([line[f"best_{metric}"] for line in final]),
        over_baseline=None,
        over_teacher=None if teacher is None else last.mean - teacher,
        seconds=_mean([line.get("seconds") for line in final]),
        ms_per_step=_mean([(run.summary or run.evals[-1]).get("ms_per_step") for run in runs]),
        student_parameters=summaries[0]["student_parameters"] if summaries else None,
        method_parameters=summaries[0].get("method_parameters") if summaries else None,
        finished=len(summaries) == len(runs),
        folders=[str(run.path) for run in runs],
        method=runs[0].config["method"]["name"] if runs[0].is_trained else "",
        teacher=teacher,
        values=tuple(line[metric] for line in final),
    )


def _teachers_result(run: Run) -> float | None:
    """Returns the metric at the end of the run that trained the teacher, if its test images are the same."""
    checkpoint = (run.config["teacher"] or {}).get("checkpoint")
    if not isinstance(checkpoint, str) or not Path(checkpoint).is_dir():
        return None
    try:
        teacher = load_run(Path(checkpoint))
    except DataError:
        return None
    unused = {*READING, "keep_empty"} - {"root"}

    def tested(data: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in data.items() if k not in unused and not k.startswith("train_")}

    same = teacher.task == run.task and tested(teacher.data) == tested(run.data)
    return teacher.evals[-1][teacher.metric] if same else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
