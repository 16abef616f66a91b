"""Training metrics, added up on the device and read from it rarely."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mdistiller.errors import TrainingError
from mdistiller.training.distributed import World
from mdistiller.training.precision import sum_dtype
from mdistiller.types import Line

FLUSH_SECONDS = 10.0  # shortest time between two reads from the device within an epoch


class TrainingMetrics:
    """Sums of a run's metrics on the device, read once per window of steps, at most every ten seconds.

    Args:
        world: this process; sums are taken over all processes.
        log_every: steps of a window.
        log: writes the line of a window.
        lr: learning rate of a step (from 0).
    """

    def __init__(
        self,
        world: World,
        log_every: int,
        log: Callable[[Line], None],
        lr: Callable[[int], float],
    ) -> None:
        self.world, self.log_every, self.log, self.lr = world, log_every, log, lr
        # By the names of a step's sums. All sums of a step are one tensor: an operation for each of them
        # would take longer than some steps.
        self.window: dict[tuple[str, ...], Tensor] = {}
        self.pending: list[tuple[int, int, dict[str, Tensor]]] = []
        self.closed: dict[str, Tensor] = {}  # the last window that is finished
        self.losses: list[tuple[int, Tensor]] = []  # by step, since the last check
        self.steps = 0
        self.epoch_sums: dict[str, float] = {}
        self.flushed = time.perf_counter()

    def add(self, sums: dict[str, Tensor], step: int, epoch: int) -> None:
        """Adds the sums of one step, as `Update` returns them; `step` and `epoch` count from 1."""
        names, values = tuple(sums), torch.stack(list(sums.values()))
        self.window[names] = self.window[names] + values if names in self.window else values
        self.losses.append((step, sums["loss"]))
        self.steps += 1
        if self.steps == self.log_every:
            self._close(step, epoch)
            # With several processes, clocks that differ would put collectives in different orders.
            if self.world.size == 1 and time.perf_counter() - self.flushed > FLUSH_SECONDS:
                self.flush(step, epoch)

    def state_dict(self) -> Line:
        """Returns the sums that are not written yet; call `flush(..., close=False)` before."""
        window = [(list(names), values) for names, values in self.window.items()]
        return {"window": window, "steps": self.steps, "epoch_sums": dict(self.epoch_sums)}

    def load_state_dict(self, state: Line) -> None:
        """Restores the sums from `state_dict`."""
        self.window = {tuple(names): values.to(self.world.device) for names, values in state["window"]}
        self.steps, self.epoch_sums = state["steps"], dict(state["epoch_sums"])

    def _close(self, step: int, epoch: int) -> None:
        if self.steps:
            self.closed = self._open_sums()
            self.pending.append((step, epoch, self.closed))
            self.window, self.steps = {}, 0

    def _open_sums(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for names, values in self.window.items():
            for name, value in zip(names, values.unbind(), strict=True):
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def recent(self) -> dict[str, float]:
        """Returns this process's means over the open window and the one before; {} before the first step.

        A call waits for the device, changes nothing, and is no collective: any process may call it any time.
        """
        sums = dict(self.closed)
        for name, value in self._open_sums().items():
            sums[name] = sums[name] + value if name in sums else value
        values = torch.stack(list(sums.values())).tolist() if sums else []
        return _means(dict(zip(sums, values, strict=True)))

    def flush(self, step: int, epoch: int, *, close: bool = True) -> None:
        """Reads the finished windows from the device and writes their lines.

        Args:
            step: steps done.
            epoch: number of the epoch under way, from 1.
            close: finish the open window, too.

        Raises:
            TrainingError: a loss was not finite; the message has the step and all losses of its window.
        """
        bad = self._bad_step()
        if close or bad is not None:  # a state with a bad loss in its open window must not be saved
            self._close(step, epoch)
        for last, number, window in self.pending:
            names = list(window)
            values = torch.stack([window[name].to(sum_dtype(self.world.device)) for name in names])
            sums = dict(zip(names, self.world.sum(values).tolist(), strict=True))
            for name, value in sums.items():
                self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
            means = _means(sums)
            if not all(map(math.isfinite, means.values())):
                shown = ", ".join(f"{name} {value:g}" for name, value in means.items())
                first = "" if bad is None else f": first in step {bad}"
                raise TrainingError(
                    f"a loss is not finite{first}; "
                    f"means of the steps up to {last}: {shown}. Earlier states are kept"
                )
            self.log({"kind": "train", "step": last, "epoch": number, "lr": self.lr(last - 1), **means})
        self.pending = []
        self.flushed = time.perf_counter()

    def _bad_step(self) -> int | None:
        """Returns the first step since the last check whose loss was not finite, in any process."""
        losses, self.losses = self.losses, []
        finite = torch.stack([loss for _, loss in losses]).isfinite().tolist() if losses else []
        first = next((step for (step, _), good in zip(losses, finite, strict=True) if not good), None)
        return min((step for step in self.world.gather(first) if step is not None), default=None)

    def epoch_means(self) -> dict[str, float]:
        """Returns the means over the images since the last call."""
        means = _means(self.epoch_sums)
        self.epoch_sums = {}
        return means


def _means(sums: dict[str, float]) -> dict[str, float]:
    return {name: value / sums["n"] for name, value in sums.items() if name != "n"}
