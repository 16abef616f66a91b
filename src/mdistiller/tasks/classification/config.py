"""Configuration of a classification run."""

from operator import attrgetter
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from mdistiller.config import RunConfig, TeacherConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.errors import ConfigError
from mdistiller.types import Line, Metric


class ClassificationConfig(RunConfig):
    """A training run of a classifier."""

    metrics: ClassVar[tuple[str, ...]] = ("top1", "top5", "loss", "balanced_accuracy", "macro_f1")
    headline: ClassVar[Metric | None] = Metric(
        "top1", "%", "Accuracy", "test accuracy", "test accuracy", result="test top-1", short="test"
    )
    fixed: ClassVar[Line] = {}
    """Fields that a child has no use for, each with its only value."""

    task: Literal["classification"] = "classification"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy with the labels; no distillation loss sees it."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: weigh the classes in the cross-entropy with the labels inversely to their numbers of
    training images, 1 on average over the images; no distillation loss sees it."""
    ensemble: Literal["logits", "losses"] = "logits"
    """With several teachers of one method: distill from the mean of their logits, or average the losses of
    all."""
    teacher_batch: int | None = Field(default=None, ge=1)
    """Images in one pass of the teacher, which runs ahead of the student by whole batches. None: one batch
    on a CPU; on a GPU as many as have the pixels of 1,024 images of 32 x 32, but at least one batch."""
    teacher_cache: Path | None = None
    """Folder that keeps the teacher's outputs. A run records what is missing while it trains, and later runs,
    of other methods, students and seeds, read it. Several runs may share one folder. Methods that read
    features other than `teacher_cache_taps` keep the live teacher. None: no cache."""
    teacher_cache_format: Literal["int8", "fp16"] = "int8"
    """Format of the stored logits. int8: one byte a class, with a scale for each image and the two largest in
    half precision. fp16: half precision, twice the size. Cached features are always in half precision."""
    teacher_cache_taps: tuple[str, ...] = ()
    """Features of the teacher to store beside its logits, such as pooled, for methods that read features. The
    plan of a run shows the size; maps and tokens are large."""
    teacher_views: int | None = Field(default=None, ge=1)
    """Augmented views of each image that the epochs use in turn: epoch e has the images of epoch e modulo
    teacher_views, so that a cache is complete after that many epochs. None: each epoch has its own."""
    diagnostics: bool = True
    """With each evaluation, compare student and teacher on the test images and 1,000 training images: TCKD
    and NCKD, confidence, logit gap, agreement, calibration."""

    @model_validator(mode="after")
    def _check_fixed(self) -> Self:
        for name, allowed in self.fixed.items():
            got = attrgetter(name)(self)
            if got != allowed:
                raise ValueError(f"{name}: got {got!r}; allowed in task {self.task} is {allowed!r}")
        return self

    @property
    def blends_teachers(self) -> bool:
        return bool(self.more_teachers) and self.ensemble == "logits" and not self.has_own_methods

    def with_teacher(self, teacher: TeacherConfig) -> Self:
        return super().with_teacher(teacher).model_copy(update={"teacher_cache_taps": teacher.cache_taps})

    def cache_format(self, output: Tensor, *, is_logits: bool) -> str:
        """Returns the format in which an image's output is stored."""
        return self.teacher_cache_format if is_logits else "fp16"

    @property
    def augment_seed(self) -> int:
        """Seed of the changes of single images: with a cache, runs of all seeds have the same images."""
        if self.augment.seed is not None:
            return self.augment.seed
        return self.seed if self.teacher_cache is None else 0

    def check_cache(self, *, stored: bool = False) -> None:
        """Checks that a cached teacher, or one whose outputs are stored, gets images that do not depend on
        their batch.

        Raises:
            ConfigError: mixup or CutMix.
        """
        if not stored and (self.teacher_cache is None or not self.has_teacher):
            return
        mixed = [name for name in ("mixup_alpha", "cutmix_alpha") if getattr(self.augment, name)]
        if mixed:
            raise ConfigError(
                f"teacher_{'outputs' if stored else 'cache'}: augment.{mixed[0]} blends each image with "
                "another of its batch, so that its stored outputs would serve that batch alone; set "
                "mixup_alpha and cutmix_alpha to 0"
            )
