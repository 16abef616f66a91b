"""Variational Information Distillation (Ahn, Hu, Damianou, Lawrence, Dai: CVPR 2019, arXiv 1904.05835)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import STAGES, Card, Example, Losses, Scalar, promote
from mdistiller.methods.features import FeatureConfig, FeatureMethod, pool_to_smaller, vector_as_map
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def vid_loss(
    predicted_mean: Float[Tensor, "b c h w"],
    predicted_variance: Float[Tensor, " c"],
    teacher_feature: Float[Tensor, "b c h w"],
) -> Scalar:
    r"""Computes the negative log-likelihood of a teacher's feature under a Gaussian predicted by the student.

    $$\frac{1}{BCHW} \sum_{b,c,h,w} \frac12 \Big(\log \sigma_c^2 +
    \frac{(t_{bchw} - \mu_{bchw})^2}{\sigma_c^2}\Big)$$

    in nats per value, without the constant ½ log 2π; it can be negative. μ is a function of the student's
    feature, σ² is positive.

    Raises:
        ConfigError: features of different shapes or not [B, C, H, W], or a variance that is not [C].

    Source: Ahn et al., CVPR 2019, equation 6.
    """
    shape = predicted_mean.shape
    if teacher_feature.shape != shape or len(shape) != 4 or predicted_variance.shape != shape[1:2]:
        raise ConfigError(
            "predicted mean and teacher feature must have one shape [B, C, H, W], the variance [C]; "
            f"got {list(shape)}, {list(teacher_feature.shape)} and {list(predicted_variance.shape)}"
        )
    variance = promote(predicted_variance)[:, None, None]
    error = promote(teacher_feature) - promote(predicted_mean)
    return 0.5 * (variance.log() + error.square() / variance).mean()


class VIDConfig(FeatureConfig):
    """Hyperparameters of VID; the defaults are the usual ones for CIFAR-100."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the VID loss, a sum over the taps."""
    initial_variance: float = Field(default=5.0, gt=0)
    """Predicted variance at the start of training."""
    eps: float = Field(default=1e-5, gt=0)
    """Least variance."""


@register_method("vid")
class VID(FeatureMethod[VIDConfig]):
    """Predicts the teacher's features from the student's, with a learned variance per channel."""

    Config = VIDConfig
    sequences = True
    card = Card(
        "Ahn et al.: Variational Information Distillation for Knowledge Transfer, CVPR 2019",
        "Down-weights channels that the student cannot match, by a learned variance",
        example=Example(STAGES, STAGES, 258_496),
    )

    def __init__(self, config: VIDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        if config.initial_variance <= config.eps:
            raise ConfigError(
                f"method.initial_variance must be above method.eps ({config.eps}); "
                f"got {config.initial_variance}"
            )
        channels = [(s[1], t[1]) for s, t in zip(self.student_shapes, self.teacher_shapes, strict=True)]
        self.regressors = nn.ModuleList(_regressor(s, t) for s, t in channels)
        # Inverse of softplus without overflow.
        start = config.initial_variance - config.eps
        start += math.log(-math.expm1(-start))
        self.scales = nn.ParameterList(torch.full((t,), start) for _, t in channels)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses = []
        features = zip(self.regressors, self.scales, *self.read(student, teacher, batch.image), strict=True)
        for regressor, scale, s, t in features:
            s, t = pool_to_smaller(vector_as_map(s), vector_as_map(t))
            losses.append(vid_loss(regressor(s), F.softplus(scale) + self.config.eps, t))
        return {"vid": self.config.weight * torch.stack(losses).sum()}


def _regressor(student: int, teacher: int) -> nn.Sequential:
    """Builds 1x1 convolutions from a student's map to the mean of a teacher's."""
    layers = [nn.Conv2d(channels, teacher, 1, bias=False) for channels in (student, teacher, teacher)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
