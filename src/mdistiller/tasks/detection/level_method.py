"""Base class of the methods for levels of pyramids, and what they share."""

from collections.abc import Iterable

from torch import Tensor, nn

from mdistiller.methods.features import FeatureMethod
from mdistiller.tasks.detection.levels import Pyramid
from mdistiller.types import Outputs

_REFERENCE = 800 * 1333  # pixels of an image, in the setting that the authors' weights belong to


def match_channels(
    student_shapes: Iterable[tuple[int, ...]], teacher_shapes: Iterable[tuple[int, ...]]
) -> nn.ModuleList:
    """Builds for each pair of levels [B, C, h, w] a 1x1 convolution to the teacher's channels.

    A pair of one channel count, as the levels in the papers are, keeps the student's level as it is.
    """
    pairs = zip(student_shapes, teacher_shapes, strict=True)
    return nn.ModuleList(nn.Identity() if s[1] == t[1] else nn.Conv2d(s[1], t[1], 1) for s, t in pairs)


class LevelMethod(FeatureMethod):
    """Base class of methods that read the levels of pyramids, beside taps derived from them."""

    def read(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        ours, theirs = zip(*self.level_pairs, strict=True)
        return [student.features[name] for name in ours], [teacher.features[name] for name in theirs]

    @property
    def level_pairs(self) -> list[tuple[str, str]]:
        """Names of the levels that are compared, the student's and the teacher's."""
        return list(zip(self.student_taps, self.teacher_taps, strict=False))  # derived taps come after them


def positions_in_papers(student: nn.Module, levels: Iterable[str]) -> list[float]:
    """Returns the number of positions that each level of a pyramid has in an image of 800 x 1333 pixels.

    A sum over positions grows with the image. A method scales the sum to that number, so that the authors'
    weights mean the same at any size.
    """
    assert isinstance(student, Pyramid)
    return [_REFERENCE / student.levels[name].stride ** 2 for name in levels]
