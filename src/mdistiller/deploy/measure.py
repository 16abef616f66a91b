"""Cost of a model: multiply-accumulates, and time on the CPU."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mdistiller.runs.environment import Machine
from mdistiller.training.deployment import Model

_ROUNDS = 3


class Speed(BaseModel, frozen=True):
    """Median milliseconds an image of a model, by batch size, on a machine."""

    machine: Machine
    ms: dict[int, float]
    float_ms: dict[int, float] | None = None
    """Times of the float32 graph that was quantized; None for other files."""

    def __str__(self) -> str:
        texts = {n: f"{ms:.3g}" for n, ms in self.ms.items()}
        texts |= {n: f"{texts[n]} (float32 {ms:.3g})" for n, ms in (self.float_ms or {}).items()}
        return ", ".join(f"{text} at batch {batch}" for batch, text in texts.items())


@torch.no_grad()
def count_macs(model: Callable[[Tensor], object], image: Tensor) -> int:
    """Counts the multiply-accumulates of convolutions, matrix products and attention in one pass.

    They are half of the operations that `torch.utils.flop_counter` counts. Element-wise operations, such as
    batch norm and activations, are not among them.
    """
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


@torch.no_grad()
def milliseconds(calls: Sequence[tuple[Model, Tensor]], count: int, seconds: float = 0.5) -> list[float]:
    """Times models on the CPU; returns the median milliseconds an image of each.

    The models take turns, so that a disturbance affects all of them. The first call of a turn is not timed:
    it warms caches up, and threads of the model before may still spin.

    Args:
        calls: models, each with a batch of prepared images.
        count: images of a batch.
        seconds: timed calls of a model go on for this long, and are three or more.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for (model, images), found in zip(calls, times, strict=True):
            model(images)
            end = time.perf_counter() + seconds / _ROUNDS
            while True:
                start = time.perf_counter()
                model(images)
                now = time.perf_counter()
                found.append(now - start)
                if now >= end:
                    break
    return [1000 * statistics.median(found) / count for found in times]
