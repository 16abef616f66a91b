"""One optimisation step of a learner: forward, backward and update."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from mdistiller.distiller import LearnerBase
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import autocast
from mdistiller.training.cuda_graph import StepGraph, Tensors
from mdistiller.training.distributed import World
from mdistiller.training.dot import DOT
from mdistiller.training.optim import build_optimizer, learning_rate
from mdistiller.types import Batch, Outputs, join


class Stepper:
    """Updates a learner by a batch: with its optimizer, its precision, over all processes.

    Args:
        config: the run's settings.
        learner: what trains, on its device.
        views: views of each image in a batch.
        ema: the moving average that follows the student, or None.
        here: this process.
        graph: whether the step is captured in a CUDA graph.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        learner: LearnerBase,
        views: int,
        ema: AveragedModel | None,
        here: World,
        *,
        graph: bool = False,
    ) -> None:
        self.config = config
        self.learner, self.views, self.ema, self.world = learner, views, ema, here
        self.precision: torch.dtype = getattr(torch, config.precision)
        # The bare module stays beside it: checkpoints and evaluation use its names.
        self.call: nn.Module = learner
        if config.compile:
            self.call = cast(nn.Module, torch.compile(learner, dynamic=False))
        # DOT averages its two gradients over the processes itself.
        if here.size > 1 and config.optim.name != "dot":
            ids = [here.device.index] if here.device.type == "cuda" else None
            # Buffers need no broadcast each step: evaluation and checkpoints take the main process's, and a
            # memory bank, which is large, is kept equal by its method.
            self.call = DistributedDataParallel(self.call, device_ids=ids, broadcast_buffers=False)
        # As a tensor, it can change from replay to replay.
        self.lr = torch.tensor(config.optim.lr, device=here.device) if graph else None
        average = here.mean if here.size > 1 else None
        self.optimizer = build_optimizer(config.optim, learner, average, lr=self.lr)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=self.precision == torch.float16)
        self.progress = torch.zeros((), device=here.device)
        self.graph = None
        if graph:
            self.graph = StepGraph(self._step, self._changing, lambda: self.learner.training)

    def __call__(self, batch: Any, teacher: Any, step: int, total: int) -> dict[str, Tensor]:
        """Sums over the batch's images, still on the device: losses, `loss`, their number `n`, and what the
        learner shows, `top1`.

        Args:
            batch: the images, augmented, in the form that the learner takes.
            teacher: what it is told of the teacher: as a rule the outputs for them.
            step: steps done before this one.
            total: of the whole run.
        """
        lr = learning_rate(self.config.optim, step, total)
        if self.lr is not None:
            self.lr.fill_(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.progress.fill_(step / total)
        return (self.graph or self._step)(batch, teacher)

    def _step(self, batch: Any, teacher: Any) -> dict[str, Tensor]:
        parts = self._split(batch, teacher)
        sums: dict[str, Tensor] = {}
        for i, (part, taught) in enumerate(parts):
            if isinstance(self.call, DistributedDataParallel):
                # Gradients travel once a step, after the last part.
                self.call.require_backward_grad_sync = i == len(parts) - 1
            self._backward(part, taught, len(batch.image), sums)
        if self.config.optim.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            assert self.config.ema is not None
            update_average(self.ema, self.learner.student.model, self.config.ema)
        return sums

    def _changing(self) -> Tensors:
        """All tensors that a step changes, by kind."""
        tensors: Tensors = {
            "parameters": list(self.learner.parameters()),
            "buffers": list(self.learner.buffers()),
        }
        for values in self.optimizer.state.values():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors.setdefault(name, []).append(value)
        if self.ema is not None:
            tensors["average"] = [*self.ema.parameters(), *self.ema.buffers()]
        return tensors

    def _split(self, batch: Any, teacher: Any) -> list[tuple[Any, Any]]:
        """The parts of an accumulated step: each has the same samples of every view, view after view."""
        count = self.config.optim.accumulate
        if count == 1:
            return [(batch, teacher)]

        def split(x: Tensor) -> list[Tensor]:
            return [join(part) for part in zip(*(v.chunk(count) for v in x.chunk(self.views)), strict=True)]

        batches = [Batch(*part) for part in zip(*map(split, batch), strict=True)]
        if not len(teacher.logits):  # there is none
            return [(part, teacher) for part in batches]
        features = {name: split(value) for name, value in teacher.features.items()}
        outputs = [
            Outputs(logits, {name: values[i] for name, values in features.items()})
            for i, logits in enumerate(split(teacher.logits))
        ]
        return list(zip(batches, outputs, strict=True))

    def _backward(self, part: Any, teacher: Any, batch_size: int, sums: dict[str, Tensor]) -> None:
        """Add one part's gradient, weighted by its share of the batch, and its figures to `sums`."""
        with autocast(self.world.device, self.precision):
            losses, logits = self.call(part, teacher, self.progress)
        n = len(part.image)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        if isinstance(self.optimizer, DOT):
            self.optimizer.backward(losses, n / batch_size)
        else:
            self.scaler.scale(loss * (n / batch_size)).backward()
        with torch.no_grad():
            figures = {name: value.detach() * n for name, value in losses.items()}
            figures["loss"] = loss.detach() * n
            figures |= self.learner.figures(part, logits)
            figures["n"] = torch.full_like(loss, n)
            for name, value in figures.items():
                sums[name] = sums[name] + value if name in sums else value

    def state_dict(self) -> dict[str, Any]:
        """The learner, its optimizer and what follows it."""
        return {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.learner.load_state_dict(state["learner"])
        # Settings are this run's: the state may come from another device.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        if self.lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr  # loading has put a copy there
        if self.graph is not None:
            self.graph.forget()
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


@torch.no_grad()
def update_average(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """Set an average to decay · average + (1 - decay) · model, buffers too; counters are copied.

    `AveragedModel.update_parameters` looks at its own counter, which waits for the device.
    """
    averages = [*ema.module.parameters(), *ema.module.buffers()]
    values = [*model.parameters(), *model.buffers()]
    pairs = list(zip(averages, values, strict=True))
    moving = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in moving], [b for _, b in moving], 1 - decay)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)
    ema.n_averaged.add_(1)
