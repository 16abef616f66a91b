"""A method in one file: match the direction of the centered logits.

    mdistiller train digits.my_cosine.resnet20_resnet8 --plugin examples/my_method.py \
        --teacher.checkpoint RUN --method.weight 2

`forward` returns distillation losses by name, already weighted; the task loss is added to them. `progress`
runs from 0 to 1 over training.
"""

import torch.nn.functional as F
from pydantic import Field

from mdistiller import Method, MethodConfig, register_method
from mdistiller.methods import Card


class MyCosineConfig(MethodConfig):
    """Hyperparameters; each becomes a flag, such as `--method.weight`."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the cosine loss."""


@register_method("my_cosine")
class MyCosine(Method):
    """Computes one minus the cosine between the student's and the teacher's centered logits."""

    Config = MyCosineConfig
    card = Card("an example", year=2026)

    def forward(self, student, teacher, batch, progress):
        """Returns `{"cosine": …}`."""
        s = student.logits - student.logits.mean(1, keepdim=True)
        t = teacher.logits - teacher.logits.mean(1, keepdim=True)
        loss = (1 - F.cosine_similarity(s.float(), t.float())).mean()
        return {"cosine": self.config.weight * loss}
