"""Several runs side by side in one process: the same images and teacher, other methods, students, settings.

Every batch is read and augmented once, and the teacher looks at it once for all. Each run has its own
weights, optimizer, folder and state, and ends with the bits that it would end with by itself (on a CPU; on a
GPU up to the order of sums). All that a run draws follows from its seed and the step, so no run disturbs
another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from mdistiller.config import SELF
from mdistiller.errors import ConfigError, MDistillerError, TrainingError
from mdistiller.runs.folder import Reporter, Silent
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.models import has_teacher
from mdistiller.training.course import drive
from mdistiller.training.distributed import world
from mdistiller.training.launch import RunResult, build_trainers, open_runs
from mdistiller.training.seeding import deterministic
from mdistiller.training.signals import stop_on_signals

_SAME = (
    "data",
    "augment",
    "epochs",
    "max_steps",
    "batch_size",
    "drop_last",
    "seed",
    "precision",
    "channels_last",
    "compile",
    "deterministic",
    "device",
)
_SAME_WITH_TEACHER = ("teacher", "more_teachers", "teacher_batch", "teacher_table")


def difference(a: ClassificationConfig, b: ClassificationConfig) -> str | None:
    """The first field in which two runs differ that have to agree to be side by side; None: they may be.

    A run without a teacher fits beside any.
    """
    for config in (a, b):
        if config.teacher is not None and config.teacher.name == SELF:
            return "teacher"
    fields = _SAME + (_SAME_WITH_TEACHER if has_teacher(a) and has_teacher(b) else ())
    return next((name for name in fields if getattr(a, name) != getattr(b, name)), None)


def grouped(configs: Sequence[ClassificationConfig], most: int) -> list[list[int]]:
    """Runs that may be side by side, at most so many at a time: their numbers, in order of the first."""
    groups: list[list[int]] = []
    for i, config in enumerate(configs):
        for group in groups:
            if len(group) < most and all(difference(configs[j], config) is None for j in group):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


class _Part:
    """One run's voice among several: one bar for all, and its evaluations under its name."""

    def __init__(self, reporter: Reporter, name: str, done: dict[str, int]) -> None:
        self.reporter, self.name, self.furthest = reporter, name, done

    def start(self, title: str, total: int, done: int) -> None:
        """The bar of all is there."""

    def step(self, done: int) -> None:
        """Move the bar, if no other run has."""
        if done > self.furthest["step"]:
            self.furthest["step"] = done
            self.reporter.step(done)

    def evaluated(self, line: dict[str, Any]) -> None:
        """Pass it on with the run's name."""
        self.reporter.evaluated({**line, "name": self.name})

    def stop(self) -> None:
        """The others may go on."""


def train_together(
    configs: Sequence[ClassificationConfig],
    *,
    resume: Sequence[bool] | None = None,
    reporter: Reporter | None = None,
) -> list[RunResult]:
    """Run several configs side by side and write their run folders.

    A run that fails leaves the others at work. A signal ends all after the same step, each with its state
    saved. Runs that go on from different steps wait for those behind. `seconds` and `ms_per_step` of a run
    are its equal share of the time of all.

    Args:
        configs: the runs, each with a folder `out` of its own.
        resume: of each, whether it goes on from the state in its folder. None: not one.
        reporter: told about progress; None shows nothing.

    Raises:
        ConfigError: runs that differ in what they would share, or several processes.
        TrainingError: after the end of all, if some failed.
        MDistillerError: its other children, before the start, as `train`.
    """
    if not configs:
        return []
    names = [str(config.out) for config in configs]
    if None in (config.out for config in configs) or len(set(names)) < len(names):
        raise ConfigError("out: runs side by side need a folder each, by name")
    for i, config in enumerate(configs):
        for other in configs[:i]:
            field = difference(other, config)
            if field is not None:
                raise ConfigError(f"{field}: runs side by side share it; {other.out} and {config.out} can't")
    shown = reporter if reporter is not None else Silent()
    first = configs[0]
    with world(first.device) as here, deterministic(first.deterministic), ExitStack() as stack:
        if here.size > 1:
            raise ConfigError(f"runs side by side take one process; got {here.size}")
        goes_on = resume or [False] * len(configs)
        opened = open_runs(configs, lambda here: build_trainers(configs, here), here, goes_on, stack)
        trainers = [trainer for trainer, _ in opened]
        feed, total = trainers[0].feed, trainers[0].total
        feed.open_table(shown)
        furthest = {"step": min(trainer.step for trainer in trainers)}
        for trainer in trainers:
            trainer.clock = lambda: time.perf_counter() / len(trainers)
        courses = [
            trainer.course(run, _Part(shown, run.path.name if run else "", furthest))
            for trainer, run in opened
        ]
        title = f"{len(configs)} runs side by side: {trainers[0].splits.description}"
        shown.start(title, total, furthest["step"])
        try:
            with stop_on_signals(here) as stop:
                ends = drive(feed, courses, total, stop)
        finally:
            shown.stop()
    errors = [f"{config.out}: {end}" for config, end in zip(configs, ends, strict=True) if _failed(end)]
    if errors:
        raise TrainingError(f"{len(errors)} of {len(configs)} runs ended early: " + "; ".join(errors))
    return [
        RunResult(config.out, end)
        for config, end in zip(configs, ends, strict=True)
        if not isinstance(end, MDistillerError)
    ]


def _failed(end: object) -> bool:
    return isinstance(end, MDistillerError)
