"""Levels of two detectors: pairs by stride, and the teacher's maps on the student's grid."""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.tasks.detection.adapter import Level

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

OVERLAP = ".overlap"
"""Suffix of a level's name; the tap of how well the anchors of the level fit an object."""
OBJECTS = ".objects"
"""Suffix of a level's name; the tap of where objects are, with the inverse of their areas."""


class Pyramid(nn.Module):
    """Levels of a detector as a model of images [B, 3, H, W], for which methods are built.

    It holds no weights: its taps, the levels by name, are zeros of the levels' shapes. A call returns zeros
    [B, 2] in place of logits.
    """

    def __init__(self, levels: Mapping[str, Level]) -> None:
        super().__init__()
        self.levels = dict(levels)
        self.names = tuple(levels)
        self.taps = nn.ModuleList(nn.Identity() for _ in levels)
        self.tap_points = {name: f"taps.{i}" for i, name in enumerate(levels)}

    def forward(self, image: Tensor) -> Tensor:
        for tap, (stride, channels) in zip(self.taps, self.levels.values(), strict=True):
            size = [math.ceil(side / stride) for side in image.shape[2:]]
            tap(image.new_zeros(len(image), channels, *size))
        return image.new_zeros(len(image), 2)


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


def same_images(one: "ImageList", other: "ImageList") -> bool:
    """Whether two batches have images of the same sizes on canvases of one size."""
    return (one.image_sizes, one.tensors.shape) == (other.image_sizes, other.tensors.shape)


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
    is_same = octave(stride) == octave(grid_stride) and feature.shape[2:] == grid
    if is_same and same_images(images, grid_images):
        return feature
    from torchvision.ops import roi_align

    height, width = (grid_stride * side for side in grid)
    canvases = [
        feature.new_tensor([[0.0, 0.0, width * x, height * y]], dtype=torch.float32)
        for x, y in map(scale_between, images.image_sizes, grid_images.image_sizes)
    ]
    return roi_align(feature.float(), canvases, (*grid,), 1 / stride, sampling_ratio=-1, aligned=True)
