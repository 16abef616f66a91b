"""Base classes of methods that compare two views of each image."""

from collections.abc import Callable

from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import ConfigT, Losses, Method, MethodConfig
from mdistiller.types import Batch, Outputs


class ViewsConfig(MethodConfig):
    """Settings of a method that compares a weak and a strong view of each image."""

    norm_per_view: bool = False
    """Run the student once on each view, as the authors do: its batch norms have the statistics of one view,
    and their running averages follow both views in turn. Otherwise it runs once on all images. With one view
    there is no difference."""


def unchanged(logits: Tensor) -> Tensor:
    """Returns the logits."""
    return logits


class PreparedMethod(Method[ConfigT]):
    """Base class of methods with divergences of logits beside terms that need the logits themselves.

    A subclass overrides `distillation`. A wrapper (LSKD) gives it a function that prepares logits [N, C],
    which the method applies only to the logits of its divergences.
    """

    def distillation(
        self, student_logits: Tensor, teacher_logits: Tensor, prepare: Callable[[Tensor], Tensor] = unchanged
    ) -> Losses:
        """Computes the weighted distillation losses by name."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        return self.distillation(student.logits, teacher.logits)


def split_views(x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits [2B, …] into the weak and the strong views; raises a `ConfigError` for an odd number of rows."""
    if len(x) % 2:
        raise ConfigError(f"two views of each image make an even batch, weak ones first; got {len(x)}")
    weak, strong = x.chunk(2)
    return weak, strong
