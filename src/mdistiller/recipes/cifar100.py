"""CIFAR-100 as in the DKD paper and its published code (which took the setting from CRD, ICLR 2020).

240 epochs, batch 64, SGD with momentum 0.9 and weight decay 5e-4, learning rate 0.05 (0.01 for MobileNetV2
and the ShuffleNets) divided by 10 at epochs 150, 180 and 210, temperature 4, DKD warm-up over 20 epochs.
"""

from __future__ import annotations

from mdistiller.engine.config import OptimConfig, TrainConfig
from mdistiller.methods import DKDConfig, MethodConfig
from mdistiller.models import ModelConfig

# The published pairs with DKD's β for each.
PAIRS: dict[tuple[str, str], float] = {
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("resnet32x4", "resnet8x4"): 8.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
    ("vgg13", "vgg8"): 6.0,
    ("resnet32x4", "ShuffleV1"): 8.0,
    ("wrn_40_2", "ShuffleV1"): 8.0,
    ("vgg13", "MobileNetV2"): 6.0,
    ("ResNet50", "MobileNetV2"): 8.0,
    ("resnet32x4", "ShuffleV2"): 8.0,
}
SMALL_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")


def alone(model: str) -> TrainConfig:
    """One model on the labels: a teacher, or the student that distillation is compared with."""
    lr = 0.01 if model in SMALL_RATE else 0.05
    return TrainConfig(student=ModelConfig(name=model), optim=OptimConfig(lr=lr))


def tune(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """The method's hyper-parameters for a pair: DKD gets the pair's β (8 for pairs not published)."""
    if isinstance(method, DKDConfig):
        return method.model_copy(update={"beta": PAIRS.get((teacher, student), 8.0)})
    return method
