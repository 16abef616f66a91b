r"""Focal and global distillation (Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan: CVPR 2022, arXiv 2111.11837).

Focal: the squared error of a level, weighed by the teacher's attention, apart for objects and background, and
the distance of the attentions. Global: the error after a context block, which relates all positions.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Losses, promote
from mdistiller.methods.features import FeatureConfig, Weight
from mdistiller.tasks.detection.adapter import Kind
from mdistiller.tasks.detection.levels import (
    OBJECTS,
    LevelMethod,
    positions_in_papers,
    settled,
    without_pooled,
)
from mdistiller.types import Batch, DataInfo, Outputs


def fgd_attention(
    feature: Float[Tensor, "b c h w"], temperature: float
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b c"]]:
    """Computes the attention of a map to its positions and to its channels.

    Each is a softmax of mean absolute activations over the temperature, times their number, so that the mean
    is 1 (equations 3 to 6).
    """
    size = promote(feature).abs()
    b, c, h, w = size.shape
    positions = h * w * (size.mean(1) / temperature).flatten(1).softmax(1).view(b, h, w)
    return positions, c * (size.mean((2, 3)) / temperature).softmax(1)


def fgd_focal_losses(
    student_features: Float[Tensor, "b c h w"],
    teacher_features: Float[Tensor, "b c h w"],
    objects: Float[Tensor, "b 1 h w"],
    temperature: float,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Computes the losses of objects, of the background and of the attentions.

    With the teacher's attentions $A_s$, $A_c$ and the squared error $E = A_s A_c (F^S - F^T)^2$ they are
    $\frac1B \sum M E$, $\frac1B \sum \bar M E$ and
    $\frac1B \sum |A^S_s - A^T_s| + \frac1B \sum |A^S_c - A^T_c|$.

    Args:
        student_features: a level, [B, C, h, w].
        teacher_features: of the same shape.
        objects: M, at each position one over the area of the smallest object there, in cells; 0 elsewhere.
            $\bar M$ is one over the number of the image's positions without an object.
        temperature: temperature of the attentions.
        scale: factor of $\sum |A^S_s - A^T_s|$, the one term that grows with the number of positions: M and
            $\bar M$ make means of the others, and $A_s$ has the mean 1.

    Source: Yang et al., CVPR 2022, equations 1 to 9; the division by the number of images B is of the
    authors' code.
    """
    student, teacher = promote(student_features), promote(teacher_features)
    (ours, our_channels), (theirs, channels) = (fgd_attention(f, temperature) for f in (student, teacher))
    error = ((student - teacher).square() * channels[:, :, None, None]).sum(1) * theirs
    mask = objects[:, 0]
    empty = (mask == 0).to(mask.dtype)
    empty = empty / empty.sum((1, 2), keepdim=True).clamp(min=1)
    count = len(student)
    attention = (scale * (ours - theirs).abs().sum() + (our_channels - channels).abs().sum()) / count
    return (mask * error).sum() / count, (empty * error).sum() / count, attention


class ContextBlock(nn.Module):
    """Adds to every position of a map the same vector: its attention-weighted mean, through two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = nn.Conv2d(channels, 1, 1)
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.mask.bias)  # type: ignore[arg-type]
        middle = max(1, channels // 2)
        self.change = nn.Sequential(
            nn.Linear(channels, middle), nn.LayerNorm(middle), nn.ReLU(), nn.Linear(middle, channels)
        )
        for parameter in self.change[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.mask(x).flatten(2).softmax(2)  # [B, 1, positions]
        context = (x.flatten(2) * shares).sum(2)
        return x + self.change(context)[:, :, None, None]


_NAMES = ("object_weight", "background_weight", "attention_weight", "context_weight", "temperature")


class FGDConfig(FeatureConfig):
    """Hyperparameters of FGD. Those that are None are the authors' for the kind of the student."""

    own_name = "fgd"

    weight: Weight = 1.0
    """Weight of the whole loss, the sum of the four terms below."""
    object_weight: float | None = Field(default=None, ge=0)
    """Weight of the positions of objects (α). None: 1e-3; 5e-5 with proposals, 1.6e-3 with points."""
    background_weight: float | None = Field(default=None, ge=0)
    """Weight of the other positions (β). None: 5e-4; 2.5e-5 with proposals, 8e-4 with points."""
    attention_weight: float | None = Field(default=None, ge=0)
    """Weight of the attentions (γ), sums over positions and channels. None: 5e-4; 5e-5 with proposals, 8e-4
    with points."""
    context_weight: float | None = Field(default=None, ge=0)
    """Weight of the maps after the context block (λ). None: 5e-6; 5e-7 with proposals, 8e-6 with points."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature of the attentions. None: 0.5; 0.8 with points."""

    by_kind: ClassVar[dict[Kind, dict[str, float]]] = {
        "anchors": dict(zip(_NAMES, (1e-3, 5e-4, 5e-4, 5e-6, 0.5), strict=True)),
        "proposals": dict(zip(_NAMES, (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), strict=True)),
        "points": dict(zip(_NAMES, (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8), strict=True)),
    }


class FGD(LevelMethod):
    """Matches levels apart for objects and background where the teacher attends, and their context."""

    Config = FGDConfig
    config: FGDConfig
    name = "fgd"
    card = Card(
        "Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan: Focal and Global Knowledge Distillation for Detectors, "
        "CVPR 2022",
    )

    derived = OBJECTS
    choose = staticmethod(without_pooled)

    def __init__(self, config: FGDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        *self.weights, self.temperature = settled(config, student).values()
        self.student_contexts = nn.ModuleList(ContextBlock(t[1]) for t in self.teacher_shapes)
        self.teacher_contexts = nn.ModuleList(ContextBlock(t[1]) for t in self.teacher_shapes)
        self.positions = positions_in_papers(student, self.levels)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses = []
        layers = self.positions, self.student_contexts, self.teacher_contexts
        levels = zip(self.levels, *layers, self.adapted(student, teacher), strict=True)
        for name, positions, ours, theirs, (s, t) in levels:
            scale = positions / s[0, 0].numel()
            focal = fgd_focal_losses(s, t, student.features[name + OBJECTS], self.temperature, scale=scale)
            context = scale * (promote(ours(s)) - promote(theirs(t))).square().sum() / len(s)
            losses.append(torch.stack([*focal, context]))
        sums = self.weight * torch.stack(losses).sum(0) * losses[0].new_tensor(self.weights)
        names = ("fgd_objects", "fgd_background", "fgd_attention", "fgd_context")
        return dict(zip(names, sums.unbind(), strict=True))
