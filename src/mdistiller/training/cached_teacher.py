"""A teacher whose outputs are kept on disk: which row an image has, and the look-up."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistiller.data import Augment, Splits, StreamSet
from mdistiller.data.augment import Draw
from mdistiller.data.identity import identity
from mdistiller.models import ModelConfig
from mdistiller.taps import probe
from mdistiller.teacher import LiveTeacher, Teacher
from mdistiller.training.row_store import Values
from mdistiller.training.teacher_cache import LOGITS, Stream, TeacherCache, teacher_key
from mdistiller.types import AnyBatch, Batch, DataInfo, Line, Outputs, joined


class CachedTeacher(Teacher):
    """A teacher whose outputs are read from a cache, and computed and recorded where they are missing.

    Args:
        live: the teacher, with all taps that the cache stores.
        config: the run's config, with this teacher alone.
        rows: the rows of the training images.
        taps: names of the features to return with the logits.
    """

    def __init__(self, live: LiveTeacher, config: Any, rows: "CacheRows", taps: Sequence[str]) -> None:
        super().__init__(live.model)
        self._live, self.rows, self.taps = live, rows, tuple(taps)
        self.folder: Path = config.teacher_cache
        self.models: list[ModelConfig] = config.teachers
        self.cache: TeacherCache | None = None
        self.read: tuple[str, ...] = ()
        """The logits, where the teacher has some."""

    @property
    def live(self) -> LiveTeacher:
        return self._live

    def open(self) -> list[str]:
        """Opens the cache.

        Raises:
            ConfigError: a folder that is a file, whose disk is too small, or with another teacher's rows.
        """
        index, shape = torch.zeros(1, dtype=torch.int64), (1, *self.rows.splits.shape)
        pattern = torch.arange(math.prod(shape), device=self.rows.augment.mean.device) * 7919 % 251 / 125 - 1
        outputs = self.live(Batch(pattern.view(shape), index, index))
        self.read = (LOGITS,) if outputs.logits.ndim > 1 else ()
        self.shapes = {name: x.shape[1:] for name, x in outputs.features.items() if x.ndim > 2}
        key = {"teacher": teacher_key(self, self.models), "precision": str(self.rows.precision)}
        key["data"] = identity(self.rows.splits.train, self.rows.config.data.workers)
        self.cache = TeacherCache(self.folder, self.rows.streams(key, outputs))
        self.cache.check(self._values(outputs))
        return [*super().open(), self.cache.describe()]

    def full_bytes(self) -> int:
        """Computes the size of the cache with all rows, in bytes."""
        data = DataInfo(self.rows.splits.shape, logits_of=self.live.taps.where)
        outputs = probe(self.model, self.live.taps.names, data)
        views = self.rows.streams({}, outputs)
        # Views that fall together share a file.
        sizes = {stream.digest(): stream.full_bytes for kinds in views for stream in kinds.values()}
        return sum(sizes.values())

    def forward(self, batch: AnyBatch, context: object = None) -> Outputs:
        return self.ask([batch])[0]

    def ask(self, batches: Sequence[AnyBatch]) -> list[Outputs]:
        if self.cache is None:  # measured before the first step
            return self.live.ask(batches)
        device, count = batches[0].image.device, self.rows.num_views
        views = []  # for each view the outputs of each batch
        for view in range(count):
            images = [batch.image.chunk(count)[view] for batch in batches]
            rows = [batch.rows for batch in batches if isinstance(batch, Batch) and batch.rows is not None]
            numbers = [part.chunk(count)[view] for part in rows]
            found = self.cache.fill(
                view,
                torch.cat(numbers).cpu().numpy(),
                (*self.read, *self.taps),
                partial(self._compute, images),
            )
            sizes = [len(part) for part in images]
            parts = {k: torch.from_numpy(values).to(device).split(sizes) for k, values in found.items()}
            views.append([{k: v[i] for k, v in parts.items()} for i in range(len(batches))])
        outputs = views[0]
        if count > 1:
            steps = zip(*views, strict=True)
            outputs = [{k: torch.cat([part[k] for part in step]) for k in step[0]} for step in steps]
        for name in self.shapes.keys() & {*self.taps}:
            for values in outputs:
                values[name] = values[name].unflatten(1, self.shapes[name])
        return [Outputs(values.pop(LOGITS, torch.empty(0)), values) for values in outputs]

    def _compute(self, images: Sequence[Tensor]) -> dict[str, Values]:
        """Computes all outputs that the cache stores, always for the whole batch.

        A pass on the missing rows alone would round otherwise, so that a lost row would change the run.
        """
        image = joined(images)
        index = torch.zeros(len(image), dtype=torch.int64)
        return self._values(self.live(Batch(image, index, index)))

    def _values(self, outputs: Outputs) -> dict[str, Values]:
        kinds = {**dict.fromkeys(self.read, outputs.logits), **outputs.features}
        return {kind: value.float().flatten(1).cpu().numpy() for kind, value in kinds.items()}


class CacheRows:
    """Rows of the training images of a run.

    Where a crop and a flip are all that happens to an image, it has a row for each variant, so that views
    fall together. Otherwise it has a row for each view: of the epochs, or of `teacher_views` epochs.

    Args:
        config: the run's config.
        splits: the data, whose training images are read as in the run.
        augment: the run's augmentation.
        steps: batches of an epoch.

    Attributes:
        num_views: the methods' views of each image in a batch.
        precision: that of the teacher's passes, on which the rows depend too.
    """

    def __init__(self, config: Any, splits: Splits, augment: Augment, steps: int) -> None:
        self.config, self.splits, self.augment, self.steps = config, splits, augment, steps
        self.num_views, self.precision = 1, torch.float32
        self.images = len(splits.train)
        channels, height, width = splits.shape
        self.variants = augment.variants(torch.empty(0, height, width, channels))
        self._are_variants = self._by_variant(0), self._by_variant(1)

    def streams(self, key: Line, outputs: Outputs) -> list[dict[str, Stream]]:
        """Returns the files' contents for each of the methods' views, by kind of output.

        Args:
            key: what else the rows depend on: teacher, precision and data.
            outputs: logits and all features to store, of any images.
        """
        train = self.splits.train
        common = key | {"mean": self.augment.mean.tolist(), "std": self.augment.std.tolist()}
        common["image_size"] = self.splits.image_size
        views = []
        for view in range(self.num_views):
            key = {**common, "augment": self.augment.settings(strong=view > 0)}
            if not self._by_variant(view):
                key |= {"augment_seed": self.config.augment_seed, "view": view}
            rows = 1 + len(train) * self.slots(view)  # the first one for `TeacherCache.check`
            kinds = {}
            if outputs.logits.ndim > 1:
                form = self.config.cache_format(outputs.logits[0], is_logits=True)
                kinds[LOGITS] = Stream(key, outputs.logits.shape[1], form, rows)
            for name, value in outputs.features.items():
                form = self.config.cache_format(value[0], is_logits=False)
                kinds[name] = Stream({**key, "tap": name}, value[0].numel(), form, rows)
            views.append(kinds)
        return views

    def numbers(
        self, view: int, batches: Sequence[Batch], draws: Sequence[Draw], epoch_view: int
    ) -> list[Tensor]:
        """Returns the rows of raw batches with their draws, int64 [B], by views of methods and epochs."""
        rows = []
        for batch, draw in zip(batches, draws, strict=True):
            by_variant = self._are_variants[view > 0]
            slot = self.augment.variant(batch.image, draw) if by_variant else epoch_view
            rows.append(1 + slot * self.images + batch.index)
        return rows

    def _by_variant(self, view: int) -> bool:
        train, cycle = self.splits.train, self.config.teacher_views
        is_cropped = isinstance(train, StreamSet) and train.random_crop
        if is_cropped or not self.augment.is_countable(strong=view > 0):
            return False
        return cycle is None or cycle >= self.variants

    def slots(self, view: int) -> int:
        """Returns the number of an image's rows for a view of the methods."""
        if self._by_variant(view):
            return self.variants
        steps = min(self.config.epochs * self.steps, self.config.max_steps or math.inf)
        epochs = math.ceil(steps / self.steps)
        return min(epochs, self.config.teacher_views or epochs)
