"""Reads run folders and summarizes them over seeds."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from mdistiller.errors import CheckpointError, DataError
from mdistiller.models.weights import STUDENT_FILE, read_metadata
from mdistiller.report.looks import method_title
from mdistiller.report.spread import MeanStd
from mdistiller.runs.folder import CONFIG, ENV, METRICS, read_metrics
from mdistiller.runs.lines import Environment, Evaluation, Read, Summary, Window
from mdistiller.settings import explain, flatten
from mdistiller.training.task import DEFAULT_TASK, get_task
from mdistiller.types import Line, Metric


class _Named(Read):
    name: str
    checkpoint: object = None


class _Data(Read):
    kind: str = "folder"
    root: str = ""
    test_limit: int | None = None


class _Config(Read, title=CONFIG):
    task: str = DEFAULT_TASK
    data: _Data | None = None
    student: _Named
    teacher: _Named | None
    more_teachers: list[_Named] | None = None
    method: _Named


class _Line(Read, title=METRICS):
    kind: str


@dataclass(frozen=True)
class RunRecord:
    """Contents of one run folder.

    config: the values of config.json.
    evals, windows: evaluations and training windows in metrics.jsonl.
    summary: None while the run is under way.
    student, teacher: names of the models, of several teachers joined by "+"; None without a teacher.
    teacher_files: checkpoints of the teachers, run folders or files.
    test_set: name of the test images; metrics on different ones do not compare.
    metric: field of the metric that picks its best epoch; `main_metric` shows it.
    """

    path: Path
    config: Line
    env: Environment
    evals: list[Evaluation]
    windows: list[Window]
    summary: Summary | None
    task: str
    student: str
    teacher: str | None
    teacher_files: list[Path]
    method: str
    test_set: str
    metric: str

    @property
    def main_metric(self) -> Metric:
        """The metric that picks the best epoch, with its presentation."""
        return get_task(self.task).Config.main_metric()

    @property
    def data(self) -> Line:
        """Settings of the data set; empty for a task that has none in a field `data`."""
        return self.config.get("data") or {}

    @property
    def is_trained(self) -> bool:
        """Whether the folder is of a training run, and not of `mdistiller eval --out`."""
        return self.summary is None or self.summary.step != 0

    @property
    def taught_by(self) -> tuple[str | None, ...]:
        """Name and files of the teacher, by which runs of one teacher are known."""
        return self.teacher, *map(str, self.teacher_files)


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


def load_run(path: Path) -> RunRecord:
    """Reads a run folder, finished or under way.

    Raises:
        DataError: the folder holds no run, a run of an unknown task, or no evaluation yet.
    """
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        fields = _Config.model_validate(config)
        env = Environment.model_validate(json.loads((path / ENV).read_text(encoding="utf-8")))
        metric = get_task(fields.task).Config.metrics[0]
        lines: dict[str, list[Line]] = {"eval": [], "train": [], "summary": []}
        for line in read_metrics(path):
            lines.setdefault(_Line.model_validate(line).kind, []).append(line)
        if not lines["eval"]:
            raise DataError(f"{path}: no evaluation in metrics.jsonl yet")
        windows = [Window.model_validate(line) for line in lines["train"]]
        evals = [_evaluation(line, metric) for line in lines["eval"]]
        summaries = [Summary.model_validate(line) for line in lines["summary"]]
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"it has no {Path(error.filename).name}" if path.is_dir() else "there is no such folder"
        if (path.suffix == ".safetensors" and path.is_file()) or (path / STUDENT_FILE).is_file():
            reason = (
                "a student by itself has no metrics to report; "
                f"`mdistiller eval {path} --data.root DIR --out FOLDER` writes a folder that the report takes"
            )
        raise DataError(f"{path} is no run folder: {reason}") from error
    except ValidationError as error:
        raise DataError(f"{path} is no run folder: {explain(error, error.title)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no run folder: {error}") from error
    teachers = [named for named in (fields.teacher, *(fields.more_teachers or ())) if named is not None]
    return RunRecord(
        path=path,
        config=config,
        env=env,
        evals=evals,
        windows=windows,
        summary=summaries[-1] if summaries else None,
        task=fields.task,
        student=fields.student.name,
        teacher=" + ".join(named.name for named in teachers) or None,
        teacher_files=[Path(named.checkpoint) for named in teachers if isinstance(named.checkpoint, str)],
        method=fields.method.name,
        test_set=_test_set(fields),
        metric=metric,
    )


def _evaluation(line: Line, metric: str) -> Evaluation:
    best = f"best_{metric}"
    if missing := [name for name in ("epoch", metric, best) if line.get(name) is None]:
        raise ValueError(f"{METRICS}: " + "; ".join(f"{name}: Field required" for name in missing))
    return Evaluation.model_validate({**line, "value": line[metric], "best": line[best]})


# Kinds of data that are named by their folder
_AT_ROOT = ("folder", "hf", "auto", "coco", "yolo", "voc")


def _test_set(fields: _Config) -> str:
    if (data := fields.data) is None:
        return fields.task
    name = Path(data.root).name if data.kind in _AT_ROOT else data.kind
    return f"{name}, {data.test_limit} test images" if data.test_limit else name


def differing(configs: Sequence[Line]) -> list[tuple[str, list[str]]]:
    """Returns the dotted fields whose values differ, and their values ("" where not set), one per config.

    Seed and output folder do not count. Paths are relative to the folder that holds the run's.
    """
    texts = [
        {k: _setting(v, str(config.get("out"))) for k, v in flatten(config).items() if v is not None}
        for config in configs
    ]
    names = [
        name for name in dict.fromkeys(k for values in texts for k in values) if name not in ("seed", "out")
    ]
    found = [(name, [values.get(name, "") for values in texts]) for name in names]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def _setting(value: object, out: str) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return (
        os.path.relpath(value, os.path.dirname(out)) if os.path.isabs(value) and os.path.isabs(out) else value
    )


def teacher_names(runs: Sequence[RunRecord]) -> dict[tuple[str | None, ...], str]:
    """Returns the names of teachers, by `taught_by`: "teacher", or with their models if there are several."""
    return {taught_by: f"teacher {name}".rstrip() for taught_by, name in _apart(runs).items()}


def _apart(runs: Sequence[RunRecord]) -> dict[tuple[str | None, ...], str]:
    """Returns what tells teachers apart, by `taught_by`: their models; an empty text for a single one."""
    known = list(dict.fromkeys(run.taught_by for run in runs if run.teacher is not None))
    models = [model for model, *_ in known]
    found = {}
    for model, *files in known:
        more = [Path(str(file)).name for file in files] if models.count(model) > 1 else []
        found[model, *files] = " ".join([str(model), *more]) if len(known) > 1 else ""
    return found


def _titles(runs: Sequence[RunRecord]) -> list[str]:
    """Returns what each run is: teacher, student alone or its method, with its models where these differ.

    A run without a teacher is one if a run names its folder, where it is now or where it was trained, and if
    no student is of its model; among runs without a teacher, if its recipe is a teacher's.
    """
    taught = [run for run in runs if run.teacher is not None]
    students = {run.student for run in taught or runs}
    models, teachers, apart = {_model(run) for run in taught}, teacher_names(runs), _apart(runs)
    places = {
        place: teachers[run.taught_by]
        for run in taught
        for file in map(Path.resolve, run.teacher_files)
        for place in (file, file.parent)
    }

    def title(run: RunRecord) -> str:
        if not run.is_trained:
            return f"{run.student}, evaluated"
        if run.teacher is not None:
            teacher = f" from {apart[run.taught_by]}" if apart[run.taught_by] else ""
            return method_title(run.method) + teacher + f" into {run.student}" * (len(students) > 1)
        known = [p for p in (run.path.resolve(), Path(str(run.config.get("out"))).resolve()) if p in places]
        if known and _model(run) not in models:
            return places[known[0]]
        if not taught and ".teacher." in str(run.config.get("recipe")):
            return "teacher"
        return "student alone" if students == {run.student} else f"{run.student} alone"

    return list(map(title, runs))


def group(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Groups runs that differ only in their seed, under unique names, which all parts of the page use.

    Where settings differ at one name, the fields that differ are added to it, or a number if that is long.
    The test set is added if there are several.
    """
    several = len({run.test_set for run in runs}) > 1
    settings: dict[str, dict[str, list[RunRecord]]] = {}
    for run, label in zip(runs, _titles(runs), strict=True):
        label += f" on {run.test_set}" if several else ""
        rest = {k: v for k, v in run.config.items() if k not in ("seed", "out")}
        settings.setdefault(label, {}).setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    groups: dict[str, list[RunRecord]] = {}
    for label, found in settings.items():
        groups |= zip(_names(label, list(found.values())), found.values(), strict=True)
    return groups


def _model(run: RunRecord) -> tuple[str, str]:
    return run.student, str(run.config["student"].get("options") or {})


def _names(label: str, groups: Sequence[Sequence[RunRecord]]) -> list[str]:
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


def find_baseline(run: RunRecord, groups: Mapping[str, Sequence[RunRecord]]) -> str | None:
    """Returns the label of a run's baseline: the same student without a teacher on the same data.

    Of several, it is the one with the fewest other settings. None without any, or without a teacher.
    """
    if run.teacher is None:
        return None

    def trained(other: RunRecord) -> tuple[object, ...]:
        # A student has the mean and std of its teacher's images, and the student alone those of its recipe.
        data = {k: v for k, v in other.data.items() if k not in (*READING, "mean", "std") and v is not None}
        with suppress(CheckpointError):  # small squares keep their size, which the student's file records
            data.setdefault("image_size", read_metadata(other.path).get("image_size"))
        return other.student, other.config["student"].get("options"), data

    mine = trained(run)
    found = {
        label: sum(members[0].config.get(k) != v for k, v in run.config.items() if k != "data")
        for label, members in groups.items()
        if members[0].teacher is None and members[0].is_trained and trained(members[0]) == mine
    }
    return min(found, key=found.__getitem__) if found else None


def summarize(runs: Sequence[RunRecord]) -> list[Row]:
    """Returns the rows of the headline table, in the order of the runs."""
    groups = group(runs)
    rows = {label: make_row(label, members) for label, members in groups.items()}
    for label, row in rows.items():
        baseline = find_baseline(groups[label][0], groups)
        if baseline is not None and row.finished and rows[baseline].finished:
            rows[label] = replace(row, over_baseline=row.last.mean - rows[baseline].last.mean)
    return list(rows.values())


def make_row(label: str, runs: Sequence[RunRecord]) -> Row:
    """Summarizes runs that differ only in their seed, the finished ones alone if there are any.

    `over_baseline` is None.
    """
    runs = [run for run in runs if run.summary is not None] or runs
    final = [run.evals[-1] for run in runs]
    summaries = [run.summary for run in runs if run.summary is not None]
    last = MeanStd.of([line.value for line in final])
    teachers = [top1 for line in final if (top1 := line.seen().get("teacher_top1")) is not None]
    if not teachers:
        teachers = [value for run in runs if (value := _teachers_result(run)) is not None]
    teacher = statistics.fmean(teachers) if len(teachers) == len(runs) else None
    return Row(
        label=label,
        metric=runs[0].metric,
        seeds=len(runs),
        last=last,
        best=MeanStd.of([line.best for line in final]),
        over_baseline=None,
        over_teacher=None if teacher is None else last.mean - teacher,
        seconds=_mean([line.seconds for line in final]),
        ms_per_step=_mean([(run.summary or run.evals[-1]).ms_per_step for run in runs]),
        student_parameters=summaries[0].student_parameters if summaries else None,
        method_parameters=summaries[0].method_parameters if summaries else None,
        finished=bool(summaries),
        folders=[str(run.path) for run in runs],
        method=runs[0].method if runs[0].is_trained else "",
        teacher=teacher,
        values=tuple(line.value for line in final),
    )


def _teachers_result(run: RunRecord) -> float | None:
    """Returns the metric at the end of the run that trained the teacher, if its test images are the same."""
    if len(run.teacher_files) != 1 or not run.teacher_files[0].is_dir():
        return None
    try:
        teacher = load_run(run.teacher_files[0])
    except DataError:
        return None
    unused = {*READING, "keep_empty"} - {"root"}

    def tested(data: Line) -> Line:
        return {k: v for k, v in data.items() if k not in unused and not k.startswith("train_")}

    same = teacher.task == run.task and tested(teacher.data) == tested(run.data)
    return teacher.evals[-1].value if same else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
