"""What a torchvision detector shows of itself in one pass, and a frozen one as a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, roi_align

from mdistiller.errors import ConfigError, TapError, UnknownNameError
from mdistiller.taps import _add_prefix, _strip_prefix, probe
from mdistiller.types import Outputs

OVERLAP = ".overlap"
"""After a level's name: the tap that says how well the anchors there fit an object."""


def is_two_stage(model: nn.Module) -> bool:
    """Whether a detector is one of torchvision's with proposals and a box head, or a child of it.

    Raises:
        ConfigError: it is neither that nor a one-stage detector of torchvision's making (RetinaNet, FCOS).
    """
    if isinstance(model, GeneralizedRCNN):
        return True
    parts = ("transform", "backbone", "head", "anchor_generator")
    if all(isinstance(getattr(model, part, None), nn.Module) for part in parts):
        return False
    raise ConfigError(
        f"{type(model).__name__} is no detector that can be distilled; allowed: torchvision's GeneralizedRCNN "
        "(Faster and Mask R-CNN), RetinaNet and FCOS, and children of these"
    )


class Pyramid(nn.Module):
    """A detector's backbone as a model of images [B, 3, H, W] whose levels can be tapped by their names.

    Methods look at it when they are built; its call gives no logits that mean anything.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = cast(nn.Module, detector.backbone)
        self.levels = nn.ModuleDict()
        self.tap_points: dict[str, str] = {}
        with torch.no_grad():
            maps = probe(_Levels(self.backbone), [], (3, 64, 64)).logits
        del maps
        for name in _level_names(self.backbone):
            self.levels[name] = nn.Identity()
            self.tap_points[name] = f"levels.{name}"

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to zeros [B, 2]."""
        for name, feature in _as_dict(self.backbone(image)).items():
            self.levels[name](feature)
        return image.new_zeros(len(image), 2)
