"""No distillation: the student alone, the baseline of every table."""

from torch import Tensor

from mdistiller.methods.base import Card, Losses, Method, MethodConfig, Needs
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs


class NoneConfig(MethodConfig):
    """Settings of a run without distillation."""


@register_method("none")
class NoDistillation(Method):
    """Trains with the task loss only."""

    Config = NoneConfig
    card = Card(
        "none: training on the labels alone",
        "The baseline: train the student alone first and measure every gain against it",
    )
    needs = Needs(teacher=False, one_class=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        return {}
