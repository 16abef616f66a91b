"""Channel-wise distillation of detectors, of the loss in `mdistiller.methods.cwd`."""

import torch
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Losses
from mdistiller.methods.cwd import cwd_loss
from mdistiller.methods.features import FeatureConfig, Weight
from mdistiller.tasks.detection.level_method import LevelMethod, match_channels
from mdistiller.types import Batch, DataInfo, Outputs


class CWDConfig(FeatureConfig):
    """Hyper-parameters of CWD for detectors; the defaults are those of mmrazor."""

    own_name = "cwd"

    weight: Weight = 50.0
    """Weight of the mean over the levels; mmrazor has 10 for the sum over five levels."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the distributions over positions."""


class CWD(LevelMethod):
    """Matches, channel by channel, the distribution of each level over its positions."""

    Config = CWDConfig
    config: CWDConfig
    name = "cwd"
    card = Card(
        "Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    )

    def __init__(self, config: CWDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        self.adapters = match_channels(self.student_shapes, self.teacher_shapes)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        temperature = self.config.temperature
        levels = zip(self.adapters, *self.read(student, teacher), strict=True)
        losses = torch.stack([cwd_loss(adapt(s), t, temperature=temperature) for adapt, s, t in levels])
        return {"cwd": self.weight * losses.mean()}
