"""Runs from configs to run folders: one run, or several side by side in one process.

Side by side, each batch is read and augmented once and passed through the teacher once for all runs. Each run
has its own weights, optimizer, folder and state, and ends with the bits of a run by itself (on a CPU; on a
GPU up to the order of sums).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdistiller.config import MEASURED, RunConfig, with_choices, with_choices_of
from mdistiller.errors import ConfigError, MDistillerError, TrainingError
from mdistiller.runs.checkpoint import load_state
from mdistiller.runs.folder import STATE, RunFolder, check_resumable
from mdistiller.runs.progress import Reporter, Silent
from mdistiller.seeding import deterministic
from mdistiller.training.choose import build_fastest
from mdistiller.training.distributed import World, process_group, restarted
from mdistiller.training.signals import stop_on_signals
from mdistiller.training.task import get_task
from mdistiller.training.trainer import fit


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    path: the run folder; None in all but the main process.
    summary: the last line of metrics.jsonl.
    """

    path: Path | None
    summary: dict[str, Any]


def train(config: RunConfig, *, resume: bool = False, reporter: Reporter | None = None) -> RunResult:
    """Runs a config to its end and writes its run folder.

    Args:
        config: the run.
        resume: resume from the state in `config.out`, left there by an earlier start of the same config.
        reporter: progress display; None shows nothing.

    Raises:
        MDistillerError: one of its children, for a config, data or checkpoint that cannot work.
    """
    (end,) = _launch([_resolve(config)], [resume], reporter)
    if isinstance(end, MDistillerError):
        raise end
    return end


def train_together(
    configs: Sequence[RunConfig],
    *,
    resume: Sequence[bool] | None = None,
    reporter: Reporter | None = None,
) -> list[RunResult]:
    """Runs several configs side by side and writes their run folders.

    A run that fails leaves the others at work. A signal ends all after the same step, each with its state
    saved. `seconds` and `ms_per_step` of a run are its equal share of the time of all.

    Args:
        configs: the runs, each with a folder `out` of its own.
        resume: for each run, whether it resumes from the state in its folder. None: no run does.
        reporter: progress display; None shows nothing.

    Raises:
        ConfigError: runs that differ in a field that they would share, or several processes.
        TrainingError: after the end of all, if some failed.
        MDistillerError: its other children, before the start, as `train`.
    """
    if not configs:
        return []
    configs = [_resolve(config) for config in configs]
    names = [str(config.out) for config in configs]
    if None in (config.out for config in configs) or len(set(names)) < len(names):
        raise ConfigError("out: runs side by side need a folder each, by name")
    for i, config in enumerate(configs):
        for other in configs[:i]:
            field = difference(other, config)
            if field is not None:
                raise ConfigError(f"{field}: runs side by side share it; {other.out} and {config.out} can't")
    ends = _launch(configs, resume or [False] * len(configs), reporter)
    errors = [
        f"{config.out}: {end}"
        for config, end in zip(configs, ends, strict=True)
        if isinstance(end, MDistillerError)
    ]
    if errors:
        raise TrainingError(f"{len(errors)} of {len(configs)} runs ended early: " + "; ".join(errors))
    return [end for end in ends if isinstance(end, RunResult)]


def _resolve(config: RunConfig) -> RunConfig:
    return get_task(config.task).resolve(config)


def _launch(
    configs: Sequence[RunConfig], resume: Sequence[bool], reporter: Reporter | None
) -> list[RunResult | MDistillerError]:
    first = configs[0]
    with process_group(first.device) as world, deterministic(first.deterministic):
        if world.size > 1 and len(configs) > 1:
            raise ConfigError(f"runs side by side take one process; got {world.size}")
        resumes = [wanted or restarted(config.out) for config, wanted in zip(configs, resume, strict=True)]
        shown = reporter if reporter is not None and world.is_main else Silent()
        # In a function of its own: its locals have to be gone before the process group is.
        return _run(configs, resumes, shown, world)


def _run(
    configs: Sequence[RunConfig], resumes: Sequence[bool], reporter: Reporter, world: World
) -> list[RunResult | MDistillerError]:
    with ExitStack() as stack:
        stored = [check_resumable(c) if resume else None for c, resume in zip(configs, resumes, strict=True)]
        shared = {name: getattr(c, name) for c in filter(None, reversed(stored)) for name in MEASURED}
        configs = [with_choices(config, shared) for config in configs]
        pairs = zip(configs, stored, strict=True)
        configs = [config if old is None else with_choices_of(config, old) for config, old in pairs]
        configs, trainers, source = build_fastest(get_task(configs[0].task), configs, world, reporter)
        for config, resume, trainer in zip(configs, resumes, trainers, strict=True):
            if world.is_main:
                trainer.run = RunFolder.reopen(config) if resume else RunFolder.create(config)
                stack.callback(trainer.run.close)
        for config, resume, trainer in zip(configs, resumes, trainers, strict=True):
            if resume:
                assert config.out is not None
                state = load_state(config.out / STATE)
                if state is None:
                    reporter.note(f"{config.out}: no state was saved before its end, so it starts at step 0")
                else:
                    trainer.load_state_dict(state)
                    if trainer.step < trainer.total:
                        reporter.note(f"{config.out}: resumes after step {trainer.step:,}")
                if trainer.run is not None:
                    trainer.run.rewind(trainer.step)
            if len(configs) > 1:
                trainer.name = config.out.name if config.out is not None else ""
                trainer.clock = lambda: time.perf_counter() / len(trainers)
        reporter.built(trainers, source)
        source.open(reporter)
        with stop_on_signals(world) as stop, stack.pop_all():  # a signal left over comes to closed folders
            ends = fit(trainers, source, stop, reporter)
        paths = [None if trainer.run is None else trainer.run.path for trainer in trainers]
        return [
            end if isinstance(end, MDistillerError) else RunResult(path, end)
            for path, end in zip(paths, ends, strict=True)
        ]


# Fields in which runs side by side agree; those of the teacher only where both have one.
_SHARED = (
    "task",
    "data",
    "augment",
    "epochs",
    "max_steps",
    "batch_size",
    "drop_last",
    "seed",
    "precision",
    "layout",
    "compile",
    "deterministic",
    "device",
    "teacher_cache",
    "teacher_views",
)
_SHARED_WITH_TEACHER = (
    "teacher",
    "more_teachers",
    "teacher_batch",
    "teacher_cache_format",
    "teacher_cache_taps",
)


def difference(a: RunConfig, b: RunConfig) -> str | None:
    """Returns the first field in which two runs differ but have to agree to run side by side.

    None: they may run side by side. A run without a teacher fits beside any.
    """
    if a.learns_from_average or b.learns_from_average:
        return "teacher"
    fields = _SHARED + (_SHARED_WITH_TEACHER if a.has_teacher and b.has_teacher else ())
    return next((f for f in fields if getattr(a, f, None) != getattr(b, f, None)), None)


def grouped(configs: Sequence[RunConfig], most: int) -> list[list[int]]:
    """Groups runs that may run side by side, at most `most` in a group; returns their indices."""
    groups: list[list[int]] = []
    for i, config in enumerate(configs):
        for group in groups:
            if len(group) < most and all(difference(configs[j], config) is None for j in group):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
