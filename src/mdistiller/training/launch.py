"""`train(config)`: one run, from its config to its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from mdistiller.data import load_data
from mdistiller.runs.checkpoint import load_state
from mdistiller.runs.folder import STATE, Reporter, RunFolder, Silent, check_resumable
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.models import (
    build_student,
    build_teacher,
    check_models,
    check_statistics,
    has_teacher,
)
from mdistiller.tasks.classification.trainer import Trainer
from mdistiller.training.batches import Feed
from mdistiller.training.distributed import World, restarted, world
from mdistiller.training.seeding import deterministic
from mdistiller.training.trainer import Loop


@dataclass(frozen=True)
class RunResult:
    """A run's folder (None in all but the main process), and its summary, the last line of metrics.jsonl."""

    path: Path | None
    summary: dict[str, Any]


def train(
    config: ClassificationConfig, *, resume: bool = False, reporter: Reporter | None = None
) -> RunResult:
    """Run a config to its end and write its run folder (its `report.html` comes from `mdistiller.analysis`).

    Args:
        config: the run.
        resume: go on from the state in `config.out`, left there by an earlier start of the same config.
        reporter: told about progress; None shows nothing.

    Raises:
        MDistillerError: one of its children, for a config, data or checkpoint that cannot work.
    """
    return carry_out(config, lambda here: build_trainers([config], here), resume, reporter)


def carry_out(
    config: ClassificationConfig,
    build: Callable[[World], Sequence[Loop]],
    resume: bool,
    reporter: Reporter | None,
) -> RunResult:
    """`train` with what `build` makes of the config: one loop."""
    with world(config.device) as here, deterministic(config.deterministic):
        resume = resume or restarted(config)
        # In a function of its own: what it holds has to be gone before the process group is.
        shown = reporter if reporter is not None and here.is_main else Silent()
        return _carry_out(config, build, here, resume, shown)


def _carry_out(
    config: ClassificationConfig,
    build: Callable[[World], Sequence[Loop]],
    here: World,
    resume: bool,
    reporter: Reporter,
) -> RunResult:
    with ExitStack() as stack:
        ((loop, run),) = open_runs([config], build, here, [resume], stack)
        return RunResult(None if run is None else run.path, loop.fit(run, reporter))


AnyLoop = TypeVar("AnyLoop", bound=Loop)


def open_runs(
    configs: Sequence[ClassificationConfig],
    build: Callable[[World], Sequence[AnyLoop]],
    here: World,
    resume: Sequence[bool],
    stack: ExitStack,
) -> list[tuple[AnyLoop, RunFolder | None]]:
    """Loops, in the state in which they begin or go on, and their folders.

    Args:
        configs: the runs.
        build: makes their loops.
        here: this process.
        resume: of each, whether it goes on from the state in its folder.
        stack: what is open is closed with it.
    """
    for config, goes_on in zip(configs, resume, strict=True):
        if goes_on:
            check_resumable(config)
    loops = build(here)
    runs: list[RunFolder | None] = []
    for config, goes_on in zip(configs, resume, strict=True):
        run = None
        if here.is_main:
            run = RunFolder.reopen(config) if goes_on else RunFolder.create(config)
            stack.callback(run.close)
        runs.append(run)
    for config, goes_on, loop, run in zip(configs, resume, loops, runs, strict=True):
        if goes_on:
            assert config.out is not None
            state = load_state(config.out / STATE)
            if state is not None:
                loop.load_state_dict(state)
            if run is not None:
                run.rewind(loop.step)
    return list(zip(loops, runs, strict=True))


def build_trainers(configs: Sequence[ClassificationConfig], here: World) -> list[Trainer]:
    """Trainers on one feed: of runs with the same data, teacher and augmentation."""
    for config in configs:
        check_models(config)
    first = next((config for config in configs if has_teacher(config)), configs[0])
    # Shapes repeat, so trying cuDNN's algorithms once pays.
    torch.backends.cudnn.benchmark = here.device.type == "cuda" and not first.deterministic
    splits = load_data(first.data)
    teacher = build_teacher(first, splits.num_classes)
    feed = Feed(first, splits, here) if len(configs) > 1 else None
    trainers = []
    for config in configs:
        student = build_student(config, splits.num_classes)
        own = teacher if has_teacher(config) else None
        check_statistics(config, student, own, splits)
        trainers.append(Trainer(config, splits, student, own, here, feed))
    return trainers
