"""A run from its config to its folder."""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mdistiller.config import RunConfig, with_choices_of
from mdistiller.errors import Interrupted
from mdistiller.runs.checkpoint import load_state
from mdistiller.runs.folder import STATE, RunFolder, check_resumable
from mdistiller.runs.progress import Reporter
from mdistiller.seeding import deterministic
from mdistiller.training.choose import build_fastest
from mdistiller.training.distributed import World, process_group, restarted
from mdistiller.training.signals import stop_on_signals
from mdistiller.training.task import get_task
from mdistiller.training.trainer import Trainer, fit
from mdistiller.types import Summary


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    path: the run folder; None in all but the main process.
    summary: the last line of metrics.jsonl.
    """

    path: Path | None
    summary: Summary


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    usual: RunConfig | None = None,
) -> RunResult:
    """Runs a config to its end and writes its run folder.

    Args:
        config: the run.
        resume: resume from the state in `config.out`, left there by an earlier start of the same config.
        reporter: progress display; None shows nothing.
        usual: config from which loggers show the differences; None: the defaults of all fields.

    Raises:
        MDistillerError: one of its children, for a config, data or checkpoint that cannot work.
        Interrupted: a signal stopped the run. The message is on stderr, too: uncaught, the error is silent.
    """
    config = get_task(config.task).resolve(config)
    with process_group(config.device) as world, deterministic(config.deterministic):
        shown = reporter if reporter is not None and world.is_main else Reporter()
        # In a function of its own: its locals have to be gone before the process group is.
        try:
            return _run(config, resume or restarted(config.out), shown, world, usual)
        except Interrupted as error:
            if world.is_main:
                print(f"mdistiller: {error}", file=sys.stderr)
            raise


def _run(
    config: RunConfig, resume: bool, reporter: Reporter, world: World, usual: RunConfig | None
) -> RunResult:
    with ExitStack() as stack:
        if resume and (stored := check_resumable(config)) is not None:
            config = with_choices_of(config, stored)
        config, trainer, source = build_fastest(get_task(config.task), config, world, reporter)
        trainer.data = trainer.identify()
        if config.has_teacher and trainer.distiller.asked is not None:
            trainer.teacher = trainer.distiller.asked.fingerprint
        if world.is_main:
            open_folder = RunFolder.reopen if resume else RunFolder.create
            trainer.run = open_folder(config, usual)
            stack.callback(trainer.run.close)
        if resume:
            _load(trainer, config, reporter)
        reporter.built(trainer, source)
        if (teacher := trainer.distiller.asked) is not None:
            for line in teacher.open():
                reporter.note(line)
        with stop_on_signals(world) as stop, stack.pop_all():  # a signal left over comes to a closed folder
            summary = fit(trainer, source, stop, reporter)
        return RunResult(None if trainer.run is None else trainer.run.path, cast(Summary, summary))


def _load(trainer: Trainer, config: RunConfig, reporter: Reporter) -> None:
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
