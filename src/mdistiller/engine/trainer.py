"""The one trainer: its steps, its epochs, its state."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mdistiller.data import Augment, Splits, StreamSet, make_loader
from mdistiller.data.loader import derive_seed
from mdistiller.engine.checkpoint import save_state, save_student
from mdistiller.engine.config import SELF, TrainConfig
from mdistiller.engine.cpu import avoid_slow_convolutions
from mdistiller.engine.distributed import World
from mdistiller.engine.evaluator import Evaluator
from mdistiller.engine.feed import Feed
from mdistiller.engine.interrupt import Stop, stop_on_signals
from mdistiller.engine.learner import Learner, Teacher
from mdistiller.engine.log import CONFIG, STATE, Reporter, RunFolder
from mdistiller.engine.meter import Meter
from mdistiller.engine.random import random_state, set_random_state
from mdistiller.engine.stepper import Stepper
from mdistiller.engine.teachers import method_for
from mdistiller.errors import ConfigError, TrainingError
from mdistiller.methods import Method
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.taps import probe
from mdistiller.types import Batch, DataInfo, Outputs

_AUGMENT = 1  # keeps the augmentation's seeds apart from those of the sample order


class Trainer:
    """Trains a student on a data set under a teacher. It knows no method by name.

    Args:
        config: the run's settings.
        splits: the data.
        student: the student; trained in place.
        teacher: the teacher; frozen in place. None for methods that need none, and for a student that
            learns from its own moving average.
        here: this process.
    """

    def __init__(
        self, config: TrainConfig, splits: Splits, student: nn.Module, teacher: nn.Module | None, here: World
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
            self.ema = self._average(student)
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
            self.ema = self._average(student)
        self._check_models(student, teacher, method, shape)
        augment = config.augment
        if augment.padding is None and isinstance(splits.train, StreamSet) and splits.train.random_crop:
            augment = augment.model_copy(update={"padding": 0})  # cropped once already
        self.augment = Augment(augment, splits.mean, splits.std, splits.num_classes).to(device)
        self.learner = Learner(student, method).to(device)
        trained = sum(p.numel() for p in self.learner.parameters() if p.requires_grad)
        self.parameters = {
            "student_parameters": student_parameters,
            "method_parameters": trained - student_parameters,
        }
        self.teacher = None if teacher is None else Teacher(teacher, method.teacher_taps).to(device)
        if self.ema is not None:
            self.ema.to(device)
        if config.channels_last:
            for module in (self.learner, self.teacher):
                if module is not None:
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cpu" and config.precision == "bfloat16":
            avoid_slow_convolutions(self.learner)
        teacher_step: nn.Module | None = self.teacher
        if config.compile and self.teacher is not None:
            teacher_step = cast(nn.Module, torch.compile(self.teacher, dynamic=False))
        self.stepper = Stepper(config, self.learner, self.views, self.ema, here)
        # Its own average changes with every step.
        fixed = self.ema is None or teacher is not self.ema.module

        self.train_loader = make_loader(
            splits.train,
            config.batch_size // here.size,
            device=device,
            seed=config.seed,
            shuffle=True,
            drop_last=config.drop_last,
            rank=here.rank,
            world_size=here.size,
            workers=config.data.workers,
        )
        self.evaluator = Evaluator(config, splits, self.augment, self.teacher if fixed else None, here)
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
        self.generator = torch.Generator(device)
        self.feed = Feed(
            config,
            splits,
            self.augment,
            self.teacher,
            teacher_step,
            method,
            self.generator,
            here,
            ahead=fixed,
        )

    def _average(self, student: nn.Module) -> AveragedModel:
        assert self.config.ema is not None
        ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema), use_buffers=True)
        ema.update_parameters(student)  # the first update copies
        return ema.eval()

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
        return self.update(*self.feed.prepare([raw])[0])

    def update(self, batch: Batch, teacher: Outputs) -> dict[str, Tensor]:
        """One step on a prepared batch; sums over its images, still on the device."""
        sums = self.stepper(batch, teacher, self.step, self.total)
        self.step += 1
        return sums

    # Epochs

    def fit(self, run: RunFolder | None, reporter: Reporter) -> dict[str, Any]:
        """Train to the end; returns the summary. Only the main process has a run folder."""
        config = self.config
        recipe = config.recipe or "run"
        self.feed.open_table(reporter)
        reporter.start(f"{recipe}: {self.splits.description}", self.total, self.step)
        meter = Meter(self, run)
        try:
            with stop_on_signals(self.world) as stop:
                while self.step < self.total:
                    stopped = not self._train_epoch(meter, reporter, stop)
                    self._check_finite()
                    if stopped:
                        self._leave(run, meter, stop)
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

    def _train_epoch(self, meter: Meter, reporter: Reporter, stop: Stop) -> bool:
        """Train to the end of the epoch; False if a signal ended it before."""
        # All that is random in an epoch follows from (seed, epoch, rank), whatever happened before.
        seed = derive_seed(self.config.seed, self.epoch, self.world.rank, _AUGMENT)
        torch.manual_seed(seed)
        self.generator.manual_seed(seed)
        self.learner.train()
        self.augment.train()
        batches = self.train_loader.epoch(self.epoch)
        for _ in range(self.batch):
            next(batches)
        if self.within is not None:
            set_random_state(self.within["random"], self.generator)
            meter.load_state_dict(self.within["meter"])
            self.within = None
        start, first = time.perf_counter(), self.step
        stopped = False
        while not stopped and (raws := list(islice(batches, min(self.feed.ahead, self.total - self.step)))):
            # A signal waits for the steps whose batches are drawn: the state is that between two groups.
            for batch, teacher in self.feed.prepare(raws):
                meter.add(self.update(batch, teacher))
                self.batch += 1
                reporter.step(self.step)
                stopped = stop.asked(self.step) or stopped
        whole = self.batch == len(self.train_loader) or self.step >= self.total
        meter.flush(close=whole)  # reads from the device, so the time below is that of finished work
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        if not whole:
            return False
        if self.step > first:
            self.epoch_ms.append(1000 * elapsed / (self.step - first))
        self.epoch += 1
        self.batch = 0
        return True

    def _leave(self, run: RunFolder | None, meter: Meter, stop: Stop) -> NoReturn:
        """Save the state within an epoch, and end the run."""
        mine = {"random": random_state(self.generator), "meter": meter.state_dict()}
        state = self.state_dict() | {"batch": self.batch, "ranks": self.world.gather(mine)}
        if run is None:
            raise TrainingError(f"stopped after step {self.step}")
        with run.writing():
            save_state(run.path / STATE, state)
        raise TrainingError(
            f"stopped by {stop.signal or 'a signal to another process'} after step {self.step}; the state is "
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
        start = time.perf_counter()
        line: dict[str, Any] = {"kind": "eval", "epoch": self.epoch, "step": self.step}
        models = {"": self.student} | ({"ema": self.ema} if self.ema is not None else {})
        line.update(self.evaluator(models))
        self.seconds += time.perf_counter() - start
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
