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
# Hyper-parameters of other methods that their authors published for a pair, in the order of FIELDS. A method
# without an entry has its defaults.
FIELDS = {
    "reviewkd": ("weight",),
    "catkd": ("weight", "resolution", "normalize"),
    "gdkd": ("w1", "w2"),
    "sdd": ("scales",),
}
_SDD = {"sdd": ((1, 2),)}
SETTINGS: dict[tuple[str, str], dict[str, tuple[Any, ...]]] = {
    ("resnet56", "resnet20"): {"reviewkd": (0.6,), "catkd": (0.7, 2, False), "gdkd": (1.0, 1.0)},
    ("resnet110", "resnet32"): {"reviewkd": (1.0,), "catkd": (1.8, 2, False), "gdkd": (1.0, 1.0)},
    ("resnet32x4", "resnet8x4"): {"reviewkd": (5.0,), "catkd": (15.0, 2, False), "gdkd": (2.0, 8.0)} | _SDD,
    ("wrn_40_2", "wrn_16_2"): {"reviewkd": (5.0,), "catkd": (12.0, 2, False), "gdkd": (2.0, 6.0)},
    ("wrn_40_2", "wrn_40_1"): {"reviewkd": (5.0,), "catkd": (1.5, 2, False), "gdkd": (2.0, 6.0)},
    ("vgg13", "vgg8"): {"catkd": (4.5, 2, False), "gdkd": (1.0, 6.0)} | _SDD,
    ("resnet32x4", "ShuffleV1"): {"reviewkd": (5.0,), "catkd": (600.0, 4, True), "gdkd": (1.0, 8.0)},
    ("wrn_40_2", "ShuffleV1"): {"reviewkd": (5.0,), "catkd": (80.0, 4, True), "gdkd": (2.0, 6.0)},
    ("vgg13", "MobileNetV2"): {"catkd": (15.0, 2, True), "gdkd": (1.0, 6.0)},
    ("ResNet50", "MobileNetV2"): {"catkd": (40.0, 2, True), "gdkd": (1.0, 8.0)},
    ("resnet32x4", "ShuffleV2"): {"reviewkd": (8.0,), "catkd": (600.0, 4, True), "gdkd": (1.0, 8.0)},
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
    values = SETTINGS.get((teacher, student), {}).get(name, ())
    changes = dict(zip(FIELDS[name] if values else (), values, strict=True))
    if isinstance(method, DKDConfig) and not isinstance(method.beta, str):
        # A factor, because a wrapper of DKD may have raised both of its weights.
        changes["beta"] = method.beta * _beta(teacher, student) / 8.0
    return method.replace(**changes)
