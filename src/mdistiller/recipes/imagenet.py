"""ImageNet as in the DKD paper and its published code.

100 epochs, batch 512, SGD with momentum 0.9 and weight decay 1e-4, learning rate 0.2 divided by 10 at epochs
30, 60 and 90, temperature 1, warm-up over one epoch; random crops of 224 and mirroring, evaluation on the
centre 224 of 256. Teachers are torchvision's with their first weights. The published code trains CRD, OFD and
ReviewKD with smaller batches and the same rate per image; these recipes have one setting for all methods.
"""

from __future__ import annotations

from typing import Any

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.methods import MethodConfig
from mdistiller.methods.dkd import DKDConfig
from mdistiller.models import ModelConfig
from mdistiller.tasks.classification.config import ClassificationConfig

MODELS = {
    "resnet18": "torchvision/resnet18",
    "resnet34": "torchvision/resnet34",
    "resnet50": "torchvision/resnet50",
    "mobilenetv1": "MobileNetV1",
}
# The published pairs with DKD's β for each.
PAIRS: dict[tuple[str, str], float] = {("resnet34", "resnet18"): 0.5, ("resnet50", "mobilenetv1"): 2.0}

_EPOCHS = 100
_WARMUP = 1 / _EPOCHS
# Hyper-parameters that a method's authors published for ImageNet, for all pairs.
SETTINGS: dict[str, dict[str, Any]] = {
    "kd": {"task_weight": 0.5, "weight": 0.5, "temperature": 1.0},
    "dkd": {"temperature": 1.0, "warmup": _WARMUP},
    "ofd": {"weight": 1e-4},
    "reviewkd": {"warmup": _WARMUP, "student_taps": (*(f"stage{i}.preact" for i in (1, 2, 3, 4)), "pooled")},
    "crld": {"task_weight": 4.0, "temperature": 1.0},
    "dist": {"temperature": 1.0},
    "gdkd": {"w0": 0.5, "temperature": 1.0, "warmup": _WARMUP},
    "mlkd": {
        "task_weight": 1.0,
        "weight": 0.5,
        "temperatures": (1.0, 3.0, 5.0, 2.0, 6.0),
        "strong_temperatures": (1.0, 3.0, 5.0),
    },
    "nkd": {"gamma": 1.5, "temperature": 1.0},
    "normkd": {"task_weight": 0.5, "weight": 0.5, "temperature": 1.0},
    "rld": {"temperature": 1.0, "confidence_temperature": 1.0, "warmup": _WARMUP},
    "semckd": {"weight": 50.0},
}
# The same for one pair.
PAIR_SETTINGS: dict[str, dict[tuple[str, str], dict[str, Any]]] = {
    "reviewkd": {
        ("resnet34", "resnet18"): {"weight": 1.0},
        ("resnet50", "mobilenetv1"): {"weight": 8.0, "max_mid_channel": 256},
    },
    "gdkd": {
        ("resnet34", "resnet18"): {"w1": 1.0, "w2": 1.0},
        ("resnet50", "mobilenetv1"): {"w1": 2.0, "w2": 2.0},
    },
    "rld": {("resnet34", "resnet18"): {"beta": 0.5}, ("resnet50", "mobilenetv1"): {"beta": 2.0}},
}


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher."""
    return ClassificationConfig(
        data=DataConfig(kind="folder", image_size=224, resize=256, memory="stream", workers=8),
        augment=AugmentConfig(crop="resized", padding=None),
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.2, weight_decay=1e-4, milestones=(0.3, 0.6, 0.9), delta=0.09),
        epochs=_EPOCHS,
        batch_size=512,
    )


def teacher(model: str) -> ModelConfig:
    """Returns a teacher; torchvision's have their first ImageNet weights, as in the paper."""
    options = {"weights": "IMAGENET1K_V1"} if model.startswith("torchvision/") else {}
    return ModelConfig(name=model, options=options)


def tune(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with its published hyper-parameters for a pair; DKD's β is 1 for other pairs."""
    short = {name: key for key, name in MODELS.items()}
    pair = (short.get(teacher, teacher), short.get(student, student))
    name = method.method_name
    published = SETTINGS.get(name, {}) | PAIR_SETTINGS.get(name, {}).get(pair, {})
    # A field that differs from its default was set by a wrapper, and stays.
    fields = type(method).model_fields
    changes = {k: v for k, v in published.items() if getattr(method, k) == fields[k].default}
    if isinstance(method, DKDConfig) and not isinstance(method.beta, str):
        # A factor, because a wrapper of DKD may have raised both of its weights.
        changes["beta"] = method.beta * PAIRS.get(pair, 1.0) / 8.0
    return method.replace(**changes)
