"""Attention transfer (Zagoruyko, Komodakis: ICLR 2017, arXiv 1612.03928)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import STAGES, Card, Example, Losses, Scalar
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Maps, Weight, map_pairs
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs


def at_loss(student_features: Maps, teacher_features: Maps, *, p: float = 2) -> Scalar:
    r"""Computes the squared distance of the normalized attention maps, summed over the pairs of features.

    $$\sum_l \frac{1}{B\,H_l W_l} \sum_b \left\| \frac{Q^S_{l,b}}{\|Q^S_{l,b}\|_2} -
    \frac{Q^T_{l,b}}{\|Q^T_{l,b}\|_2} \right\|_2^2, \quad
    Q = \operatorname{mean}_c |A_c|^p \in \mathbb{R}^{H_l W_l}$$

    The larger map [B, C, H, W] is average-pooled to the size of the smaller one; channels may differ. Errors:
    as `map_pairs`; p below 1.

    Source: Zagoruyko and Komodakis, ICLR 2017, section 3.1 and equation 2 (there the norm itself; the
    authors' code and the reference code base take the mean square).
    """
    if not p >= 1:
        raise ConfigError(f"p must be at least 1; got {p}")

    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.abs().pow(p).mean(1).flatten(1))

    pairs = map_pairs(student_features, teacher_features)
    return torch.stack([(attention(s) - attention(t)).square().mean() for s, t in pairs]).sum()


class ATConfig(FeatureConfig):
    """Hyperparameters of AT; the defaults are the usual ones for CIFAR-100."""

    weight: Weight = 1000.0
    """Weight of the attention loss."""
    p: float = Field(default=2, ge=1)
    """Power of the activations in an attention map."""


@register_method("at")
class AT(FeatureMethod[ATConfig]):
    """Matches the spatial attention of the teacher's stages."""

    Config = ATConfig
    card = Card(
        "Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017",
        "Channel counts differ and you want no extra layers",
        example=Example(STAGES, STAGES),
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        return {"at": self.weight * at_loss(*self.read(student, teacher, batch.image), p=self.config.p)}
