"""Overhaul of feature distillation (Heo, Kim, Yun, Park, Kwak, Choi: ICCV 2019, arXiv 1904.01866)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mdistiller.errors import ConfigError
from mdistiller.methods.base import PREACTIVATIONS, Card, Example, Losses, Scalar, promote
from mdistiller.methods.features import (
    FeatureConfig,
    FeatureMethod,
    TapPair,
    Weight,
    check_shapes,
    match_stages,
    preactivations,
)
from mdistiller.methods.registry import register_method
from mdistiller.taps import probe, resolve
from mdistiller.types import Batch, DataInfo, Outputs


def ofd_loss(
    student_feature: Float[Tensor, "b c h w"],
    teacher_feature: Float[Tensor, "b c h w"],
    margin: Float[Tensor, " c"],
) -> Scalar:
    r"""Computes the partial squared distance to the teacher's pre-activation after a margin ReLU.

    $$\frac1B \sum_{b,i} d(s_{bi}, \max(t_{bi}, m_i)), \quad
    d(s, t) = \begin{cases} 0 & s \le t \le 0 \\ (s - t)^2 & \text{else} \end{cases}$$

    $i$ runs over C, H and W. Where the teacher's unit is off, the student's only needs to be off as well.

    Args:
        student_feature: [B, C, H, W], mapped to the teacher's channels.
        teacher_feature: [B, C, H, W], before the activation.
        margin: [C], not positive, from `ofd_margin`.

    Raises:
        ConfigError: features of different shapes or not [B, C, H, W]; a margin that is not [C].

    Source: Heo et al., ICCV 2019: margin ReLU and partial L2 distance.
    """
    check_shapes(student_feature, teacher_feature, "B, C, H, W")
    if margin.shape != student_feature.shape[1:2]:
        raise ConfigError(f"margin must be [{student_feature.shape[1]}]; got {list(margin.shape)}")
    student, teacher = promote(student_feature), promote(teacher_feature)
    target = torch.maximum(teacher, margin.to(teacher)[:, None, None])
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).sum((1, 2, 3)).mean()


def ofd_margin(batch_norm: _BatchNorm) -> Float[Tensor, " c"]:
    r"""Computes the margin of each channel, the mean of the negative part of a batch norm's output.

    The output has mean $\beta$ and deviation $|\gamma|$. If it is normally distributed, then

    $$m = \mathrm{E}[x \mid x < 0] = \beta - |\gamma|\,\frac{\phi(\beta/\gamma)}{\Phi(-\beta/|\gamma|)}$$

    and $-3\,|\gamma|$ where fewer than one in a thousand values are negative. The margins have no gradient,
    and the precision of the weight.

    Source: Heo et al., ICCV 2019, margin ReLU; the rule for rare negatives follows the authors' code.
    """
    weight, bias = (
        torch.full((batch_norm.num_features,), default) if p is None else p.detach()
        for p, default in ((batch_norm.weight, 1.0), (batch_norm.bias, 0.0))
    )
    # The clamp gives a channel without deviation the limit: its bias if negative, else 0.
    mean, deviation = bias.cpu().double(), weight.cpu().double().abs().clamp(min=1e-12)
    z = mean / deviation
    negative = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(negative > 0.001, mean - deviation * density / negative, -3 * deviation)
    return margin.to(promote(weight))


def preceding_norms(
    model: nn.Module, taps: Sequence[str], data: DataInfo | tuple[int, ...]
) -> list[_BatchNorm]:
    """Finds the batch norm in front of each tap, the last one that runs before it.

    For the input of a block's last activation, it is the last one of that block, so that the batch norm of a
    projected shortcut does not count. A copy of the model runs on images of the data's shape (C, H, W).

    Raises:
        ConfigError: no such batch norm, or one with other channels.
    """
    modules = dict(model.named_modules())
    ran: list[str] = []
    before: dict[str, list[str]] = {}
    paths = resolve(model, taps)
    # `probe` runs a copy of the model with these hooks, which write into the same lists.
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, module in modules.items()
        if isinstance(module, _BatchNorm)
    ]
    for name, path in paths.items():
        module = modules[path.removesuffix(":input")]
        hook = module.register_forward_pre_hook if path.endswith(":input") else module.register_forward_hook
        handles.append(hook(lambda *_, name=name: before.update({name: list(ran)})))
    try:
        features = probe(model, taps, data).features
    finally:
        for handle in handles:
            handle.remove()
    norms = []
    for name in taps:
        width = features[name].shape[1 if features[name].ndim == 4 else -1]
        path, _, side = paths[name].partition(":")
        block = path.rpartition(".")[0]
        own = [p for p in before[name] if side and p.rpartition(".")[0] == block]
        found = modules[(own or before[name])[-1]] if before[name] else None
        # ShuffleNetV2 concatenates a part that skips the last block's batch norm.
        widths = (width, width / 2) if own else (width,)
        if not isinstance(found, _BatchNorm) or found.num_features not in widths:
            raise ConfigError(
                f"method 'ofd' takes its margins from the batch norm in front of the teacher's tap; "
                f"{type(model).__name__} has none of {width} channels in front of {name!r}"
            )
        norms.append(found)
    return norms


class OFDConfig(FeatureConfig):
    """Hyperparameters of OFD; the defaults are the paper's for CIFAR-100."""

    weight: Weight = 0.001
    """Weight of the loss of the last stage; each stage before has half the weight of the next one."""
    kernel_size: Literal[1, 3, 5, 7] = 1
    """Kernel size of the convolution that maps the student's channels to the teacher's."""


@register_method("ofd")
class OFD(FeatureMethod[OFDConfig]):
    """Matches pre-activations under a margin ReLU, except where they are off in both models."""

    Config = OFDConfig
    card = Card(
        "Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation, ICCV 2019",
        "CNNs whose stages end in batch norm and ReLU",
        example=Example(PREACTIVATIONS, PREACTIVATIONS, 86_912),
    )

    def __init__(self, config: OFDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        taps, shapes = self.student_taps + self.teacher_taps, self.student_shapes + self.teacher_shapes
        for name, shape in zip(taps, shapes, strict=True):
            if len(shape) != 4:
                raise ConfigError(f"method 'ofd' compares maps [B, C, H, W]; {name!r} is {list(shape)}")
        widths = [shape[1] for shape in self.teacher_shapes]
        norms = preceding_norms(teacher, self.teacher_taps, data)
        self.connectors = nn.ModuleList()
        for i, (norm, shape) in enumerate(zip(norms, self.student_shapes, strict=True)):
            size = config.kernel_size
            convolution = nn.Conv2d(shape[1], widths[i], size, padding=size // 2, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(widths[i])))
            # Concatenated channels come first, are never negative and need no margin.
            margin = F.pad(ofd_margin(norm), (widths[i] - norm.num_features, 0))
            # Not saved, because it follows from the teacher.
            self.register_buffer(f"margin{i}", margin, persistent=False)

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        student_stages, teacher_stages = match_stages(student, teacher)
        return preactivations(student, student_stages), preactivations(teacher, teacher_stages)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses = []
        features = zip(*self.read(student, teacher, batch.image), self.connectors, strict=True)
        for i, (student_feature, teacher_feature, connector) in enumerate(features):
            mapped = connector(student_feature)
            target = F.adaptive_avg_pool2d(promote(teacher_feature), mapped.shape[-2:])
            loss = ofd_loss(mapped, target, self.get_buffer(f"margin{i}"))
            losses.append(loss / 2 ** (len(self.connectors) - 1 - i))
        return {"ofd": self.weight * torch.stack(losses).sum()}
