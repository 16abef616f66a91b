"""scikit-learn's handwritten digits at 16 x 16 pixels: real images without a download, for CPUs."""

from __future__ import annotations

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig

PAIRS = ("resnet20_resnet8",)


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher."""
    return ClassificationConfig(
        data=DataConfig(kind="digits"),
        augment=AugmentConfig(flip=False, padding=2),  # a mirrored digit is not a digit
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.05, schedule="cosine", lr_warmup=0.05),
        epochs=20,
        device="cpu",
    )
