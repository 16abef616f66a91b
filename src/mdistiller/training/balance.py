"""Weights of distillation losses from the gradients of the first batches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from mdistiller.config import RunConfig, find_field
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.training.batches import AnySource
from mdistiller.training.trainer import Trainer
from mdistiller.types import AnyBatch, Outputs

_BATCHES = 8


def measure_weights(
    trainer: Trainer, source: AnySource, names: Sequence[str], ratio: float = 1.0
) -> dict[str, float]:
    """Measures the weights of a run on the first batches, without an update.

    A weight is such that the norm of the gradient of its loss for the student is `ratio` times that of the
    weighted task loss: the geometric mean over the batches, at the end of a warm-up, rounded to two digits.
    Batches in which a loss has no gradient are left out, such as those of images without an object.

    Args:
        trainer: the run, built with 1 for the weights that are measured.
        source: its batches, from which none has been taken.
        names: dotted fields of its weights.
        ratio: norm of a loss's gradient, as a multiple of the norm of the task's.

    Raises:
        ConfigError: a loss has no gradient for the student, or one that is not finite.
    """
    logs: dict[str, list[float]] = {name: [] for name in names}
    for found in _ratios(trainer, source, names):
        for name, value in found.items():
            if value:
                logs[name].append(math.log(value))
    return {name: _weight(name, values, ratio) for name, values in logs.items()}


def first_strengths(trainer: Trainer, source: AnySource) -> dict[str, float]:
    """Returns the gradient of a method, or of the parts of a sum, as multiples of the task's, by name.

    It is that of the first batch in which all have one, measured as in `measure_weights`.
    """
    method = trainer.config.method
    parts = method.parts() if "+" in method.method_name else {}
    names = [f"method.{field}.weight" for field in parts] or ["method.weight"]
    for found in _ratios(trainer, source, names):
        if all(found.values()):
            break
    factors = [dict(method)[f"{field}_weight"] for field in parts] or [1.0]
    subjects = [part.method_name for part in parts.values()] or [method.method_name]
    return {s: f * found[n] for s, f, n in zip(subjects, factors, names, strict=True)}


def _ratios(trainer: Trainer, source: AnySource, names: Sequence[str]) -> Iterator[dict[str, float]]:
    for step, raw in enumerate(islice(source.loader.epoch(0), _BATCHES)):
        (batch,) = source.prepare([raw], step)
        trainer.seed_step(step)
        (teacher,) = trainer.distiller.ask_ahead([batch])
        yield gradient_ratios(trainer, batch, teacher, names)


def _weight(name: str, logs: Sequence[float], ratio: float) -> float:
    mean = sum(logs) / len(logs) if logs else math.nan
    if not math.isfinite(mean):
        raise ConfigError(
            f"{name}: auto needs gradients of task and method at the student's parameters, and one of them "
            "is zero or not finite; allowed: a number, 0 or more"
        )
    return float(f"{ratio * math.exp(-mean):.2g}")


def gradient_ratios(
    trainer: Trainer, batch: AnyBatch, teacher: Outputs | None, names: Sequence[str]
) -> dict[str, float]:
    """Returns the norm of the gradient of each loss divided by that of the task loss.

    Only parameters of the student that both reach are counted. The gradients are those of the whole batch:
    the mean over its parts and over all processes.
    """
    distiller, world, update = trainer.distiller.train(), trainer.world, trainer.update
    trainer.phases.start(probing=False)
    parameters = [p for p in trainer.student.parameters() if p.requires_grad]
    ends = torch.ones((), device=world.device)  # of a warm-up
    scale = 1.0 if update.scaler is None else 1024.0  # float16 would lose small gradients
    methods = {name: _methods(trainer, name) for name in names}
    sums: dict[str, list[Tensor]] = {}
    reached: dict[str, list[bool]] = {}
    for part, outputs in update.split(batch, teacher):
        with _recorded(methods) as recorded, update.autocast:
            task = distiller(part[0], part[1], part[2], ends, outputs).task
        share = scale * len(part.index) / len(batch.index)
        losses = {"task": torch.stack(list(task.values())).sum()}
        for name, found in recorded.items():  # the sum over a method's losses, the mean over teachers
            losses[name] = torch.stack(found).sum() / len(methods[name])
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss * share, parameters, retain_graph=True, allow_unused=True)
            reached[name] = [g is not None for g in gradients]
            pairs = zip(gradients, parameters, strict=True)
            new = [torch.zeros_like(p) if g is None else g for g, p in pairs]
            sums[name] = new if name not in sums else [a + b for a, b in zip(sums[name], new, strict=True)]
    ratios = {}
    for name in names:
        shared = [a and b for a, b in zip(reached[name], reached["task"], strict=True)]
        own, task_norm = (_norm(sums[n], shared, trainer) for n in (name, "task"))
        ratios[name] = own / task_norm if task_norm else 0.0
    return ratios


def _norm(gradients: Sequence[Tensor], shared: Sequence[bool], trainer: Trainer) -> float:
    kept = [g.float().flatten() for g, both in zip(gradients, shared, strict=True) if both]
    return trainer.world.mean(torch.cat(kept)).norm().item() if kept else 0.0


def _methods(trainer: Trainer, name: str) -> list[Method]:
    """Returns the methods with a weight: with several teachers, several have one config."""
    part = find_field(trainer.config, name.rpartition(".")[0])
    return [m for m in trainer.distiller.modules() if isinstance(m, Method) and m.config is part]


@contextmanager
def _recorded(methods: Mapping[str, Sequence[Method]]) -> Iterator[dict[str, list[Tensor]]]:
    """Context in which the losses of methods are recorded, by the name of their weight."""
    found: dict[str, list[Tensor]] = {name: [] for name in methods}

    def record(name: str, method: Method, inputs: object, losses: dict[str, Tensor]) -> None:
        found[name].extend(losses.values())

    with ExitStack() as hooks:
        for name, own in methods.items():
            for method in own:
                hooks.enter_context(method.register_forward_hook(partial(record, name)))
        yield found


def describe_weight(config: RunConfig, name: str, weight: float, ratio: float) -> str:
    """Returns a line about a measured weight."""
    size = "as large as" if ratio == 1 else f"{ratio:g} times"
    method = find_field(config, name.rpartition(".")[0]).method_name
    return f"{name} {weight:g}: makes {method}'s first gradients {size} the task's"
