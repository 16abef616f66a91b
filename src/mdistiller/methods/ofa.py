"""OFA: One-for-All (Hao, Guo, Han, Tang, Hu, Wang, Xu: NeurIPS 2023, arXiv 2310.19444)."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import STAGES, Card, Example, Losses, Method, MethodConfig, Needs
from mdistiller.methods.class_means import class_shares
from mdistiller.methods.features import spread, stages, to_map
from mdistiller.methods.kd import (
    AnyLogits,
    Loss,
    Mask,
    Reduction,
    Target,
    absent_classes,
    reduce_samples,
    soften,
)
from mdistiller.methods.registry import register_method
from mdistiller.taps import probe, tap_layouts
from mdistiller.types import IGNORED, Batch, DataInfo, Outputs


def ofa_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: Target,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORED,
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the cross-entropy with the teacher's probabilities, with that of the target enhanced.

    $$-\frac1B \sum_b \Big( \big[(1 + p^T_t)^\gamma - 1\big] \log p^S_t +
    \sum_{c \ne t} (p^T_c)^\gamma \log p^S_c \Big)$$

    with $p = \sigma(z / T)$, in nats, not multiplied by T². With γ = 1, it is the cross-entropy of KD; a
    larger γ gives the target more weight where the teacher is confident. A soft label stands for its classes
    in expectation. Shapes, `reduction`, `ignore_index`, `mask` and errors: as `dkd_loss`.

    Source: Hao et al., NeurIPS 2023, adaptive target enhancement, in the form of the authors' code: the
    probabilities of the other classes are also raised to γ, and the −1 is the task loss, counted separately.
    """

    def samples(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        student, teacher = soften(student, teacher, temperature)
        share = class_shares(target, student.shape[1], student.dtype)
        log_p = teacher.log_softmax(1)
        enhanced = torch.expm1(gamma * torch.log1p(log_p.exp()))
        weights = share * enhanced + (1 - share) * torch.exp(gamma * log_p)
        absent = absent_classes(student, teacher)
        return -(weights * student.log_softmax(1).masked_fill(absent, 0.0)).sum(1)

    return reduce_samples(samples, student_logits, teacher_logits, target, reduction, ignore_index, mask)


class OFAConfig(MethodConfig):
    """Hyperparameters of OFA; the defaults are those of the authors' code."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the sum of the losses of the stages."""
    logit_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss of the student's logits."""
    gamma: tuple[PositiveFloat, ...] = Field(default=(1.0,), min_length=1)
    """γ ≥ 1: one value for all, or one per stage and a last one for the logits; the authors use 1 to 1.5."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both probability distributions."""
    student_taps: tuple[str, ...] = ()
    """Stages to project to logits, shallow to deep. Empty: at most four stages, evenly spaced."""


@register_method("ofa")
class OFA(Method[OFAConfig]):
    """Projects each stage of the student to logits, the space that all architectures share."""

    Config = OFAConfig
    needs = Needs(labels=True)
    card = Card(
        "Hao, Guo, Han, Tang, Hu, Wang, Xu: One-for-All: Bridge the Gap Between Heterogeneous Architectures "
        "in Knowledge Distillation, NeurIPS 2023",
        "Different architectures, such as a transformer and a CNN; taps only the student",
        example=Example(STAGES, extra_parameters=261_164, reads_logits=True),
    )

    def __init__(self, config: OFAConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        self.student_taps = config.student_taps or spread(stages(student), 4)
        count = len(self.student_taps)
        if len(config.gamma) not in (1, count + 1):
            raise ConfigError(
                f"method.gamma needs one value, or {count + 1}: one for each of {list(self.student_taps)} "
                f"and one for the logits; got {len(config.gamma)}"
            )
        self.gammas = config.gamma if len(config.gamma) > 1 else config.gamma * (count + 1)
        logits, features = probe(student, (*self.student_taps, "pooled"), data)
        own = features.pop("pooled").shape[1]
        wider = max(own, probe(teacher, ("pooled",), data).features["pooled"].shape[1])
        self.layouts = tap_layouts(student, features, data)
        self.projectors = nn.ModuleList()
        for i, name in enumerate(self.student_taps):
            classes, deeper, layout = logits.shape[1], count - 1 - i, self.layouts[name]
            shape = to_map(features[name], layout, data.input_shape).shape
            if layout.kind == "vector":
                self.projectors.append(nn.Linear(shape[1], classes))
            elif layout.kind in ("tokens", "sequence", "signal"):
                self.projectors.append(TokenProjector(shape, layout.prefix, own, deeper, classes))
            else:
                self.projectors.append(map_projector(shape[1], wider, deeper, classes))
        self.projectors.apply(_initialize)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        predictions = []
        for projector, name in zip(self.projectors, self.student_taps, strict=True):
            feature, layout = student.features[name], self.layouts[name]
            prefix = [feature[:, : layout.prefix]] if layout.prefix else []
            predictions.append(projector(to_map(feature, layout, batch.image), *prefix))
        *losses, last = (
            ofa_loss(logits, teacher.logits, batch.label, gamma=gamma, temperature=c.temperature)
            for logits, gamma in zip([*predictions, student.logits], self.gammas, strict=True)
        )
        return {"ofa": c.weight * torch.stack(losses).sum(), "ofa_logits": c.logit_weight * last}


def map_projector(channels: int, width: int, deeper: int, classes: int) -> nn.Sequential:
    """Builds layers from a map [B, channels, H, W] to logits: a halving per deeper stage, mean, linear."""
    layers: list[nn.Module] = [] if deeper else [nn.Conv2d(channels, width, 1)]
    for i in range(deeper):
        outputs = width if i == deeper - 1 else 2 * channels
        layers += [*_separable(channels, channels, 2), *_separable(channels, outputs, 1)]
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


class TokenProjector(nn.Module):
    """Projector of tokens to logits: merges patches of a large grid, attention blocks, linear.

    The logits are read from the first token in front of the patches, the class token, if there is one.

    Args:
        shape: shape of the patches as a map, (B, C, H, W).
        prefix: number of tokens in front of the patches.
        width: width of the blocks if patches are merged; else C.
        deeper: number of deeper stages, and of blocks (at least one).
        classes: number of classes.
    """

    def __init__(self, shape: Sequence[int], prefix: int, width: int, deeper: int, classes: int) -> None:
        super().__init__()
        _, channels, *sides = shape
        self.merge = nn.Sequential()
        while min(sides) >= 14 and not any(side % 2 for side in sides):  # down to about 7x7
            self.merge.append(_Merge(channels, width))
            channels, sides = width, [side // 2 for side in sides]
        if prefix and channels != shape[1]:
            raise ConfigError(f"method 'ofa': class tokens of {shape[1]} channels beside patches of {width}")
        sizes = channels, math.gcd(channels, 4), 4 * channels
        block = partial(
            nn.TransformerEncoderLayer,
            *sizes,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.Sequential(*(block() for _ in range(max(deeper, 1))))
        self.linear = nn.Linear(channels, classes)

    def forward(self, patches: Tensor, *prefix: Tensor) -> Tensor:
        x = self.blocks(torch.cat([*prefix, self.merge(patches).flatten(2).mT], 1))
        return self.linear(x[:, 0] if prefix else x.mean(1))


class _Merge(nn.Module):
    """Merge of 2x2 patches to one: [B, channels, H, W] to [B, outputs, H / 2, W / 2]."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        return F.gelu(self.reduce(self.norm(x))).permute(0, 3, 1, 2)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
