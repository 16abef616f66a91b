"""Cross-View Consistency Regularization (CRLD; Zhang, Liu, Cai, Ma: ACM MM 2024, arXiv 2412.16493)."""

from collections.abc import Callable

from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, Logits, Losses, Needs, Scalar, promote
from mdistiller.methods.kd import kd_samples
from mdistiller.methods.registry import register_method
from mdistiller.methods.views import PreparedMethod, ViewsConfig, split_views, unchanged


def _crld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    weak_threshold: float,
    strong_threshold: float,
    prepare: Callable[[Tensor], Tensor] = unchanged,
) -> tuple[Tensor, Tensor]:
    """Computes the means over images of the within-view and the cross-view loss."""
    confidence = promote(teacher_logits).softmax(1).amax(1)
    confidence_weak, confidence_strong = split_views(confidence)
    student_weak, student_strong = split_views(prepare(student_logits))
    teacher_weak, teacher_strong = split_views(prepare(teacher_logits))

    def kd(student: Tensor, teacher: Tensor) -> Tensor:
        return kd_samples(student, teacher, temperature)

    within = kd(student_weak, teacher_weak) + kd(student_strong, teacher_strong)
    cross = kd(student_strong, teacher_weak) + kd(student_weak, teacher_strong)
    within = within.masked_fill(confidence_weak < weak_threshold, 0.0)
    cross = cross.masked_fill(confidence_strong < strong_threshold, 0.0)
    return within.mean(), cross.mean()


def crld_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    within_weight: float = 2.0,
    cross_weight: float = 0.5,
    temperature: float = 4.0,
    weak_threshold: float = 0.9,
    strong_threshold: float = 0.2,
) -> Scalar:
    r"""Computes within-view and cross-view KD of the images for which the teacher is confident.

    With $d(t, s) = T^2\,\mathrm{KL}(\sigma(t / T) \| \sigma(s / T))$, weak views $w$, strong views $s$, and
    the teacher's confidences $c = \max \sigma(t)$,

    $$\frac1B \sum_b \lambda_\mathrm{wv} [c_w \ge \tau_w] \big( d(t_w, s_w) + d(t_s, s_s) \big)
    + \lambda_\mathrm{cv} [c_s \ge \tau_s] \big( d(t_w, s_s) + d(t_s, s_w) \big)$$

    in nats. The weights are λ, the thresholds τ. Logits [2B, C] are of B weak views, and then of the strong
    views of the same images in the same order. Errors: as `kd_loss`; an odd number of rows.

    Source: Zhang et al., ACM MM 2024, section 3; the choice of confidence for each part follows the
    authors' code.
    """
    parts = _crld(student_logits, teacher_logits, temperature, weak_threshold, strong_threshold)
    return within_weight * parts[0] + cross_weight * parts[1]


class CRLDConfig(ViewsConfig):
    """Hyperparameters of CRLD; the defaults are the authors' for CIFAR-100."""

    task_weight: float = Field(default=2.0, ge=0)
    """Weight of the task loss, a mean over both views; the authors use 1 for each view."""
    within_weight: float = Field(default=2.0, ge=0)
    """Weight of the within-view loss."""
    cross_weight: float = Field(default=0.5, ge=0)
    """Weight of the cross-view loss."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of all probability distributions."""
    weak_threshold: float = Field(default=0.9, ge=0, le=1)
    """Least confidence of the teacher in the weak view for the within-view loss."""
    strong_threshold: float = Field(default=0.2, ge=0, le=1)
    """Least confidence of the teacher in the strong view for the cross-view loss."""


@register_method("crld")
class CRLD(PreparedMethod[CRLDConfig]):
    """Matches predictions within and across a weak and a strong view, where the teacher is confident."""

    Config = CRLDConfig
    card = Card(
        "Zhang et al.: Cross-View Consistency Regularization for Knowledge Distillation, ACM MM 2024",
        "You can afford two views per image; images the teacher is unsure of are skipped",
    )
    needs = Needs(views=2)

    def distillation(
        self, student_logits: Tensor, teacher_logits: Tensor, prepare: Callable[[Tensor], Tensor] = unchanged
    ) -> Losses:
        """Returns `{"within": …, "cross": …}` of logits [2B, C]; `prepare` changes no confidence."""
        c = self.config
        within, cross = _crld(
            student_logits, teacher_logits, c.temperature, c.weak_threshold, c.strong_threshold, prepare
        )
        return {"within": c.within_weight * within, "cross": c.cross_weight * cross}
