r"""KD++: regularized norm and direction (Wang, Cheng, Duan, Wang, Feng, Kong: 2023, arXiv 2305.17007).

The student's embedding, the input of its classifier, is drawn to the direction of the teacher's mean
embedding of the image's class, with a norm at least as large as the teacher's.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import (
    Card,
    Example,
    Labels,
    Losses,
    Method,
    Needs,
    Scalar,
    count_labeled,
    exact,
    promote,
    ramp,
    unit,
)
from mdistiller.methods.class_means import ClassMeans, class_shares
from mdistiller.methods.compose import Wrapper, WrapperConfig, get_method
from mdistiller.methods.features import probe_as
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def nd_loss(
    student_embedding: Float[Tensor, "b d"],
    teacher_embedding: Float[Tensor, "b d"],
    class_means: Float[Tensor, "c d"],
    target: Labels,
) -> Scalar:
    r"""Computes the distance of embeddings from the directions of their classes.

    $$\frac1B \sum_b \Big( 1 - \frac{h^S_b \cdot e_t}{\max(\| h^S_b \|, \| h^T_b \|)} \Big), \quad
    e_c = \frac{m_c}{\| m_c \|}$$

    with the class t of the image and the teacher's mean embedding $m_c$ of each class. The loss is between 0
    and 2, and falls with the projection on $e_t$ until the student's norm reaches the teacher's.

    Args:
        student_embedding: [B, D], D the teacher's width.
        teacher_embedding: [B, D], detached.
        class_means: [C, D], detached.
        target: int64 [B] class ids, -100 for images that the mean leaves out; or float [B, C] soft
            labels, for which the loss is an expectation.

    Raises:
        ConfigError: shapes that do not fit together.

    Source: Wang et al. 2023, the norm and direction loss; equals the authors' code.
    """
    s, t, m = (list(x.shape) for x in (student_embedding, teacher_embedding, class_means))
    wanted = [s[0], m[0]] if target.is_floating_point() else s[:1]
    if s != t or len(s) != 2 or len(m) != 2 or m[1] != s[1] or list(target.shape) != wanted:
        raise ConfigError(
            "student and teacher embeddings must have one shape [B, D], the class means [C, D], and the "
            f"target [B] or float [B, C]; got {s}, {t}, {m} and {target.dtype} {list(target.shape)}"
        )
    with exact(student_embedding):
        student, teacher = promote(student_embedding), promote(teacher_embedding)
        shares = class_shares(target, len(class_means), student.dtype)
        directions = shares @ unit(promote(class_means).to(student.dtype))
        norms = (torch.linalg.vector_norm(x, dim=1) for x in (student, teacher))
        norm = torch.maximum(*norms).clamp(min=1e-12)
        losses = shares.sum(1) - (student * directions).sum(1) / norm
    return losses.sum() / count_labeled(target).clamp(min=1)


class NDConfig(WrapperConfig):
    """Hyperparameters of KD++; the defaults are the authors' for resnet56 → resnet20 on CIFAR-100."""

    task_weight: float = Field(default=1.0, ge=0)
    """Weight of the task loss."""
    weight: float = Field(default=2.0, ge=0)
    """Weight of the norm and direction loss."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which the losses of the base grow from zero to their full weight."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the projection of an embedding to the teacher's width; the authors use 0.5."""


@register_method("nd")
class ND(Wrapper[NDConfig]):
    """Adds the norm and direction loss of embeddings to the losses of a logit method: KD++, DKD++, DIST++.

    The teacher's class means are those of all training images so far.
    """

    Config = NDConfig
    card = Card(
        "Wang, Cheng, Duan, Wang, Feng, Kong: Improving Knowledge Distillation via Regularizing Feature Norm "
        "and Direction, 2023",
        "You will use the embeddings themselves, as in search; wraps any logit method",
        example=Example(("pooled",), ("pooled",), reads_logits=True),
    )
    needs = Needs(labels=True, every_label=False)
    student_taps = teacher_taps = ("pooled",)

    def __init__(
        self, config: NDConfig, base: Method, student: nn.Module, teacher: nn.Module, data: DataInfo
    ) -> None:
        super().__init__(config, base, student, teacher, data)
        logits, features = probe_as(teacher, "pooled", "vector", data)
        width = features["pooled"].shape[1]
        own = probe_as(student, "pooled", "vector", data).features["pooled"].shape[1]
        self.means = ClassMeans(logits.shape[1], width)
        # The base `none` has no losses that could grow.
        grows = config.warmup > 0 and base.needs.teacher
        self.needs = replace(self.needs, progress=base.needs.progress or grows)
        self.projector = nn.Sequential()
        if own != width:
            layer = nn.Linear(own, width)
            nn.init.zeros_(layer.bias)
            self.projector = nn.Sequential(nn.BatchNorm1d(own), nn.Dropout(config.dropout), layer)

    @classmethod
    def base_defaults(cls, base: str) -> dict[str, object]:
        """Returns the authors' weight 1 for KD, and no warm-up besides the wrapper's own."""
        defaults: dict[str, object] = {"weight": 1.0} if base == "kd" else {}
        return defaults | ({"warmup": 0.0} if "warmup" in get_method(base).Config.model_fields else {})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses = self.base(student, teacher, batch, progress)
        weight = ramp(progress, self.config.warmup)
        losses = {name: weight * value for name, value in losses.items()}
        s, t = self.projector(student.features["pooled"]), teacher.features["pooled"]
        if self.training:
            self.means.update(t, class_shares(batch.label, len(self.means.counts), promote(t).dtype))
        losses["nd"] = self.config.weight * nd_loss(s, t, self.means(), batch.label)
        return losses
