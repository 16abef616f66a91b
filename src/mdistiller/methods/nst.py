"""Neuron selectivity transfer (Huang, Wang: Like What You Like, 2017, arXiv 1707.01219).

The unit-length activation maps of the channels are samples of a distribution. The loss is the maximum mean
discrepancy (MMD) between the student's and the teacher's distribution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.methods.base import STAGES, Card, Example, Losses, Scalar, exact
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Maps, Weight, map_pairs
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs


def nst_loss(student_features: Maps, teacher_features: Maps) -> Scalar:
    r"""Computes the squared MMD of the channels' normalized maps with the kernel $k(x, y) = (x^\top y)^2$.

    $$\sum_l \frac{1}{B} \sum_b \Big( \operatorname{mean}_{i,i'} k(t_i, t_{i'}) +
    \operatorname{mean}_{j,j'} k(s_j, s_{j'}) - 2 \operatorname{mean}_{i,j} k(t_i, s_j) \Big)$$

    $t_i$ and $s_j$ are the channels of stage $l$, as unit vectors over positions. The larger map
    is average-pooled to the size of the smaller one; channels may differ. Errors: as `map_pairs`.

    Source: Huang and Wang 2017, the MMD loss with the polynomial kernel of degree 2 without a constant.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).square().mean()

    pairs = map_pairs(student_features, teacher_features)
    terms = []
    with exact(pairs[0][0]):
        for s_map, t_map in pairs:
            s, t = F.normalize(s_map.flatten(2), dim=2), F.normalize(t_map.flatten(2), dim=2)
            terms.append(kernel(t, t) + kernel(s, s) - 2 * kernel(t, s))
    return torch.stack(terms).sum()


class NSTConfig(FeatureConfig):
    """Hyperparameters of NST; the defaults are the usual ones for CIFAR-100."""

    weight: Weight = 50.0
    """Weight of the MMD loss."""


@register_method("nst")
class NST(FeatureMethod[NSTConfig]):
    """Matches the distribution of the channels' activation maps."""

    Config = NSTConfig
    card = Card(
        "Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017",
        "Narrow teachers: compares the distribution of activations over positions",
        example=Example(STAGES, STAGES),
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        return {"nst": self.weight * nst_loss(*self.read(student, teacher, batch.image))}
