r"""Channel-wise distillation (Shu, Liu, Gao, Yan, Shen: ICCV 2021, arXiv 2011.13256).

Each channel's map is a distribution over positions, $\phi(y_c) = \sigma(y_c / T)$, and the student's follows
the teacher's: $L = \frac{T^2}{C} \sum_c \sum_i \phi(y^T_c)_i \log \frac{\phi(y^T_c)_i}{\phi(y^S_c)_i}$.
"""

from typing import cast

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Losses, Scalar, promote
from mdistiller.methods.features import FeatureConfig, FeatureMethod, TapPair, sum_pairs
from mdistiller.methods.kd import divergence
from mdistiller.tasks.segmentation.pixels import TAP, resized
from mdistiller.types import Batch, DataInfo, Outputs


def cwd_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], *, temperature: float = 4.0
) -> Scalar:
    r"""Computes the KL divergence of the channels' distributions over positions, times T².

    Args:
        student: map [B, C, H, W], features or logits.
        teacher: map of the same shape.
        temperature: T > 0.

    Returns:
        A scalar in nats, the mean over images and channels.

    Raises:
        ConfigError: maps of different shapes or not [B, C, H, W]; a temperature that is not positive.

    Source: Shu et al., ICCV 2021, equations 3 and 4.
    """
    if student.shape != teacher.shape or student.ndim != 4:
        raise ConfigError(
            f"student and teacher maps must have one shape [B, C, H, W]; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive; got {temperature}")
    s, t = ((promote(x).flatten(2) / temperature).log_softmax(2) for x in (student, teacher))
    return divergence(t, s).sum(2).mean() * temperature**2


class CWDConfig(FeatureConfig):
    """Hyper-parameters of CWD; the defaults are the paper's for logits."""

    method_name = "cwd"

    weight: float = Field(default=3.0, ge=0)
    """Weight of the loss; 3 for logits and 50 for features in the paper."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of the distributions over positions."""


class CWD(FeatureMethod):
    """Matches, channel by channel, the distribution of a map over positions; by default of the logits.

    Maps of other channels go through a 1x1 convolution.
    """

    config: CWDConfig
    name = "cwd"
    paper = "Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    year = 2021

    def __init__(self, config: CWDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        pairs = zip(self.student_shapes, self.teacher_shapes, strict=True)
        self.adapters = nn.ModuleList(
            nn.Identity() if s[1] == t[1] else nn.Conv2d(s[1], t[1], 1, bias=False) for s, t in pairs
        )

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        return (TAP,), (TAP,)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features, targets = self.read(student, teacher)
        adapted = [cast(Tensor, adapt(x)) for adapt, x in zip(self.adapters, features, strict=True)]
        targets = [resized(promote(t), tuple(s.shape[2:])) for s, t in zip(adapted, targets, strict=True)]
        temperature = self.config.temperature
        loss = sum_pairs(lambda s, t: cwd_loss(s, t, temperature=temperature), adapted, targets)
        return {"cwd": self.weight * loss}
