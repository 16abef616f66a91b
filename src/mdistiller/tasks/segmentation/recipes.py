"""Recipes for segmentation: CIRKD's setting on Cityscapes and VOC, and one for sets of small images.

The families are `DATA-seg`. `FAMILY.METHOD.HEAD_TEACHER_STUDENT`, such as
`voc-seg.cwd.deeplabv3_resnet101_resnet18`, distils between two backbones with one head, and
`FAMILY.METHOD.TEACHER_STUDENT` between any two models, such as
`coco-seg.kd.deeplabv3_resnet18_lraspp_mobilenet_v3_small`. The teacher `self` is the student's own moving
average. `FAMILY.teacher.MODEL` and `FAMILY.student.MODEL` train one model without a teacher.

Cityscapes and VOC: the setting of the published code of Yang et al. ("Cross-Image Relational Knowledge
Distillation for Semantic Segmentation", CVPR 2022): SGD, momentum 0.9, weight decay 1e-4, batch 16, learning
rate 0.02 with polynomial decay of power 0.9 over 40,000 steps, crops of 512 x 1024 (VOC: 512 x 512), scales
0.5 to 2, mirrored at random, backbones pretrained on ImageNet. Its auxiliary classifier is off by default.
"""

from dataclasses import dataclass
from typing import Any

from mdistiller.config import SELF, OptimConfig
from mdistiller.errors import UnknownNameError
from mdistiller.methods import MethodConfig
from mdistiller.models import ModelConfig
from mdistiller.recipes.family import Family, register_family
from mdistiller.tasks.segmentation.config import (
    SegmentationAugmentConfig,
    SegmentationConfig,
    SegmentationDataConfig,
)
from mdistiller.tasks.segmentation.methods import default_config, list_segmentation_methods
from mdistiller.tasks.segmentation.segmenter import BACKBONES, list_segmenters

_OPTIM = OptimConfig(lr=0.02, weight_decay=1e-4, schedule="poly")
# The passes below are over Cityscapes' 2,975 training images, and VOC's 10,582 with the additional masks.
_STEPS = 40_000


def _student(name: str) -> ModelConfig:
    head = name.partition("_")[0]
    options: dict[str, Any] = {} if head == "segformer" else {"backbone_weights": "DEFAULT"}
    if head in ("deeplabv3", "fcn"):
        options["aux"] = False  # so that it has a flag
    return ModelConfig(name=name, options=options)


def cityscapes(name: str) -> SegmentationConfig:
    """Returns the config of one model on Cityscapes without a teacher."""
    return SegmentationConfig(
        data=SegmentationDataConfig(kind="cityscapes", root="data/cityscapes"),
        augment=SegmentationAugmentConfig(crop=(512, 1024)),
        student=_student(name),
        optim=_OPTIM,
        epochs=217,
        max_steps=_STEPS,
        batch_size=16,
        drop_last=True,
        eval_every=20,
    )


def voc(name: str) -> SegmentationConfig:
    """Returns the config of one model on VOC, or other images in its layout, without a teacher."""
    return SegmentationConfig(
        data=SegmentationDataConfig(kind="voc"),
        augment=SegmentationAugmentConfig(crop=(512, 512)),
        student=_student(name),
        optim=_OPTIM,
        epochs=61,
        max_steps=_STEPS,
        batch_size=16,
        drop_last=True,
        eval_every=5,
    )


def coco(name: str) -> SegmentationConfig:
    """Returns the config of one model on COCO-format images of about 320 pixels, without a teacher."""
    return SegmentationConfig(
        data=SegmentationDataConfig(kind="coco", root="data/coco"),
        augment=SegmentationAugmentConfig(crop=(128, 128), short_side=128),
        student=ModelConfig(name=name),
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.01, schedule="poly", clip_norm=5.0),
        epochs=40,
        batch_size=16,
        drop_last=True,
        eval_every=10,
    )


@dataclass(frozen=True)
class SegmentationFamily(Family):
    """Recipes over one set of images with masks."""

    about = (
        "a pair is HEAD_TEACHER_STUDENT with two backbones, or two models; a model is HEAD_BACKBONE. HEAD is "
        + ", ".join(f"{head} ({', '.join(backbones)})" for head, backbones in BACKBONES.items())
    )

    def models(self) -> tuple[list[str], list[str]]:
        return list_segmenters(), list_segmenters()

    def methods(self) -> list[str]:
        return [name for name in list_segmentation_methods() if name != "none"]

    def find_model(self, name: str) -> str:
        if name not in list_segmenters():
            raise UnknownNameError("segmentation model", name, list_segmenters())
        return name

    def split_pair(self, pair: str) -> tuple[str, str]:
        head, _, backbones = pair.partition("_")
        for teacher in (*BACKBONES.get(head, ()), SELF):
            student = backbones.removeprefix(f"{teacher}_")
            if student != backbones and student in BACKBONES[head]:
                return SELF if teacher == SELF else f"{head}_{teacher}", f"{head}_{student}"
        models = list_segmenters()
        for teacher in models:
            if (student := pair.removeprefix(f"{teacher}_")) in models:
                return teacher, student
        raise UnknownNameError(
            "pair of segmentation models HEAD_TEACHER_STUDENT or TEACHER_STUDENT", pair, self.pairs
        )

    def join_pair(self, teacher: str, student: str) -> str:
        head, _, backbone = student.partition("_")
        if teacher == SELF:
            return f"{head}_{SELF}_{backbone}"
        return f"{teacher}_{backbone}" if teacher.startswith(f"{head}_") else f"{teacher}_{student}"

    def method_config(self, name: str) -> MethodConfig:
        return default_config(name)


_PAIRS = ("deeplabv3_resnet101_resnet18", "deeplabv3_resnet101_mobilenet_v3_large", "segformer_b4_b0")
register_family("cityscapes-seg", SegmentationFamily(cityscapes, _PAIRS))
register_family("voc-seg", SegmentationFamily(voc, _PAIRS))
register_family(
    "coco-seg",
    SegmentationFamily(coco, ("deeplabv3_resnet18_lraspp_mobilenet_v3_small", "deeplabv3_resnet50_resnet18")),
)
