"""`train_detector(config)`: a detection run, made of the parts that the training loop takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mdistiller.errors import ConfigError
from mdistiller.models import ModelConfig
from mdistiller.runs.progress import Reporter
from mdistiller.tasks.classification.models import has_teacher
from mdistiller.tasks.detection.coco import DetectionSet, DetectionSplits, train_transform
from mdistiller.tasks.detection.config import DetectionConfig
from mdistiller.tasks.detection.detector import DetectionTeacher
from mdistiller.tasks.detection.evaluate import evaluate_detector
from mdistiller.tasks.detection.learner import DetectionLearner
from mdistiller.tasks.detection.loader import DetectionBatch, DetectionLoader, load_detection
from mdistiller.tasks.detection.methods import build_method
from mdistiller.tasks.detection.models import build_detector, resolve_options
from mdistiller.training.batches import Fed
from mdistiller.training.distributed import World
from mdistiller.training.launch import RunResult, carry_out
from mdistiller.training.precision import avoid_slow_convolutions
from mdistiller.training.step import Stepper
from mdistiller.training.trainer import Loop


def train_detector(
    config: DetectionConfig, *, resume: bool = False, reporter: Reporter | None = None
) -> RunResult:
    """Run a config to its end and write its run folder, as `mdistiller.engine.run.train` does.

    Args:
        config: the run.
        resume: go on from the state in `config.out`, left there by an earlier start of the same config.
        reporter: told about progress; None shows nothing.

    Raises:
        MDistillerError: one of its children, for a config, data or checkpoint that cannot work.
    """
    return carry_out(config, lambda here: [build_trainer(config, here)], resume, reporter)


def build_trainer(config: DetectionConfig, here: World) -> DetectionTrainer:
    """The loop of a run, before its first step."""
    # Every batch has a size of its own, so trying cuDNN's algorithms for each would never end.
    torch.backends.cudnn.benchmark = False
    splits = load_detection(config.data)
    if all(annotation["iscrowd"] for annotation in splits.test.ground_truth["annotations"]):
        raise ConfigError(f"data: there is no object in the test images of {config.data.root} to evaluate by")
    teacher = None
    if has_teacher(config):
        assert config.teacher is not None
        if config.teacher.checkpoint is None and config.teacher.options.get("weights") is None:
            raise ConfigError(
                f"teacher.checkpoint: the teacher {config.teacher.name} has no weights; "
                "give --teacher.checkpoint FILE"
            )
        torch.manual_seed(config.seed)
        teacher = _build(config, config.teacher, splits.num_classes)
    # Seeded here, so that every method's student starts from the same weights.
    torch.manual_seed(config.seed)
    student = _build(config, config.student, splits.num_classes)
    return DetectionTrainer(config, splits, student, teacher, here)


def _build(config: DetectionConfig, model: ModelConfig, num_classes: int) -> nn.Module:
    return build_detector(model, num_classes, **config.augment.size)


class DetectionFeed:
    """Gives a run its batches, and beside each the teacher itself: it sees what the student samples."""

    def __init__(self, loader: DetectionLoader, teacher: DetectionTeacher | None) -> None:
        self.loader, self.teacher = loader, teacher
        self.step = -1  # the next one of `_batches`
        self._batches: Iterator[DetectionBatch] = iter(())

    def take(self, step: int, most: int) -> list[Fed]:
        """The batch of step `step`, for the one run that there is."""
        epoch, batch = divmod(step, len(self.loader))
        if step != self.step or batch == 0:
            self._batches = self.loader.epoch(epoch, batch)
        self.step = step + 1
        return [[(next(self._batches), self.teacher)]]


class DetectionEvaluator:
    """Average precision of models on the test images."""

    def __init__(
        self, images: DetectionSet, batch_size: int, here: World, *, precision: torch.dtype, workers: int
    ) -> None:
        self.images, self.world, self.precision = images, here, precision
        self.loader = DetectionLoader(
            images,
            batch_size,
            device=here.device,
            shuffle=False,
            rank=here.rank,
            world_size=here.size,
            workers=workers,
        )

    def __call__(self, models: dict[str, nn.Module]) -> dict[str, Any]:
        """Figures by the model's name; those of the student, whose name is empty, stand by themselves."""
        found: dict[str, Any] = {}
        for name, model in models.items():
            detector = model.module if isinstance(model, AveragedModel) else model
            self.world.share_buffers(detector)
            figures = evaluate_detector(
                detector, self.loader.epoch(0), self.images, self.world, precision=self.precision
            )
            found.update({name: figures} if name else figures)
        return found


class DetectionTrainer(Loop):
    """Trains a detector on a data set under a teacher.

    Args:
        config: the run's settings.
        splits: the data.
        student: the student; trained in place.
        teacher: the teacher; frozen in place. None for methods that need none.
        here: this process.
    """

    def __init__(
        self,
        config: DetectionConfig,
        splits: DetectionSplits,
        student: nn.Module,
        teacher: nn.Module | None,
        here: World,
    ) -> None:
        self.splits, self.detection = splits, config
        if config.batch_size % here.size:
            raise ConfigError(f"batch_size: {config.batch_size} does not divide among {here.size} processes")
        augment = config.augment
        loader = DetectionLoader(
            splits.train,
            config.batch_size // here.size,
            device=here.device,
            transform=train_transform(augment.short_sides, augment.long_side, augment.flip),
            seed=config.seed,
            drop_last=config.drop_last,
            rank=here.rank,
            world_size=here.size,
            workers=config.data.workers,
        )
        method = build_method(config.method, student, teacher)
        frozen = None if teacher is None else DetectionTeacher(teacher).to(here.device)
        ema = None
        if config.ema is not None:
            ema = AveragedModel(student, use_buffers=True).eval().to(here.device)
        learner = DetectionLearner(student, method).to(here.device)
        if config.channels_last:
            for module in (learner, frozen):
                if module is not None:
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if here.device.type == "cpu" and config.precision == "bfloat16":
            avoid_slow_convolutions(learner)
        super().__init__(
            config,
            here,
            description=splits.description,
            student=student,
            stepper=Stepper(config, learner, 1, ema, here),
            ema=ema,
            feed=DetectionFeed(loader, frozen),
            place=0,
            steps=len(loader),
            evaluator=DetectionEvaluator(
                splits.test,
                config.eval_batch_size,
                here,
                precision=getattr(torch, config.precision),
                workers=config.data.workers,
            ),
            parameters={
                "student_parameters": sum(p.numel() for p in student.parameters()),
                "method_parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
            },
        )

    def open(self, reporter: Reporter) -> None:
        """Nothing is to be done."""

    def about(self) -> dict[str, Any]:
        """What is written beside the student's weights: enough to build it again."""
        return {
            "detector": self.config.student.name,
            "options": resolve_options(self.config.student, trained=True, **self.detection.augment.size),
            "classes": self.splits.classes,
            "num_classes": self.splits.num_classes,
        }
