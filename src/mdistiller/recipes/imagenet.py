"""ImageNet as in the DKD paper and its published code.

100 epochs, batch 512, SGD with momentum 0.9 and weight decay 1e-4, learning rate 0.2 divided by 10 at epochs
30, 60 and 90, temperature 1, warm-up over one epoch; random crops of 224 and mirroring, evaluation on the
centre 224 of 256. Teachers are torchvision's with their first weights. The published code trains CRD, OFD and
ReviewKD with smaller batches and the same rate per image; these recipes have one setting for all methods.
"""

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.methods import MethodConfig
from mdistiller.methods.dkd import DKDConfig
from mdistiller.models import ModelConfig
from mdistiller.recipes.published import HYPERPARAMETERS, scaled_beta
from mdistiller.tasks.classification.config import ClassificationConfig

MODELS = {name: f"torchvision/{name}" for name in ("resnet18", "resnet34", "resnet50")}
MODELS["mobilenetv1"] = "MobileNetV1"
PAIRS = tuple(pair for pair in HYPERPARAMETERS["imagenet"] if pair != "all")


def baseline(model: str) -> ClassificationConfig:
    """Returns the run of one model without a teacher."""
    return ClassificationConfig(
        data=DataConfig(kind="folder", image_size=224, resize=256, memory="stream", workers=8),
        augment=AugmentConfig(crop="resized", padding=None),
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.2, weight_decay=1e-4, milestones=(0.3, 0.6, 0.9), delta=0.09),
        epochs=100,
        batch_size=512,
    )


def teacher(model: str) -> ModelConfig:
    """Returns a teacher; torchvision's have their first ImageNet weights, as in the paper."""
    options = {"weights": "IMAGENET1K_V1"} if model.startswith("torchvision/") else {}
    return ModelConfig(name=model, options=options)


def tune(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with its published hyper-parameters for a pair; DKD's β is 1 for other pairs."""
    short = {name: key for key, name in MODELS.items()}
    known, name = HYPERPARAMETERS["imagenet"], method.method_name
    pair = known.get(f"{short.get(teacher, teacher)}_{short.get(student, student)}", {})
    fields, published = type(method).model_fields, known["all"].get(name, {}) | pair.get(name, {})
    # A field that differs from its default was set by a wrapper, and stays.
    changes = {k: v for k, v in published.items() if getattr(method, k) == fields[k].default}
    if isinstance(method, DKDConfig):
        changes["beta"] = scaled_beta(method, pair.get("dkd", {}).get("beta", 1.0))
    return method.replace(**changes)
