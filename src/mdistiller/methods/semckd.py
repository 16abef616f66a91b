"""SemCKD: Cross-Layer Distillation with Semantic Calibration (Chen et al., AAAI 2021, arXiv 2012.03236)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import STAGES, Card, Example, Losses, Needs, Scalar, exact, promote, unit
from mdistiller.methods.features import (
    FeatureConfig,
    FeatureMethod,
    TapPair,
    check_shapes,
    pool_to_smaller,
    spread,
    stages,
)
from mdistiller.methods.gather import gather
from mdistiller.methods.kd import kd_loss
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs

# Each pair of layers costs three convolutions, and a transformer has one stage per block.
_MOST_LAYERS = 5


def semckd_loss(distances: Float[Tensor, "b s t"], attention: Float[Tensor, "b s t"]) -> Scalar:
    r"""Computes the mean distance between the layers of both models, weighted by the attention.

    $$\frac{1}{BS} \sum_b \sum_{s,t} \alpha_{bst}\, d_{bst}$$

    $d$ are the squared distances of each sample between S layers of the student, mapped to the size of the
    teacher's, and T layers of the teacher; the weights α sum to one over T (a softmax).

    Raises:
        ConfigError: shapes that differ or are not [B, S, T].

    Source: Chen et al., AAAI 2021, the calibrated loss between layers; equals the authors' code.
    """
    check_shapes(distances, attention, "B, S, T", "distances and attention")
    return (promote(attention) * promote(distances)).sum(2).mean()


class SemCKDConfig(FeatureConfig):
    """Hyperparameters of SemCKD; the defaults are the authors' for CIFAR-100."""

    weight: float = Field(default=400.0, ge=0)
    """Weight of the loss between layers."""
    kd_weight: float = Field(default=1.0, ge=0)
    """Weight of the KD loss."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of the KD loss."""
    student_taps: tuple[str, ...] = ()
    """Taps of the student. Empty: at most five of the stages."""
    teacher_taps: tuple[str, ...] = ()
    """Taps of the teacher, any number. Empty: at most five of the stages."""


class _Embed(nn.Module):
    """Embedding of a layer's similarities [B, N] among samples as unit vectors [B, N / 4], query or key."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        width = max(1, batch_size // 4)
        self.linear1 = nn.Linear(batch_size, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)

    def forward(self, similarities: Tensor) -> Tensor:
        hidden = self.linear1(similarities.to(self.linear1.weight.dtype)).relu()
        return unit(promote(self.linear2(hidden)))


def _align(inputs: int, outputs: int) -> nn.Sequential:
    """Builds layers that map a student's feature map to the teacher's channels."""
    width = 2 * outputs
    layers = [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, outputs, 1, bias=False))


@register_method("semckd")
class SemCKD(FeatureMethod[SemCKDConfig]):
    """Matches every layer of the student with all layers of the teacher through a learned attention.

    The attention, one per sample, is computed from the similarities among the samples of the batch in each
    layer. It has the width of the batch, so `DataInfo.batch_size` is required. A smaller batch is padded
    with zeros.
    """

    Config = SemCKDConfig
    in_pairs = False
    needs = Needs()
    card = Card(
        "Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021",
        "You do not know which layers match: attention decides, at the cost of memory and time",
        example=Example(STAGES, STAGES, 10_233_632, reads_logits=True),
    )

    def __init__(self, config: SemCKDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        if data.batch_size is None:
            raise ConfigError(
                "method 'semckd' has layers as wide as the batch and needs its size: "
                "Distiller(…, batch_size=64), or DataInfo(…, batch_size=64)"
            )
        self.batch_size = data.batch_size
        self.queries = nn.ModuleList(_Embed(data.batch_size) for _ in self.student_taps)
        self.keys = nn.ModuleList(_Embed(data.batch_size) for _ in self.teacher_taps)
        taps, shapes = self.student_taps + self.teacher_taps, self.student_shapes + self.teacher_shapes
        for name, shape in zip(taps, shapes, strict=True):
            if len(shape) != 4:
                raise ConfigError(f"method 'semckd' reads maps [B, C, H, W]; {name!r} is {list(shape)}")
        self.aligners = nn.ModuleList(
            nn.ModuleList(_align(s[1], t[1]) for t in self.teacher_shapes) for s in self.student_shapes
        )

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        """Returns at most five of the stages of each."""
        return spread(stages(student), _MOST_LAYERS), spread(stages(teacher), _MOST_LAYERS)

    def similarities(self, feature: Tensor) -> Tensor:
        """Returns inner products among the samples of all processes, [n, batch_size], padded with zeros."""
        x = gather(promote(feature).flatten(1))
        if len(x) > self.batch_size:
            raise ConfigError(f"method 'semckd' was built for batches of {self.batch_size}; got {len(x)}")
        return F.pad(x @ x.T, (0, self.batch_size - len(x)))

    def attention(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """Computes the weights of the teacher's layers per sample and layer of the student, [n, S, T]."""
        with exact(students[0]):
            query, key = (
                torch.stack([layer(self.similarities(x)) for layer, x in zip(layers, maps, strict=True)], 1)
                for layers, maps in ((self.queries, students), (self.keys, teachers))
            )
            return (query @ key.mT).softmax(2)

    def distances(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """Computes the mean squared differences of each sample's aligned maps, [B, S, T]."""
        rows = [
            torch.stack([_distance(a, s, t) for a, t in zip(aligners, teachers, strict=True)], 1)  # type: ignore[call-overload]
            for aligners, s in zip(self.aligners, students, strict=True)
        ]
        return torch.stack(rows, 1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        s, t = self.read(student, teacher, batch.image)
        loss = semckd_loss(gather(self.distances(s, t)), self.attention(s, t))
        kd = kd_loss(student.logits, teacher.logits, temperature=c.temperature)
        return {"kd": c.kd_weight * kd, "semckd": c.weight * loss}


def _distance(align: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Computes distances [B]; the larger map is averaged to the size of the smaller one."""
    student, teacher = pool_to_smaller(student, teacher)
    return (promote(align(student)) - promote(teacher)).square().mean((1, 2, 3))
