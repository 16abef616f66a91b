"""Configuration of a run without labels, in which a student learns its teacher's features."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator
from torch import Tensor

from mdistiller.data import DataConfig
from mdistiller.errors import ConfigError
from mdistiller.methods import Method, MethodConfig, method_config
from mdistiller.methods.changes import open_weights
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.types import Line, Metric


class EmbedData(DataConfig):
    """Images without labels: those of any folder, of a list, or of any data set."""

    labeled: ClassVar[bool] = False

    probe: Path | None = None
    """Labeled images to measure embeddings on, in a form of kind folder: accuracy of nearest neighbors and of
    a linear probe in each evaluation. Without a validation split, a fifth of each class is held out."""


class EmbedConfig(ClassificationConfig):
    """A training run of a backbone on images without labels."""

    # What is about labels.
    fixed: ClassVar[Line] = {
        "label_smoothing": 0,
        "class_weights": "none",
        "diagnostics": False,
        "probe_epochs": 0,
        "ensemble": "losses",
        "augment.mixup_alpha": 0,
        "augment.cutmix_alpha": 0,
    }
    hidden_flags = (
        *(*ClassificationConfig.hidden_flags, *fixed),
        *(f"data.{name}" for name in ("label_column", "label_noise", "multi_label")),
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
    ensemble: Literal["logits", "losses"] = "losses"
    """Several teachers have no logits to average."""
    teacher_cache_format: Literal["int8", "fp16"] = "fp16"
    """Format of the stored tokens. fp16: half precision. int8: one byte a number, with a scale for each
    channel of an image, half the size. Embeddings and maps are always in half precision."""

    def cache_format(self, output: Tensor, *, is_logits: bool) -> str:
        is_tokens = output.ndim == 2 and self.teacher_cache_format == "int8"
        return f"int8/{output.shape[1]}" if is_tokens else "fp16"

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

    @classmethod
    def method_named(cls, name: str) -> MethodConfig:
        return method_config(name, cls.method_class, task_weight=0.0)

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        wrong = [f"optim.name {self.optim.name}"] * bool(self.optim.momenta)
        wrong += [f"method.{name} auto" for name in open_weights(self.method)]
        if wrong:
            raise ValueError(f"{wrong[0]}: task embed has no task loss; leave it at its default")
        return self


def suits(method: type[Method]) -> bool:
    """Whether a method distills features without labels, logits and a memory of the training set."""
    needs = method.needs
    reads = needs.logits or needs.labels or needs.classifier or needs.index
    return needs.teacher and not reads and needs.views == 1
