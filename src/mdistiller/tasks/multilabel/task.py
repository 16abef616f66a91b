"""Classification of images with several classes each, as a task."""

from typing import ClassVar

from torch import Tensor, nn

from mdistiller.config import RunConfig
from mdistiller.data import Splits
from mdistiller.errors import ConfigError
from mdistiller.losses import TaskLoss, binary_cross_entropy
from mdistiller.methods import Method
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.deployment import ClassifierDeployment
from mdistiller.tasks.classification.task import LOWEST, ClassificationTask
from mdistiller.tasks.multilabel.config import MultiLabelConfig
from mdistiller.tasks.multilabel.evaluate import evaluate
from mdistiller.training.deployment import Deployment, ModelInput
from mdistiller.types import IGNORED, Batch, Line


class MultiLabelTask(ClassificationTask):
    """Classification of images, each with any number of classes."""

    name = "multilabel"
    Config: ClassVar[type[RunConfig]] = MultiLabelConfig
    measure = staticmethod(evaluate)

    def check_kind(self, data: Splits) -> None:
        if not data.multi_label:
            raise ConfigError("data: its images have one class each; allowed are recipes of classification")

    def build_method(
        self, config: ClassificationConfig, student: nn.Module, teacher: nn.Module | None, data: Splits
    ) -> Method:
        is_mixed = config.augment.mixup_alpha or config.augment.cutmix_alpha
        if is_mixed and bool((data.train.labels == IGNORED).any()):
            raise ConfigError(
                "augment: mixup and CutMix blend labels, and some are unknown; set their alphas to 0"
            )
        config.method_class(config.method.method_name)
        return super().build_method(config, student, teacher, data)

    def task_loss(self, config: ClassificationConfig, data: Splits) -> TaskLoss:
        return binary_cross_entropy

    def batch_metrics(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        return {}

    def format_metrics(self, metrics: Line) -> list[str]:
        lowest = sorted(metrics["classes"].items(), key=lambda item: item[1])[:LOWEST]
        return [
            f"mAP {metrics['mAP']:.2f} %  macro F1 {metrics['macro_f1']:.2f} %  loss {metrics['loss']:.4f}  "
            f"({metrics['images']:,} images)",
            "lowest average precisions: " + ", ".join(f"{name} {value:.2f} %" for name, value in lowest),
        ]

    def deployment(self) -> Deployment:
        return MultiLabelDeployment()


class MultiLabelDeployment(ClassifierDeployment):
    """Graphs from images to logits [B, classes], whose sigmoid is the probability of each class."""

    measure = staticmethod(evaluate)
    show_code = "print([name for name, logit in zip(classes, logits[0]) if logit > 0])"

    def describe(self, fields: ModelInput) -> dict[str, str]:
        return super().describe(fields) | {
            "output": f"logits [B, {len(fields.classes)}], whose sigmoid is the probability of each class"
        }

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()
