"""Configuration of a run without labels, in which a student learns its teacher's features."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from mdistiller.data import DataConfig
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.methods.changes import open_weights
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.types import Metric

# Fields about classes, with the only value that is allowed.
_OFF = {"label_smoothing": 0.0, "class_weights": "none", "diagnostics": False, "ensemble": "logits"}


class EmbedData(DataConfig):
    """Images without labels: those of any folder, of a list, or of any data set."""

    labelled: ClassVar[bool] = False

    probe: Path | None = None
    """Labeled images to measure embeddings on, in a form of kind folder: accuracy of nearest neighbors and of
    a linear probe in each evaluation. Without a validation split, a fifth of each class is held out."""


class EmbedConfig(ClassificationConfig):
    """A training run of a backbone on images without labels."""

    hidden_flags = (
        *(*ClassificationConfig.hidden_flags, *_OFF, "more_teachers"),
        *(f"data.{name}" for name in ("label_column", "label_noise", "sampler", "multi_label", "ignored")),
    )
    metrics: ClassVar[tuple[str, ...]] = ("agreement", "loss")
    headline = Metric(
        *("agreement", "%", "Retrieval agreement", "agreement with the teacher's neighbors"),
        axis="retrieval agreement",
        result="retrieval agreement",
    )

    task: Literal["embed"] = "embed"  # type: ignore[assignment]
    data: EmbedData = EmbedData(kind="folder")
    diagnostics: bool = False
    """Not for images without labels."""
    teacher_cache_format: Literal["int8", "fp16"] = "fp16"

    @classmethod
    def method_class(cls, name: str) -> type[Method]:
        """Finds the class of a method that reads features, and no labels.

        Raises:
            UnknownNameError: no such method.
            ConfigError: a method that reads labels, logits or classifiers.
        """
        found = super().method_class(name)
        for part in map(super().method_class, name.split("+")):
            if not suits(part) and part.needs.teacher:
                raise ConfigError(
                    f"method {part.name!r} reads labels or logits, and task embed has neither; allowed are "
                    "methods that read features alone, such as 'tokens' or 'fitnet', and their sums"
                )
        return found

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        for name, allowed in _OFF.items():
            if (got := getattr(self, name)) != allowed:
                raise ValueError(f"{name}: got {got!r}; allowed for images without labels is {allowed!r}")
        if self.data.sampler != "shuffle" or self.data.label_noise:
            raise ValueError("data.sampler, data.label_noise: images without labels have no classes")
        if self.augment.mixup_alpha or self.augment.cutmix_alpha:
            raise ValueError("augment: mixup and CutMix blend labels; allowed for task embed are alphas of 0")
        if self.optim.has_momenta or self.probe_epochs:
            raise ValueError(
                "optim.name, probe_epochs: task embed has no task loss and no classifier; allowed are sgd or "
                "adamw, and no probe"
            )
        if measured := open_weights(self.method):
            raise ValueError(f"method.{measured[0]}: auto needs a task loss; allowed here is a number")
        return self


def suits(method: type[Method]) -> bool:
    """Whether a method distils features without labels, logits and a memory of the training set."""
    needs = method.needs
    reads = needs.logits or needs.labels or needs.classifier or needs.index
    return needs.teacher and not reads and needs.views == 1
