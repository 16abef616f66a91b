"""SIGTERM and Ctrl-C: the step under way is finished, and all processes stop at the same one."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from mdistiller.training.distributed import World

# Several processes have to agree before they stop or save, which costs a message each time.
_AGREE_EVERY = 20
_MOMENT = 1.0  # seconds


def agreed(world: World, step: int, count: int, wish: bool) -> bool:
    """Whether any process has a wish, asked after the `count` steps that follow `step`; the same in all."""
    if world.size == 1:
        return wish
    if step // _AGREE_EVERY == (step + count) // _AGREE_EVERY:
        return False
    return bool(world.sum(torch.tensor(float(wish), device=world.device)).item())


class Stop:
    """A request to stop, made by a signal to any process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: str | None = None
        self.answered = False  # a run has ended for it

    @property
    def reason(self) -> str:
        """Name of the signal."""
        return self.signal or "a signal to another process"

    def requested(self, step: int, count: int) -> bool:
        """Returns True in every process if one was told to stop; called `count` steps after `step`."""
        return agreed(self.world, step, count, self.signal is not None)


@contextmanager
def stop_on_signals(world: World) -> Iterator[Stop]:
    """Context in which SIGTERM and SIGINT are requests to stop; a second signal has its usual effect.

    The two of them within a moment are one request: launchers pass Ctrl-C on as SIGTERM to processes that got
    it from the terminal already. A request that ended no run, for all were at their last step, has the usual
    effect on leaving: a program that trains one run after another must not start the next.
    """
    stop = Stop(world)
    if threading.current_thread() is not threading.main_thread():  # handlers can be set only there
        yield stop
        return
    usual = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    taken: list[tuple[int, float]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not taken:
            taken.append((number, now))
            stop.signal = signal.Signals(number).name
        elif number == taken[0][0] or now - taken[0][1] > _MOMENT:
            signal.signal(number, usual[number])
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if taken and not stop.answered:
        signal.raise_signal(taken[0][0])
