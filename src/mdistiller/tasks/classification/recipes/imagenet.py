"""ImageNet as in the DKD paper and its published code.

Random crops of 224 and mirroring, evaluation on the center 224 of 256. Teachers are torchvision's with their
first weights. Settings and accuracies of methods and pairs are in `published/imagenet.toml`.
"""

from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.methods import MethodConfig
from mdistiller.models import ModelConfig
from mdistiller.recipes.apply import train_as, tune
from mdistiller.recipes.published import run_of
from mdistiller.tasks.classification.config import ClassificationConfig

DATA = "imagenet"
MODELS = {name: f"torchvision/{name}" for name in ("resnet18", "resnet34", "resnet50")}
MODELS["mobilenetv1"] = "MobileNetV1"
PAIRS = ("resnet34_resnet18", "resnet50_mobilenetv1")


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher."""
    config = ClassificationConfig(
        data=DataConfig(kind="folder", image_size=224, resize=256, memory="stream", workers=8),
        augment=AugmentConfig(crop="resized", padding=None),
        student=ModelConfig(name=model),
    )
    return train_as(config, run_of(DATA, "none", model))


def teacher(model: str) -> ModelConfig:
    """Returns a teacher; torchvision's have their first ImageNet weights, as in the paper."""
    options = {"weights": "IMAGENET1K_V1"} if model.startswith("torchvision/") else {}
    return ModelConfig(name=model, options=options)


def pair_of(teacher: str, student: str) -> str:
    """Returns the pair of two full names, by their short names."""
    short = {name: key for key, name in MODELS.items()}
    return f"{short.get(teacher, teacher)}_{short.get(student, student)}"


def tune_pair(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with its published hyperparameters for a pair; DKD's β is 1 for other pairs."""
    return tune(DATA, method, pair_of(teacher, student))
