"""Probabilistic Knowledge Transfer (Passalis, Tefas: ECCV 2018, arXiv 1803.10837)."""

import torch
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, Scalar, exact, unit
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Vectors, Weight, float_pairs, sum_pairs
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs

_EPS = 1e-7


def float_embeddings(student_embedding: Tensor, teacher_embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Checks two embeddings and returns them in at least float32.

    Raises:
        ConfigError: embeddings that are not [B, D], or of different batch sizes.
    """
    if student_embedding.ndim != 2 or teacher_embedding.ndim != 2:
        raise ConfigError(
            f"student and teacher embeddings must be [B, D]; "
            f"got {list(student_embedding.shape)} and {list(teacher_embedding.shape)}"
        )
    return float_pairs([student_embedding], [teacher_embedding])[0]


def _affinities(x: Tensor) -> Tensor:
    """Returns the probabilities of choosing sample j as a neighbor of i, [B, B], one row per i."""
    x = unit(x, eps=_EPS**2)
    kernel = (x @ x.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(student_embedding: Vectors, teacher_embedding: Vectors) -> Scalar:
    r"""Computes the divergence between the neighborhoods in the student's and the teacher's embedding.

    $$\frac{1}{B^2} \sum_{i,j} p^T_{j|i} \log \frac{p^T_{j|i}}{p^S_{j|i}}, \quad
    p_{j|i} = \frac{K(x_i, x_j)}{\sum_k K(x_i, x_k)}, \quad K(a, b) = \tfrac12 (\cos(a, b) + 1)$$

    in nats, with 1e-7 added to both probabilities in the logarithm. The loss relates the samples of a batch:
    with several processes, gather the embeddings first. Errors: as `float_embeddings`.

    Source: Passalis, Tefas, ECCV 2018, the cosine kernel and the divergence of section 3. As in the authors'
    code, a sample is one of its own neighbors.
    """
    student, teacher = float_embeddings(student_embedding, teacher_embedding)
    with exact(student):
        p, q = _affinities(teacher), _affinities(student)
    return (p * torch.log((p + _EPS) / (q + _EPS))).mean()


class PKTConfig(FeatureConfig):
    """Hyperparameters of PKT; the default is the usual one for CIFAR-100."""

    weight: Weight = 30000.0
    """Weight of the PKT loss, which is small because it is a mean over pairs of samples."""


@register_method("pkt")
class PKT(FeatureMethod[PKTConfig]):
    """Matches the neighborhood of each sample in the teacher's embedding."""

    Config = PKTConfig
    sequences = True
    card = Card(
        "Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018",
        "Embeddings for search, without extra layers; widths may differ",
        example=Example(("pooled",), ("pooled",)),
    )
    taps_by_default = "pooled"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        return {"pkt": self.weight * sum_pairs(pkt_loss, *self.gathered(student, teacher))}
