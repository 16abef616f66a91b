"""Feature methods on the levels of pyramids."""

from torch import Tensor, nn

from mdistiller.methods.features import FeatureMethod, TapPair
from mdistiller.tasks.detection.levels import Pyramid, pair_levels, say_pairs
from mdistiller.types import Outputs


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
