"""Feature methods on the levels of pyramids, and what they share."""

from collections.abc import Iterable

from torch import Tensor, nn

from mdistiller.methods.features import FeatureMethod, TapPair
from mdistiller.tasks.detection.levels import Pyramid, pair_levels, say_pairs
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
    """Base class that makes a feature method read the levels of pyramids; put before the method's class."""

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        """Returns the levels of both pyramids with one stride; raises ConfigError where there are none."""
        assert isinstance(student, Pyramid)
        assert isinstance(teacher, Pyramid)
        pairs = pair_levels(student.levels, teacher.levels)
        say_pairs(pairs, student.levels, teacher.levels)
        return tuple(name for name, _ in pairs), tuple(name for _, name in pairs)

    def read(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        ours = [student.features[name] for name, _ in self.level_pairs]
        theirs = [teacher.features[name] for _, name in self.level_pairs]
        # Layers are built for what a step has: the teacher's levels on the student's grids.
        theirs = [
            t.new_empty(*t.shape[:2], *s.shape[2:]) if t.is_meta else t
            for s, t in zip(ours, theirs, strict=True)
        ]
        return ours, theirs

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
