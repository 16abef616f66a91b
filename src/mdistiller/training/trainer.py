"""The training loop: epochs, evaluations and state of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.config import RunConfig
from mdistiller.distiller import Distiller
from mdistiller.errors import ConfigError, Interrupted, MDistillerError, TrainingError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.runs.checkpoint import drop_previous, save_state, save_student
from mdistiller.runs.folder import CONFIG, EMA_FILE, STATE, RunFolder
from mdistiller.runs.progress import Reporter
from mdistiller.seeding import derive_seed, seed_default
from mdistiller.training.batches import AnySource
from mdistiller.training.distributed import World
from mdistiller.training.metrics import TrainingMetrics
from mdistiller.training.phases import Phases
from mdistiller.training.signals import Stop, agreed
from mdistiller.training.update import Update, learning_rate
from mdistiller.types import AnyBatch, Line, Outputs

_STEP = 2  # keeps a step's seeds apart from others

Evaluator = Callable[[nn.Module, bool], Line]
"""A model, and whether it is the student itself, to its metrics on the test set."""


def fit(trainer: Trainer, source: AnySource, stop: Stop, reporter: Reporter) -> Line:
    """Trains a run to its end and returns its summary. This is the training loop.

    Args:
        trainer: the run.
        source: prepared batches.
        stop: requests to stop. Steps whose batches are prepared are done before.
        reporter: progress display.

    Raises:
        MDistillerError: the run failed.
        Interrupted: the run was stopped, with its state saved.
    """
    world, images = trainer.world, trainer.config.batch_size
    reporter.start(_title(trainer), trainer.total, trainer.step, images=images, losses=trainer.metrics.recent)
    try:
        while not trainer.is_done:
            trainer.start_epoch()
            ended = False
            while not ended:
                step = trainer.step
                batches = source.next_batches(step, trainer.total - step)
                outputs = trainer.distiller.ask_ahead(batches)
                for batch, teacher in zip(batches, outputs, strict=True):
                    trainer.train_step(batch, teacher)
                    reporter.step(trainer.step)
                ended = trainer.batch == trainer.steps or trainer.step >= trainer.total
                if ended:
                    trainer.end_epoch(reporter)
                elif agreed(world, step, len(batches), time.monotonic() >= trainer.save_at):
                    trainer.save_within_epoch()
                if stop.requested(step, len(batches)) and not trainer.is_done:
                    stop.answered = True
                    raise trainer.interrupt(stop.reason)
        return trainer.finish()
    finally:
        reporter.stop()


@dataclass(eq=False, kw_only=True)
class Trainer:
    """A run: its student, its state, and the methods that `fit` calls.

    Args:
        config: the run's config.
        world: this process.
        description: one line about the data.
        identify: computes `data`, which may read every image.
        student: the model that makes the predictions and is saved.
        distiller: everything that trains.
        phases: parts of the student that stand still.
        ema: the student's moving average, or None.
        steps: batches of an epoch.
        parameters: parameter counts for the summary.
        is_extended: whether the method made another model of the student.

    Attributes:
        step: number of steps done, from which everything random and the learning rate follow.
        update: forward, backward and the optimizer on one batch.
        evaluator: computes metrics, `config.metrics` among them.
        metadata: entries written beside the student's weights.
        teacher: the hash of the teacher's weights, by which a resumed run knows it.
        data: hashes of the data by name, likewise.
    """

    config: RunConfig
    world: World
    description: str
    identify: Callable[[], dict[str, str]]
    student: nn.Module
    distiller: Distiller
    phases: Phases
    ema: AveragedModel | None
    steps: int
    parameters: dict[str, int]
    is_extended: bool
    update: Update = field(init=False)
    evaluator: Evaluator = field(init=False)
    metadata: Line = field(init=False)

    def __post_init__(self) -> None:
        config, world, steps = self.config, self.world, self.steps
        self.run: RunFolder | None = None
        self.teacher: str | None = None
        self.data: dict[str, str] = {}
        self.total = min(config.epochs * steps, config.max_steps or config.epochs * steps)
        self.probe_steps = min(config.probe_epochs * steps, self.total)
        self.step = self.epoch = 0
        self.batch = 0  # batches done of the epoch
        self.metrics = TrainingMetrics(world, config.log_every, self.log, self.learning_rate)
        self.best: Line = {}
        self.best_ema = -math.inf  # the first metric of the moving average
        self.improved = 0  # epoch of the last better metric, of the student or of its average
        self.last: Line = {}
        self.probe: Line = {}  # `last` at the end of the probe
        self.seconds = 0.0
        self.epoch_ms: list[float] = []
        self.clock: Callable[[], float] = time.perf_counter
        self._plan_save()

    # Steps and epochs

    def train_step(self, batch: AnyBatch, teacher: Outputs | None) -> dict[str, Tensor]:
        """Trains on one prepared batch; returns the sums of its losses and metrics, on the device."""
        progress = self._method_progress()
        self.seed_step(self.step)
        sums = self.update(batch, teacher, self.learning_rate(self.step), progress)
        self.step += 1
        self.batch += 1
        self.metrics.add(sums, self.step, self.epoch + 1)
        return sums

    def _method_progress(self) -> float:
        """Returns the fraction of training done for the method, rounded as `config.progress` says."""
        if self.config.progress == "exact":
            return self.step / self.total
        epochs = self.step // self.steps + (self.config.progress == "ceil")
        return min(epochs * self.steps / self.total, 1.0)

    def seed_step(self, step: int) -> None:
        """Seeds a step: everything random follows from (seed, step, rank), whatever happened before."""
        seed = derive_seed(self.config.seed, step, self.world.rank, _STEP)
        seed_default(self.world.device, seed)

    def start_epoch(self) -> None:
        """Starts the clock of an epoch, or of the rest of one."""
        self.distiller.train()
        if self.phases.start(probing=self.epoch < self.config.probe_epochs):
            self.update.synchronize_gradients()
        self.epoch_start, self.first_step = self.clock(), self.step

    def end_epoch(self, reporter: Reporter) -> None:
        """Writes the epoch's metrics; evaluates and saves where that is due."""
        # Reads from the device, so the time below is that of finished work.
        self.metrics.flush(self.step, self.epoch + 1)
        elapsed = self.clock() - self.epoch_start
        self.seconds += elapsed
        self.epoch_ms.append(1000 * elapsed / (self.step - self.first_step))
        self.epoch, self.batch = self.epoch + 1, 0
        self._check_finite()
        run, config = self.run, self.config
        if run is not None and self.epoch in config.save_epochs:
            with run.writing():
                save_student(run.path / f"student-e{self.epoch}.safetensors", self.student, self.metadata)
        due = self.epoch % config.eval_every == 0 or self.epoch == config.probe_epochs
        if self.step >= self.total or due:
            line = self.evaluate()
            if run is not None:
                with run.writing():
                    self.save(line)
                reporter.evaluated(line)
        self.epoch_start = self.clock()  # for a stop before the next epoch

    def _check_finite(self) -> None:
        """Checks the weights, which may be infinite or NaN after a finite loss, before a state is saved."""
        tensors = {k: v for k, v in self.distiller.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in tensors.values()])
        if not finite.all():
            bad = list(tensors)[int(finite.int().argmin())]
            raise TrainingError(
                f"weights are not finite after step {self.step}: first {bad}. Earlier states are kept"
            )

    def interrupt(self, reason: str) -> Interrupted:
        """Saves the state within an epoch; returns the error that ends the run."""
        try:
            self.save_within_epoch()
        except MDistillerError as error:
            return Interrupted(str(error), reason)
        if self.run is None:
            return Interrupted(f"stopped after step {self.step}", reason)
        return Interrupted(
            f"stopped by {reason} after step {self.step}; the state is "
            f"saved. To go on: mdistiller train {self.run.path / CONFIG} --resume",
            reason,
        )

    def _plan_save(self) -> None:
        """Sets the time of the next save within an epoch, by the clock of the main process."""
        minutes = self.config.save_minutes if self.world.is_main else None
        self.save_at = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def save_within_epoch(self) -> None:
        """Saves the state within an epoch, in which training may go on."""
        self.metrics.flush(self.step, self.epoch + 1, close=False)
        self._check_finite()
        start = self.clock()
        # A collective: every process takes part, with or without a run folder.
        ranks = self.world.gather({"metrics": self.metrics.state_dict()})
        state = self.state_dict() | {"batch": self.batch, "ranks": ranks}
        state["seconds"] = self.seconds + start - self.epoch_start
        if self.run is not None:
            with self.run.writing():
                save_state(self.run.path / STATE, state)
        self._plan_save()
        self.epoch_start += self.clock() - start  # writing is no training

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step (from 0)."""
        return learning_rate(self.config.optim, step, self.total, self.probe_steps)

    @property
    def stopped_early(self) -> bool:
        """Whether the last evaluation was one too many without a better metric."""
        patience, probe = self.config.patience, self.config.probe_epochs
        if patience is None or self.step >= self.total or self.last.get("epoch") != self.epoch:
            return False
        return self.epoch - max(self.improved, probe) >= patience

    @property
    def is_done(self) -> bool:
        """Whether the run has made all its steps or has stopped early."""
        return self.step >= self.total or self.stopped_early

    # Evaluation

    def evaluate(self) -> Line:
        """Evaluates the student, and its average if there is one; returns a line of metrics."""
        start = self.clock()
        line: Line = {"kind": "eval", "epoch": self.epoch, "step": self.step}
        self.world.share_buffers(self.student)
        line.update(self.evaluator(self.student, True))
        if self.ema is not None:
            self.world.share_buffers(self.ema.module)
            line["ema"] = self.evaluator(self.ema.module, False)
        self.seconds += self.clock() - start
        line["train"] = self.metrics.epoch_means()
        line["ms_per_step"] = self.epoch_ms[-1]
        line["seconds"] = self.seconds
        first = self.config.metrics[0]
        self.last = {key: line[key] for key in (*self.config.metrics, "epoch")}
        if "epoch" not in self.best or line[first] > self.best[first]:
            self.best, self.improved = dict(self.last), self.epoch
        line[f"best_{first}"] = self.best[first]
        if self.ema is not None:
            self.last[f"ema_{first}"] = average = line["ema"][first]
            if average > self.best_ema:
                self.best_ema, self.improved = average, self.epoch
        if self.epoch == self.config.probe_epochs:
            self.probe = dict(self.last)
        return line

    def finish(self) -> Line:
        """Writes and returns the summary of a finished run."""
        # The first epoch pays for warm-up and compilation.
        steady = sorted(self.epoch_ms[1:] or self.epoch_ms)
        summary = {
            "kind": "summary",
            "step": self.step,
            "epochs": self.epoch,
            "last": self.last,
            "best": self.best,
            **({"probe": self.probe} if self.probe else {}),
            **({"stopped_early": True} if self.stopped_early else {}),
            "seconds": self.seconds,
            "ms_per_step": steady[len(steady) // 2],
            **self.parameters,
        }
        if self.run is not None:
            with self.run.writing():
                self.log(summary)
                drop_previous(self.run.path / STATE)
        return summary

    def log(self, line: Line) -> None:
        """Writes one line of metrics; only the main process has a run folder."""
        if self.run is not None:
            self.run.log(line)

    # State

    def save(self, line: Line) -> None:
        """Writes an evaluation's line, the student and the state into the run folder."""
        assert self.run is not None
        path = self.run.path
        self.log(line)
        save_student(path / STUDENT_FILE, self.student, self.metadata)
        keeps_best = self.config.save_best or self.config.patience is not None
        if keeps_best and self.best["epoch"] == self.epoch:
            save_student(path / "student-best.safetensors", self.student, self.metadata)
        if self.ema is not None:
            save_student(path / EMA_FILE, self.ema.module, self.metadata)
        save_state(path / STATE, self.state_dict())
        self._plan_save()

    _COUNTERS = (
        *("step", "epoch", "best", "best_ema", "improved"),
        *("last", "probe", "seconds", "epoch_ms", "teacher", "data"),
    )

    def state_dict(self) -> Line:
        """Returns everything on which the next epoch depends; of the teacher the hash of its weights."""
        return self.update.state_dict() | {name: getattr(self, name) for name in self._COUNTERS}

    def load_state_dict(self, state: Line) -> None:
        """Restores the state from `state_dict`, or from `interrupt` within an epoch.

        Raises:
            ConfigError: the state is from within an epoch of another number of processes, or the teacher's
                weights or the data have changed.
        """
        stored, own = ((text or "").split("+") for text in (state["teacher"], self.teacher))
        if stored != own:
            wrong = next((i for i, (a, b) in enumerate(zip(stored, own, strict=False), 1) if a != b), 1)
            raise ConfigError(
                f"teacher{f' {wrong}' * (len(own) > 1)}: its weights are not those with "
                "which this run was started; put the old checkpoint "
                "back, or start another run"
            )
        before = state["data"]
        if changed := [name for name in before if before[name] != self.data.get(name, before[name])]:
            raise ConfigError(
                f"data: {' and '.join(changed)} are not those with which this run was started; put the old "
                "data back, or start another run"
            )
        self.update.load_state_dict(state)
        for name in self._COUNTERS:
            setattr(self, name, state[name])
        if "ranks" in state:
            if len(state["ranks"]) != self.world.size:
                raise ConfigError(
                    f"cannot resume with {self.world.size} processes within an epoch that "
                    f"{len(state['ranks'])} began"
                )
            self.batch = state["batch"]
            self.metrics.load_state_dict(state["ranks"][self.world.rank]["metrics"])


def _title(trainer: Trainer) -> str:
    over = "; finished before, so nothing is trained" if trainer.step >= trainer.total else ""
    return f"{trainer.config.recipe or 'run'}{over}"
