"""Distillation in a module of Lightning."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mdistiller.checks import take_labels
from mdistiller.distiller import Distiller
from mdistiller.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as Base
else:
    Base = object

Inputs = Tensor | Mapping[str, Tensor]
Batch = Mapping[str, Tensor] | Sequence[Tensor]


class DistillMixin(Base):
    """Steps of a `LightningModule` whose attribute `distiller` is a `Distiller`.

    Batches are (inputs, target), (inputs, target, index), or mappings with `labels`. Training logs
    `train_loss` and each loss by name; validation and test run the student alone and log `val_loss` and
    `val_acc`, `test_loss` and `test_acc`. `forward` returns the student's logits. Schedules follow the
    trainer's progress. Example::

        class Student(DistillMixin, LightningModule):
            def __init__(self, student, teacher):
                super().__init__()
                self.distiller = Distiller(student, teacher, "dkd")

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.05)

    `self.parameters()` are those of student and method; the teacher is in no checkpoint.
    """

    distiller: Distiller

    @property
    def student(self) -> nn.Module:
        """The student to evaluate and save."""
        return self.distiller.student

    def forward(self, inputs: Inputs) -> Tensor:
        """Computes the student's logits."""
        return self.distiller.evaluate(inputs)[1]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the sum of all losses of a batch."""
        inputs, target, index = _split(batch)
        out = self.distiller(inputs, target, index, self._progress())
        losses = {f"train_{name}": value.detach() for name, value in out.losses.items()}
        self.log_dict({"train_loss": out.loss.detach(), **losses})
        return out.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and accuracy of the student."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and accuracy of the student."""
        self._evaluate("test", batch)

    def _progress(self) -> float:
        """Returns the fraction of the training that is done; 0 where it has no end."""
        trainer = self.trainer
        limits: list[tuple[float, float]]
        if self.automatic_optimization:
            limits = [(trainer.global_step, trainer.estimated_stepping_batches)]
        else:  # `global_step` and `max_steps` count the steps of every optimizer
            batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
            whole = trainer.num_training_batches * (trainer.max_epochs or -1)
            limits = [(trainer.global_step, trainer.max_steps), (batches, whole)]
        return max((done / end for done, end in limits if 0 < end < inf), default=0.0)

    def _evaluate(self, split: str, batch: Batch) -> None:
        inputs, target, _ = _split(batch)
        loss, logits = self.distiller.evaluate(inputs, target)
        assert loss is not None
        metrics = {f"{split}_loss": loss}
        if logits.ndim == 2 and target.ndim == 1:
            metrics[f"{split}_acc"] = (logits.argmax(1) == target).float().mean()
        self.log_dict(metrics, prog_bar=True, sync_dist=True, batch_size=len(target))


def _split(batch: Batch) -> tuple[Inputs, Tensor, Tensor | None]:
    if isinstance(batch, Mapping):
        return (*take_labels(batch), None)
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        return batch[0], batch[1], batch[2] if len(batch) == 3 else None
    raise ConfigError(
        f"a batch is (inputs, target), (inputs, target, index) or a mapping with 'labels'; got a "
        f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}: override "
        "training_step for another form"
    )
