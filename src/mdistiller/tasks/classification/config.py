"""Configuration of a classification run."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from mdistiller.config import SELF, RunConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.models import ModelConfig


class ClassificationConfig(RunConfig):
    """A training run of a classifier."""

    metrics: ClassVar[tuple[str, ...]] = ("top1", "top5", "loss", "balanced_accuracy", "macro_f1")

    task: Literal["classification"] = "classification"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy with the labels; no distillation loss sees it."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: weigh the classes in the cross-entropy with the labels inversely to their numbers of
    training images, 1 on average over the images; no distillation loss sees it."""
    more_teachers: tuple[ModelConfig, ...] = ()
    """Further teachers; on the command line NAME=CHECKPOINT each."""
    ensemble: Literal["logits", "losses"] = "logits"
    """With several teachers: distil from the mean of their logits, or average the losses of all."""
    teacher_batch: int | None = Field(default=None, ge=1)
    """Images in one pass of the teacher, which runs ahead of the student by whole batches. None: one batch
    on a CPU; on a GPU as many as have the pixels of 1,024 images of 32 x 32, but at least one batch."""
    teacher_table: Path | None = None
    """Folder that keeps the teacher's logits for every crop and flip of every training image. The first
    run with a teacher computes them, and later ones need no pass of it. Methods that read features, or
    several views, go on with the teacher itself. None: no table."""
    compile: bool = False
    """Run teacher and student through torch.compile."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """On a GPU, capture the whole step in a CUDA graph and replay it. auto: except with several processes,
    float16, DOT, streamed images, plug-ins or `deterministic`. on: with plug-ins and `deterministic` too;
    the other cases are an error."""
    diagnostics: bool = True
    """With each evaluation, compare student and teacher on the test images and 1,000 training images: TCKD
    and NCKD, confidence, logit gap, agreement, calibration."""

    @property
    def teachers(self) -> list[ModelConfig]:
        """The teachers, the first one first; none for a run without a teacher."""
        return [self.teacher, *self.more_teachers] if self.teacher is not None and self.has_teacher else []

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        if any(teacher.checkpoint is None for teacher in self.more_teachers):
            raise ValueError("more_teachers: each needs a checkpoint")
        if self.more_teachers and (self.teacher is None or self.teacher.name == SELF):
            raise ValueError("more_teachers: the first one goes into teacher")
        return self
