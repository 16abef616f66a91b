"""Tiny-ImageNet as in the published code of DOT (ICCV 2023): images of 64 pixels, teacher ResNet18.

Training images are mirrored and rotated by up to 20 degrees. Settings and accuracies are in
`published/tiny-imagenet.toml`.
"""

from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.methods import MethodConfig
from mdistiller.models import ModelConfig
from mdistiller.recipes.apply import train_as, tune
from mdistiller.recipes.published import run_of
from mdistiller.tasks.classification.config import ClassificationConfig

DATA = "tiny-imagenet"
PAIRS = ("ResNet18_MobileNetV2", "ResNet18_ShuffleV2")


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher."""
    config = ClassificationConfig(
        data=DataConfig(kind="tiny-imagenet"),
        augment=AugmentConfig(crop="padded", padding=0, rotation=20.0),
        student=ModelConfig(name=model),
    )
    return train_as(config, run_of(DATA, "none", model))


def tune_pair(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with its published hyperparameters for a pair."""
    return tune(DATA, method, f"{teacher}_{student}")
