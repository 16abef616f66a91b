r"""Methods that compare maps: CWD, SKD and CIRKD, with their base.

CWD, channel-wise distillation (Shu, Liu, Gao, Yan, Shen: ICCV 2021), of the loss in `mdistiller.methods.cwd`.

SKD, structured knowledge, its pair-wise term (Liu, Chen, Liu, Qin, Luo, Wang: CVPR 2019, arXiv 1903.04197).
With $a_{ij}$ the cosine similarity of the features of two nodes of the image, each a square of positions,
$L = \frac{1}{N^2} \sum_{i,j} (a^S_{ij} - a^T_{ij})^2$.

CIRKD, cross-image relational distillation, its mini-batch pixel-to-pixel term (Yang, Zhou, An, Jiang, Xu,
Zhang: CVPR 2022, arXiv 2204.06986). With unit vectors $f$ of all positions, each pair of images $i, j$ of a
batch has similarities $S_{ij} = F_i F_j^\top$, whose rows become distributions:
$L = \frac{1}{B^2} \sum_{i,j} \frac{1}{N} \sum_a
\mathrm{KL}\big(\sigma(S^T_{ij,a} / \tau) \,\|\, \sigma(S^S_{ij,a} / \tau)\big)$.
"""

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Losses, Scalar, exact, promote
from mdistiller.methods.cwd import cwd_loss
from mdistiller.methods.features import FeatureConfig, FeatureMethod, TapPair, sum_pairs
from mdistiller.methods.kd import divergence
from mdistiller.tasks.segmentation.pixels import resized
from mdistiller.tasks.segmentation.segmenter import LOGITS
from mdistiller.types import Batch, DataInfo, Outputs

_EPS = 1e-8


class MapMethod(FeatureMethod):
    """Base class of methods that compare maps, the teacher's scaled to the student's size."""

    tap: ClassVar[str] = "embedding"
    """Tap of student and teacher of a config without any."""

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        return (self.tap,), (self.tap,)

    def read(
        self, student: Outputs, teacher: Outputs, inputs: object = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        ours, theirs = super().read(student, teacher, inputs)
        return ours, [resized(promote(t), tuple(s.shape[2:])) for s, t in zip(ours, theirs, strict=True)]


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Raises a ConfigError for maps that are not [B, C, H, W] of one size."""
    shapes = student.shape, teacher.shape
    if {len(shape) for shape in shapes} != {4} or len({(b, h, w) for b, _, h, w in shapes}) > 1:
        raise ConfigError(
            "student and teacher maps must be [B, C, H, W] of one size, whatever their channels; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )


class CWDConfig(FeatureConfig):
    """Hyperparameters of CWD; the defaults are the paper's for logits."""

    own_name = "cwd"

    weight: float = Field(default=3.0, ge=0)
    """Weight of the loss; 3 for logits and 50 for features in the paper."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of the distributions over positions."""


class CWD(MapMethod):
    """Matches, channel by channel, the distribution of a map over positions; by default of the logits.

    Maps of other channels go through a 1x1 convolution.
    """

    Config = CWDConfig
    config: CWDConfig
    name = "cwd"
    card = Card(
        "Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    )
    tap = LOGITS

    def __init__(self, config: CWDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        pairs = zip(self.student_shapes, self.teacher_shapes, strict=True)
        self.adapters = nn.ModuleList(
            nn.Identity() if s[1] == t[1] else nn.Conv2d(s[1], t[1], 1, bias=False) for s, t in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features, targets = self.read(student, teacher, batch.image)
        adapted = [cast(Tensor, adapt(x)) for adapt, x in zip(self.adapters, features, strict=True)]
        temperature = self.config.temperature
        loss = sum_pairs(lambda s, t: cwd_loss(s, t, temperature=temperature), adapted, targets)
        return {"cwd": self.weight * loss}


def skd_loss(
    student: Float[Tensor, "b _ h w"], teacher: Float[Tensor, "b _ h w"], *, scale: float = 0.5
) -> Scalar:
    r"""Computes the mean squared difference of the similarities of nodes, the pair-wise term.

    Args:
        student: map [B, C, H, W].
        teacher: map [B, C', H, W]; channels may differ.
        scale: side of a node as a fraction of the map's; a node has the largest value of each channel.

    Returns:
        A scalar, the mean over images and pairs of nodes.

    Raises:
        ConfigError: maps of different sizes or not [B, C, H, W]; a scale out of (0, 1].

    Source: Liu et al., CVPR 2019, equation 2; max pooling, and lengths without a gradient, as in the authors'
    code.
    """
    check_maps(student, teacher)
    if not 0 < scale <= 1:
        raise ConfigError(f"scale: got {scale}; allowed: above 0, at most 1")
    window = tuple(max(1, int(side * scale)) for side in teacher.shape[2:])

    def similarities(x: Tensor) -> Tensor:
        nodes = F.max_pool2d(promote(x), window, window, ceil_mode=True)
        length = nodes.square().sum(1, keepdim=True).sqrt().detach() + _EPS
        rows = (nodes / length).flatten(2)
        return rows.transpose(1, 2) @ rows

    return (similarities(student) - similarities(teacher)).square().mean()


class SKDConfig(FeatureConfig):
    """Hyperparameters of SKD."""

    own_name = "skd"

    weight: float = Field(default=10.0, ge=0)
    """Weight of the pair-wise loss; 10 in the comparison of the authors of CIRKD, 1 in the code of SKD."""
    scale: float = Field(default=0.5, gt=0, le=1)
    """Side of a node as a fraction of the map's side."""


class SKD(MapMethod):
    """Matches the similarities of an image's regions, in the map that the head's last layer classifies."""

    Config = SKDConfig
    config: SKDConfig
    name = "skd"
    card = Card(
        "Liu, Chen, Liu, Qin, Luo, Wang: Structured Knowledge Distillation for Semantic Segmentation, "
        "CVPR 2019",
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features, targets = self.read(student, teacher, batch.image)
        scale = self.config.scale
        return {"skd": self.weight * sum_pairs(lambda s, t: skd_loss(s, t, scale=scale), features, targets)}


def cirkd_loss(
    student: Float[Tensor, "b _ h w"],
    teacher: Float[Tensor, "b _ h w"],
    *,
    temperature: float = 0.1,
    pool: int = 1,
) -> Scalar:
    r"""Computes the divergence of each pixel's similarities to the pixels of every image of the batch.

    Args:
        student: map [B, C, H, W].
        teacher: map [B, C', H, W]; channels may differ.
        temperature: $\tau$ > 0 of the distributions over the other image's pixels.
        pool: side of the squares of positions that are averaged first.

    Returns:
        A scalar in nats, the mean over pairs of images and over pixels. Memory grows with (B·H·W)² / pool⁴.

    Raises:
        ConfigError: maps of different sizes or not [B, C, H, W]; a temperature or side that is not positive.

    Source: Yang et al., CVPR 2022, equations 4 and 5.
    """
    check_maps(student, teacher)
    if not temperature > 0 or pool < 1:
        raise ConfigError(f"temperature and pool must be positive; got {temperature} and {pool}")

    def units(x: Tensor) -> Tensor:
        x = promote(x)
        x = x if pool == 1 else F.avg_pool2d(x, pool, pool, ceil_mode=True)
        return F.normalize(x, dim=1).flatten(2).transpose(1, 2)

    with exact(student):
        s, t = units(student), units(teacher)
        count = s.shape[1]
        losses = []
        for own_s, own_t in zip(s, t, strict=True):
            rows = [
                (own @ others.flatten(0, 1).T / temperature).unflatten(1, (-1, count)).log_softmax(2)
                for own, others in ((own_t, t), (own_s, s))
            ]
            losses.append(divergence(*rows).sum(2).mean())
        return torch.stack(losses).mean()


class CIRKDConfig(FeatureConfig):
    """Hyperparameters of CIRKD's pixel-to-pixel term; the defaults are the authors'."""

    own_name = "cirkd"

    weight: float = Field(default=1.0, ge=0)
    """Weight of the loss."""
    temperature: float = Field(default=0.1, gt=0)
    """Temperature of the distributions over the other image's pixels."""
    pool: int = Field(default=1, ge=1)
    """Side of the squares of positions that are averaged first; the authors' code takes 4 for maps
    of 256 x 256 positions or more. Memory falls with its fourth power."""


class CIRKD(MapMethod):
    """Matches the similarities of pixels across the images of a batch, before the head's last layer."""

    Config = CIRKDConfig
    config: CIRKDConfig
    name = "cirkd"
    card = Card(
        "Yang, Zhou, An, Jiang, Xu, Zhang: Cross-Image Relational Knowledge Distillation for Semantic "
        "Segmentation, CVPR 2022",
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features, targets = self.read(student, teacher, batch.image)
        c = self.config

        def loss(s: Tensor, t: Tensor) -> Tensor:
            return cirkd_loss(s, t, temperature=c.temperature, pool=c.pool)

        return {"cirkd": self.weight * sum_pairs(loss, features, targets)}
