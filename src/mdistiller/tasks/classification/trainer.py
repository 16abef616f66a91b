"""What a classification run is made of: student, teacher, method, feed, step, evaluation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.config import SELF
from mdistiller.data import Splits
from mdistiller.distiller import Learner, Teacher
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.runs.folder import Reporter
from mdistiller.taps import probe
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluator import Evaluator
from mdistiller.tasks.classification.models import method_for
from mdistiller.training.batches import Feed
from mdistiller.training.cuda_graph import wants_graph
from mdistiller.training.distributed import World
from mdistiller.training.precision import avoid_slow_convolutions
from mdistiller.training.step import Stepper
from mdistiller.training.trainer import Loop
from mdistiller.types import Batch, DataInfo, Outputs


class Trainer(Loop):
    """Trains a classifier on a data set under a teacher. It knows no method by name.

    Args:
        config: the run's settings.
        splits: the data.
        student: the student; trained in place.
        teacher: the teacher; frozen in place. None for methods that need none, and for a student that
            learns from its own moving average.
        here: this process.
        feed: what several runs share, see `mdistiller.training.together`. None: the run has one of its own.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        splits: Splits,
        student: nn.Module,
        teacher: nn.Module | None,
        here: World,
        feed: Feed | None = None,
    ) -> None:
        self.splits = splits
        if config.batch_size % here.size:
            raise ConfigError(f"batch_size: {config.batch_size} does not divide among {here.size} processes")

        shape = (3, splits.image_size, splits.image_size)
        data = DataInfo(shape, splits.train.labels, config.batch_size)
        ema = None
        if config.teacher is not None and config.teacher.name == SELF and teacher is None:
            ema = AveragedModel(student, use_buffers=True).eval()
            teacher = ema.module
        method = method_for(config, student, teacher, data)
        if method.views > 1 and (config.augment.mixup_alpha or config.augment.cutmix_alpha):
            raise ConfigError(
                f"augment: method {config.method.method_name!r} compares views of the same image, which "
                "mixup and CutMix would mix with different ones; set their alphas to 0"
            )
        # What makes the predictions.
        deployed = method.deployed(student)
        self.extended = deployed is not student
        if self.extended and ema is not None:
            raise ConfigError(f"method {config.method.method_name!r} needs a teacher other than itself")
        if config.ema is not None and ema is None:
            ema = AveragedModel(deployed, use_buffers=True).eval()
        self._check_models(deployed, teacher, method, shape)
        # Its own average changes with every step.
        fixed = ema is None or teacher is not ema.module
        self.feed = Feed(config, splits, here) if feed is None else feed
        place = self.feed.join(method, teacher, fixed=fixed)
        self.augment = self.feed.augment
        student_parameters = sum(p.numel() for p in student.parameters())
        learner = Learner(deployed, method).to(here.device)
        trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        if ema is not None:
            ema.to(here.device)
        if config.channels_last:
            for module in (learner, ema):  # an average of another layout would be slow to follow
                if module is not None:
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if here.device.type == "cpu" and config.precision == "bfloat16":
            avoid_slow_convolutions(learner)
        graph = wants_graph(config, splits.train, here)
        super().__init__(
            config,
            here,
            description=splits.description,
            student=deployed,
            stepper=Stepper(config, learner, method.views, ema, here, graph=graph),
            ema=ema,
            feed=self.feed,
            place=place,
            steps=len(self.feed.loader),
            evaluator=Evaluator(config, splits, self.augment, teacher if fixed else None, here),
            parameters={
                "student_parameters": student_parameters,
                "method_parameters": trained - student_parameters,
            },
        )
        self._check_last_batch(shape)

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

    def _check_last_batch(self, shape: tuple[int, ...]) -> None:
        """Try a single image, where one is left over at an epoch's end: better now than an epoch later.

        Whether it can be trained on depends on the models and the method: most of this package's have batch
        norm over many pixels, and runs that get through are not stopped. A batch size of 1 is the user's
        choice, and fails at the first step.
        """
        count = self.config.optim.accumulate
        chosen = _smallest(self.config.batch_size // self.world.size, count)
        left = _smallest(self.feed.loader.last, count)
        if not left == 1 < chosen or self.total < self.steps:
            return
        learner = copy.deepcopy(self.learner).train()
        views = learner.method.views
        image = torch.zeros(views, *shape, device=self.world.device)
        number = torch.zeros(views, dtype=torch.int64, device=self.world.device)
        teacher = self.teacher
        outputs = Outputs(image.new_zeros(0), {}) if teacher is None else teacher(image)
        try:
            with torch.no_grad():
                learner(Batch(image, number, number), outputs, image.new_zeros(()))
        except ValueError as error:
            raise ConfigError(
                "drop_last: an epoch's last batch has a single image, which cannot be trained on; give "
                f"--drop-last, or another --batch-size than {self.config.batch_size} ({error})"
            ) from error

    def train_step(self, raw: Batch) -> dict[str, Tensor]:
        """One step on one raw batch; see `update`."""
        return self.update(*self.feed.prepare([raw], self.step)[self.place][0])

    def open(self, reporter: Reporter) -> None:
        """Get the teacher's table, if one is asked for."""
        self.feed.open_table(reporter)

    def about(self) -> dict[str, Any]:
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


def _smallest(images: int, parts: int) -> int:
    """Images in the smallest part of a batch that is passed in parts (see `torch.chunk`)."""
    size = -(-images // parts)
    return images % size or size
