"""Detection: the DKD paper's setting on COCO (its Table 10), and a small one for sets of small images.

`FAMILY.METHOD.ARCHITECTURE_TEACHER_STUDENT`, such as `coco.dkd.fasterrcnn_resnet101_resnet18`, distils
between two backbones of one architecture; `FAMILY.teacher.DETECTOR` and `FAMILY.student.DETECTOR` train one
alone.

COCO: batch 8, learning rate 0.01 divided by 10 at steps 120,000 and 160,000 of 180,000, weight decay 1e-4,
the first 1,000 steps a linear warm-up, short side 640 to 800, backbones pretrained on ImageNet with frozen
batch norm. The published code's values. Evaluation takes one image at a time, as there: images of one batch
are padded to one size, which changes predictions a little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mdistiller.config import OptimConfig
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import MethodConfig, ReviewKDConfig
from mdistiller.methods.compose import change_all
from mdistiller.models import ModelConfig
from mdistiller.tasks.detection.config import DetectionAugmentConfig, DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.methods import default_config, get_method, list_detection_methods
from mdistiller.tasks.detection.models import ARCHITECTURES, BACKBONES, list_detectors

ALONE = ("teacher", "student")
# The published pairs of backbones, with ReviewKD's weight for Faster R-CNN and for Mask R-CNN.
PAIRS: dict[tuple[str, str], tuple[float, float]] = {
    ("resnet101", "resnet18"): (1.2, 1.5),
    ("resnet101", "resnet50"): (1.0, 0.8),
    ("resnet50", "mobilenet_v2"): (2.0, 1.0),
}


def coco(detector: str) -> DetectionConfig:
    """One detector alone in the paper's setting."""
    options: dict[str, Any] = {"backbone_weights": "IMAGENET1K_V1"}
    if detector.startswith(("fasterrcnn", "maskrcnn")):
        options["rpn_post_nms_top_n_train"] = 1000
    return DetectionConfig(
        data=DetectionDataConfig(masks=detector.startswith("maskrcnn")),
        student=ModelConfig(name=detector, options=options),
        optim=OptimConfig(lr=0.01, weight_decay=1e-4, milestones=(120 / 180, 160 / 180), lr_warmup=1 / 180),
        epochs=13,  # the steps below are 12.3 passes over the images with objects
        max_steps=180_000,
        batch_size=8,
        eval_batch_size=1,
        diagnostics=False,
    )


def small(detector: str) -> DetectionConfig:
    """One detector alone on images of at most 320 pixels, from scratch: a few thousand images at most."""
    return DetectionConfig(
        data=DetectionDataConfig(masks=detector.startswith("maskrcnn")),
        augment=DetectionAugmentConfig(short_sides=(192, 208, 224, 240), long_side=320),
        student=ModelConfig(name=detector),
        optim=OptimConfig(
            lr=0.01, weight_decay=1e-4, milestones=(120 / 180, 160 / 180), lr_warmup=0.02, clip_norm=10.0
        ),
        epochs=40,
        batch_size=8,
        eval_batch_size=1,
        eval_every=10,
        diagnostics=False,
    )


FAMILIES: dict[str, Callable[[str], DetectionConfig]] = {"coco": coco, "small": small}


def list_detection_recipes() -> list[str]:
    """Names for the published pairs; any other two backbones make a pair as well."""
    names = []
    for family in FAMILIES:
        for architecture in ("fasterrcnn", "maskrcnn"):
            pairs = [f"{architecture}_{teacher}_{student}" for teacher, student in PAIRS]
            methods = [m for m in list_detection_methods() if m not in ("none", "bckd")]
            names += [f"{family}.{method}.{pair}" for method in (*methods, "dkd+reviewkd") for pair in pairs]
        names += [f"{family}.{role}.{detector}" for role in ALONE for detector in list_detectors()]
    return names


def get_detection_recipe(name: str, method: str | None = None) -> DetectionConfig:
    """The config of a detection recipe's name, with another method in its place if one is given.

    Raises:
        UnknownNameError: no such family, method or detector.
        ConfigError: the name is not of the form FAMILY.METHOD.DETECTORS.
    """
    if method is not None:
        name = _renamed(name, method)
    family, _, rest = name.partition(".")
    if family not in FAMILIES:
        raise UnknownNameError("detection recipe", name, list_detection_recipes())
    chosen, _, models = rest.partition(".")
    if not chosen or not models:
        raise ConfigError(
            f"recipe {name!r}: a detection recipe is {family}.METHOD.ARCHITECTURE_TEACHER_STUDENT, "
            f"{family}.teacher.DETECTOR or {family}.student.DETECTOR"
        )
    if chosen in ALONE:
        if models not in list_detectors():
            raise UnknownNameError("detector", models, list_detectors())
        return FAMILIES[family](models).model_copy(update={"recipe": name})
    architecture, teacher, student = _split(models)
    config = FAMILIES[family](f"{architecture}_{student}")
    method_config = change_all(
        default_config(chosen), lambda part: _tune(part, architecture, teacher, student)
    )
    if chosen == "none":
        raise ConfigError(f"recipe {name!r}: method 'none' takes no teacher; use {family}.student.DETECTOR")
    update = {
        "recipe": name,
        "teacher": FAMILIES[family](f"{architecture}_{teacher}").student,
        "method": method_config,
    }
    return config.model_copy(update=update)


def set_detection_method(config: DetectionConfig, name: str) -> DetectionConfig:
    """A stored config with another method, with its default hyper-parameters for detectors."""
    recipe = _renamed(config.recipe, name) if config.recipe else ""
    return config.model_copy(update={"method": default_config(name), "recipe": recipe})


def _renamed(recipe: str, method: str) -> str:
    family, _, rest = recipe.partition(".")
    old, _, models = rest.partition(".")
    get_method(method)
    if old in ALONE:
        raise ConfigError(
            f"method: recipe {recipe!r} trains one detector alone; to distil, use "
            f"{family}.{method}.ARCHITECTURE_TEACHER_STUDENT"
        )
    return f"{family}.{method}.{models}" if models else recipe


def _tune(method: MethodConfig, architecture: str, teacher: str, student: str) -> MethodConfig:
    if isinstance(method, ReviewKDConfig) and (teacher, student) in PAIRS:
        weight = PAIRS[teacher, student][architecture == "maskrcnn"]
        return method.model_copy(update={"weight": weight})
    return method


def _split(models: str) -> tuple[str, str, str]:
    architecture, _, pair = models.partition("_")
    if architecture in ARCHITECTURES:
        for teacher in BACKBONES:
            student = pair.removeprefix(f"{teacher}_")
            if student != pair and student in BACKBONES:
                return architecture, teacher, student
    known = [f"fasterrcnn_{teacher}_{student}" for teacher, student in PAIRS]
    raise UnknownNameError("pair of detectors ARCHITECTURE_TEACHER_STUDENT", models, known)
