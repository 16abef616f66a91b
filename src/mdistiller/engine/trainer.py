"""The one trainer: its steps, its epochs, its state."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.data import Splits
from mdistiller.data.loader import derive_seed
from mdistiller.engine.checkpoint import save_state, save_student
from mdistiller.engine.config import SELF, TrainConfig
from mdistiller.engine.course import Course, drive
from mdistiller.engine.cpu import avoid_slow_convolutions
from mdistiller.engine.distributed import World
from mdistiller.engine.evaluator import Evaluator
from mdistiller.engine.feed import Fed, Feed
from mdistiller.engine.graph import wants_graph
from mdistiller.engine.interrupt import stop_on_signals
from mdistiller.engine.learner import Learner, Teacher
from mdistiller.engine.log import CONFIG, STATE, Reporter, RunFolder
from mdistiller.engine.meter import Meter
from mdistiller.engine.random import seed_default
from mdistiller.engine.stepper import Stepper
from mdistiller.engine.teachers import method_for
from mdistiller.errors import ConfigError, MDistillerError, TrainingError
from mdistiller.methods import Method
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.taps import probe
from mdistiller.types import Batch, DataInfo, Outputs

_LEARNER = 2  # keeps the seeds of what a learner draws apart from those of others


class Trainer:
    """Trains a student on a data set under a teacher. It knows no method by name.

    Args:
        config: the run's settings.
        splits: the data.
        student: the student; trained in place.
        teacher: the teacher; frozen in place. None for methods that need none, and for a student that
            learns from its own moving average.
        here: this process.
        feed: what several runs share, see `mdistiller.engine.together`. None: the run has one of its own.
    """

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        student: nn.Module,
        teacher: nn.Module | None,
        here: World,
        feed: Feed | None = None,
    ) -> None:
        self.config = config
        self.splits = splits
        self.world = here
        device = here.device
        if config.batch_size % here.size:
            raise ConfigError(f"batch_size: {config.batch_size} does not divide among {here.size} processes")

        shape = (3, splits.image_size, splits.image_size)
        data = DataInfo(shape, splits.train.labels, config.batch_size)
        self.ema = None
        if config.teacher is not None and config.teacher.name == SELF and teacher is None:
            self.ema = AveragedModel(student, use_buffers=True).eval()
            teacher = self.ema.module
        method = method_for(config, student, teacher, data)
        self.views = method.views
        if self.views > 1 and (config.augment.mixup_alpha or config.augment.cutmix_alpha):
            raise ConfigError(
                f"augment: method {config.method.method_name!r} compares views of the same image, which "
                "mixup and CutMix would mix with different ones; set their alphas to 0"
            )
        student_parameters = sum(p.numel() for p in student.parameters())
        # From here on the student is what makes the predictions.
        self.student = method.deployed(student)
        self.extended = self.student is not student
        if self.extended and self.ema is not None:
            raise ConfigError(f"method {config.method.method_name!r} needs a teacher other than itself")
        student = self.student
        if config.ema is not None and self.ema is None:
            self.ema = AveragedModel(student, use_buffers=True).eval()
        self._check_models(student, teacher, method, shape)
        # Its own average changes with every step.
        fixed = self.ema is None or teacher is not self.ema.module
        self.feed = Feed(config, splits, here) if feed is None else feed
        self.place = self.feed.join(method, teacher, fixed=fixed)
        self.augment, self.train_loader = self.feed.augment, self.feed.loader
        self.learner = Learner(student, method).to(device)
        trained = sum(p.numel() for p in self.learner.parameters() if p.requires_grad)
        self.parameters = {
            "student_parameters": student_parameters,
            "method_parameters": trained - student_parameters,
        }
        if self.ema is not None:
            self.ema.to(device)
        if config.channels_last:
            self.learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cpu" and config.precision == "bfloat16":
            avoid_slow_convolutions(self.learner)
        graph = wants_graph(config, splits.train, here)
        self.stepper = Stepper(config, self.learner, self.views, self.ema, here, graph=graph)
        self.evaluator = Evaluator(config, splits, self.augment, teacher if fixed else None, here)
        self.total = config.epochs * len(self.train_loader)
        if config.max_steps is not None:
            self.total = min(self.total, config.max_steps)
        self.step = 0
        self.epoch = 0
        self.batch = 0  # of the epoch
        self.within: dict[str, Any] | None = None  # what a state from within an epoch leaves to `fit`
        self.best: dict[str, Any] = {"top1": -1.0}
        self.last: dict[str, Any] = {}
        self.seconds = 0.0
        self.epoch_ms: list[float] = []
        self.clock: Callable[[], float] = time.perf_counter

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, frozen."""
        return self.feed.teacher

    def _check_models(
        self, student: nn.Module, teacher: nn.Module | None, method: Method, shape: tuple[int, ...]
    ) -> None:
        """Look at both models' outputs once, before any step: what a compiled pass would not notice."""
        # Raises for a tap that is not reached, gives no tensor, or is changed in place.
        outputs = {"student": probe(student, method.student_taps, shape)}
        if teacher is not None:
            outputs["teacher"] = probe(teacher, method.teacher_taps, shape)
        for name, (logits, _) in outputs.items():
            if logits.shape[1:] != (self.splits.num_classes,):
                raise ConfigError(
                    f"{name}: its output has shape [B, {', '.join(map(str, logits.shape[1:]))}]; "
                    f"the data has {self.splits.num_classes} classes"
                )

    # One step

    def train_step(self, raw: Batch) -> dict[str, Tensor]:
        """One step on one raw batch; see `update`."""
        return self.update(*self.feed.prepare([raw], self.step)[self.place][0])

    def update(self, batch: Batch, teacher: Outputs) -> dict[str, Tensor]:
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
        self.feed.open_table(reporter)
        with stop_on_signals(self.world) as stop:
            (end,) = drive(self.feed, [self.course(run, reporter)], self.total, stop)
        if isinstance(end, MDistillerError):
            raise end
        return end

    def course(self, run: RunFolder | None, reporter: Reporter) -> Course:
        """The run as a coroutine, for `drive`; see `fit`."""
        config = self.config
        recipe = config.recipe or "run"
        reporter.start(f"{recipe}: {self.splits.description}", self.total, self.step)
        meter = Meter(self, run)
        try:
            while self.step < self.total:
                stopped = yield from self._train_epoch(meter, reporter)
                self._check_finite()
                if stopped is not None:
                    self._leave(run, meter, stopped)
                if run is not None and self.epoch in config.keep_epochs:
                    with run.writing():
                        name = f"student-e{self.epoch}.safetensors"
                        save_student(run.path / name, self.student, self._about())
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
        while self.batch < len(self.train_loader) and self.step < self.total:
            fed = yield self.step
            assert fed is not None
            if isinstance(fed, str):
                stopped = fed
                break
            for batch, teacher in fed:
                meter.add(self.update(batch, teacher))
                self.batch += 1
                reporter.step(self.step)
        meter.flush(
            close=stopped is None
        )  # reads from the device, so the time below is that of finished work
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
        if line["top1"] > self.best["top1"]:
            self.best = {key: line[key] for key in ("top1", "top5", "loss", "epoch")}
        line["best_top1"] = self.best["top1"]
        self.last = {key: line[key] for key in ("top1", "top5", "loss", "epoch")}
        if self.ema is not None:
            self.last["ema_top1"] = line["ema"]["top1"]
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

    def _about(self) -> dict[str, Any]:
        """What is written beside the student's weights."""
        about: dict[str, Any] = {
            "model": self.config.student.name,
            "options": self.config.student.options,
            "classes": self.splits.classes,
            "image_size": self.splits.image_size,
            "mean": self.splits.mean,
            "std": self.splits.std,
        }
        if self.extended:  # what it takes to build it again
            assert self.config.teacher is not None
            about["deployed"] = {
                "method": self.config.method.model_dump(mode="json"),
                "teacher": self.config.teacher.name,
                "teacher_options": self.config.teacher.options,
                "image_size": self.splits.image_size,
            }
        return about

    def _save(self, run: RunFolder, line: dict[str, Any]) -> None:
        about = self._about()
        run.log(line)
        save_student(run.path / STUDENT_FILE, self.student, about)
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
