"""Training figures, added up on the device and read from it rarely."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdistiller.engine.log import RunFolder
from mdistiller.engine.optim import learning_rate
from mdistiller.errors import TrainingError

if TYPE_CHECKING:
    from mdistiller.engine.trainer import Trainer

FLUSH_SECONDS = 10.0  # how often figures may be read from the device within an epoch


class Meter:
    """Adds up figures on the device; reads them once a window, at most every ten seconds."""

    def __init__(self, trainer: Trainer, run: RunFolder | None) -> None:
        self.trainer = trainer
        self.run = run
        self.window: dict[str, Tensor] = {}
        self.pending: list[tuple[int, int, dict[str, Tensor]]] = []
        self.steps = 0
        self.epoch_sums: dict[str, float] = {}
        self.flushed = time.perf_counter()

    def add(self, sums: dict[str, Tensor]) -> None:
        """Take the sums of one step, as `Trainer.train_step` gives them."""
        for name, value in sums.items():
            self.window[name] = self.window[name] + value if name in self.window else value
        self.steps += 1
        if self.steps == self.trainer.config.log_every:
            self._close()
            # With several processes, clocks that differ would put collectives in different orders.
            if self.trainer.world.size == 1 and time.perf_counter() - self.flushed > FLUSH_SECONDS:
                self.flush()

    def _close(self) -> None:
        if self.steps:
            self.pending.append((self.trainer.step, self.trainer.epoch + 1, self.window))
            self.window, self.steps = {}, 0

    def flush(self) -> None:
        """Read the pending windows from the device and write their lines."""
        self._close()
        for step, epoch, window in self.pending:
            names = list(window)
            values = torch.stack([window[name].double() for name in names])
            sums = dict(zip(names, self.trainer.world.sum(values).tolist(), strict=True))
            for name, value in sums.items():
                self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
            means = _means(sums)
            if not all(value == value and abs(value) != float("inf") for value in means.values()):
                raise TrainingError(f"a loss is not finite in the steps up to {step}: {means}")
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
