"""Knowledge review (Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import PREACTIVATIONS, STAGES, Card, Example, Losses, Scalar, ramp
from mdistiller.methods.features import (
    FeatureConfig,
    FeatureMethod,
    Maps,
    TapPair,
    Weight,
    check_shapes,
    float_pairs,
    match_stages,
    preactivations,
    vector_as_map,
)
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs

_LEVELS = (4, 2, 1)


def hcl_loss(student_features: Maps, teacher_features: Maps) -> Scalar:
    r"""Computes the hierarchical context loss, mean squared errors of maps and of their averages over grids.

    $$\sum_k \frac{\sum_l w_l\,\mathrm{MSE}\big(\mathrm{pool}_l(s_k), \mathrm{pool}_l(t_k)\big)}{\sum_l w_l}$$

    where $l$ runs over the whole map and the smaller ones of the grids 4x4, 2x2 and 1x1, and
    $w = 1, \frac12, \frac14, \dots$

    Raises:
        ConfigError: lists of different or no length; a pair of different shapes or not [B, C, H, W].

    Source: Chen et al., CVPR 2021, hierarchical context loss; the weights follow the authors' code.
    """
    losses = []
    for student, teacher in float_pairs(student_features, teacher_features):
        check_shapes(student, teacher, "B, C, H, W")
        # Pooling is linear, so pooling the difference replaces pooling both maps.
        difference = student - teacher
        loss, weight, weights = difference.square().mean(), 1.0, 1.0
        for level in _LEVELS:
            if level < student.shape[2]:  # only the height, as in the authors' code
                weight /= 2
                weights += weight
                loss = loss + weight * F.adaptive_avg_pool2d(difference, level).square().mean()
        losses.append(loss / weights)
    return torch.stack(losses).sum()


class ABF(nn.Module):
    """Attention-based fusion of a stage's feature with the fused feature of the deeper stages.

    Args:
        inputs: channels of the stage.
        middle: channels of the fused feature.
        outputs: channels of the teacher's feature.
        fuse: whether there is a deeper stage.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, fuse: bool) -> None:
        super().__init__()
        enter = nn.Conv2d(inputs, middle, 1, bias=False)
        leave = nn.Conv2d(middle, outputs, 3, padding=1, bias=False)
        for convolution in (enter, leave):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(outputs))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Returns the prediction of the teacher's feature, [B, outputs, *size], and the fused feature."""
        x = self.enter(x)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, x.shape[2:])
            shares = self.attention(torch.cat([x, deeper], 1))
            x = x * shares[:, :1] + deeper * shares[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size)
        return self.leave(x), x


class ReviewKDConfig(FeatureConfig):
    """Hyperparameters of ReviewKD."""

    weight: Weight = 1.0
    """Weight of the review loss; 0.6 to 8 in the paper, depending on the pair."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which the review loss grows from zero to its full weight."""
    max_mid_channel: int = Field(default=512, ge=1)
    """Upper limit of the channels of the fused features, else those of the student's deepest feature."""


@register_method("reviewkd")
class ReviewKD(FeatureMethod[ReviewKDConfig]):
    """Guides each stage of the student and all deeper ones by each stage of the teacher."""

    Config = ReviewKDConfig
    card = Card(
        "Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021",
        "Training time is cheap: each stage learns from all deeper ones; also for detectors",
        example=Example((*STAGES, "pooled"), (*PREACTIVATIONS, "pooled"), 1_808_774),
    )

    def __init__(
        self, config: ReviewKDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        inputs = [shape[1] for shape in self.student_shapes]
        outputs = [shape[1] for shape in self.teacher_shapes]
        middle = min(config.max_mid_channel, inputs[-1])
        self.fusions = nn.ModuleList(
            ABF(i, middle, o, fuse=k < len(inputs) - 1)
            for k, (i, o) in enumerate(zip(inputs, outputs, strict=True))
        )

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        student_stages, teacher_stages = match_stages(student, teacher)
        return (*student_stages, "pooled"), (*preactivations(teacher, teacher_stages), "pooled")

    def read(
        self, student: Outputs, teacher: Outputs, inputs: object = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        first, second = super().read(student, teacher, inputs)
        return list(map(vector_as_map, first)), list(map(vector_as_map, second))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features, targets = self.read(student, teacher, batch.image)
        reviewed, deeper = [], None
        for x, target, fusion in reversed(list(zip(features, targets, self.fusions, strict=True))):
            out, deeper = fusion(x, deeper, target.shape[2:])
            reviewed.append(out)
        weight = self.weight * ramp(progress, self.config.warmup)
        return {"reviewkd": weight * hcl_loss(reviewed[::-1], targets)}
