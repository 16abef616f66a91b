"""CIFAR-100 as in the DKD paper and its published code (which took the setting from CRD, ICLR 2020).

240 epochs, batch 64, SGD with momentum 0.9 and weight decay 5e-4, learning rate 0.05 (0.01 for MobileNetV2
and the ShuffleNets) divided by 10 at epochs 150, 180 and 210, temperature 4, DKD warm-up over 20 epochs.
"""

from __future__ import annotations

from statistics import mode
from typing import Any

from mdistiller.config import OptimConfig
from mdistiller.methods import (
    CATKDConfig,
    DKDConfig,
    GDKDConfig,
    MethodConfig,
    ReviewKDConfig,
    SDDConfig,
)
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig

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
# What other methods' authors set for some of these pairs; for the rest a method's defaults hold.
REVIEWKD_WEIGHT = {
    ("resnet56", "resnet20"): 0.6,
    ("resnet110", "resnet32"): 1.0,
    ("resnet32x4", "resnet8x4"): 5.0,
    ("wrn_40_2", "wrn_16_2"): 5.0,
    ("wrn_40_2", "wrn_40_1"): 5.0,
    ("resnet32x4", "ShuffleV1"): 5.0,
    ("wrn_40_2", "ShuffleV1"): 5.0,
    ("resnet32x4", "ShuffleV2"): 8.0,
}
CATKD = {
    ("resnet56", "resnet20"): (0.7, 2, False),
    ("resnet110", "resnet32"): (1.8, 2, False),
    ("resnet32x4", "resnet8x4"): (15.0, 2, False),
    ("wrn_40_2", "wrn_16_2"): (12.0, 2, False),
    ("wrn_40_2", "wrn_40_1"): (1.5, 2, False),
    ("vgg13", "vgg8"): (4.5, 2, False),
    ("vgg13", "MobileNetV2"): (15.0, 2, True),
    ("ResNet50", "MobileNetV2"): (40.0, 2, True),
    ("wrn_40_2", "ShuffleV1"): (80.0, 4, True),
    ("resnet32x4", "ShuffleV1"): (600.0, 4, True),
    ("resnet32x4", "ShuffleV2"): (600.0, 4, True),
}
GDKD_WEIGHTS = {
    ("resnet56", "resnet20"): (1.0, 1.0),
    ("resnet110", "resnet32"): (1.0, 1.0),
    ("resnet32x4", "resnet8x4"): (2.0, 8.0),
    ("resnet32x4", "ShuffleV1"): (1.0, 8.0),
    ("resnet32x4", "ShuffleV2"): (1.0, 8.0),
    ("ResNet50", "MobileNetV2"): (1.0, 8.0),
    ("vgg13", "vgg8"): (1.0, 6.0),
    ("vgg13", "MobileNetV2"): (1.0, 6.0),
    ("wrn_40_2", "wrn_16_2"): (2.0, 6.0),
    ("wrn_40_2", "wrn_40_1"): (2.0, 6.0),
    ("wrn_40_2", "ShuffleV1"): (2.0, 6.0),
}
SDD_SMALL_SCALES = (("resnet32x4", "resnet8x4"), ("vgg13", "vgg8"))

SMALL_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")


def baseline(model: str) -> ClassificationConfig:
    """One model on the labels: a teacher, or the student that distillation is compared with."""
    lr = 0.01 if model in SMALL_RATE else 0.05
    return ClassificationConfig(student=ModelConfig(name=model), optim=OptimConfig(lr=lr))


def _beta(teacher: str, student: str) -> float:
    """DKD's β: for a new student the one that its teacher has most often, for a new teacher 8.

    The paper finds that the best β follows from the teacher, how far its logit of the class is ahead.
    """
    if (teacher, student) in PAIRS:
        return PAIRS[teacher, student]
    return mode([beta for (name, _), beta in PAIRS.items() if name == teacher] or [8.0])


def tune(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """The method's hyper-parameters for a pair, as published; DKD's β also for other pairs, see `_beta`."""
    pair = (teacher, student)
    update: dict[str, Any] = {}
    if isinstance(method, DKDConfig) and not isinstance(method.beta, str):
        # A factor, because what wraps DKD may have raised both of its weights.
        update = {"beta": method.beta * _beta(teacher, student) / 8.0}
    elif isinstance(method, ReviewKDConfig) and pair in REVIEWKD_WEIGHT:
        update = {"weight": REVIEWKD_WEIGHT[pair]}
    elif isinstance(method, CATKDConfig) and pair in CATKD:
        update = dict(zip(("weight", "resolution", "normalize"), CATKD[pair], strict=True))
    elif isinstance(method, GDKDConfig) and pair in GDKD_WEIGHTS:
        update = dict(zip(("w1", "w2"), GDKD_WEIGHTS[pair], strict=True))
    elif isinstance(method, SDDConfig) and pair in SDD_SMALL_SCALES:
        update = {"scales": (1, 2)}
    return method.model_copy(update=update)
