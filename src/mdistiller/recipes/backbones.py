"""Families of recipes whose models are heads on backbones, such as `fasterrcnn_resnet18`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from mdistiller.config import SELF
from mdistiller.errors import UnknownNameError
from mdistiller.models.backbone import is_backbone
from mdistiller.recipes.family import Family
from mdistiller.training.dense import DenseConfig


@dataclass(frozen=True)
class BackboneFamily(Family):
    """Recipes over one data set; a pair is HEAD_TEACHER_STUDENT, of backbones, or two models' whole names."""

    Config: ClassVar[type[DenseConfig]]
    what: ClassVar[str]
    """Name of a pair in messages, and a hint for one that is unknown."""
    hint: ClassVar[str] = ""
    backbones: ClassVar[Mapping[str, Collection[str]]]
    """Backbones of each head."""

    def is_model(self, name: str) -> bool:
        """Whether a model, perhaps of a library, has this name."""
        return name in self.models()[0]

    def find_model(self, name: str) -> str:
        self.Config.check_name(name)
        return name

    def find_teacher(self, name: str) -> str:
        return name if is_backbone(name, self.find_model) else self.find_model(name)

    def split_pair(self, pair: str) -> tuple[str, str]:
        head, _, names = pair.partition("_")
        backbones = self.backbones.get(head, ())
        for teacher in (*backbones, SELF):
            student = names.removeprefix(f"{teacher}_")
            if student != names and student in backbones:
                return SELF if teacher == SELF else f"{head}_{teacher}", f"{head}_{student}"
        parts = pair.split("_")
        for i in range(1, len(parts)):
            teacher, student = "_".join(parts[:i]), "_".join(parts[i:])
            if self.is_model(student) and (teacher == SELF or self.is_model(teacher)):
                return teacher, student
            if self.is_model(student) and is_backbone(teacher, self.find_model):
                return teacher, student
        raise UnknownNameError(self.what, pair, self.pairs, self.hint)

    def join_pair(self, teacher: str, student: str) -> str:
        head, _, backbone = student.partition("_")
        if backbone in self.backbones.get(head, ()):
            if teacher == SELF:
                return f"{head}_{SELF}_{backbone}"
            if teacher.startswith(f"{head}_"):
                return f"{teacher}_{backbone}"
        return f"{teacher}_{student}"
