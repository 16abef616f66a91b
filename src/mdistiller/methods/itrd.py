"""ITRD (Miles, Lopez-Rodriguez, Mikolajczyk: BMVC 2022, arXiv 2112.00459).

Both losses of information theoretic representation distillation follow from Rényi's entropy of matrices.
"""

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, Scalar, exact, promote, unit
from mdistiller.methods.features import FeatureConfig, FeatureMethod
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs

# Added under the root: too small to change a value, large enough for a finite gradient of equal inputs.
_VARIANCE_EPS = 1e-8


def _embeddings(student: Tensor, teacher: Tensor, *, same_width: bool) -> tuple[Tensor, Tensor]:
    got = f"got {list(student.shape)} and {list(teacher.shape)}"
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 2:
        raise ConfigError(f"student and teacher embeddings must be [B, D] with one B ≥ 2; {got}")
    if same_width and student.shape != teacher.shape:
        raise ConfigError(f"student and teacher embeddings must have one D; {got}")
    return promote(student), promote(teacher)


def itrd_correlation_loss(
    student_embedding: Float[Tensor, "b d"], teacher_embedding: Float[Tensor, "b d"], *, alpha: float = 1.01
) -> Scalar:
    r"""Computes the logarithm of the distances of the correlations of matching dimensions from 1.

    $$\log_2 \sum_d |c_d - 1|^{2\alpha}, \quad c_d = \frac1B \sum_b
    \frac{s_{bd} - \bar s_d}{\sigma(s_d)} \cdot \frac{t_{bd} - \bar t_d}{\sigma(t_d)}$$

    in bits, negative if the sum is below 1. σ is the sample deviation (over B − 1), so c ≤ 1 − 1/B and the
    logarithm is finite. α > 0 is the order of Rényi's entropy.

    Raises:
        ConfigError: shapes that differ or are not [B, D] with B ≥ 2; an alpha that is not positive.

    Source: Miles et al., BMVC 2022, the correlation loss. Equals the authors' code, except that a
    constant dimension counts as uncorrelated where that code gives NaN.
    """
    if not alpha > 0:
        raise ConfigError(f"alpha must be positive; got {alpha}")
    student, teacher = _embeddings(student_embedding, teacher_embedding, same_width=True)

    def standardize(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + _VARIANCE_EPS).sqrt()

    correlation = (standardize(student) * standardize(teacher)).mean(0)
    return (correlation - 1).abs().pow(2 * alpha).sum().log2()


def itrd_mutual_information_loss(
    student_embedding: Float[Tensor, "b ds"], teacher_embedding: Float[Tensor, "b dt"]
) -> Scalar:
    r"""Computes the student's similarities among samples that the teacher does not share.

    $$\| G^S \|_F^2 - \| G^{ST} \|_F^2, \quad G^S_{ij} = \tfrac1B \cos(s_i, s_j), \quad
    G^{ST}_{ij} = \tfrac1B \cos(s_i, s_j) \cos(t_i, t_j)$$

    It is a mean over all pairs of samples and at least 0.

    Raises:
        ConfigError: not two [B, D] with the same B ≥ 2.

    Source: Miles et al., BMVC 2022, the mutual information loss: the second-order entropies of
    the student's and the joint Gram matrix, compared without their logarithms, as in the authors' code.
    """
    student, teacher = _embeddings(student_embedding, teacher_embedding, same_width=False)

    def cosines(x: Tensor) -> Tensor:
        x = unit(x)
        return x @ x.T

    with exact(student):
        return (cosines(student).square() * (1 - cosines(teacher).square())).mean()


class ITRDConfig(FeatureConfig):
    """Hyperparameters of ITRD; the defaults are the authors' for CIFAR-100."""

    correlation_weight: float = Field(default=2.0, ge=0)
    """Weight of the correlation loss."""
    mutual_information_weight: float = Field(default=1.0, ge=0)
    """Weight of the mutual information loss."""
    alpha: float = Field(default=1.01, gt=0)
    """Order of Rényi's entropy in the correlation loss."""


@register_method("itrd")
class ITRD(FeatureMethod[ITRDConfig]):
    """Correlates the embeddings per dimension, and matches the similarities among samples."""

    Config = ITRDConfig
    sequences = True
    card = Card(
        "Miles, Lopez-Rodriguez, Mikolajczyk: Information Theoretic Representation Distillation, BMVC 2022",
        "Like CRD without a memory bank: correlations and similarities of embeddings",
        example=Example(("pooled",), ("pooled",), 65_792),
    )
    taps_by_default = "pooled"

    def __init__(self, config: ITRDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        if len(self.student_taps) != 1:
            raise ConfigError(f"method 'itrd' reads one feature of each; got {list(self.student_taps)}")
        student_dim, teacher_dim = self.student_shapes[0][1], self.teacher_shapes[0][1]
        self.same_width = student_dim == teacher_dim
        self.embed = nn.Linear(student_dim, teacher_dim)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        (s,), (t,) = self.gathered(student, teacher)
        embedded = self.embed(s)
        correlation = itrd_correlation_loss(embedded, t, alpha=c.alpha)
        # Cosines need no common width; as in the authors' code, equal widths are compared without the layer.
        information = itrd_mutual_information_loss(s if self.same_width else embedded, t)
        return {
            "itrd_correlation": c.correlation_weight * correlation,
            "itrd_mutual_information": c.mutual_information_weight * information,
        }
