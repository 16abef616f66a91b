"""Recipes of classification; settings and accuracies of methods and pairs are in the files of `published/`.

CIFAR-100 is as in the DKD paper and its published code, whose setting is that of CRD, ICLR 2020. No published
settings for CIFAR-10 are in the files, so its recipes have those of CIFAR-100. ImageNet is as in the DKD
paper and its published code: random crops of 224 and mirroring, evaluation on the center 224 of 256, and
torchvision's teachers with their first weights. Tiny-ImageNet is as in the published code of DOT (ICCV 2023):
images of 64 pixels, mirrored and rotated by up to 20 degrees. scikit-learn's digits, for CPUs, and one's own
images have no paper.
"""

from dataclasses import replace
from statistics import mode

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.methods import MethodConfig
from mdistiller.methods.changes import change_all
from mdistiller.models import ModelConfig
from mdistiller.recipes.apply import tune
from mdistiller.recipes.family import Family, measure, register_family
from mdistiller.recipes.published import all_runs, default_run
from mdistiller.tasks.classification.config import ClassificationConfig

CIFAR100_PAIRS = (
    *("resnet56_resnet20", "resnet110_resnet32", "resnet32x4_resnet8x4", "wrn_40_2_wrn_16_2"),
    *("wrn_40_2_wrn_40_1", "vgg13_vgg8", "resnet32x4_ShuffleV1", "wrn_40_2_ShuffleV1", "vgg13_MobileNetV2"),
    *("ResNet50_MobileNetV2", "resnet32x4_ShuffleV2"),
)
"""Pairs of the DKD paper's tables 6 and 7."""
IMAGENET_MODELS = {name: f"torchvision/{name}" for name in ("resnet18", "resnet34", "resnet50")}
IMAGENET_MODELS["mobilenetv1"] = "MobileNetV1"


def cifar(model: str, kind: str = "cifar100") -> ClassificationConfig:
    """Returns the run of one model on CIFAR."""
    return ClassificationConfig(data=DataConfig(kind=kind), student=ModelConfig(name=model))


def tune_cifar(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with its published hyperparameters for a pair.

    Other pairs have DKD's most frequent β of the teacher, and 8 for other teachers: according to the paper,
    the best β depends on the teacher, on the gap of its target logit.
    """
    default: float = default_run("cifar100", "dkd", "").fields["beta"]
    published = {run.pair: run.fields["beta"] for run in all_runs("cifar100") if run.method == "dkd"}
    own = [published[pair] for pair in CIFAR100_PAIRS if pair in published and pair.startswith(f"{teacher}_")]
    pair = f"{teacher}_{student}"
    return tune("cifar100", method, pair, published.get(pair, mode(own or [default])))


def imagenet(model: str) -> ClassificationConfig:
    """Returns the run of one model on ImageNet."""
    return ClassificationConfig(
        data=DataConfig(kind="folder", image_size=224, resize=256, memory="stream", workers=8),
        augment=AugmentConfig(crop="resized", padding=None),
        student=ModelConfig(name=model),
    )


def imagenet_teacher(model: str) -> ModelConfig:
    """Returns a teacher; torchvision's have their first ImageNet weights, as in the paper."""
    options = {"weights": "IMAGENET1K_V1"} if model.startswith("torchvision/") else {}
    return ModelConfig(name=model, options=options)


def tiny_imagenet(model: str) -> ClassificationConfig:
    """Returns the run of one model on Tiny-ImageNet."""
    return ClassificationConfig(
        data=DataConfig(kind="tiny-imagenet"),
        augment=AugmentConfig(crop="padded", padding=0, rotation=20.0),
        student=ModelConfig(name=model),
    )


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


def tune_folder(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Returns a method with ImageNet's published settings, and a weight of features that is measured.

    Taps stay the method's: those published belong to ImageNet's pairs.
    """

    def change(part: MethodConfig) -> MethodConfig:
        fields = type(part).model_fields
        taps = {name: fields[name].default for name in fields if name.endswith("_taps")}
        return measure(part.replace(**taps), teacher)

    return change_all(IMAGENET.tune(method, teacher, student), change)


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


CIFAR100 = Family(cifar, CIFAR100_PAIRS, tune_cifar, published="cifar100")
CIFAR10 = replace(CIFAR100, baseline=lambda model: cifar(model, "cifar10"), own_data=False)
IMAGENET = Family(
    imagenet,
    ("resnet34_resnet18", "resnet50_mobilenetv1"),
    aliases=IMAGENET_MODELS,
    teacher_config=imagenet_teacher,
    photographs=True,
    published="imagenet",
)
FOLDER = Family(
    folder,
    ("torchvision/resnet50_torchvision/resnet18",),
    tune_folder,
    photographs=True,
    settings="ImageNet's; auto weights are measured before the first step",
    finetune=finetune,
)
TINY = Family(tiny_imagenet, ("ResNet18_MobileNetV2", "ResNet18_ShuffleV2"), published="tiny-imagenet")
register_family("cifar10", CIFAR10)
register_family("cifar100", CIFAR100)
register_family("digits", Family(digits, ("resnet20_resnet8",)))
register_family("folder", FOLDER)
register_family("imagenet", IMAGENET)
register_family("tiny-imagenet", TINY)
