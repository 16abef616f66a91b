"""CIFAR-100 as in the DKD paper and its published code (whose setting is that of CRD, ICLR 2020).

240 epochs, batch 64, SGD with momentum 0.9 and weight decay 5e-4, learning rate 0.05 (0.01 for MobileNetV2
and the ShuffleNets) divided by 10 at epochs 150, 180 and 210, temperature 4, DKD warm-up over 20 epochs.
"""

from __future__ import annotations

from statistics import mode
from typing import Any

from mdistiller.config import OptimConfig
from mdistiller.methods import MethodConfig
from mdistiller.methods.dkd import DKDConfig
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
# Hyper-parameters of other methods that their authors published for some of these pairs, in the order of the
# fields. Other pairs have the method's defaults.
FIELDS = {
    "reviewkd": ("weight",),
    "catkd": ("weight", "resolution", "normalize"),
    "gdkd": ("w1", "w2"),
    "sdd": ("scales",),
}
SETTINGS: dict[str, dict[tuple[str, str], tuple[Any, ...]]] = {
    "reviewkd": {
        ("resnet56", "resnet20"): (0.6,),
        ("resnet110", "resnet32"): (1.0,),
        ("resnet32x4", "resnet8x4"): (5.0,),
        ("wrn_40_2", "wrn_16_2"): (5.0,),
        ("wrn_40_2", "wrn_40_1"): (5.0,),
        ("resnet32x4", "ShuffleV1"): (5.0,),
        ("wrn_40_2", "ShuffleV1"): (5.0,),
        ("resnet32x4", "ShuffleV2"): (8.0,),
    },
    "catkd": {
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
    },
    "gdkd": {
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
    },
    "sdd": {("resnet32x4", "resnet8x4"): ((1, 2),), ("vgg13", "vgg8"): ((1, 2),)},
}

SMALL_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher: a teacher itself, or a baseline."""
    lr = 0.01 if model in SMALL_RATE else 0.05
    return ClassificationConfig(student=ModelConfig(name=model), optim=OptimConfig(lr=lr))


def _beta(teacher: str, student: str) -> float:
    """Returns DKD's β: for other students the teacher's most frequent one, for other teachers 8.

    According to the paper, the best β depends on the teacher: on the gap of its target logit.
    """
    if (teacher, student) in PAIRS:
        return PAIRS[teacher, student]
    return mode([beta for (name, _), beta in PAIRS.items() if name == teacher] or [8.0])


def tune(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with its published hyper-parameters for a pair; DKD's β follows `_beta`."""
    name = method.method_name
    values = SETTINGS.get(name, {}).get((teacher, student))
    changes = {} if values is None else dict(zip(FIELDS[name], values, strict=True))
    if isinstance(method, DKDConfig) and not isinstance(method.beta, str):
        # A factor, because a wrapper of DKD may have raised both of its weights.
        changes["beta"] = method.beta * _beta(teacher, student) / 8.0
    return method.replace(**changes)
