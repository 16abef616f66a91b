"""The one training loop: epochs, evaluations, state and run folder, whatever a step and a model are."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.data.loader import derive_seed
from mdistiller.errors import ConfigError, MDistillerError, TrainingError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.runs.checkpoint import save_state, save_student
from mdistiller.runs.folder import CONFIG, STATE, Reporter, RunFolder
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.batches import Fed
from mdistiller.training.course import Course, Source, drive
from mdistiller.training.distributed import World
from mdistiller.training.metrics import Meter
from mdistiller.training.seeding import seed_default
from mdistiller.training.signals import stop_on_signals
from mdistiller.training.step import Stepper

_LEARNER = 2  # keeps the seeds of what a learner draws apart from those of others


class Loop(ABC):
    """Trains what a subclass has built, to the end or from where an earlier start left off.

    Args:
        config: the run's settings.
        here: this process.
        description: of the data, in a line.
        student: what makes the predictions, and is saved.
        stepper: takes a step.
        ema: the student's moving average, or None.
        feed: gives the batches; `place` is this run's in what it gives.
        steps: batches an epoch.
        evaluator: figures of models by name, `config.metrics` among them; the student's, whose name is
            empty, stand by themselves.
        parameters: counts for the summary.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        here: World,
        *,
        description: str,
        student: nn.Module,
        stepper: Stepper,
        ema: AveragedModel | None,
        feed: Source,
        place: int,
        steps: int,
        evaluator: Callable[[dict[str, nn.Module]], dict[str, Any]],
        parameters: dict[str, int],
    ) -> None:
        self.config, self.world, self.description = config, here, description
        self.student, self.stepper, self.ema = student, stepper, ema
        self.learner = stepper.learner
        self.source, self.place, self.steps = feed, place, steps
        self.evaluator, self.figures, self.parameters = evaluator, config.metrics, parameters
        self.total = config.epochs * steps
        if config.max_steps is not None:
            self.total = min(self.total, config.max_steps)
        self.step = 0
        self.epoch = 0
        self.batch = 0  # of the epoch
        self.within: dict[str, Any] | None = None  # what a state from within an epoch leaves to `fit`
        self.best: dict[str, Any] = {self.figures[0]: -1.0}
        self.last: dict[str, Any] = {}
        self.seconds = 0.0
        self.epoch_ms: list[float] = []
        self.clock: Callable[[], float] = time.perf_counter

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What is written beside the student's weights."""

    @abstractmethod
    def open(self, reporter: Reporter) -> None:
        """What is to be done before the first step."""

    def update(self, batch: Any, teacher: Any) -> dict[str, Tensor]:
        """One step on a prepared batch; sums over its images, still on the device."""
        # All that is random follows from (seed, step, rank), whatever happened before.
        seed = derive_seed(self.config.seed, self.step, self.world.rank, _LEARNER)
        seed_default(self.world.device, seed)
        sums = self.stepper(batch, teacher, self.step, self.total)
        self.step += 1
        return sums

    # Epochs

    def fit(self, run: RunFolder | None, reporter: Reporter) -> dict[str, Any]:
        """Train to the end; returns the summary. Only the main process has a run folder."""
        self.open(reporter)
        with stop_on_signals(self.world) as stop:
            (end,) = drive(self.source, [self.course(run, reporter)], self.total, stop)
        if isinstance(end, MDistillerError):
            raise end
        return end

    def course(self, run: RunFolder | None, reporter: Reporter) -> Course:
        """The run as a coroutine, for `drive`; see `fit`."""
        config = self.config
        recipe = config.recipe or "run"
        over = "; finished before, so nothing is trained" if self.step >= self.total else ""
        reporter.start(f"{recipe}: {self.description}{over}", self.total, self.step)
        meter = Meter(self, run)
        try:
            while self.step < self.total:
                stopped = yield from self._train_epoch(meter, reporter)
                self._check_finite()
                if stopped is not None:
                    self._leave(run, meter, stopped)
                if run is not None and self.epoch in config.save_epochs:
                    with run.writing():
                        name = f"student-e{self.epoch}.safetensors"
                        save_student(run.path / name, self.student, self.about())
                if self.step >= self.total or self.epoch % config.eval_every == 0:
                    line = self._evaluate(meter)
                    if run is not None:
                        with run.writing():
                            self._save(run, line)
                        reporter.evaluated(line)
            summary = self._summary()
            if run is not None:
                with run.writing():
                    run.log(summary)
            return summary
        finally:
            reporter.stop()

    def _train_epoch(self, meter: Meter, reporter: Reporter) -> Generator[int, Fed | str | None, str | None]:
        """Train to the end of the epoch; what ended it before, or None."""
        self.learner.train()
        if self.within is not None:
            meter.load_state_dict(self.within["meter"])
            self.within = None
        start, first = self.clock(), self.step
        stopped = None
        while self.batch < self.steps and self.step < self.total:
            fed = yield self.step
            assert fed is not None
            if isinstance(fed, str):
                stopped = fed
                break
            for batch, teacher in fed:
                meter.add(self.update(batch, teacher))
                self.batch += 1
                reporter.step(self.step)
        # Reads from the device, so the time below is that of finished work.
        meter.flush(close=stopped is None)
        elapsed = self.clock() - start
        self.seconds += elapsed
        if stopped is None:
            if self.step > first:
                self.epoch_ms.append(1000 * elapsed / (self.step - first))
            self.epoch += 1
            self.batch = 0
        return stopped

    def _leave(self, run: RunFolder | None, meter: Meter, reason: str) -> NoReturn:
        """Save the state within an epoch, and end the run."""
        mine = {"meter": meter.state_dict()}
        state = self.state_dict() | {"batch": self.batch, "ranks": self.world.gather(mine)}
        if run is None:
            raise TrainingError(f"stopped after step {self.step}")
        with run.writing():
            save_state(run.path / STATE, state)
        raise TrainingError(
            f"stopped by {reason} after step {self.step}; the state is "
            f"saved. To go on: mdistiller train {run.path / CONFIG} --resume"
        )

    def _check_finite(self) -> None:
        """What is saved has to be good to go on from. A gradient can be bad where the loss is not."""
        tensors = {k: v for k, v in self.learner.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in tensors.values()])
        if not finite.all():
            bad = list(tensors)[int(finite.int().argmin())]
            raise TrainingError(
                f"weights are not finite after step {self.step}: first {bad}. Earlier states are kept"
            )

    def _evaluate(self, meter: Meter) -> dict[str, Any]:
        start = self.clock()
        line: dict[str, Any] = {"kind": "eval", "epoch": self.epoch, "step": self.step}
        models = {"": self.student} | ({"ema": self.ema} if self.ema is not None else {})
        line.update(self.evaluator(models))
        self.seconds += self.clock() - start
        line["train"] = meter.epoch_means()
        line["ms_per_step"] = self.epoch_ms[-1]
        line["seconds"] = self.seconds
        first = self.figures[0]
        self.last = {key: line[key] for key in (*self.figures, "epoch")}
        if line[first] > self.best[first]:
            self.best = dict(self.last)
        line[f"best_{first}"] = self.best[first]
        if self.ema is not None:
            self.last[f"ema_{first}"] = line["ema"][first]
        return line

    def _summary(self) -> dict[str, Any]:
        # The first epoch pays for warm-up and compilation.
        steady = sorted(self.epoch_ms[1:] or self.epoch_ms)
        return {
            "kind": "summary",
            "step": self.step,
            "epochs": self.epoch,
            "last": self.last,
            "best": self.best,
            "seconds": self.seconds,
            "ms_per_step": steady[len(steady) // 2],
            **self.parameters,
        }

    # State

    def _save(self, run: RunFolder, line: dict[str, Any]) -> None:
        about = self.about()
        run.log(line)
        save_student(run.path / STUDENT_FILE, self.student, about)
        if self.config.save_best and self.best["epoch"] == self.epoch:
            save_student(run.path / "student-best.safetensors", self.student, about)
        if self.ema is not None:
            save_student(run.path / f"ema_{STUDENT_FILE}", self.ema.module, about)
        save_state(run.path / STATE, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on. The teacher is no part of it."""
        return {
            **self.stepper.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "epoch_ms": self.epoch_ms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.stepper.load_state_dict(state)
        for name in ("step", "epoch", "best", "last", "seconds", "epoch_ms"):
            setattr(self, name, state[name])
        if "ranks" in state:
            if len(state["ranks"]) != self.world.size:
                raise ConfigError(
                    f"cannot resume with {self.world.size} processes within an epoch that "
                    f"{len(state['ranks'])} began"
                )
            self.batch, self.within = state["batch"], state["ranks"][self.world.rank]
