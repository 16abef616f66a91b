"""A whole optimization step as one CUDA graph: forward, backward, clipping, optimizer, moving average.

A step on a batch of small images consists of several hundred kernels, each of which takes less time than its
launch. A graph holds them all and is launched once. Python does not run in a replay: everything that changes
from step to step has to be a tensor that keeps its address.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from mdistiller.data import ImageSet, StreamSet
from mdistiller.errors import ConfigError
from mdistiller.training.distributed import World
from mdistiller.types import Batch, Outputs

T = TypeVar("T")
Step = Callable[[Batch, Outputs], dict[str, Tensor]]
Tensors = dict[str, list[Tensor]]

# Steps before the capture, in which kernels are chosen and compiled and the optimizer makes its buffers.
WARMUP = 3


def wants_graph(config: Any, images: ImageSet | StreamSet, world: World) -> bool:
    """Whether the steps of a run are captured.

    Raises:
        ConfigError: `cuda_graph` is "on" where that is impossible.
    """
    if config.cuda_graph == "off":
        return False
    reasons = {
        "it needs a GPU": world.device.type != "cuda",
        "it needs a single process": world.size > 1,
        "gradient checkpointing reads the random state": config.gradient_checkpointing,
        "DOT has no captured form": config.optim.has_momenta,
        "float16's loss scaling looks at the gradients": config.precision == "float16",
        "the images have to be in memory": isinstance(images, StreamSet),
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if config.cuda_graph == "on" and against:
        raise ConfigError(f"cuda_graph: {against[0]}; allowed here are auto and off")
    # A plug-in's Python would run once and not again. The first steps after a start are no replays, and
    # nothing shows that these have the same bits.
    return config.cuda_graph == "on" or not (against or config.plugins or config.deterministic)


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """Returns a device's stream for warm-up and capture; a single one, since each keeps memory of its own."""
    return torch.cuda.Stream(index)


def warm_up(step: Callable[[], T]) -> tuple[T, bool]:
    """Runs a step on a stream of its own; returns its result, and whether it waited for the device."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(stream):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    for w in caught:
        if not any(known in str(w.message) for known in (_WAITED, *_NOTICES)):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return result, any(_WAITED in str(w.message) for w in caught)


_WAITED = "synchronizing CUDA operation"
# The first is of an optimizer that was made for a capture, about steps outside of one.
_NOTICES = ("without CUDA graph capture", "Synchronization debug mode is a prototype")


def record(step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Captures a step without computing it; returns its result's tensors and the function that replays it."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    here, device = torch.cuda.current_stream(), torch.cuda.current_device()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_side_stream(device)):
            result = step()
    except BaseException:
        # If the device has ended the capture, torch's own clean-up fails half-way, and leaves its stream and
        # its memory pool in use.
        torch.cuda.set_stream(here)
        with suppress(RuntimeError):  # ended already
            torch._C._cuda_endAllocateToPool(device, pool)
        raise
    return result, graph.replay


class StepGraph:
    """Step that is captured after a few calls, and replayed from then on.

    Batches of another shape, such as an epoch's last, run eagerly. The first replay is compared with the
    eager step from the same state. If they differ, if the step waits for the device, if the capture fails or
    memory does not suffice, there is a warning and no graph.

    Args:
        step: the eager step; its only changing inputs are its arguments and tensors that keep their address,
            and it leaves no gradients.
        state: returns the tensors that a step changes in place, by kind; the same from the second step on.
        training: returns whether the module is in training mode.
        warm, capture: `warm_up` and `record`, or replacements where there is no GPU.
    """

    def __init__(
        self,
        step: Step,
        state: Callable[[], Tensors],
        training: Callable[[], bool],
        *,
        warm: Callable[[Callable[[], dict[str, Tensor]]], tuple[dict[str, Tensor], bool]] = warm_up,
        capture: Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]] = record,
    ) -> None:
        self.step, self.state, self.training = step, state, training
        self.warm, self.capture = warm, capture
        self.failed = False
        self.forget()

    def forget(self) -> None:
        """Drops the graph, because the tensors of the state have been replaced."""
        self.seen: Counter[Hashable] = Counter()
        self.key: Hashable = None
        self.names: list[str] = []
        self.inputs: list[Tensor] = []
        self.metrics = torch.empty(0)
        self.replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch, teacher: Outputs) -> dict[str, Tensor]:
        """Runs or replays the step; returns its result in new tensors."""
        key = (self.training(), *teacher.features, *((x.shape, x.dtype) for x in _tensors(batch, teacher)))
        if self.replay is not None and key == self.key:
            return self._replay(batch, teacher)
        if self.failed or self.replay is not None:
            return self.step(batch, teacher)
        self.seen[key] += 1
        if self.seen[key] <= WARMUP:
            metrics, waited = self.warm(lambda: self.step(batch, teacher))
            if waited and self.seen[key] == WARMUP:
                self._give_up("a step waits for the device")
            return metrics
        try:
            self._capture(batch, teacher)
            self.key = key
            return self._compare(batch, teacher)
        except RuntimeError as error:
            reason = str(error)
        # Not in the `except`, where the error still holds all memory of the capture.
        self._give_up(f"the capture failed: {reason}")
        for parameter in self.state()["parameters"]:
            parameter.grad = None
        return self.step(batch, teacher)

    def _give_up(self, reason: str) -> None:
        self.forget()
        self.failed = True
        warnings.warn(f"cuda_graph: no graph for this run's steps: {reason}", stacklevel=2)

    def _capture(self, batch: Batch, teacher: Outputs) -> None:
        self.inputs = [x.clone() for x in _tensors(batch, teacher)]
        image, label, index, logits, *features = self.inputs
        still = Outputs(logits, dict(zip(teacher.features, features, strict=True)))

        def step() -> Tensor:
            metrics = self.step(Batch(image, label, index), still)
            self.names = list(metrics)
            return torch.stack(list(metrics.values()))

        self.metrics, self.replay = self.capture(step)

    def _replay(self, batch: Batch, teacher: Outputs) -> dict[str, Tensor]:
        for target, value in zip(self.inputs, _tensors(batch, teacher), strict=True):
            target.copy_(value)
        assert self.replay is not None
        self.replay()
        # Cloned, because the next replay overwrites the result.
        return dict(zip(self.names, self.metrics.clone().unbind(), strict=True))

    def _compare(self, batch: Batch, teacher: Outputs) -> dict[str, Tensor]:
        """Runs the eager step and the first replay from the same state; together they count as one step."""
        tensors, device = self.state(), batch.image.device
        before = _clone(tensors)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                expected = self.step(batch, teacher)
            after = _clone(tensors)
        except RuntimeError:  # no memory for both
            _restore(tensors, before)
            raise
        _restore(tensors, before)
        found = self._replay(batch, teacher)
        same = list(found) == list(expected) and _near(found, expected)
        if not (same and all(_close(before[kind], after[kind], tensors[kind]) for kind in tensors)):
            _restore(tensors, after)
            self._give_up("its first replay differs from the step")
            return expected
        return found


def _tensors(batch: Batch, teacher: Outputs) -> list[Tensor]:
    return [*batch, teacher.logits, *teacher.features.values()]


@torch.no_grad()
def _clone(tensors: Tensors) -> Tensors:
    return {kind: [x.detach().clone() for x in values] for kind, values in tensors.items()}


@torch.no_grad()
def _restore(tensors: Tensors, values: Tensors) -> None:
    for kind, targets in tensors.items():
        for target, value in zip(targets, values[kind], strict=True):
            target.copy_(value)


def _near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two steps have the same metrics up to rounding, which may turn a hit into a miss."""
    names = [name for name in expected if name != "top1"]
    a, b = (torch.stack([metrics[name] for name in names]) for metrics in (found, expected))
    return bool(torch.isclose(a, b, rtol=0.02, atol=1e-4).all())


@torch.no_grad()
def _close(before: list[Tensor], after: list[Tensor], found: list[Tensor]) -> bool:
    """Whether two steps from one state end in the same state, up to the order of their sums.

    The norm is over all tensors together: by itself, a gradient that is zero up to rounding would differ.
    """
    if any(not a.is_floating_point() and not torch.equal(a, b) for a, b in zip(after, found, strict=True)):
        return False

    def norm(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
        floats = [(a.double(), b) for a, b in pairs if a.is_floating_point()]
        parts = [(a if b is None else a - b.double()).square().sum() for a, b in floats]
        return torch.stack(parts).sum().sqrt() if parts else torch.zeros(())

    difference = norm(zip(found, after, strict=True))
    allowed = 0.05 * norm(zip(after, before, strict=True)) + 1e-5 * norm((a, None) for a in after)
    return bool(difference <= allowed)
