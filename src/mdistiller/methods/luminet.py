"""LumiNet (Hossain, Elahi, Ramasinghe, Cheraghian, Rahman, Mohammed, Rahman: 2023, arXiv 2310.03669).

The logits of each class are standardized over the batch before the softmax. The result, the "perception",
depends on how a sample relates to the others, and has no overconfident class.
"""

from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import (
    Card,
    Logits,
    Losses,
    Method,
    MethodConfig,
    Scalar,
    promote,
    ramp,
    standardize,
)
from mdistiller.methods.gather import gather
from mdistiller.methods.kd import check_logits, kd_samples
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs

_EPS = 1e-5


def luminet_loss(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 4.0) -> Scalar:
    r"""Computes the KL divergence of the student's from the teacher's softened perceptions.

    $$\frac1B \sum_b \mathrm{KL}\big(\sigma(h^T_b / T) \,\|\, \sigma(h^S_b / T)\big), \quad
    h_{bc} = \frac{z_{bc} - \mu_c}{\sqrt{\sigma_c^2 + 10^{-5}}}$$

    with mean and variance (divisor B) of each class over the batch, without a factor T². Zero for one sample.
    Logits are [B, C], because a sample's loss depends on the others of the batch.

    Raises:
        ConfigError: as `kd_loss`.

    Source: Hossain et al. 2023, section 3; equals the authors' code.
    """
    check_logits(student_logits, teacher_logits)
    student, teacher = (standardize(promote(x), _EPS) for x in (student_logits, teacher_logits))
    losses = kd_samples(student, teacher, temperature)
    return losses.mean() / temperature**2


class LumiNetConfig(MethodConfig):
    """Hyperparameters of LumiNet; the defaults are the authors' for resnet32x4 → resnet8x4."""

    task_weight: float = Field(default=2.0, ge=0)
    """Weight of the task loss."""
    alpha: float = Field(default=33.0, ge=0)
    """Square root of the weight of the loss."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of both perceptions."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which the loss grows from zero to its full weight."""


@register_method("luminet")
class LumiNet(Method[LumiNetConfig]):
    """Applies KD to logits that are standardized over the batch, class by class."""

    Config = LumiNetConfig
    card = Card(
        "Hossain, Elahi, Ramasinghe, Cheraghian, Rahman, Mohammed, Rahman: LumiNet: Perception-Driven "
        "Knowledge Distillation via Statistical Logit Calibration, 2023",
        "Large batches: standardizes each class's logits over the batch",
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        loss = luminet_loss(gather(student.logits), gather(teacher.logits), temperature=c.temperature)
        return {"luminet": ramp(progress, self.config.warmup) * c.alpha**2 * loss}
