r"""Simple recipe distillation (SRD; Miles, Mikolajczyk: AAAI 2024, arXiv 2303.11098).

A linear projection of the student's embedding learns relations between samples. A normalization over the
batch, without parameters, sets the pace at which it learns, and a soft maximum of the errors suits students
that are far weaker than the teacher.
"""

import torch
from torch import Tensor, nn

from mdistiller.methods.base import Card, Example, Losses, Scalar, promote, standardize
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Vectors, Weight, check_shapes
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs

_EPS = 1e-5


def srd_loss(student_embedding: Vectors, teacher_embedding: Vectors, *, eps: float = 1e-4) -> Scalar:
    r"""Computes the logarithm of the sum of the fourth powers of the differences of standardized embeddings.

    $$\log \Big( 10^{-5} + \sum_{b,d} \big( \hat h^S_{bd} - \hat h^T_{bd} \big)^4 \Big), \quad
    \hat h_{bd} = \frac{h_{bd} - \mu_d}{\sqrt{\sigma_d^2 + \epsilon}}$$

    with mean and variance (divisor B) of each dimension over the batch. It is negative for small differences.

    Args:
        student_embedding: [B, D], projected to the teacher's width.
        teacher_embedding: [B, D], detached.
        eps: ε, added to the variances.

    Raises:
        ConfigError: not two embeddings of one shape [B, D].

    Source: Miles and Mikolajczyk, AAAI 2024, section 3; equals the authors' code for ImageNet, to which
    the constant 1e-5, of their code for DeiT, is added.
    """
    check_shapes(student_embedding, teacher_embedding, "B, D")
    student, teacher = (standardize(promote(x), eps) for x in (student_embedding, teacher_embedding))
    return ((student - teacher).square().square().sum() + _EPS).log()


class SRDConfig(FeatureConfig):
    """Hyperparameters of SRD; the defaults are the authors' for ImageNet."""

    weight: Weight = 2.0
    """Weight of the loss."""


@register_method("srd")
class SRD(FeatureMethod[SRDConfig]):
    """Matches a linear projection of the student's embedding, both standardized over the batch."""

    Config = SRDConfig
    sequences = True
    card = Card(
        "Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024",
        "One linear projection of the embedding, for CNNs and transformers; combine with KD",
        example=Example(("pooled",), ("pooled",), 65_792),
    )
    taps_by_default = "embedding"

    def __init__(self, config: SRDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        shapes = zip(self.student_shapes, self.teacher_shapes, strict=True)
        self.projectors = nn.ModuleList(nn.Linear(s[1], t[1]) for s, t in shapes)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        pairs = zip(self.projectors, *self.gathered(student, teacher), strict=True)
        losses = [srd_loss(promote(project(s)), t) for project, s, t in pairs]
        return {"srd": self.weight * torch.stack(losses).sum()}
