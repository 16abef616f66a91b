"""Class attention transfer (CAT-KD; Guo, Yan, Li, Lin: Class Attention Transfer Based KD, CVPR 2023)."""

from dataclasses import replace

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, Scalar, exact, promote
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Weight, check_channels, classifier
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def catkd_loss(
    student_cams: Float[Tensor, "b c _ _"],
    teacher_cams: Float[Tensor, "b c _ _"],
    *,
    resolution: int = 2,
    normalize: bool = True,
) -> Scalar:
    r"""Computes the mean squared error of class activation maps (CAMs), pooled to a coarse grid.

    $$\frac{1}{B K r^2} \sum_{b,k} \Big\| \frac{\varphi(A^S_{bk})}{\|\varphi(A^S_{bk})\|_2} -
    \frac{\varphi(A^T_{bk})}{\|\varphi(A^T_{bk})\|_2} \Big\|_2^2$$

    with $\varphi$ the average pooling to $r \times r$, the `resolution`, and $K$ classes. Without
    `normalize`, the norms in the equation are 1.

    Raises:
        ConfigError: maps that are not [B, K, H, W], or of different B or K.

    Source: Guo et al., CVPR 2023, CAT loss; the mean over the grid, where the paper has a sum, follows the
    authors' code.
    """
    check_channels(student_cams, teacher_cams)
    student, teacher = (
        F.adaptive_avg_pool2d(promote(cams), resolution).flatten(2) for cams in (student_cams, teacher_cams)
    )
    if normalize:
        # Epsilon inside the root, so that a map of zeros has a gradient.
        student, teacher = (x * (x.square().sum(2, keepdim=True) + 1e-12).rsqrt() for x in (student, teacher))
    return F.mse_loss(student, teacher)


class CATKDConfig(FeatureConfig):
    """Hyperparameters of CAT-KD; the authors tune weight, resolution and normalization per pair."""

    weight: Weight = 400.0
    """Weight of the CAM loss."""
    resolution: int = Field(default=2, ge=1)
    """Side of the grid to which the maps are pooled."""
    normalize: bool = True
    """Divide each map by its norm after pooling."""


@register_method("catkd")
class CATKD(FeatureMethod[CATKDConfig]):
    """Matches class activation maps, the evidence for each class at each position."""

    Config = CATKDConfig
    card = Card(
        "Guo, Yan, Li, Lin: Class Attention Transfer Based Knowledge Distillation, CVPR 2023",
        "Where a class appears matters; both models have class activation maps",
        example=Example(("last_map",), ("last_map",)),
    )
    taps_by_default = "last_map"
    needs = replace(FeatureMethod.needs, classifier=True, logits=True)

    def __init__(self, config: CATKDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        # In tuples they are no submodules of the method.
        self._student_head = (classifier(student),)
        self._teacher_head = (classifier(teacher),)
        for name, shapes, (head,) in (
            (self.student_taps, self.student_shapes, self._student_head),
            (self.teacher_taps, self.teacher_shapes, self._teacher_head),
        ):
            if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != head.in_features:
                raise ConfigError(
                    f"method 'catkd' reads one map [B, {head.in_features}, H, W], the classifier's input "
                    f"before pooling; {list(name)} has the shapes {[list(s) for s in shapes]}"
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        (student_map,), (teacher_map,) = self.read(student, teacher, batch.image)
        with exact(student_map):
            loss = catkd_loss(
                activation_maps(student_map, self._student_head[0].weight, c.resolution),
                activation_maps(teacher_map, promote(self._teacher_head[0].weight.detach()), c.resolution),
                resolution=c.resolution,
                normalize=c.normalize,
            )
        return {"catkd": self.weight * loss}


def activation_maps(
    feature: Float[Tensor, "b d _ _"], weight: Float[Tensor, "c d"], resolution: int
) -> Float[Tensor, "b c r r"]:
    """Computes pooled class activation maps from a feature map and the classifier's weight, without its bias.

    Pooling and classifier are linear, so pooling first gives the same maps in less time.
    """
    pooled = F.adaptive_avg_pool2d(promote(feature), resolution)
    return F.conv2d(pooled, promote(weight)[:, :, None, None])
