"""Optimizers, with a rate and a weight decay for each group of parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mdistiller.config import OptimConfig
from mdistiller.models.layers import classifier_paths, layer_numbers, undecayed
from mdistiller.training.dot import DOT
from mdistiller.types import Line


def build_optimizer(
    config: OptimConfig,
    module: nn.Module,
    average: Callable[[Tensor], Tensor] | None = None,
    *,
    student: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimizer of all trainable parameters of a module.

    Args:
        config: the optimizer's settings.
        module: the module that trains.
        average: the mean over processes, for an optimizer that has several gradients to reduce.
        student: the part of the module whose layers have rates of their own. None: the module.
    """
    groups = parameter_groups(config, module, module if student is None else student)
    if deltas := config.momenta:
        return DOT(groups, lr=config.lr, momentum=config.momentum, deltas=deltas, average=average)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def parameter_groups(config: OptimConfig, module: nn.Module, student: nn.Module) -> list[Line]:
    """Groups the trainable parameters of a module by `lr_scale`, a factor of the rate, and weight decay.

    A parameter of the student's layer l of L has the factor layer_decay^(L - l), the classifier and all
    parameters outside of the student have head_lr. Without such settings there is one group.
    """
    scales: dict[int, float] = {}
    plain: set[int] = set()
    if config.layer_decay != 1 or config.head_lr != 1:
        numbers = layer_numbers(student)
        last = max(numbers.values())
        scales = {
            id(p): config.layer_decay ** (last - numbers[name]) for name, p in student.named_parameters()
        }
        for path in classifier_paths(student):
            scales |= {id(p): config.head_lr for p in student.get_submodule(path).parameters()}
    if not config.norm_decay:
        listed = undecayed(student)
        plain = {id(p) for name, p in student.named_parameters() if name in listed}
        plain |= {id(p) for p in module.parameters() if p.ndim <= 1}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in module.parameters():
        if p.requires_grad:
            decay = 0.0 if id(p) in plain else config.weight_decay
            groups.setdefault((scales.get(id(p), config.head_lr), decay), []).append(p)
    return [
        {"params": found, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), found in groups.items()
    ]
