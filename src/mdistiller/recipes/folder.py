"""Any folder of class folders, with any two models: a starting point for one's own images."""

from __future__ import annotations

from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.engine.config import OptimConfig, TrainConfig
from mdistiller.models import ModelConfig

PAIRS = (("torchvision/resnet50", "torchvision/resnet18"),)


def alone(model: str) -> TrainConfig:
    """One model on the labels."""
    return TrainConfig(
        data=DataConfig(kind="folder"),
        augment=AugmentConfig(crop="resized", padding=None),
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.05, weight_decay=1e-4, schedule="cosine", lr_warmup=0.05),
        epochs=100,
        precision="bfloat16",
    )
