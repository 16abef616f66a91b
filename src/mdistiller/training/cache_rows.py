"""Rows of a teacher cache for augmented images: names of the files, and number of an image's row."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mdistiller.data import Augment, Splits, StreamSet
from mdistiller.data.augment import Draw
from mdistiller.data.identity import identity
from mdistiller.errors import ConfigError
from mdistiller.training.row_formats import row_format
from mdistiller.training.row_store import Numbers, RowStore
from mdistiller.training.teacher_cache import LOGITS, Stream, teacher_key
from mdistiller.types import Batch, Outputs


class CacheRows:
    """Rows of the training images of a run.

    Where a crop and a flip are all that happens to an image, it has a row for each variant, so that views
    fall together. Otherwise it has a row for each view: of the epochs, or of `teacher_views` epochs.

    Args:
        config: the run's config.
        splits: the data, whose training images are read as in the run.
        augment: the run's augmentation.
        steps: batches of an epoch.
    """

    def __init__(self, config: Any, splits: Splits, augment: Augment, steps: int) -> None:
        self.config, self.splits, self.augment, self.steps = config, splits, augment, steps
        size = splits.image_size
        self.variants = augment.variants(torch.empty(0, size, size, 3))

    def streams(
        self, num_views: int, teacher: nn.Module, precision: torch.dtype, outputs: Outputs
    ) -> list[dict[str, Stream]]:
        """Returns the files' contents for each of the methods' views, by kind of output.

        Args:
            num_views: number of the methods' views.
            teacher: the model.
            precision: precision of autocast.
            outputs: logits and all features to store, of any images.

        Raises:
            ConfigError: a feature that is no vector.
        """
        for name, value in outputs.features.items():
            if value.ndim != 2:
                raise ConfigError(
                    f"teacher_cache_taps: {name!r} has shape [B, {', '.join(map(str, value.shape[1:]))}]; "
                    "allowed are vectors, such as 'pooled'"
                )
        train = self.splits.train
        common: dict[str, Any] = {"teacher": teacher_key(teacher), "precision": str(precision)}
        common |= {"mean": self.augment.mean.tolist(), "std": self.augment.std.tolist()}
        common |= {"image_size": self.splits.image_size, "data": identity(train)}
        views = []
        for view in range(num_views):
            key = {**common, "augment": self.augment.settings(strong=view > 0)}
            if not self._by_variant(view):
                key |= {"augment_seed": self.config.augment_seed, "view": view}
            rows = len(train) * self._slots(view)
            kinds = {LOGITS: Stream(key, outputs.logits.shape[1], self.config.teacher_cache_format, rows)}
            for name, value in outputs.features.items():
                kinds[name] = Stream({**key, "tap": name}, value.shape[1], "fp16", rows)
            views.append(kinds)
        return views

    def full_bytes(self, num_views: int, outputs: Outputs) -> int:
        """Computes the size of the files with all rows, in bytes; arguments as those of `streams`."""
        logits = row_format(outputs.logits.shape[1], self.config.teacher_cache_format)
        formats = [logits, *(row_format(value.shape[1], "fp16") for value in outputs.features.values())]
        row = sum(RowStore.stride_of(form.row_bytes) for form in formats)
        slots: dict[str, int] = {}  # views that fall together share a file
        for view in range(num_views):
            settings = self.augment.settings(strong=view > 0)
            slots[f"{settings} {None if self._by_variant(view) else view}"] = self._slots(view)
        return row * len(self.splits.train) * sum(slots.values())

    def numbers(self, view: int, batches: Sequence[Batch], draws: Sequence[Draw], epoch_view: int) -> Numbers:
        """Returns the rows of raw batches with their draws, in a view of the methods and of the epochs."""
        slot: Any = epoch_view
        if self._by_variant(view):
            pairs = zip(batches, draws, strict=True)
            slot = torch.cat([self.augment.variant(batch.image, draw) for batch, draw in pairs])
        index = torch.cat([batch.index for batch in batches])
        numbers: Numbers = (slot * len(self.splits.train) + index).cpu().numpy()
        return numbers

    def _by_variant(self, view: int) -> bool:
        train, cycle = self.splits.train, self.config.teacher_views
        is_cropped = isinstance(train, StreamSet) and train.random_crop
        if is_cropped or not self.augment.is_countable(strong=view > 0):
            return False
        return cycle is None or cycle >= self.variants

    def _slots(self, view: int) -> int:
        """Returns the number of an image's rows."""
        if self._by_variant(view):
            return self.variants
        steps = min(self.config.epochs * self.steps, self.config.max_steps or math.inf)
        epochs = math.ceil(steps / self.steps)
        return min(epochs, self.config.teacher_views or epochs)
