"""The average of a method over several teachers."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Losses, Method, Needs
from mdistiller.methods.compose import joined_needs
from mdistiller.taps import resolve, tap_names
from mdistiller.types import Batch, Outputs


class Average(Method):
    """Average of the losses of methods with one config, each with a teacher and adapters of its own.

    The teachers are given by their module paths in the module that is tapped as the teacher. The output at
    each path is that teacher's logits.
    """

    needs = Needs(every_label=False, one_class=False, logits=False)

    def __init__(self, methods: Sequence[Method], teachers: Mapping[str, nn.Module]) -> None:
        super().__init__(methods[0].config)
        self.methods = nn.ModuleList(methods)
        self.paths: list[tuple[str, dict[str, str]]] = []
        for method, (path, teacher) in zip(methods, teachers.items(), strict=True):
            inner = resolve(teacher, method.teacher_taps)
            self.paths.append((path, {name: f"{path}.{inner_path}" for name, inner_path in inner.items()}))
            self.student_taps += tap_names(method.student_taps)
            self.teacher_taps += (path, *self.paths[-1][1].values())
        self.needs = joined_needs(self, methods)
        self.name = self.config.method_name
        self.has_unlabelled = any(method.has_unlabelled for method in methods)

    def extend_student(self, student: nn.Module) -> nn.Module:
        if any(m.extend_student(student) is not student for m in self.methods):  # type: ignore[operator]
            raise ConfigError(f"method {self.name!r} takes only one teacher")
        return student

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses: Losses = {}
        for method, (path, inner) in zip(self.methods, self.paths, strict=True):
            features = {name: teacher.features[inner_path] for name, inner_path in inner.items()}
            outputs = Outputs(teacher.features[path], features)
            for name, value in method(student, outputs, batch, progress).items():
                value = value / len(self.methods)
                losses[name] = losses[name] + value if name in losses else value
        return losses
