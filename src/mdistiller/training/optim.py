"""Optimizers, and the learning rate as a function of the fraction of training done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.config import OptimConfig
from mdistiller.training.dot import DOT


def build_optimizer(
    config: OptimConfig,
    module: nn.Module,
    average: Callable[[Tensor], Tensor] | None = None,
    *,
    lr: Tensor | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimizer of all trainable parameters of a module.

    `average` computes the mean over processes, for an optimizer that has several gradients to reduce. `lr` is
    the learning rate as a float32 scalar on the parameters' device, read anew at each step (not for DOT);
    None: the number in the parameter groups.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    decay: dict[str, Any] = {"weight_decay": config.weight_decay}
    if config.name == "dot":
        return DOT(
            parameters, lr=config.lr, momentum=config.momentum, delta=config.delta, average=average, **decay
        )
    # Only the fused implementations read a tensor on the device without waiting for it.
    rate, fused = (config.lr, None) if lr is None else (lr, True)
    if config.name == "sgd":
        momentum, nesterov = config.momentum, config.nesterov
        return torch.optim.SGD(
            parameters, lr=rate, momentum=momentum, nesterov=nesterov, fused=fused, **decay
        )
    return torch.optim.AdamW(parameters, lr=rate, fused=fused, capturable=lr is not None, **decay)


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Returns the learning rate of step `step` (from 0) of `total`.

    A milestone m takes effect at step round(m · total), so that 0.625 of 240 epochs is the first step of
    epoch 150 counted from 0, as in the field's step schedules.
    """
    warmup = round(config.lr_warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "step":
        passed = sum(step >= round(m * total) for m in config.milestones)
        return config.lr * config.gamma**passed
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return config.lr
