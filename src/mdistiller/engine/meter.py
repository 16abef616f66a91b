"""Training figures, added up on the device and read from it rarely."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdistiller.engine.log import RunFolder
from mdistiller.engine.optim import learning_rate
from mdistiller.errors import TrainingError

if TYPE_CHECKING:
    from mdistiller.engine.loop import Loop

FLUSH_SECONDS = 10.0  # how often figures may be read from the device within an epoch


class Meter:
    """Adds up figures on the device; reads them once a window, at most every ten seconds."""

    def __init__(self, trainer: Loop, run: RunFolder | None) -> None:
        self.trainer = trainer
        self.run = run
        self.window: dict[str, Tensor] = {}
        self.pending: list[tuple[int, int, dict[str, Tensor]]] = []
        self.steps = 0
        self.epoch_sums: dict[str, float] = {}
        self.flushed = time.perf_counter()
        self.bad_step = torch.full((), -1, device=trainer.world.device)

    def add(self, sums: dict[str, Tensor]) -> None:
        """Take the sums of one step, as `Trainer.train_step` gives them."""
        for name, value in sums.items():
            self.window[name] = self.window[name] + value if name in self.window else value
        # Without a look at the value, which would wait for the device.
        bad = ~torch.isfinite(sums["loss"]) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, self.trainer.step, self.bad_step)
        self.steps += 1
        if self.steps == self.trainer.config.log_every:
            self._close()
            # With several processes, clocks that differ would put collectives in different orders.
            if self.trainer.world.size == 1 and time.perf_counter() - self.flushed > FLUSH_SECONDS:
                self.flush()

    def state_dict(self) -> dict[str, Any]:
        """What has been added up and is not written yet; call `flush(close=False)` before."""
        return {"window": dict(self.window), "steps": self.steps, "epoch_sums": dict(self.epoch_sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        device = self.trainer.world.device
        self.window = {name: value.to(device) for name, value in state["window"].items()}
        self.steps, self.epoch_sums = state["steps"], dict(state["epoch_sums"])

    def _close(self) -> None:
        if self.steps:
            self.pending.append((self.trainer.step, self.trainer.epoch + 1, self.window))
            self.window, self.steps = {}, 0

    def flush(self, *, close: bool = True) -> None:
        """Read the pending windows from the device and write their lines.

        Args:
            close: take in the window that is not full, too.

        Raises:
            TrainingError: a loss was not finite; the message has the step and all losses of its window.
        """
        bad = self.trainer.world.sum((self.bad_step >= 0).float()).item() > 0
        if close or bad:  # a state with a bad loss in its open window must not be saved
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
                raise TrainingError(
                    f"a loss is not finite: first in step {int(self.bad_step.item())}; "
                    f"means of the steps up to {step}: {figures}. Earlier states are kept"
                )
            if self.run is not None:
                lr = learning_rate(self.trainer.config.optim, step - 1, self.trainer.total)
                self.run.log({"kind": "train", "step": step, "epoch": epoch, "lr": lr, **means})
        self.pending = []
        self.flushed = time.perf_counter()

    def epoch_means(self) -> dict[str, float]:
        """Means over the images seen since the last call."""
        means = _means(self.epoch_sums)
        self.epoch_sums = {}
        return means


def _means(sums: dict[str, float]) -> dict[str, float]:
    return {name: value / sums["n"] for name, value in sums.items() if name != "n"}
