r"""Scale Decoupled Distillation (SDD; Wei, Luo, Luo: CVPR 2024, arXiv 2403.13512).

A logit of the whole image mixes what different places say. The last feature map, averaged over the cells of
grids of several scales, gives through the model's own classifier the logits of regions, which a logit
distillation loss compares one by one. A region is complementary where the teacher is right about it and wrong
about the whole image, or the other way round; it counts more than the others, the consistent ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import LogitMethod, Method, exact, promote, ramp
from mdistiller.methods.compose import Wrapper, WrapperConfig
from mdistiller.methods.features import classifier, last_map
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def region_logits(feature: Tensor, head: nn.Linear, scales: tuple[int, ...]) -> Tensor:
    """Logits [B, N, C] of the N = Σ s² cells of s × s grids over a map [B, D, H, W]."""
    with exact(feature):
        feature = promote(feature)
        cells = [F.adaptive_avg_pool2d(feature, scale).flatten(2) for scale in scales]
        regions = torch.cat(cells, 2).transpose(1, 2)
        logits: Tensor = head(regions.to(head.weight.dtype))
    return promote(logits)


def region_weights(
    region_logits: Tensor, global_logits: Tensor, label: Tensor, complementary_weight: float
) -> Tensor:
    """Weights [B, N] of the teacher's regions: 1, or more where right and wrong differ from the whole image.

    Args:
        region_logits: [B, N, C], the teacher's.
        global_logits: [B, C], the teacher's.
        label: int64 [B], or float [B, C] soft labels, for which the weight is an expectation.
        complementary_weight: the weight where one of both predictions is the label and the other is not.
    """
    local, whole = region_logits.argmax(2), global_logits.argmax(1, keepdim=True)

    def right(prediction: Tensor) -> Tensor:
        if label.is_floating_point():
            return promote(label).gather(1, prediction)
        return (prediction == label[:, None]).to(region_logits.dtype)

    # Different predictions are not both right, so this is the chance that one of them is.
    complementary = (right(local) + right(whole)).masked_fill(local == whole, 0.0)
    return 1 + (complementary_weight - 1) * complementary


class SDDConfig(WrapperConfig):
    """Hyper-parameters of SDD."""

    scales: tuple[PositiveInt, ...] = Field(default=(1, 2, 4), min_length=1)
    """Grids over the last feature map: s stands for s × s regions."""
    complementary_weight: float = Field(default=2.0, ge=0)
    """Weight of complementary regions; consistent ones have 1."""


@register_method("sdd")
class SDD(Wrapper):
    """The base method on the logits of image regions.

    Both models must have a feature map whose mean feeds their classifier. With `scales` (1,) the only region
    is the whole image, and this is the base itself.
    """

    Config = SDDConfig
    config: SDDConfig
    base: LogitMethod
    # It needs feature maps: a wrapper that changes the model's logits would not reach the regions'.
    kind = "feature"
    paper = "Wei, Luo, Luo: Scale Decoupled Distillation, CVPR 2024"
    year = 2024

    def __init__(
        self, config: SDDConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        assert teacher is not None
        for model in (student, teacher):
            last_map(model, data)
        # In tuples they are no submodules: the student's trains with the student, the teacher's not at all.
        self._student_head = (classifier(student),)
        self._teacher_head = (classifier(teacher),)
        self.student_taps = ("map", *self.base.student_taps)
        self.teacher_taps = ("map", *self.base.teacher_taps)

    @classmethod
    def base_defaults(cls, base: type[Method]) -> dict[str, Any]:
        """The authors give NKD the settings of DKD."""
        return {"gamma": 8.0, "temperature": 4.0} if base.name == "nkd" else {}

    @classmethod
    def check_base(cls, base: type[Method]) -> None:
        """A base is a `LogitMethod`, whose loss is a mean over samples."""
        if not issubclass(base, LogitMethod):
            raise ConfigError(
                f"method {cls.name!r} wraps methods whose loss is a mean over samples of their logits, such "
                f"as 'kd' and 'dkd'; {base.name!r} is none"
            )

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """The task's loss of the student's own logits, and the base's of all regions."""
        c = self.config
        s = region_logits(student.features["map"], self._student_head[0], c.scales)
        with torch.no_grad():
            t = region_logits(teacher.features["map"], self._teacher_head[0], c.scales)
            weights = region_weights(t, teacher.logits, batch.label, c.complementary_weight).flatten()
        label = batch.label.repeat_interleave(s.shape[1], dim=0)
        losses = self.base.sample_losses(s.flatten(0, 1), t.flatten(0, 1), label)
        weight = ramp(progress, self.base.warmup)
        means = {name: weight * (weights * value).mean() for name, value in losses.items()}
        return {"task": self.task_loss(student, batch), **means}
