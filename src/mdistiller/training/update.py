"""The update of one step: forward, backward and the optimizer, at the learning rate of the step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from mdistiller.config import OptimConfig, RunConfig
from mdistiller.distiller import Distiller
from mdistiller.training.distributed import World
from mdistiller.training.dot import DOT
from mdistiller.training.optim import build_optimizer
from mdistiller.training.precision import autocast, torch_dtype
from mdistiller.types import AnyBatch, Line, Outputs

BatchMetrics = Callable[[AnyBatch, Tensor], dict[str, Tensor]]
"""A batch and the student's logits to sums over the samples, by name."""


class Update:
    """The update of a run's steps: a call trains the distiller on one batch.

    Args:
        config: the run's config.
        distiller: everything that trains, on its device.
        ema: the moving average that follows the student, or None.
        world: this process.
        batch_metrics: metrics beside the losses.
        student: the part of the student whose layers have rates of their own. None: the distiller.
    """

    def __init__(
        self,
        config: RunConfig,
        distiller: Distiller,
        ema: AveragedModel | None,
        world: World,
        batch_metrics: BatchMetrics,
        *,
        student: nn.Module | None = None,
    ) -> None:
        self.config, self.distiller, self.ema, self.world = config, distiller, ema, world
        self.batch_metrics = batch_metrics
        self.precision = torch_dtype(config.precision)
        self.autocast = autocast(world.device, self.precision)
        if config.compile != "off":
            distiller.compile(dynamic=False, mode=config.compile)
        self.synchronize_gradients()
        # A tensor: a number would be compiled anew at each step.
        self.progress = torch.zeros((), device=world.device)
        average = world.mean if world.size > 1 else None
        self.optimizer = build_optimizer(config.optim, distiller, average, student=student)
        self.scaler: torch.amp.GradScaler | None = None
        if self.precision == torch.float16:
            self.scaler = torch.amp.GradScaler(world.device.type)

    def synchronize_gradients(self) -> None:
        """Wraps the distiller in DDP, for the parameters that train now."""
        self.call: Distiller | DistributedDataParallel = self.distiller
        # DOT averages its gradients over the processes itself.
        if self.world.size > 1 and not self.config.optim.momenta:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            # Buffers need no broadcast each step: evaluation and checkpoints take the main process's, and a
            # memory bank, which is large, is kept equal by its method.
            self.call = DistributedDataParallel(self.distiller, device_ids=ids, broadcast_buffers=False)

    def __call__(
        self, batch: AnyBatch, teacher: Outputs | None, lr: float, progress: float
    ) -> dict[str, Tensor]:
        """Trains on one batch: forward and backward, in parts if gradients accumulate, and one update.

        Args:
            batch: the prepared batch.
            teacher: the teacher's outputs for it; None: the distiller asks the teacher, if there is one.
            lr: learning rate.
            progress: fraction of training done.

        Returns:
            Sums over the batch's samples, on the device: the losses by name, `loss`, the number of samples
            `n`, and the batch metrics.
        """
        set_learning_rate(self.optimizer, lr)
        self.progress.fill_(progress)
        parts = self.split(batch, teacher)
        size = len(batch.index)
        sums: dict[str, Tensor] = {}
        for i, (part, outputs) in enumerate(parts):
            if isinstance(self.call, DistributedDataParallel):
                # Gradients travel once a step, after the last part.
                self.call.require_backward_grad_sync = i == len(parts) - 1
            with self.autocast:
                out = self.call(part[0], part[1], part[2], self.progress, outputs)
            loss, losses, logits, task = out
            n = len(part.index)
            if isinstance(self.optimizer, DOT):
                distillation = {name: value for name, value in losses.items() if name not in task}
                self.optimizer.backward(task, distillation, n / size)
            elif self.scaler is not None:
                self.scaler.scale(loss * (n / size)).backward()
            else:
                (loss * (n / size)).backward()
            with torch.no_grad():
                found = {**losses, "loss": loss, "n": torch.ones_like(loss)}
                for name, value in found.items():
                    found[name] = value.detach() * n
                for name, value in {**found, **self.batch_metrics(part, logits)}.items():
                    sums[name] = sums[name] + value if name in sums else value
        if self.config.optim.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.distiller.parameters(), self.config.optim.clip_norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            assert self.config.ema is not None
            update_average(self.ema, self.distiller.student, self.config.ema, warmup=self.config.ema_warmup)
        return sums

    def split(self, batch: AnyBatch, outputs: Outputs | None) -> list[tuple[AnyBatch, Outputs | None]]:
        """Splits an accumulated step; each part has the same samples of every view, view after view."""
        count = self.config.optim.accumulate
        if count == 1:
            return [(batch, outputs)]
        batches = batch.split(count, self.distiller.method.needs.views)
        if outputs is None:
            return [(part, None) for part in batches]
        return list(zip(batches, outputs.split(count, self.distiller.method.needs.views), strict=True))

    def state_dict(self) -> Line:
        """Returns the state of the distiller, its optimizer, its loss scale and its average."""
        return {
            "learner": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: Line) -> None:
        """Restores the state from `state_dict`."""
        self.distiller.load_state_dict(state["learner"])
        # Hyperparameters are this run's: the state may come from another device.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        if self.scaler is not None and state["scaler"]:  # {}: saved at another precision
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


@torch.no_grad()
def update_average(ema: AveragedModel, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
    """Sets an average to decay · average + (1 - decay) · model, buffers too; counters are copied.

    With `warmup`, the decay of update n (from 0) is min(decay, (1 + n) / (10 + n)).
    `AveragedModel.update_parameters` reads its own counter, which waits for the device.
    """
    averages = [*ema.module.parameters(), *ema.module.buffers()]
    values = [*model.parameters(), *model.buffers()]
    pairs = list(zip(averages, values, strict=True))
    moving = [(a, b) for a, b in pairs if a.is_floating_point()]
    if warmup:
        n = ema.n_averaged
        weight = 1 - ((1 + n) / (10 + n)).clamp(max=decay)
        change = torch._foreach_sub([b for _, b in moving], [a for a, _ in moving])
        torch._foreach_add_([a for a, _ in moving], torch._foreach_mul(change, weight))
    else:
        torch._foreach_lerp_([a for a, _ in moving], [b for _, b in moving], 1 - decay)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)
    ema.n_averaged.add_(1)


def learning_rate(config: OptimConfig, step: int, total: int, probe: int = 0) -> float:
    """Returns the learning rate of step `step` (from 0) of `total`.

    The first `probe` steps and the others have a whole schedule each.

    A milestone m takes effect at step round(m · total), so that 0.625 of 240 epochs is the first step of
    epoch 150 counted from 0, as in the field's step schedules. No rate after the warm-up is below
    `min_lr` times the highest one.
    """
    lr = config.lr
    if step < probe:
        lr, total = lr if config.probe_lr is None else config.probe_lr / config.head_lr, probe
    else:
        step, total = step - probe, total - probe
    warmup = round(config.lr_warmup * total)
    if config.lr_warmup_steps is not None:
        warmup = min(config.lr_warmup_steps, total // 2)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if config.schedule == "step":
        passed = sum(step >= round(m * total) for m in config.milestones)
        return lr * max(config.gamma**passed, config.min_lr)
    if config.schedule == "cosine":
        wave = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        return lr * (config.min_lr + (1 - config.min_lr) * wave)
    if config.schedule == "poly":
        return lr * max((1 - (step - warmup) / (total - warmup)) ** 0.9, config.min_lr)
    return lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate, times its factor in each group; a rate on the device stays a tensor."""
    for group in optimizer.param_groups:
        rate = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
