"""Recipes without a paper: scikit-learn's digits for CPUs, and one's own images."""

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.methods import MethodConfig
from mdistiller.methods.changes import change_all
from mdistiller.models import ModelConfig
from mdistiller.recipes.family import measure
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.recipes import imagenet


def digits(model: str) -> ClassificationConfig:
    """Returns the run of one model on the digits at 16 x 16 pixels: real images without a download."""
    return ClassificationConfig(
        data=DataConfig(kind="digits"),
        augment=AugmentConfig(flip=False, padding=2),  # a mirrored digit is not a digit
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.05, schedule="cosine", lr_warmup=0.05),
        epochs=20,
        layout="channels_last",
        device="cpu",
    )


def folder(model: str) -> ClassificationConfig:
    """Returns the run of one model on class folders: a start for one's own images."""
    return ClassificationConfig(
        data=DataConfig(kind="folder"),
        augment=AugmentConfig(crop="resized", padding=None),
        student=ModelConfig(name=model),
        optim=OptimConfig(lr=0.05, weight_decay=1e-4, schedule="cosine", lr_warmup=0.05),
        epochs=100,
        precision="auto",
    )


def tune(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with ImageNet's published settings, and a weight of features that is measured.

    Taps stay the method's: those published belong to ImageNet's pairs.
    """
    tuned = imagenet.tune_pair(method, teacher, student)
    return change_all(tuned, lambda part: measure(_with_own_taps(part), teacher))


def _with_own_taps(part: MethodConfig) -> MethodConfig:
    fields = type(part).model_fields
    return part.replace(**{name: fields[name].default for name in fields if name.endswith("_taps")})


def finetune(model: str) -> ClassificationConfig:
    """Returns the run of one pretrained model on class folders: a linear probe, then all layers at low rates.

    Rates fall from the classifier to the stem (Clark et al., "ELECTRA", ICLR 2020), and the classifier is
    trained before them (Kumar et al., "Fine-tuning can distort pretrained features and underperform
    out-of-distribution", ICLR 2022). Batch norms keep their running statistics: with those of the batches,
    the features would not be those that the classifier was trained on.
    """
    return ClassificationConfig(
        data=DataConfig(kind="folder"),
        augment=AugmentConfig(crop="resized", padding=None, scale=(0.35, 1.0)),
        student=ModelConfig(name=model),
        optim=OptimConfig(
            name="adamw",
            lr=3e-4,
            weight_decay=0.05,
            schedule="cosine",
            lr_warmup=0.1,
            layer_decay=0.85,
            head_lr=2.0,
            probe_lr=2.5e-3,
            norm_decay=False,
        ),
        epochs=12,
        probe_epochs=4,
        norm_eval=True,
        patience=6,
        ema=0.999,
        ema_warmup=True,
        precision="auto",
    )
