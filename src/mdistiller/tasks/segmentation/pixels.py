"""Bases of methods on maps and on pixels, with channel-wise distillation, and the task loss of pixels."""

from dataclasses import replace
from typing import ClassVar, cast

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods import LogitMethod, Method
from mdistiller.methods.base import Card, Losses, Needs, promote
from mdistiller.methods.cwd import cwd_loss
from mdistiller.methods.features import FeatureConfig, FeatureMethod, TapPair, sum_pairs
from mdistiller.tasks.segmentation.segmenter import AUX
from mdistiller.types import IGNORED, Batch, DataInfo, Outputs

TAP = "logits"


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Scales a map [B, C, H, W] to a size (H, W), bilinear; it stays as it is where it has that size."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def resized_label(label: Tensor, size: tuple[int, ...]) -> Tensor:
    """Picks the labels [B, H, W] at the centers of the pixels of another size, [B, h, w]."""
    if label.shape[1:] == size:
        return label
    return F.interpolate(label[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def pixel_rows(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits [N, C] of both models and labels [N] of all pixels of the student's map, N = B·h·w.

    Ignored pixels are among them, so that shapes do not depend on values.

    Args:
        student: logits [B, C, h, w].
        teacher: logits [B, C, …], scaled to the student's size.
        label: int64 [B, H, W].
    """
    size = tuple(student.shape[2:])
    teacher = resized(promote(teacher), size)
    rows = (x.movedim(1, -1).flatten(0, 2) for x in (promote(student), teacher))
    return *rows, resized_label(label, size).flatten()  # type: ignore[return-value]


class MapMethod(FeatureMethod):
    """Base class of methods that compare maps, the teacher's scaled to the student's size."""

    tap: ClassVar[str] = "embedding"
    """Tap of student and teacher of a config without any."""

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        return (self.tap,), (self.tap,)

    def read(
        self, student: Outputs, teacher: Outputs, inputs: object = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        ours, theirs = super().read(student, teacher, inputs)
        return ours, [resized(promote(t), tuple(s.shape[2:])) for s, t in zip(ours, theirs, strict=True)]


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Raises a ConfigError for maps that are not [B, C, H, W] of one size."""
    shapes = student.shape, teacher.shape
    if {len(shape) for shape in shapes} != {4} or len({(b, h, w) for b, _, h, w in shapes}) > 1:
        raise ConfigError(
            "student and teacher maps must be [B, C, H, W] of one size, whatever their channels; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )


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


class PixelMethod(Method):
    """Makes a method of logits read pixels. Its means are over the pixels that have a class."""

    needs = Needs(labels=True)
    student_taps = teacher_taps = (TAP,)

    def __init__(self, base: LogitMethod) -> None:
        super().__init__(base.config)
        self.base, self.name = base, base.name
        self.needs = replace(self.needs, progress=base.needs.progress)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        s, t, label = pixel_rows(student.features[TAP], teacher.features[TAP], batch.label)
        return self.base(Outputs(s, {}), Outputs(t, {}), batch._replace(label=label), progress)


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Computes the mean cross-entropy of the pixels that have a class, 0 if none has, in nats.

    Args:
        logits: [B, C, h, w], scaled to the size of the labels.
        label: int64 [B, H, W], -100 for a pixel without a class.
    """
    scaled = resized(promote(logits), tuple(label.shape[1:]))
    total = F.cross_entropy(scaled, label, ignore_index=IGNORED, reduction="sum")
    return total / (label != IGNORED).sum().clamp(min=1)


class PixelLoss:
    """Task loss of a segmentation model: `pixel_cross_entropy` of its classifier and of its auxiliary one.

    Args:
        aux_weight: weight of the auxiliary classifier; 0: it is not read.
    """

    def __init__(self, aux_weight: float) -> None:
        self.aux_weight = aux_weight

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        losses = {"task": pixel_cross_entropy(outputs.logits, batch.label)}
        if self.aux_weight:
            losses[AUX] = self.aux_weight * pixel_cross_entropy(outputs.features[AUX], batch.label)
        return losses
