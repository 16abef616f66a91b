"""Channel-wise distillation of segmentation models, of the loss in `mdistiller.methods.cwd`."""

from typing import cast

from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Losses
from mdistiller.methods.cwd import cwd_loss
from mdistiller.methods.features import FeatureConfig, sum_pairs
from mdistiller.tasks.segmentation.pixels import TAP, MapMethod
from mdistiller.types import Batch, DataInfo, Outputs


class CWDConfig(FeatureConfig):
    """Hyperparameters of CWD; the defaults are the paper's for logits."""

    own_name = "cwd"

    weight: float = Field(default=3.0, ge=0)
    """Weight of the loss; 3 for logits and 50 for features in the paper."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of the distributions over positions."""


class CWD(MapMethod):
    """Matches, channel by channel, the distribution of a map over positions; by default of the logits.

    Maps of other channels go through a 1x1 convolution.
    """

    Config = CWDConfig
    config: CWDConfig
    name = "cwd"
    card = Card(
        "Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    )
    tap = TAP

    def __init__(self, config: CWDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        pairs = zip(self.student_shapes, self.teacher_shapes, strict=True)
        self.adapters = nn.ModuleList(
            nn.Identity() if s[1] == t[1] else nn.Conv2d(s[1], t[1], 1, bias=False) for s, t in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features, targets = self.read(student, teacher, batch.image)
        adapted = [cast(Tensor, adapt(x)) for adapt, x in zip(self.adapters, features, strict=True)]
        temperature = self.config.temperature
        loss = sum_pairs(lambda s, t: cwd_loss(s, t, temperature=temperature), adapted, targets)
        return {"cwd": self.weight * loss}
