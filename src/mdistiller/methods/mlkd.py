"""Multi-Level Logit Distillation (Jin, Wang, Lin: CVPR 2023)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Logits, Losses, Scalar, exact, promote
from mdistiller.methods.gather import gather
from mdistiller.methods.kd import kd_samples, soften
from mdistiller.methods.registry import register_method
from mdistiller.methods.views import PreparedMethod, ViewsConfig, split_views, unchanged
from mdistiller.types import DataInfo


def _instance(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Computes the mean KD loss, summed over temperatures."""
    terms = [kd_samples(student, teacher, t).mean() for t in temperatures]
    return sum(terms, start=student.new_zeros(()))


def _correlations(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Computes the batch and the class level, summed over temperatures."""
    batch = classes = promote(student).new_zeros(())
    with exact(student):
        for temperature in temperatures:
            p, q = (x.softmax(1) for x in soften(student, teacher, temperature))
            batch = batch + (q @ q.T - p @ p.T).square().sum() / p.shape[0]
            classes = classes + (q.T @ q - p.T @ p).square().sum() / p.shape[1]
    return batch, classes


def mlkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
) -> Scalar:
    r"""Computes the sum of the instance, the batch and the class level over all temperatures.

    $$\sum_T \Big[ \frac{T^2}{B} \sum_b \mathrm{KL}(p^T_b \| p^S_b)
    + \frac1B \| G^T - G^S \|_F^2 + \frac1C \| M^T - M^S \|_F^2 \Big], \quad G = P P^\top, M = P^\top P$$

    Two levels compare the samples of a batch, so logits are [B, C]. Errors: as `kd_loss`; no temperature.

    Source: Jin et al., CVPR 2023, section 3; T², at the instance level only, as in the authors' code.
    """
    if not temperatures:
        raise ConfigError("temperatures must be at least one positive number; got none")
    instance = _instance(student_logits, teacher_logits, temperatures)
    batch, classes = _correlations(student_logits, teacher_logits, temperatures)
    return instance + batch + classes


def _lower_half(confidence: Tensor) -> Tensor:
    """Returns the share of entries that are not above the median."""
    return (confidence <= confidence.median()).to(confidence.dtype).mean()


class MLKDConfig(ViewsConfig):
    """Hyperparameters of MLKD; the defaults are the authors' for CIFAR-100."""

    task_weight: float = Field(default=0.2, ge=0)
    """Weight of the task loss, a mean over both views; the authors use 0.1 for each view."""
    weight: float = Field(default=0.9, ge=0)
    """Weight of all three levels."""
    num_views: Literal[1, 2] = 2
    """2: each image under ordinary and under strong augmentation. 1: only ordinary augmentation."""
    temperatures: tuple[PositiveFloat, ...] = Field(default=(4.0, 3.0, 5.0, 2.0, 6.0), min_length=1)
    """Temperatures of the three levels; with two views, of the weak views."""
    strong_temperatures: tuple[PositiveFloat, ...] = Field(default=(4.0, 3.0, 5.0))
    """Temperatures of the instance level of the strong views."""
    repeated_temperatures: tuple[PositiveFloat, ...] = Field(default=(2.0, 6.0))
    """Temperatures at which the instance level of the weak views is added at full weight, with two views."""


@register_method("mlkd")
class MLKD(PreparedMethod[MLKDConfig]):
    """Matches predictions and the correlations of samples and of classes at several temperatures."""

    Config = MLKDConfig
    card = Card(
        "Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023",
        "You can afford two views per image; compares instances, batches and classes",
        example=Example(),
    )

    def __init__(self, config: MLKDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        self.needs = replace(self.needs, views=config.num_views)

    def distillation(
        self, student_logits: Tensor, teacher_logits: Tensor, prepare: Callable[[Tensor], Tensor] = unchanged
    ) -> Losses:
        """Returns `{"instance": …, "batch": …, "class": …}` of logits [B, C], or [2B, C] with two views.

        `prepare` applies only to the instance level.
        """
        c = self.config
        if c.num_views == 1:
            s, t = gather(student_logits), gather(teacher_logits)
            instance = _instance(prepare(s), prepare(t), c.temperatures)
            batch, classes = _correlations(s, t, c.temperatures)
        else:
            weak, strong = split_views(student_logits)
            teacher_weak, teacher_strong = split_views(teacher_logits)
            s, t = gather(weak), gather(teacher_weak)
            # The authors' masks of the less confident half multiply means, so only its share counts.
            p = promote(t).softmax(1)
            samples, columns = _lower_half(p.amax(1)), _lower_half(p.sum(0))
            batch, classes = _correlations(s, t, c.temperatures)
            batch, classes = samples * batch, columns * classes
            s, t = prepare(s), prepare(t)
            instance = samples * _instance(s, t, c.temperatures) + _instance(s, t, c.repeated_temperatures)
            instance = instance + _instance(prepare(strong), prepare(teacher_strong), c.strong_temperatures)
        return {"instance": c.weight * instance, "batch": c.weight * batch, "class": c.weight * classes}
