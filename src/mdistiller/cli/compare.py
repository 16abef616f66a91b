"""`mdistiller compare RUN…`: accuracy and cost of teacher, student alone, distilled students and exports."""

import shutil
import statistics
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.cli.terminal import print_table
from mdistiller.config import SELF, RunConfig
from mdistiller.deploy.measure import count_macs, milliseconds
from mdistiller.deploy.predict import Card, load_export
from mdistiller.deploy.student import StudentFile, open_student
from mdistiller.errors import CheckpointError, ConfigError, DataError, MDistillerError
from mdistiller.models.weights import STUDENT_FILE, find_weights
from mdistiller.report.costs import COMPARISON, ComparedModel, Comparison, compared_columns
from mdistiller.report.markup import markdown_table
from mdistiller.report.runs import RunRecord, find_baseline, group, load_run, make_row, teacher_names
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.environment import this_machine
from mdistiller.training.deployment import Model, ModelInput
from mdistiller.types import Line


class CompareCommand(Command):
    """Compare the teacher, the student alone, distilled students and their exports on the CPU: accuracy,
    parameters, multiply-accumulates, file size and milliseconds per image. Later reports on these runs
    include the table.
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders with one test set."""
    exports: tuple[Path, ...] = ()
    """Folders that `mdistiller export` wrote, such as RUN/export/*. A torch-export graph may run code when
    opened: name only those you trust."""
    batch: tuple[int, ...] | None = None
    """Batch sizes to time. None: 1 and 32, or only 1 for models that accept any image size, timed on the
    first test image."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads. None: torch's choice, or OMP_NUM_THREADS."""
    eval: bool = True
    """Evaluate all models on the test set. Otherwise the recorded metrics are printed."""

    def execute(self) -> None:
        if not self.runs:
            raise ConfigError("compare needs at least one run folder; see mdistiller compare --help")
        before = torch.get_num_threads()
        try:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            found = compare(self.runs, self.exports, batches=self.batch, evaluate=self.eval)
        finally:
            torch.set_num_threads(before)
        if self.as_json:
            print(found.model_dump_json())
            return
        head, *rows = compared_columns(found, load_run(self.runs[0]).main_metric)
        shape = f", images of shape {list(found.image_shape)}" if found.image_shape else ""
        note = f"{found.metric} on {found.test_set}; milliseconds per image on {found.machine}{shape}"
        if not sys.stdout.isatty():
            print(f"{markdown_table(head, rows)}\n{note}")
            return
        print_table([name.replace(", ", "\n") for name in head], rows)
        print(f"\n{textwrap.fill(note, shutil.get_terminal_size().columns)}")


@dataclass(frozen=True)
class _Member:
    """A run with what its models need."""

    run: RunRecord
    label: str
    file: StudentFile
    config: RunConfig
    fields: ModelInput
    """Classes and form of the input of the run's models."""
    data: Callable[[], Any]
    """Reads the test set on its first call."""

    def images(self, count: int) -> Tensor:
        """Returns a batch of prepared images, on which the models are timed."""
        deployment = self.file.deployment
        images = deployment.example(self.fields, count, None)
        if images is None:
            images = deployment.example(self.fields, count, self.data())
        if images is None:
            sizes = ", ".join(map(str, deployment.batches))
            raise ConfigError(f"batch: got {count}; allowed for a run of {self.file.task.name}: {sizes}")
        return images


@dataclass(frozen=True)
class _Entry:
    """A model to compare, and its row; `member` is the run whose test set and baseline it has."""

    member: _Member
    model: Model
    row: Line
    is_student: bool = False


def compare(
    folders: Sequence[Path],
    exports: Sequence[Path] = (),
    *,
    batches: Sequence[int] | None = None,
    evaluate: bool = True,
) -> Comparison:
    """Compares the students of runs with their teacher and with their exported files, on the CPU.

    The rows are the teacher of the first run that has one, the students without a teacher, then the other
    students, each with its `exports`. A teacher that has no checkpoint, or one that cannot be loaded, is left
    out with a warning. No export of another student is opened: torch may unpickle parts of a graph.
    `compare.json` is written into each run folder. Times are those of `batches`, None: of the runs' task.

    Raises:
        DataError: a folder is no run, the runs have different test sets, or the test set cannot be read.
        ConfigError: a task that does not measure models, or a batch size that its models do not take.
        CheckpointError: a student or one of `exports` cannot be read, or such an export belongs to no run.
    """
    if wrong := [batch for batch in batches or () if batch < 1]:
        raise ConfigError(f"batch: got {wrong[0]}; allowed: 1 or more")
    runs = [load_run(folder) for folder in folders]
    tests = list(dict.fromkeys(run.test_set for run in runs))
    if len(tests) > 1:
        raise DataError(f"the runs have different test sets ({', '.join(tests)}); compare runs with one")
    groups = group(runs)
    members = _members(runs, groups)
    batches = batches or members[0].file.deployment.batches
    shapes = [tuple(members[0].images(batch).shape) for batch in batches]
    entries = _entries(members, exports)
    for entry in entries if evaluate else ():
        member, cpu = entry.member, torch.device("cpu")
        (metrics,) = member.file.deployment.evaluate([entry.model], member.config, member.data(), cpu)
        entry.row["metric"] = float(metrics[member.run.metric])
    for batch in batches:
        calls = [(entry.model, entry.member.images(batch)) for entry in entries]
        for entry, ms in zip(entries, milliseconds(calls, batch), strict=True):
            entry.row["ms"][batch] = ms
    found = Comparison(
        test_set=tests[0],
        metric=runs[0].metric,
        measured=evaluate,
        machine=this_machine(),
        image_shape=shapes[0],
        rows=[ComparedModel(**e.row, over_alone=_over_alone(e, entries, groups)) for e in entries],
    )
    for run in runs:
        try:
            write_text(run.path / COMPARISON, found.model_dump_json(indent=2) + "\n")
        except OSError as error:
            warnings.warn(f"cannot write {run.path / COMPARISON}: {error}", stacklevel=2)
    return found


def _members(runs: Sequence[RunRecord], groups: Mapping[str, Sequence[RunRecord]]) -> list[_Member]:
    """Returns the runs with what their models need; runs of one test set share it."""
    found: list[_Member] = []
    sets: dict[str, Callable[[], Any]] = {}
    for run in runs:
        label, seeds = next((label, members) for label, members in groups.items() if run in members)
        if len(seeds) > 1:
            label += f", seed {run.config.get('seed')}"
        file = open_student(run.path)
        config = file.config
        assert config is not None  # `load_run` has read it
        key = (config.data_settings or config).model_dump_json()
        read = sets.setdefault(key, cache(partial(file.deployment.load_test_set, config)))
        found.append(_Member(run, label, file, config, ModelInput(**file.fields), read))
    return found


def _entries(members: Sequence[_Member], exports: Sequence[Path]) -> list[_Entry]:
    found: list[_Entry] = []
    teacher_file: Path | None = None
    names = teacher_names([member.run for member in members])
    for taught in [member for member in members if member.run.teacher not in (None, SELF)][:1]:
        try:
            config, files = _teacher_files(taught)
            module = taught.file.task.build_teacher(config, taught.data()).eval()
            recorded = make_row("", [taught.run]).teacher
            found.append(_entry(taught, names[taught.run.taught_by], module, files, recorded))
            teacher_file = files[0].resolve()
        except (MDistillerError, OSError) as error:
            warnings.warn(f"teacher left out: {error}", stacklevel=3)

    def rank(member: _Member) -> int:
        """Returns the position of a run: the teacher's, one without a teacher, a distilled one."""
        if (member.run.path / STUDENT_FILE).resolve() == teacher_file:
            return 0
        return 1 if member.run.teacher is None else 2

    owners = [(folder, _owner(folder, members)) for folder in exports]
    for member in sorted(members, key=rank):
        label = member.label if rank(member) else found[0].row["label"]
        file, recorded = member.file, member.run.evals[-1].value
        student = _entry(member, label, file.load(), [file.path], recorded, is_student=True)
        if rank(member):  # the teacher has a row
            found.append(student)
        found += [_export(folder, student) for folder, owner in owners if owner is member]
    return found


def _teacher_files(member: _Member) -> tuple[RunConfig, list[Path]]:
    """Returns the config that builds a run's teacher, and the files of its weights."""
    # A run's settings are read with method "none", which has no teacher.
    config, _ = member.config.replace(method={"name": "kd"}).by_teacher()[0]
    files = [find_weights(t.checkpoint) for t in config.teachers if t.checkpoint is not None]
    if len(files) < len(config.teachers):  # a config is data: nothing is downloaded for it
        raise ConfigError(f"a teacher of {member.run.path} has no checkpoint file")
    for teacher in config.teachers:  # a backbone has no metric
        member.file.task.check_model(teacher.name)
    return config, files


def _owner(folder: Path, members: Sequence[_Member]) -> _Member:
    """Returns the run of an export: the one in whose folder it is, or the first with its model."""
    owners = [member for member in members if member.run.path.resolve() in folder.resolve().parents]
    if not owners:
        card = load_export(folder, "cpu").card
        owners = [m for m in members if isinstance(card, Card) and m.run.student == card.model]
    if not owners:
        raise CheckpointError(f"exports: {folder} has no student of these runs' models")
    return owners[0]


def _entry(
    member: _Member,
    label: str,
    module: nn.Module,
    files: Sequence[Path],
    recorded: float | None,
    *,
    is_student: bool = False,
) -> _Entry:
    model, parameters = member.file.deployment.as_model(module), sum(p.numel() for p in module.parameters())
    row: Line = {"label": label, "metric": recorded, "parameters": parameters, "ms": {}}
    row |= {"macs": count_macs(model, member.images(1)), "bytes": sum(file.stat().st_size for file in files)}
    return _Entry(member, model, row, is_student)


def _export(folder: Path, student: _Entry) -> _Entry:
    exported, member = load_export(folder, "cpu"), student.member
    card = exported.card
    assert isinstance(card, Card)
    for name in ("classes", "image_size"):
        if getattr(card, name) != getattr(member.fields, name):
            raise CheckpointError(f"{folder} has other {name} than {member.run.path}")
    kind = f"{card.format} int8" if card.int8 else card.format
    weights = "" if card.student == STUDENT_FILE else f" of {card.student}"
    row: Line = {"label": f"{student.row['label']}, {kind}{weights}", "parameters": card.parameters}
    row |= {"macs": card.macs or student.row["macs"], "bytes": (folder / card.file).stat().st_size}
    row |= {"metric": None if card.measured is None else card.measured.value, "ms": {}}
    return _Entry(member, exported.model, row)


def _over_alone(
    entry: _Entry, entries: Sequence[_Entry], groups: Mapping[str, Sequence[RunRecord]]
) -> float | None:
    """Returns a metric minus the mean of the student alone over seeds."""
    run, value = entry.member.run, entry.row["metric"]
    is_alone = run.teacher is None
    if value is None or (is_alone and entry.is_student):
        return None
    label = next(k for k, v in groups.items() if run in v) if is_alone else find_baseline(run, groups)
    paths = {member.path for member in groups.get(label or "", ())}
    students = [e.row["metric"] for e in entries if e.is_student and e.member.run.path in paths]
    alone = [metric for metric in students if metric is not None]
    return value - statistics.fmean(alone) if alone else None
