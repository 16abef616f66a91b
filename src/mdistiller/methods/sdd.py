r"""Scale Decoupled Distillation (SDD; Wei, Luo, Luo: CVPR 2024, arXiv 2403.13512).

The model's own classifier turns the last feature map, averaged over the cells of grids of several scales,
into logits of image regions, which a logit distillation loss compares one by one. A region is complementary
if the teacher is right about it and wrong about the whole image, or the other way round, and consistent
otherwise. Complementary regions have a larger weight.
"""

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, LogitMethod, Losses, Method, Needs, exact, promote, ramp
from mdistiller.methods.compose import Wrapper, WrapperConfig
from mdistiller.methods.features import classifier, last_map
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def region_logits(feature: Tensor, head: nn.Linear, scales: tuple[int, ...]) -> Tensor:
    """Computes logits [B, N, C] of the N = Σ s² cells of s × s grids over a map [B, D, H, W]."""
    with exact(feature):
        feature = promote(feature)
        cells = [F.adaptive_avg_pool2d(feature, scale).flatten(2) for scale in scales]
        regions = torch.cat(cells, 2).transpose(1, 2)
        logits: Tensor = head(regions.to(head.weight.dtype))
    return promote(logits)


def region_weights(
    region_logits: Tensor, global_logits: Tensor, label: Tensor, complementary_weight: float
) -> Tensor:
    """Computes the weights [B, N] of regions from the teacher's logits [B, N, C] and [B, C].

    The label is int64 [B], or float [B, C] soft labels, for which the weight is an expectation.
    """
    local, whole = region_logits.argmax(2), global_logits.argmax(1, keepdim=True)

    def right(prediction: Tensor) -> Tensor:
        if label.is_floating_point():
            return promote(label).gather(1, prediction)
        return (prediction == label[:, None]).to(region_logits.dtype)

    # Different predictions are not both right, so this is the probability that one of them is.
    complementary = (right(local) + right(whole)).masked_fill(local == whole, 0.0)
    return 1 + (complementary_weight - 1) * complementary


class SDDConfig(WrapperConfig):
    """Hyperparameters of SDD."""

    scales: tuple[PositiveInt, ...] = Field(default=(1, 2, 4), min_length=1)
    """Grids over the last feature map, s × s regions each."""
    complementary_weight: float = Field(default=2.0, ge=0)
    """Weight of complementary regions; consistent regions have 1."""


@register_method("sdd")
class SDD(Wrapper[SDDConfig]):
    """Applies the base method to the logits of image regions.

    Both models need a feature map whose mean feeds their classifier. With `scales` (1,) the only region is
    the whole image, so the losses are those of the base.
    """

    Config = SDDConfig
    base: LogitMethod
    card = Card(
        "Wei, Luo, Luo: Scale Decoupled Distillation, CVPR 2024",
        "Images show several objects: distills parts of each image; wraps any logit method",
        example=Example(("last_map",), ("last_map",)),
    )
    needs = Needs(labels=True, classifier=True)
    student_taps = teacher_taps = ("last_map",)

    def __init__(
        self, config: SDDConfig, base: Method, student: nn.Module, teacher: nn.Module, data: DataInfo
    ) -> None:
        super().__init__(config, base, student, teacher, data)
        for model in (student, teacher):
            last_map(model, data)
        # In tuples they are no submodules of the method.
        self._student_head = (classifier(student),)
        self._teacher_head = (classifier(teacher),)

    @classmethod
    def base_defaults(cls, base: str) -> dict[str, object]:
        """Returns the settings of DKD for NKD, as in the authors' code."""
        return {"gamma": 8.0, "temperature": 4.0} if base == "nkd" else {}

    @classmethod
    def check_base(cls, base: type[Method]) -> None:
        if not issubclass(base, LogitMethod):
            raise ConfigError(
                f"method {cls.name!r} wraps methods whose loss is a mean over samples of their logits, such "
                f"as 'kd' and 'dkd'; {base.name!r} is none"
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        s = region_logits(student.features["last_map"], self._student_head[0], c.scales)
        with torch.no_grad():
            t = region_logits(teacher.features["last_map"], self._teacher_head[0], c.scales)
            weights = region_weights(t, teacher.logits, batch.label, c.complementary_weight).flatten()
        label = batch.label.repeat_interleave(s.shape[1], dim=0)
        losses = self.base.sample_losses(s.flatten(0, 1), t.flatten(0, 1), label)
        weight = ramp(progress, self.base.warmup)
        return {name: weight * (weights * value).mean() for name, value in losses.items()}
