"""The weighted sum of methods with a teacher each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Losses, Method, Needs
from mdistiller.methods.compose import join
from mdistiller.taps import tap_names
from mdistiller.types import Batch, Outputs


class Several(Method):
    """Sum of the losses of methods, each with a teacher of its own, whose outputs a `Teachers` joins.

    Losses of one name are added. The task loss has the first method's weight.

    Args:
        parts: the methods, in the order of the teachers.
        weights: factor of each method's losses. None: 1 each.
        dropout: probability that a teacher is left out of a training pass; at least one stays. Its losses
            are then zero, and those of the others keep their size.

    Raises:
        ConfigError: another number of weights, or a wrong value.
    """

    needs = Needs(teacher=False, every_label=False, one_class=False, logits=False)

    def __init__(
        self, parts: Sequence[Method], weights: Sequence[float] | None = None, dropout: float = 0.0
    ) -> None:
        # A copy: a measured weight belongs to the part.
        super().__init__(parts[0].config.model_copy())
        self.parts: Sequence[Method] = nn.ModuleList(parts)  # type: ignore[assignment]
        self.dropout = dropout
        self.weights = [1.0] * len(parts) if weights is None else [*weights]
        if len(self.weights) != len(parts) or not all(weight >= 0 for weight in self.weights):
            raise ConfigError(
                f"teacher_weights: got {weights} for {len(parts)} teachers; allowed: a number ≥ 0 for each"
            )
        if name := next((part.name for part in parts if not part.needs.teacher), None):
            raise ConfigError(
                f"method {name!r} takes no teacher; each of several teachers needs one that does"
            )
        if not 0 <= dropout < 1:
            raise ConfigError(f"teacher_dropout: got {dropout}; allowed: a probability in [0, 1)")
        self.teacher_taps = tuple(
            f"{i}/{tap}" for i, p in enumerate(parts) for tap in tap_names(p.teacher_taps)
        )
        join(self, parts)
        self.name = ", ".join(dict.fromkeys(part.name for part in parts))

    def extend_student(self, student: nn.Module) -> nn.Module:
        for part in self.parts:
            if part.extend_student(student) is not student:
                raise ConfigError(f"method {part.name!r} takes only one teacher")
        return student

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses: Losses = {}
        keep = self._keep() if self.training and self.dropout else None
        for i, (part, weight) in enumerate(zip(self.parts, self.weights, strict=True)):
            features = {name: teacher.features[f"{i}/{name}"] for name in tap_names(part.teacher_taps)}
            logits = teacher.features.get(f"{i}/", teacher.logits)
            try:
                found = part(student, Outputs(logits, features), batch, progress)
            except ConfigError as error:
                raise ConfigError(f"teacher {i + 1}: {error}") from error
            for name, value in found.items():
                # A product, so that all parameters have a gradient on each process.
                value = value * weight if keep is None else value * weight * keep[i].to(value.device)
                losses[name] = losses[name] + value if name in losses else value
        return losses

    def _keep(self) -> Tensor:
        """Draws the teachers that stay in a pass, bool [teachers], from torch's generator of the CPU."""
        draws = torch.rand(len(self.parts))
        return (draws >= self.dropout) | (draws == draws.max())
