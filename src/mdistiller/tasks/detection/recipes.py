"""Recipes for detection: the DKD paper's setting on COCO (its Table 10), and one for sets of small images.

`FAMILY.METHOD.ARCHITECTURE_TEACHER_STUDENT`, such as `coco.dkd.fasterrcnn_resnet101_resnet18`, distills
between two backbones of one architecture; the teacher `self` is the student's own moving average. Any two
detectors make a pair TEACHER_STUDENT by their whole names, such as `fasterrcnn_resnet50_fcos_resnet18`.
`FAMILY.teacher.DETECTOR` and `FAMILY.student.DETECTOR` train one detector without a teacher.

COCO: batch 8, learning rate 0.01 divided by 10 at steps 120,000 and 160,000 of 180,000, weight decay 1e-4,
the first 1,000 steps a linear warm-up, short side 640 to 800, backbones pretrained on ImageNet with frozen
batch norm. These are the published code's values. Detectors of transformers train with AdamW, rate 1e-4 and
gradients clipped at 0.1, as DETR and RT-DETR do. Evaluation takes one image at a time, as there: the images
of a batch are padded to one size, which changes predictions a little.
"""

from mdistiller.config import OptimConfig
from mdistiller.methods import MethodConfig
from mdistiller.methods.changes import change_all
from mdistiller.models import ModelConfig
from mdistiller.recipes.backbones import BackboneFamily
from mdistiller.recipes.family import measure, register_family
from mdistiller.recipes.published import all_runs, default_run, find_runs
from mdistiller.tasks.detection.config import DetectionAugmentConfig, DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.detr_config import CLASSES, kind_of
from mdistiller.tasks.detection.methods import list_detection_methods, takes_softmax
from mdistiller.tasks.detection.models import ARCHITECTURES, BACKBONES, list_detectors

_TWO_STAGE = ("fasterrcnn", "maskrcnn")
DATA = "coco"
PAIRS = tuple(dict.fromkeys(run.pair for run in all_runs(DATA)))
_RUN = default_run(DATA, "none", "")
assert _RUN.steps is not None
_OPTIM = OptimConfig(
    lr=_RUN.lr,
    weight_decay=_RUN.weight_decay,
    milestones=tuple(drop / _RUN.steps for drop in _RUN.drops),
    lr_warmup_steps=1000,
)
_SET_OPTIM = _OPTIM.replace(name="adamw", lr=1e-4, clip_norm=0.1)


def coco(detector: str) -> DetectionConfig:
    """Returns the config of one detector without a teacher, in the paper's setting."""
    options: dict[str, str | int] = {}
    if detector.partition("_")[2] in BACKBONES:  # other detectors have options of their own
        options["backbone_weights"] = "IMAGENET1K_V1"
    if options and detector.startswith(_TWO_STAGE):
        options["rpn_post_nms_top_n_train"] = 1000
    return DetectionConfig(
        data=DetectionDataConfig(masks=detector.startswith("maskrcnn")),
        student=ModelConfig(name=detector, options=options),
        optim=_OPTIM if kind_of(detector) is None else _SET_OPTIM,
        epochs=13,  # max_steps are 12.3 passes over the images with objects
        max_steps=_RUN.steps,
        batch_size=_RUN.batch_size,
        eval_batch_size=1,
    )


def small(detector: str) -> DetectionConfig:
    """Returns the config of one detector without a teacher, for a few thousand images of up to 320 pixels."""
    kind = kind_of(detector)
    optim = _OPTIM.replace(clip_norm=10.0) if kind is None else _SET_OPTIM
    return DetectionConfig(
        data=DetectionDataConfig(masks=detector.startswith("maskrcnn")),
        augment=DetectionAugmentConfig(short_sides=(192, 208, 224, 240), long_side=320),
        student=ModelConfig(name=detector, options={} if kind is None else {"size": 320}),
        optim=optim.replace(lr_warmup_steps=100),
        epochs=40,
        batch_size=8,
        eval_batch_size=1,
        eval_every=10,
    )


class DetectionFamily(BackboneFamily):
    """Recipes over one detection data set."""

    Config = DetectionConfig
    what = "pair of detectors ARCHITECTURE_TEACHER_STUDENT"
    hint = "Detectors of two kinds: TEACHER_STUDENT, such as fasterrcnn_resnet50_fcos_resnet18"
    backbones = dict.fromkeys(ARCHITECTURES, BACKBONES)

    about = (
        "a pair is ARCHITECTURE_TEACHER_STUDENT with two backbones, a model ARCHITECTURE_BACKBONE. "
        f"ARCHITECTURE is {', '.join(ARCHITECTURES)}; a backbone is {', '.join(BACKBONES)}. Detectors of two "
        "kinds make a pair by their whole names: `mdistiller list models --task detection`."
    )

    def models(self) -> tuple[list[str], list[str]]:
        return list_detectors(), list_detectors()

    def is_model(self, name: str) -> bool:
        return super().is_model(name) or name.startswith("torchvision/") or kind_of(name) in CLASSES

    def methods(self) -> list[str]:
        """Lists the methods that detectors with proposals take, and the paper's sum."""
        return [*(m for m in list_detection_methods() if takes_softmax(m) and m != "none"), "dkd+reviewkd"]


def tune(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Sets the published hyperparameters of a pair; Faster R-CNN's serve for all but Mask R-CNN."""
    architecture, _, backbone = student.partition("_")
    kind = architecture if architecture == "maskrcnn" else "fasterrcnn"
    first = teacher.partition("_")[2] if teacher.startswith(f"{architecture}_") else teacher
    pair = f"{kind}_{first}_{backbone}"

    def change(part: MethodConfig) -> MethodConfig:
        runs = find_runs(DATA, part.method_name, pair)
        return part.replace(**runs[0].fields) if runs else part

    return change_all(method, change)


def tune_small(method: MethodConfig, teacher: str, student: str) -> MethodConfig:
    """Sets the published hyperparameters, and measures the weight of FitNet, of which none is published."""

    def change(part: MethodConfig) -> MethodConfig:
        return measure(part, teacher) if part.method_name == "fitnet" else part

    return change_all(tune(method, teacher, student), change)


register_family(
    "coco",
    DetectionFamily(
        coco, PAIRS, tune, teacher_config=lambda name: coco(name).student, published=DATA, schedules=False
    ),
)
register_family(
    "small", DetectionFamily(small, PAIRS, tune_small, teacher_config=lambda name: ModelConfig(name=name))
)
