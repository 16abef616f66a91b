r"""Masked generative distillation (Yang, Li, Shao, Shi, Yuan, Yuan: ECCV 2022, arXiv 2205.01529).

A random part of the positions of the student's map is set to zero, and two convolutions generate the
teacher's whole map from the rest: $L = \frac{\alpha}{B} \sum \big(G(f(F^S) \cdot M) - F^T\big)^2$.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Losses, promote
from mdistiller.methods.features import FeatureConfig, Weight, check_shapes
from mdistiller.tasks.detection.adapter import Kind
from mdistiller.tasks.detection.levels import LevelMethod, positions_in_papers, settled, without_pooled
from mdistiller.types import Batch, DataInfo, Outputs


def mgd_loss(
    generated: Float[Tensor, "b c h w"], teacher_features: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    r"""Computes the squared error of a generated map, the sum over channels and positions for each image.

    Args:
        generated: the map that is generated from the masked one, [B, C, h, w].
        teacher_features: of the same shape.

    Returns:
        A scalar, the mean over the B images.

    Raises:
        ConfigError: maps of different shapes or not [B, C, H, W].

    Source: Yang et al., ECCV 2022, equation 4; the division by the number of images is of the authors' code.
    """
    check_shapes(generated, teacher_features, "B, C, H, W", "the generated and the teacher's features")
    return (promote(generated) - promote(teacher_features)).square().sum() / len(generated)


class MGDConfig(FeatureConfig):
    """Hyperparameters of MGD. Those that are None are the authors' for the kind of the student."""

    own_name = "mgd"

    weight: Weight | None = None
    """Weight of the loss, a sum over channels and the positions that an image of 800 x 1333 pixels has. None:
    2e-5; 5e-7 with proposals."""
    masked: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of positions that are masked. None: 0.65; 0.45 with proposals."""

    by_kind: ClassVar[dict[Kind, dict[str, float]]] = {
        "anchors": {"weight": 2e-5, "masked": 0.65},
        "proposals": {"weight": 5e-7, "masked": 0.45},
    }


class MGD(LevelMethod):
    """Generates the teacher's levels from the student's, of which a random part is masked."""

    Config = MGDConfig
    config: MGDConfig
    name = "mgd"
    choose = staticmethod(without_pooled)
    card = Card("Yang, Li, Shao, Shi, Yuan, Yuan: Masked Generative Distillation, ECCV 2022")

    def __init__(self, config: MGDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        self.settled = settled(config, student)
        self.generators = nn.ModuleList(
            nn.Sequential(nn.Conv2d(t[1], t[1], 3, padding=1), nn.ReLU(), nn.Conv2d(t[1], t[1], 3, padding=1))
            for t in self.teacher_shapes
        )
        self.positions = positions_in_papers(student, self.levels)

    @property
    def weight(self) -> float:
        return super().weight if self.config.weight is not None else self.settled["weight"]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses = []
        levels = zip(self.generators, self.positions, self.adapted(student, teacher), strict=True)
        for generate, positions, (s, t) in levels:
            kept = torch.rand(len(s), 1, *s.shape[2:], device=s.device) <= 1 - self.settled["masked"]
            scale = positions / s[0, 0].numel()
            losses.append(scale * mgd_loss(generate(s * kept), t))
        return {"mgd": self.weight * torch.stack(losses).sum()}
