"""Recipes for segmentation: CIRKD's setting on Cityscapes and VOC, and one for sets of small images.

The families are `DATA-seg`. `FAMILY.METHOD.HEAD_TEACHER_STUDENT`, such as
`voc-seg.cwd.deeplabv3_resnet101_resnet18`, distills between two backbones with one head, and
`FAMILY.METHOD.TEACHER_STUDENT` between any two models, such as
`coco-seg.kd.deeplabv3_resnet18_lraspp_mobilenet_v3_small`. The teacher `self` is the student's own moving
average. `FAMILY.teacher.MODEL` and `FAMILY.student.MODEL` train one model without a teacher.

Cityscapes and VOC: the setting of the published code of Yang et al. ("Cross-Image Relational Knowledge
Distillation for Semantic Segmentation", CVPR 2022): SGD, momentum 0.9, weight decay 1e-4, batch 16, learning
rate 0.02 with polynomial decay of power 0.9 over 40,000 steps, crops of 512 x 1024 (VOC: 512 x 512), scales
0.5 to 2, mirrored at random, backbones pretrained on ImageNet. Its auxiliary classifier is off by default.
"""

from typing import Any

from mdistiller.config import OptimConfig
from mdistiller.models import ModelConfig
from mdistiller.recipes.backbones import BackboneFamily
from mdistiller.recipes.family import register_family
from mdistiller.tasks.segmentation.config import (
    SegmentationAugmentConfig,
    SegmentationConfig,
    SegmentationDataConfig,
)
from mdistiller.tasks.segmentation.methods import list_segmentation_methods
from mdistiller.tasks.segmentation.segmenter import BACKBONES, list_segmenters


def _published(name: str, data: SegmentationDataConfig, **changes: Any) -> SegmentationConfig:
    """Returns the config of one model in the setting of CIRKD's code."""
    head = name.partition("_")[0]
    options: dict[str, str | bool] = {} if head == "segformer" else {"backbone_weights": "DEFAULT"}
    if head in ("deeplabv3", "fcn"):
        options["aux"] = False  # so that it has a flag
    return SegmentationConfig(
        data=data,
        student=ModelConfig(name=name, options=options),
        optim=OptimConfig(lr=0.02, weight_decay=1e-4, schedule="poly"),
        max_steps=40_000,
        batch_size=16,
        drop_last=True,
        **changes,
    )


def cityscapes(name: str) -> SegmentationConfig:
    """Returns the config of one model on Cityscapes without a teacher."""
    data = SegmentationDataConfig(kind="cityscapes", root="data/cityscapes")
    augment = SegmentationAugmentConfig(crop=(512, 1024))
    return _published(name, data, augment=augment, epochs=217, eval_every=20)  # passes over 2,975 images


def voc(name: str) -> SegmentationConfig:
    """Returns the config of one model on VOC, or other images in its layout, without a teacher."""
    # Passes over VOC's 10,582 images with the additional masks.
    return _published(name, SegmentationDataConfig(kind="voc"), epochs=61, eval_every=5)


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


class SegmentationFamily(BackboneFamily):
    """Recipes over one set of images with masks."""

    Config = SegmentationConfig
    what = "pair of segmentation models HEAD_TEACHER_STUDENT or TEACHER_STUDENT"
    backbones = BACKBONES
    about = (
        "a pair is HEAD_TEACHER_STUDENT with two backbones, or two models; a model is HEAD_BACKBONE. HEAD is "
        + ", ".join(f"{head} ({', '.join(backbones)})" for head, backbones in BACKBONES.items())
    )

    def models(self) -> tuple[list[str], list[str]]:
        return list_segmenters(), list_segmenters()

    def methods(self) -> list[str]:
        return [name for name in list_segmentation_methods() if name != "none"]


_PAIRS = ("deeplabv3_resnet101_resnet18", "deeplabv3_resnet101_mobilenet_v3_large", "segformer_b4_b0")
register_family("cityscapes-seg", SegmentationFamily(cityscapes, _PAIRS))
register_family("voc-seg", SegmentationFamily(voc, _PAIRS))
register_family(
    "coco-seg",
    SegmentationFamily(coco, ("deeplabv3_resnet18_lraspp_mobilenet_v3_small", "deeplabv3_resnet50_resnet18")),
)
