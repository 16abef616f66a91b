"""Channel-wise distillation of detectors, of the loss in `mdistiller.methods.cwd`."""

import torch
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, Losses
from mdistiller.methods.cwd import cwd_loss
from mdistiller.methods.features import FeatureConfig, Weight
from mdistiller.tasks.detection.levels import LevelMethod
from mdistiller.types import Batch, Outputs


class CWDConfig(FeatureConfig):
    """Hyperparameters of CWD for detectors; the defaults are those of mmrazor."""

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

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        temperature = self.config.temperature
        pairs = self.adapted(student, teacher)
        losses = torch.stack([cwd_loss(s, t, temperature=temperature) for s, t in pairs])
        return {"cwd": self.weight * losses.mean()}
