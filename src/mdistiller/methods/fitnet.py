r"""FitNets (Romero, Ballas, Kahou, Chassang, Gatta, Bengio: ICLR 2015, arXiv 1412.6550).

A regressor $r$ lifts the student's guided layer to the teacher's hint layer:
$L = \frac{1}{|F^T|} \| r(F^S) - F^T \|_2^2$.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import promote
from mdistiller.methods.features import FeatureConfig, FeatureMethod, stages
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def regressor(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], relu: bool) -> nn.Sequential:
    """Layers that turn a student's map into one of the teacher's shape, each [B, C, H, W].

    The convolution changes the size: by stride where it halves or doubles, else by a kernel just large
    enough (the paper's way; 1x1 for equal sizes). A smaller map that isn't half the size is resized first.

    Raises:
        ConfigError: a shape that is no map's.
    """
    if len(student_shape) != 4 or len(teacher_shape) != 4:
        raise ConfigError(
            "fitnet needs feature maps [B, C, H, W] (or tokens) on both sides; "
            f"got {list(student_shape)} and {list(teacher_shape)}"
        )
    (_, c_s, h_s, w_s), (_, c_t, h_t, w_t) = student_shape, teacher_shape
    resize: list[nn.Module] = []
    convolution: nn.Module
    if (h_s, w_s) == (2 * h_t, 2 * w_t):
        convolution = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    elif (2 * h_s, 2 * w_s) == (h_t, w_t):
        convolution = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    elif h_s >= h_t and w_s >= w_t:
        convolution = nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t))
    else:
        resize = [nn.Upsample((h_t, w_t), mode="bilinear")]
        convolution = nn.Conv2d(c_s, c_t, 1)
    return nn.Sequential(*resize, convolution, nn.BatchNorm2d(c_t), *([nn.ReLU()] if relu else []))


class FitNetConfig(FeatureConfig):
    """Hyper-parameters of FitNet; the defaults are the field's for CIFAR-100."""

    weight: float = Field(default=100.0, ge=0)
    """Weight of the hint loss."""
    relu: bool = True
    """End the regressor with a ReLU, as hints behind a ReLU want; off for hints with negative values."""


@register_method("fitnet")
class FitNet(FeatureMethod):
    """Regress the teacher's hint layer from a layer of the student."""

    Config = FitNetConfig
    config: FitNetConfig
    paper = "Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015"
    year = 2015

    def __init__(
        self, config: FitNetConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        self.regressors = nn.ModuleList(
            regressor(s, t, config.relu)
            for s, t in zip(self.student_shapes, self.teacher_shapes, strict=True)
        )

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The second stages; of a model with many (a transformer's blocks) the one as deep in proportion."""
        both = stages(student), stages(teacher)
        count = min(map(len, both))
        first, second = ((names[min(2, count) * len(names) // count - 1],) for names in both)
        return first, second

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """`{"task": …, "fitnet": …}`; the latter a sum over the pairs, each a mean over all elements."""
        hints = zip(self.regressors, *self.read(student, teacher), strict=True)
        loss = torch.stack([F.mse_loss(promote(regress(s)), promote(t)) for regress, s, t in hints]).sum()
        return {"task": self.task_loss(student, batch), "fitnet": self.config.weight * loss}
