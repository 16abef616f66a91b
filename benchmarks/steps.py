"""Steps of a built run, one by one, for benchmarks that time them."""

from collections import deque
from collections.abc import Callable

import numpy as np

from mdistiller.training.batches import AnySource
from mdistiller.training.cached_teacher import CachedTeacher
from mdistiller.training.teacher_cache import LOGITS
from mdistiller.training.trainer import Trainer
from mdistiller.types import AnyBatch, Outputs


def steps_of(trainer: Trainer, source: AnySource, *, fill: int = 0) -> Callable[[], None]:
    """Returns a function that trains the next step as `fit` does, without evaluations and saves.

    Args:
        trainer: a built run.
        source: its batches.
        fill: number of training images that get zeros as cached logits, so that the teacher never runs.
    """
    asked = trainer.distiller.asked
    if asked is not None:
        asked.open()
    if fill:
        assert isinstance(asked, CachedTeacher)
        assert asked.cache is not None
        width = asked.live(next(iter(source.next_batches(0, 1)))).logits.shape[1]
        rows = {LOGITS: np.zeros((fill, width), np.float32)}
        for view in range(asked.rows.num_views):
            asked.cache.fill(view, 1 + np.arange(fill), (LOGITS,), lambda: rows)
    trainer.start_epoch()
    ready: deque[tuple[AnyBatch, Outputs | None]] = deque()

    def step() -> None:
        if not ready:
            batches = source.next_batches(trainer.step, trainer.total - trainer.step)
            outputs = trainer.distiller.ask_ahead(batches)
            ready.extend(zip(batches, outputs, strict=True))
        trainer.train_step(*ready.popleft())

    return step
