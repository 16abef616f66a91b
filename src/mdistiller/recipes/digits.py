"""scikit-learn's handwritten digits at 16 pixels: real images that need no download, for CPUs."""

from __future__ import annotations

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig

PAIRS = (("resnet20", "resnet8"),)


def baseline(model: str) -> ClassificationConfig:
    """One model on the labels."""
    return ClassificationConfig(
        data=DataConfig(kind="digits"),
        # Mirrored digits are no digits.
        augment=AugmentConfig(flip=False, padding=2),
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.05, schedule="cosine", lr_warmup=0.05),
        epochs=20,
        device="cpu",
    )
