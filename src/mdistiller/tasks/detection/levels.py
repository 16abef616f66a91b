"""Levels of two detectors: pairs by stride, the teacher's on the student's grid; bases of methods; CWD."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods import MethodConfig
from mdistiller.methods.base import Card, Losses
from mdistiller.methods.cwd import cwd_loss
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Weight
from mdistiller.tasks.detection.adapter import Kind, Level
from mdistiller.types import Batch, DataInfo, Outputs

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

_REFERENCE = 800 * 1333  # pixels of an image, in the setting that the authors' weights belong to
OVERLAP = ".overlap"
"""Suffix of a level's name; the tap of how well the anchors of the level fit an object."""
OBJECTS = ".objects"
"""Suffix of a level's name; the tap of where objects are, with the inverse of their areas."""


class Pyramid(nn.Module):
    """Levels of a detector as a model of images [B, 3, H, W], for which methods are built.

    It holds no weights: its taps, the levels by name, are zeros of the levels' shapes. A call returns zeros
    [B, 2] in place of logits.
    """

    def __init__(self, levels: Mapping[str, Level], kind: Kind = "anchors") -> None:
        super().__init__()
        self.kind = kind
        self.levels = dict(levels)
        self.names = tuple(levels)
        self.taps = nn.ModuleList(nn.Identity() for _ in levels)
        self.tap_points = {name.partition("@")[0]: f"taps.{i}" for i, name in enumerate(levels)}

    def forward(self, image: Tensor) -> Tensor:
        for tap, (stride, channels) in zip(self.taps, self.levels.values(), strict=True):
            size = [math.ceil(side / stride) for side in image.shape[2:]]
            tap(image.new_zeros(len(image), channels, *size))
        return image.new_zeros(len(image), 2)


def settle(config: MethodConfig, kind: Kind) -> MethodConfig:
    """Fills in the fields of a config that are None: by `by_kind` of its class, its authors' values.

    A set gets the values for anchors.
    """
    authors = getattr(config, "by_kind", {})
    values = authors.get(kind, authors.get("anchors", {}))
    return config.model_copy(update={k: v for k, v in values.items() if getattr(config, k) is None})


def settled(config: MethodConfig, student: nn.Module) -> dict[str, float]:
    """Returns the values of the fields that depend on the student's kind."""
    assert isinstance(student, Pyramid)
    values = settle(config, student.kind)
    return {name: getattr(values, name) for name in getattr(config, "by_kind", {}).get("anchors", ())}


def octave(stride: float) -> int:
    """Returns the power of two that is nearest to a stride, as its exponent."""
    return round(math.log2(stride))


def pair_levels(student: Mapping[str, Level], teacher: Mapping[str, Level]) -> list[tuple[str, str]]:
    """Pairs the levels of two detectors by stride, in the order of the student's.

    Strides are equal if the same power of two is nearest to them. Of several levels with one stride, the last
    ones meet each other, then those before; where the teacher's run out, its first serves again.

    Raises:
        ConfigError: no level of one has the stride of a level of the other.
    """
    pairs = {}
    for stride in {octave(level.stride) for level in student.values()}:
        ours, theirs = ([n for n, x in m.items() if octave(x.stride) == stride] for m in (student, teacher))
        for i, name in enumerate(reversed(ours), 1):
            if theirs:
                pairs[name] = theirs[-min(i, len(theirs))]
    if not pairs:
        raise ConfigError(
            f"student and teacher have no level of one stride: the student's are {_text(student)}, the "
            f"teacher's {_text(teacher)}; give pairs in method.student_taps and method.teacher_taps"
        )
    return [(name, pairs[name]) for name in student if name in pairs]


def say_pairs(
    pairs: list[tuple[str, str]], student: Mapping[str, Level], teacher: Mapping[str, Level]
) -> None:
    """Warns, with the pairs, where a level of either detector has no partner of its own."""
    ours, theirs = ({pair[i] for pair in pairs} for i in (0, 1))
    if len(pairs) == len(student) == len(teacher) == len(theirs):
        return
    said = ", ".join(f"{s} with {t} (stride {round(student[s].stride)})" for s, t in pairs)
    left = [
        f"the {whose}'s {_text({n: x for n, x in levels.items() if n not in used})}"
        for whose, levels, used in (("student", student, ours), ("teacher", teacher, theirs))
        if len(used) < len(levels)
    ]
    rest = f"; not compared: {' and '.join(left)}" if left else ""
    warnings.warn(f"levels compared, the student's with the teacher's: {said}{rest}", stacklevel=2)


def _text(levels: Mapping[str, Level]) -> str:
    return ", ".join(f"{name} (stride {round(level.stride)})" for name, level in levels.items())


def scale_between(to: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Returns the factors of x and y from an image of (height, width) `size` to one of size `to`."""
    return to[1] / size[1], to[0] / size[0]


def resample(
    feature: Tensor,
    stride: float,
    images: "ImageList",
    grid: torch.Size,
    grid_stride: float,
    grid_images: "ImageList",
) -> Tensor:
    """Samples a level [B, C, h, w] on the grid of another detector's level: [B, C, *grid].

    Each cell is the mean over its area in the image; a level on that grid already is returned as it is.

    Args:
        feature: the level.
        stride: its stride, in pixels of `images`.
        images: prepared images of the level's detector.
        grid: height and width of the other level.
        grid_stride: the stride of that level, in pixels of `grid_images`.
        grid_images: the same images, prepared for the other detector.
    """
    ours, theirs = ((x.image_sizes, x.tensors.shape) for x in (images, grid_images))
    if octave(stride) == octave(grid_stride) and feature.shape[2:] == grid and ours == theirs:
        return feature
    from torchvision.ops import roi_align

    height, width = (grid_stride * side for side in grid)
    canvases = [
        feature.new_tensor([[0.0, 0.0, width * x, height * y]], dtype=torch.float32)
        for x, y in map(scale_between, images.image_sizes, grid_images.image_sizes)
    ]
    return roi_align(feature.float(), canvases, (*grid,), 1 / stride, sampling_ratio=-1, aligned=True)


def without_pooled(pairs: list[tuple[str, str]], kind: Kind) -> list[tuple[str, str]]:
    """Leaves out the level `pool` of torchvision's R-CNNs: every second position of the level before it."""
    return [pair for pair in pairs if kind != "proposals" or pair[0] != "pool"] or pairs


def match_channels(student: int, teacher: int) -> nn.Module:
    """Builds a 1x1 convolution to the teacher's channels.

    Levels of one channel count, as those in the papers are, stay as they are.
    """
    return nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1)


class LevelMethod(FeatureMethod):
    """Base class of methods that read the levels of pyramids, the student's through a layer each.

    Children may set `derived` to the suffix of taps that are derived from the student's levels.
    """

    derived: ClassVar[str] = ""

    @classmethod
    def choose(cls, pairs: list[tuple[str, str]], kind: Kind) -> list[tuple[str, str]]:
        """Returns the pairs of levels, fine to coarse, that the authors compare."""
        return pairs

    def __init__(self, config: FeatureConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        shapes = zip(self.student_shapes, self.teacher_shapes, strict=True)
        self.adapters = nn.ModuleList(self.adapter(s[1], t[1]) for s, t in shapes)
        self.levels = self.student_taps
        if self.derived:
            self.student_taps = (*self.levels, *(name + self.derived for name in self.levels))

    def adapter(self, student: int, teacher: int) -> nn.Module:
        """Builds the layer from a level of the student to the teacher's, by their channels."""
        return match_channels(student, teacher)

    def read(
        self, student: Outputs, teacher: Outputs, inputs: object = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        pairs = list(zip(self.student_taps, self.teacher_taps, strict=False))  # derived taps come after them
        return [student.features[name] for name, _ in pairs], [teacher.features[name] for _, name in pairs]

    def adapted(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs of levels, the student's behind their layers."""
        levels = zip(self.adapters, *self.read(student, teacher), strict=True)
        return [(adapt(ours), theirs) for adapt, ours, theirs in levels]


def positions_in_papers(student: nn.Module, levels: Iterable[str]) -> list[float]:
    """Returns the number of positions that each level of a pyramid has in an image of 800 x 1333 pixels.

    A sum over positions grows with the image. A method scales the sum to that number, so that the authors'
    weights mean the same at any size.
    """
    assert isinstance(student, Pyramid)
    return [_REFERENCE / student.levels[name].stride ** 2 for name in levels]


class CWDConfig(FeatureConfig):
    """Hyperparameters of CWD for detectors; the defaults are those of mmrazor."""

    own_name = "cwd"

    weight: Weight = 50.0
    """Weight of the mean over the levels; mmrazor has 10 for the sum over five levels."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the distributions over positions."""


class CWD(LevelMethod):
    """Matches, channel by channel, the distribution of each level over its positions."""

    Config = CWDConfig
    config: CWDConfig
    name = "cwd"
    card = Card(
        "Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        temperature = self.config.temperature
        pairs = self.adapted(student, teacher)
        losses = torch.stack([cwd_loss(s, t, temperature=temperature) for s, t in pairs])
        return {"cwd": self.weight * losses.mean()}
