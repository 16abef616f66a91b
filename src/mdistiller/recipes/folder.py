"""Any folder of class folders and any two models: a start for one's own images."""

from __future__ import annotations

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig

PAIRS = ("torchvision/resnet50_torchvision/resnet18",)


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher."""
    return ClassificationConfig(
        data=DataConfig(kind="folder"),
        augment=AugmentConfig(crop="resized", padding=None),
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.05, weight_decay=1e-4, schedule="cosine", lr_warmup=0.05),
        epochs=100,
        precision="bfloat16",
    )
