"""Prepared batches, and the teacher of a run on them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from mdistiller.data import Augment, Splits, StreamSet, make_loader
from mdistiller.data.augment import Draw
from mdistiller.data.draws import Draws
from mdistiller.methods import Method
from mdistiller.models.own_input import own_inputs
from mdistiller.seeding import derive_seed
from mdistiller.stored import StoredTeacher
from mdistiller.taps import logits_if_any
from mdistiller.teacher import LiveTeacher, Teacher
from mdistiller.training.cached_teacher import CachedTeacher, CacheRows
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast, memory_format
from mdistiller.types import AnyBatch, Batch, LogitsOf

# Pixels in one pass of a teacher that runs ahead. A batch of 64 small images leaves most of a GPU idle; a CPU
# is busy with it, and its caches hold no more.
_TEACHER_PIXELS = {"cpu": 1, "gpu": 1024 * 32 * 32}
_AUGMENT = 1  # keeps the augmentation's seeds apart from others


B = TypeVar("B", bound=AnyBatch)
B_co = TypeVar("B_co", bound=AnyBatch, covariant=True)


class Loader(Protocol[B_co]):
    """Raw batches on the device, in an order that follows from the seed and the epoch."""

    @property
    def last(self) -> int:
        """Images in the last batch of an epoch."""

    def __len__(self) -> int:
        """Number of batches of an epoch."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[B_co]:
        """Returns the batches of an epoch (from 0), from number `first` on."""


class BatchSource(Generic[B]):
    """Prepared batches in the order of a loader, and the teacher of a run on them.

    Everything random follows from the seed, the step and the rank.
    """

    def __init__(self, loader: Loader[B], world: World) -> None:
        self.loader, self.world = loader, world
        self.steps = len(loader)  # of an epoch
        self.lookahead = 1
        """Steps whose batches are prepared together, for which the teacher is asked at once."""
        self.num_views = 1
        self.logits_of: LogitsOf = None
        """The logits in the teacher's result."""
        self.shape: tuple[int, int, int] | None = None
        """Channels, height and width of square images, all of one size; None for other inputs."""
        self._next = -1  # step of the next batch of the iterator
        self._raw: Iterator[B] = iter(())

    def teacher_for(self, method: Method, model: nn.Module, config: Any, *, fixed: bool) -> Teacher:
        """Returns a teacher for its method, on the device, in evaluation mode for good.

        `config` is the run's, with this teacher alone. `arrange` sets its precision and memory format. A
        `fixed` teacher stays the same from step to step, so that it may run ahead.
        """
        if isinstance(model, StoredTeacher):
            return model.to(self.world.device)
        return self._freeze(model, method, method.teacher_taps, fixed=fixed)

    def _freeze(self, model: nn.Module, method: Method, taps: Sequence[str], *, fixed: bool) -> LiveTeacher:
        if not fixed:
            self.lookahead = 1
        where = self.logits_of if method.needs.logits else partial(logits_if_any, where=self.logits_of)
        return LiveTeacher(model.requires_grad_(False).eval().to(self.world.device), taps, where)

    def arrange(self, precision: torch.dtype, layout: torch.memory_format, teacher: Teacher | None) -> None:
        """Changes the precision of the teacher's passes, and the memory format of images and teacher."""
        for member in () if teacher is None else teacher.members:
            if isinstance(member.live, LiveTeacher):
                member.live.autocast = autocast(self.world.device, precision)

    def next_batches(self, step: int, limit: int) -> list[B]:
        """Prepares at most `limit` steps after `step`, none beyond the epoch's end."""
        epoch, batch = divmod(step, self.steps)
        if step != self._next or batch == 0:
            self._raw = self.loader.epoch(epoch, batch)
        raw = list(islice(self._raw, min(self.lookahead, limit)))
        self._next = step + len(raw)
        return self.prepare(raw, step)

    def prepare(self, raw: Sequence[B], step: int) -> list[B]:
        """Prepares the raw batches of step `step` and its next ones."""
        return list(raw)


AnySource = BatchSource[AnyBatch]


class ImageBatches(BatchSource[Batch]):
    """Augmented images of a run, and its teacher: live, ahead of the student, or in a cache."""

    def __init__(self, config: Any, splits: Splits, world: World) -> None:
        augment, train = config.augment, splits.train
        is_cropped = isinstance(train, StreamSet) and train.random_crop
        if augment.crop == "auto":
            crop = "resized" if is_cropped else splits.crop
            augment = augment.model_copy(update={"crop": crop})
        if isinstance(train, StreamSet) and is_cropped:
            if augment.crop == "padded":
                splits = replace(splits, train=replace(train, random_crop=False))
            else:  # the reader has cropped, from the whole image
                splits = replace(splits, train=replace(train, crop_scale=augment.scale))
                augment = augment.model_copy(update={"crop": "padded", "padding": 0})
        loader = self.order = make_loader(
            splits.train,
            config.batch_size // world.size,
            device=world.device,
            seed=config.seed,
            crop_seed=config.augment_seed,
            cycle=config.teacher_views,
            shuffle=True,
            drop_last=config.drop_last,
            rank=world.rank,
            world_size=world.size,
            workers=config.data.workers,
        )
        super().__init__(loader, world)
        self.config, self.splits = config, splits
        layout, classes = memory_format(config.layout), splits.num_classes
        self.augment = Augment(augment, splits.mean, splits.std, classes, layout).to(world.device)
        self.generator = torch.Generator(world.device)  # of mixup and CutMix
        self.augment_seed: int = config.augment_seed
        self.epoch = self.epoch_view = -1
        self.lookahead, self.shape = steps_ahead(config, splits.image_size, world), splits.shape
        self.rows = CacheRows(config, splits, self.augment, self.steps)
        self.is_cached = False

    def teacher_for(self, method: Method, model: nn.Module, config: Any, *, fixed: bool) -> Teacher:
        """Returns the teacher: live, or with `teacher_cache`, where the method reads what it holds, cached.

        Raises:
            ConfigError: images that depend on their batch, with a cache.
        """
        if isinstance(model, StoredTeacher):
            config.check_cache(stored=True)
            return super().teacher_for(method, model, config, fixed=fixed)
        folder, stored = config.teacher_cache, config.teacher_cache_taps
        for part in own_inputs(model):
            size = part.own.image_size or self.splits.image_size
            self.lookahead = min(self.lookahead, steps_ahead(self.config, size, self.world))
        is_cached = folder is not None and fixed and {*method.teacher_taps} <= {*stored}
        self.is_cached |= is_cached
        live = self._freeze(model, method, stored if is_cached else method.teacher_taps, fixed=fixed)
        if self.config.compile != "off":
            # Not in the step's mode: a CUDA graph's outputs do not outlive the student's next step.
            live.compile(dynamic=False)
        if not is_cached:
            if folder is not None and fixed:
                live.notes.append(
                    "teacher cache: not used, since the method reads features that it does not hold"
                )
            return live
        config.check_cache()
        self.rows.num_views = self.num_views
        return CachedTeacher(live, config, self.rows, method.teacher_taps)

    def arrange(self, precision: torch.dtype, layout: torch.memory_format, teacher: Teacher | None) -> None:
        super().arrange(precision, layout, teacher)
        self.augment.memory_format, self.rows.precision = layout, precision

    def prepare(self, raw: Sequence[Batch], step: int) -> list[Batch]:
        """Augments the raw batches of some steps together.

        A batch holds all views of its images, one view after another.
        """
        epoch = step // self.steps
        if epoch != self.epoch:
            self.epoch, self.epoch_view = epoch, self.order.view(epoch)
        changed: list[list[Batch]] = []  # for each view, by step
        for view in range(self.num_views):
            draws = [self._draw(batch, step + i, self.epoch_view, view) for i, batch in enumerate(raw)]
            changed.append(self.augment.change(raw, draws, strong=view > 0))
            if self.is_cached:
                for i, rows in enumerate(self.rows.numbers(view, raw, draws, self.epoch_view)):
                    changed[view][i] = changed[view][i]._replace(rows=rows)
        batches = []
        for views in zip(*changed, strict=True):
            batch = views[0] if len(views) == 1 else Batch.join(views)
            image = batch.image.contiguous(memory_format=self.augment.memory_format)
            batches.append(batch._replace(image=image))
        return batches

    def _draw(self, batch: Batch, step: int, epoch_view: int, view: int) -> Draw:
        draws = Draws(derive_seed(self.augment_seed, epoch_view, view, _AUGMENT), batch.index)
        if self.augment.config.mixup_alpha or self.augment.config.cutmix_alpha:
            # These depend on the images that meet in a batch.
            self.generator.manual_seed(derive_seed(self.config.seed, step, self.world.rank, _AUGMENT))
        return self.augment.draw(batch.image, draws, self.generator, strong=view > 0)


def steps_ahead(config: Any, image_size: int, world: World) -> int:
    """Returns the number of steps whose batches a fixed teacher gets in one pass.

    One on a CPU, and on a GPU 16 of 64 CIFAR images, unless the config says otherwise.
    """
    images = (
        config.teacher_batch
        or _TEACHER_PIXELS["cpu" if world.device.type == "cpu" else "gpu"] // image_size**2
    )
    return max(1, images // (config.batch_size // world.size))
