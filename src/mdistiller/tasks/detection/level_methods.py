r"""Methods that compare levels of detectors: CWD, PKD, FGFI, MGD and FGD, each with its loss.

- CWD (Shu, Liu, Gao, Yan, Shen: ICCV 2021), of the loss in `mdistiller.methods.cwd`.
- PKD, distillation by Pearson correlation (Cao, Zhang, Gao, Cheng, Cheng, Li: NeurIPS 2022, arXiv
  2207.02039). Each channel of a level is standardized over batch and positions in student and teacher, so
  that the loss does not depend on the sizes of their activations: detectors of different kinds may teach each
  other.
- FGFI, fine-grained feature imitation (Wang, Yuan, Zhang, Feng: CVPR 2019, arXiv 1906.03609). The student
  imitates the teacher's feature map near objects only, at positions with an anchor whose overlap with an
  object is more than $\psi$ times the best overlap that any anchor has with that object:
  $L = \frac{1}{2N} \sum_{i} I_i \sum_c \big(a(F^S)_{ic} - F^T_{ic}\big)^2$, $N = \sum_i I_i$.
- MGD, masked generative distillation (Yang, Li, Shao, Shi, Yuan, Yuan: ECCV 2022, arXiv 2205.01529). A random
  part of the positions of the student's map is set to zero, and two convolutions generate the teacher's whole
  map from the rest: $L = \frac{\alpha}{B} \sum \big(G(f(F^S) \cdot M) - F^T\big)^2$.
- FGD, focal and global distillation (Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan: CVPR 2022, arXiv 2111.11837).
  Focal: the squared error of a level, weighed by the teacher's attention, apart for objects and background,
  and the distance of the attentions. Global: the error after a context block, which relates all positions.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Losses, promote
from mdistiller.methods.cwd import cwd_loss
from mdistiller.methods.features import FeatureConfig, Weight, check_shapes, float_pairs
from mdistiller.tasks.detection.adapter import Kind
from mdistiller.tasks.detection.levels import (
    OBJECTS,
    OVERLAP,
    LevelMethod,
    positions_in_papers,
    settled,
    without_pooled,
)
from mdistiller.types import Batch, DataInfo, Outputs


class CWDConfig(FeatureConfig):
    """Hyperparameters of CWD for detectors; the defaults are those of mmrazor."""

    own_name = "cwd"

    weight: Weight = 50.0
    """Weight of the mean over the levels; mmrazor has 10 for the sum over five levels."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the distributions over positions."""


class CWD(LevelMethod):
    """Matches, channel by channel, the distribution of each level over its positions."""

    Config = CWDConfig
    config: CWDConfig
    name = "cwd"
    card = Card(
        "Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        temperature = self.config.temperature
        pairs = self.adapted(student, teacher)
        losses = torch.stack([cwd_loss(s, t, temperature=temperature) for s, t in pairs])
        return {"cwd": self.weight * losses.mean()}


def pkd_loss(
    student_features: Float[Tensor, "b c h w"], teacher_features: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    r"""Computes one minus the correlation of two maps, the mean over channels: $1 - \frac{1}{C}\sum_c r_c$.

    $r_c$ is Pearson's correlation of channel c over batch and positions, so the loss is half the mean squared
    error of the standardized maps. A constant channel counts as uncorrelated, with the loss 1/2.

    Args:
        student_features: a level, [B, C, h, w].
        teacher_features: of the same shape.

    Returns:
        A scalar in [0, 2].

    Raises:
        ConfigError: maps of different shapes or not [B, C, H, W].

    Source: Cao et al., NeurIPS 2022, equations 2 to 5.
    """
    check_shapes(student_features, teacher_features, "B, C, H, W")
    return (_standardize(student_features) - _standardize(teacher_features)).square().mean() / 2


def _standardize(feature: Tensor) -> Tensor:
    feature = promote(feature)
    variance, mean = torch.var_mean(feature, dim=(0, 2, 3), keepdim=True, correction=0)
    return (feature - mean) / (variance + 1e-12).sqrt()


class PKDConfig(FeatureConfig):
    """Hyperparameters of PKD."""

    own_name = "pkd"

    weight: Weight = 1.0
    """Weight of the mean over the levels, which lies between 0 and 2 whatever their number and sizes. mmrazor
    has 6 (Faster R-CNN) or 10 (RetinaNet) for each of four levels, which is 24 or 40 here. On a small set the
    student with 24 was 3 AP worse than the student alone, so the default is not theirs."""


class PKD(LevelMethod):
    """Matches the levels up to the scale and offset of each channel."""

    Config = PKDConfig
    config: PKDConfig
    name = "pkd"
    card = Card(
        "Cao, Zhang, Gao, Cheng, Cheng, Li: PKD: General Distillation Framework for Object Detectors via "
        "Pearson Correlation Coefficient, NeurIPS 2022",
    )

    @classmethod
    def choose(cls, pairs: list[tuple[str, str]], kind: Kind) -> list[tuple[str, str]]:
        return without_pooled(pairs, kind)[:4]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses = torch.stack([pkd_loss(s, t) for s, t in self.adapted(student, teacher)])
        return {"pkd": self.weight * losses.mean()}


def fgfi_loss(
    student_features: list[Float[Tensor, "b _ _ _"]],
    teacher_features: list[Float[Tensor, "b _ _ _"]],
    masks: list[Bool[Tensor, "b 1 _ _"]],
) -> Float[Tensor, ""]:
    r"""Computes the squared error near objects over all levels: $\frac{1}{2N} \sum_i I_i \|s_i - t_i\|^2$.

    Args:
        student_features: levels [B, C, H, W], each of the shape of the teacher's.
        teacher_features: as many levels.
        masks: $I$, as many masks [B, 1, H, W] of the positions that count; $N = \sum_i I_i$.

    Returns:
        A scalar: the sum over channels, half the mean over the positions that count; 0 without any.

    Raises:
        ConfigError: lists of different or no length, or shapes that differ.

    Source: Wang et al., CVPR 2019, equation 3.
    """
    pairs = float_pairs(student_features, teacher_features)
    total, count = torch.zeros(2, device=masks[0].device)
    for (student, teacher), mask in zip(pairs, masks, strict=True):
        if student.shape != teacher.shape or mask.shape[2:] != student.shape[2:]:
            raise ConfigError(
                f"each pair of features must have one shape [B, C, H, W], and their mask [B, 1, H, W]; "
                f"got {list(student.shape)}, {list(teacher.shape)} and {list(mask.shape)}"
            )
        total = total + ((student - teacher).square() * mask).sum()
        count = count + mask.sum()
    return total / (2 * count.clamp(min=1))


class FGFIConfig(FeatureConfig):
    """Hyperparameters of FGFI."""

    own_name = "fgfi"

    weight: Weight = 0.01
    """Weight of the imitation loss; the default is from the authors' code."""
    threshold: float = Field(default=0.5, ge=0, lt=1)
    """ψ, the fraction of an object's best overlap above which an anchor is near the object."""
    relu: bool = False
    """Put a ReLU behind the convolution, as in the authors' code, whose maps are not negative."""


class FGFI(LevelMethod):
    """Imitates the teacher's pyramid at the anchors near objects, through one 3x3 convolution per level."""

    Config = FGFIConfig
    config: FGFIConfig
    name = "fgfi"
    derived = OVERLAP
    card = Card(
        "Wang, Yuan, Zhang, Feng: Distilling Object Detectors with Fine-grained Feature Imitation, CVPR 2019"
    )

    def adapter(self, student: int, teacher: int) -> nn.Module:
        return nn.Conv2d(student, teacher, 3, padding=1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        adapted, targets = map(list, zip(*self.adapted(student, teacher), strict=True))
        adapted = [x.relu() for x in adapted] if self.config.relu else adapted
        near = [student.features[name + OVERLAP] > self.config.threshold for name in self.levels]
        return {"fgfi": self.weight * fgfi_loss(adapted, targets, near)}


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
