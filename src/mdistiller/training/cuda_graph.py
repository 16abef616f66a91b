"""A whole optimisation step as one CUDA graph: forward, backward, clipping, optimizer, moving average.

A step on a batch of small images is several hundred kernels, each of which takes less time than its launch.
A graph has them all and is launched once. Python does not run in a replay: whatever changes from step to step
has to be a tensor that stays in its place.
"""

from __future__ import annotations

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

# Steps before the capture: kernels are chosen and compiled, the optimizer makes its buffers.
WARMUP = 3


def wants_graph(config: Any, images: ImageSet | StreamSet, world: World) -> bool:
    """Whether the steps of a run are to be captured.

    Raises:
        ConfigError: `cuda_graph` is "on" where that can't be.
    """
    if config.cuda_graph == "off":
        return False
    reasons = {
        "it needs a GPU": world.device.type != "cuda",
        "it needs a single process": world.size > 1,
        "DOT has no captured form": config.optim.name == "dot",
        "float16's loss scaling looks at the gradients": config.precision == "float16",
        "the images have to be in memory": isinstance(images, StreamSet),
    }
    if config.cuda_graph == "on":
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(f"cuda_graph: {reason}; allowed here are auto and off")
        return True
    # A plug-in's Python would run once and not again. The first steps after a start are no replays, and
    # whether those give the same bits is not known.
    return not (any(reasons.values()) or config.plugins or config.deterministic)


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """A device's stream for warm-up and capture: one, since each keeps memory of its own."""
    return torch.cuda.Stream(index)


def warm_up(step: Callable[[], T]) -> tuple[T, bool]:
    """Run a step on a stream of its own, as a capture wants it; and whether it waited for the device."""
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
    waited = False
    for warning in caught:
        text = str(warning.message)
        waited = waited or _WAITED in text
        if not any(known in text for known in (_WAITED, *_NOTICES)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, waited


_WAITED = "synchronizing CUDA operation"
_NOTICES = (
    "without CUDA graph capture",  # an optimizer that was made for a capture, of steps outside of one
    "Synchronization debug mode is a prototype",
)


def record(step: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Capture a step, which computes nothing yet; its result's tensors, and what computes them anew."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    here, device = torch.cuda.current_stream(), torch.cuda.current_device()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_side_stream(device)):
            result = step()
    except BaseException:
        # Where the device has ended a capture, torch's own end of it fails half-way, and leaves its stream
        # and its memory in force.
        torch.cuda.set_stream(here)
        with suppress(RuntimeError):  # it was ended
            torch._C._cuda_endAllocateToPool(device, pool)
        raise
    return result, graph.replay


class StepGraph:
    """A step that is captured after a few calls, and replayed from then on.

    Batches of another shape, such as an epoch's last, go through the step as it is. The first replay is held
    against the step as it is, from the same state: where they differ, where the step waits for the device,
    where the capture fails or memory does not suffice, there is a warning and no graph.

    Args:
        step: reads nothing that changes but its arguments and tensors that stay in place; leaves no
            gradients.
        state: the tensors that a step changes in place, by kind; the same ones from the second step on.
        training: whether the step is that of training mode just now.
        warm, capture: `warm_up` and `record`, or what stands for them where there is no GPU.
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
        """Start anew: the tensors of the state are others now."""
        self.seen: Counter[Hashable] = Counter()
        self.key: Hashable = None
        self.names: list[str] = []
        self.inputs: list[Tensor] = []
        self.figures = torch.empty(0)
        self.replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch, teacher: Outputs) -> dict[str, Tensor]:
        """What `step` gives, in tensors of its own."""
        key = (self.training(), *teacher.features, *((x.shape, x.dtype) for x in _tensors(batch, teacher)))
        if self.replay is not None and key == self.key:
            return self._replay(batch, teacher)
        if self.failed or self.replay is not None:
            return self.step(batch, teacher)
        self.seen[key] += 1
        if self.seen[key] <= WARMUP:
            figures, waited = self.warm(lambda: self.step(batch, teacher))
            if waited and self.seen[key] == WARMUP:
                self._give_up("a step waits for the device")
            return figures
        try:
            self._capture(batch, teacher)
            self.key = key
            return self._compare(batch, teacher)
        except RuntimeError as error:
            reason = str(error)
        # Not above, where the error still holds all memory of the capture.
        self._give_up(f"the capture failed: {reason}")
        for parameter in self.state()["parameters"]:
            parameter.grad = None
        return self.step(batch, teacher)

    def _give_up(self, reason: str) -> None:
        self.forget()
        self.failed = True
        warnings.warn(f"cuda_graph: no graph for this run's steps: {reason}", stacklevel=2)

    def _capture(self, batch: Batch, teacher: Outputs) -> None:
        inputs = [x.clone() for x in _tensors(batch, teacher)]
        image, label, index, logits, *features = inputs
        still = Outputs(logits, dict(zip(teacher.features, features, strict=True)))

        def step() -> Tensor:
            figures = self.step(Batch(image, label, index), still)
            self.names = list(figures)
            return torch.stack(list(figures.values()))

        self.figures, self.replay = self.capture(step)
        self.inputs = inputs

    def _replay(self, batch: Batch, teacher: Outputs) -> dict[str, Tensor]:
        for place, value in zip(self.inputs, _tensors(batch, teacher), strict=True):
            place.copy_(value)
        assert self.replay is not None
        self.replay()
        # The next replay overwrites what this one gave.
        return dict(zip(self.names, self.figures.clone().unbind(), strict=True))

    def _compare(self, batch: Batch, teacher: Outputs) -> dict[str, Tensor]:
        """The first replay and the step as it is: one step in all."""
        tensors = self.state()
        before = _clone(tensors)
        device = batch.image.device
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
    for kind, places in tensors.items():
        for place, value in zip(places, values[kind], strict=True):
            place.copy_(value)


def _near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two steps have the same figures, but for rounding, which may turn a hit into a miss."""
    names = [name for name in expected if name != "top1"]
    a, b = (torch.stack([figures[name] for name in names]) for figures in (found, expected))
    return bool(torch.isclose(a, b, rtol=0.02, atol=1e-4).all())


@torch.no_grad()
def _close(before: list[Tensor], after: list[Tensor], found: list[Tensor]) -> bool:
    """Whether two steps from one state ended in the same one, but for the order of their sums.

    By the norm of all tensors together: a gradient that is zero but for rounding differs by itself.
    """
    exact = [(a, b) for a, b in zip(after, found, strict=True) if not a.is_floating_point()]
    if not all(torch.equal(a, b) for a, b in exact):
        return False

    def norm(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
        parts = [
            (a if b is None else a.double() - b.double()).double().square().sum()
            for a, b in pairs
            if a.is_floating_point()
        ]
        return torch.stack(parts).sum().sqrt() if parts else torch.zeros(())

    difference = norm(zip(found, after, strict=True))
    allowed = 0.05 * norm(zip(after, before, strict=True)) + 1e-5 * norm((a, None) for a in after)
    return bool(difference <= allowed)
