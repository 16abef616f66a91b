"""Training figures, added up on the device and read from it rarely."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdistiller.errors import TrainingError
from mdistiller.runs.folder import RunFolder
from mdistiller.training.optim import learning_rate

if TYPE_CHECKING:
    from mdistiller.training.trainer import Loop

FLUSH_SECONDS = 10.0  # how often figures may be read from the device within an epoch


class Meter:
    """Adds up figures on the device; reads them once a window, at most every ten seconds."""

    def __init__(self, trainer: Loop, run: RunFolder | None) -> None:
        self.trainer = trainer
        self.run = run
        # By the names of a step's sums, all of them in one tensor: an operation of the device for each
        # would take longer than some steps.
        self.window: dict[tuple[str, ...], Tensor] = {}
        self.pending: list[tuple[int, int, dict[str, Tensor]]] = []
        self.losses: list[tuple[int, Tensor]] = []  # by step, since the last look at them
        self.steps = 0
        self.epoch_sums: dict[str, float] = {}
        self.flushed = time.perf_counter()

    def add(self, sums: dict[str, Tensor]) -> None:
        """Take the sums of one step, as `Trainer.train_step` gives them."""
        names, values = tuple(sums), torch.stack(list(sums.values()))
        self.window[names] = self.window[names] + values if names in self.window else values
        self.losses.append((self.trainer.step, sums["loss"]))
        self.steps += 1
        if self.steps == self.trainer.config.log_every:
            self._close()
            # With several processes, clocks that differ would put collectives in different orders.
            if self.trainer.world.size == 1 and time.perf_counter() - self.flushed > FLUSH_SECONDS:
                self.flush()

    def state_dict(self) -> dict[str, Any]:
        """What has been added up and is not written yet; call `flush(close=False)` before."""
        window = [(list(names), values) for names, values in self.window.items()]
        return {"window": window, "steps": self.steps, "epoch_sums": dict(self.epoch_sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        device = self.trainer.world.device
        self.window = {tuple(names): values.to(device) for names, values in state["window"]}
        self.steps, self.epoch_sums = state["steps"], dict(state["epoch_sums"])

    def _close(self) -> None:
        if self.steps:
            sums: dict[str, Tensor] = {}
            for names, values in self.window.items():
                for name, value in zip(names, values.unbind(), strict=True):
                    sums[name] = sums[name] + value if name in sums else value
            self.pending.append((self.trainer.step, self.trainer.epoch + 1, sums))
            self.window, self.steps = {}, 0

    def flush(self, *, close: bool = True) -> None:
        """Read the pending windows from the device and write their lines.

        Args:
            close: take in the window that is not full, too.

        Raises:
            TrainingError: a loss was not finite; the message has the step and all losses of its window.
        """
        bad = self._bad_step()
        if close or bad is not None:  # a state with a bad loss in its open window must not be saved
            self._close()
        for step, epoch, window in self.pending:
            names = list(window)
            values = torch.stack([window[name].double() for name in names])
            sums = dict(zip(names, self.trainer.world.sum(values).tolist(), strict=True))
            for name, value in sums.items():
                self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
            means = _means(sums)
            if not all(map(math.isfinite, means.values())):
                figures = ", ".join(f"{name} {value:g}" for name, value in means.items())
                first = "" if bad is None else f": first in step {bad}"
                raise TrainingError(
                    f"a loss is not finite{first}; "
                    f"means of the steps up to {step}: {figures}. Earlier states are kept"
                )
            if self.run is not None:
                lr = learning_rate(self.trainer.config.optim, step - 1, self.trainer.total)
                self.run.log({"kind": "train", "step": step, "epoch": epoch, "lr": lr, **means})
        self.pending = []
        self.flushed = time.perf_counter()

    def _bad_step(self) -> int | None:
        """The first step since the last look whose loss was not finite, in any process."""
        losses, self.losses = self.losses, []
        finite = torch.stack([loss for _, loss in losses]).isfinite().tolist() if losses else []
        first = next((step for (step, _), good in zip(losses, finite, strict=True) if not good), None)
        return min((step for step in self.trainer.world.gather(first) if step is not None), default=None)

    def epoch_means(self) -> dict[str, float]:
        """Means over the images seen since the last call."""
        means = _means(self.epoch_sums)
        self.epoch_sums = {}
        return means


def _means(sums: dict[str, float]) -> dict[str, float]:
    return {name: value / sums["n"] for name, value in sums.items() if name != "n"}
