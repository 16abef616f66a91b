"""Prepared batches: augmented images with the teacher's outputs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.data import Augment, Splits, StreamSet, make_loader
from mdistiller.data.augment import Draw
from mdistiller.data.draws import Draws
from mdistiller.distiller import FrozenTeacher
from mdistiller.methods import Method
from mdistiller.models.own_input import own_inputs
from mdistiller.runs.progress import Reporter
from mdistiller.seeding import derive_seed
from mdistiller.training.cache_rows import CacheRows
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast, lay_out, memory_format, torch_dtype
from mdistiller.training.row_formats import Values
from mdistiller.training.row_store import Numbers
from mdistiller.training.teacher_cache import LOGITS, TeacherCache
from mdistiller.types import Batch, Outputs

# Pixels in one pass of a teacher that runs ahead. A batch of 64 small images leaves most of a GPU idle; a CPU
# is busy with it, and its caches hold no more.
_TEACHER_PIXELS = {"cpu": 1, "gpu": 1024 * 32 * 32}
_AUGMENT = 1  # keeps the augmentation's seeds apart from others
_SHAPES = 4  # sizes of the teacher's pass on a part of its images, where each new size costs time

Prepared = tuple[Any, Any]
"""A prepared batch and the teacher's outputs for it."""


class Loader(Protocol):
    """Raw batches on the device, in an order that follows from the seed and the epoch."""

    def __len__(self) -> int:
        """Number of batches of an epoch."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """Returns the batches of an epoch (from 0), from number `first` on."""


class BatchSource:
    """Batches with the outputs of a live teacher.

    Everything random follows from the seed, the step and the rank.

    `precision` and `memory_format` are the teacher's: of autocast and of the weights.
    """

    def __init__(
        self,
        loader: Loader,
        world: World,
        *,
        precision: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.loader, self.world = loader, world
        self.steps = len(loader)  # of an epoch
        self.precision, self.memory_format = precision, memory_format
        self.autocast = autocast(world.device, precision)
        self.lookahead = 1
        """Steps whose batches are prepared together."""
        self.num_views, self.taps = 1, tuple[str, ...]()
        self.model: nn.Module | None = None
        self.teacher: nn.Module | None = None
        self._next = -1  # step of the next batch of the iterator
        self._raw: Iterator[Any] = iter(())

    def serve(self, method: Method, teacher: nn.Module | None, *, fixed: bool) -> None:
        """Prepares for a method and its teacher, which goes to the device, in evaluation mode.

        A `fixed` teacher stays the same from step to step, so that it may run ahead.
        """
        self.num_views, self.taps = method.num_views, method.teacher_taps
        if not fixed:
            self.lookahead = 1
        if teacher is not None:
            self.model = teacher.requires_grad_(False).eval()
            self.teacher = lay_out(self.freeze(self.model).to(self.world.device), self.memory_format)

    def freeze(self, teacher: nn.Module) -> nn.Module:
        """Returns the module whose call gives a teacher's outputs."""
        return FrozenTeacher(teacher, self.taps)

    def open(self, reporter: Reporter) -> None:
        """Prepares for the first step; called once."""

    def next_batches(self, step: int, limit: int) -> list[Prepared]:
        """Prepares at most `limit` steps after `step`, none beyond the epoch's end."""
        epoch, batch = divmod(step, self.steps)
        if step != self._next or batch == 0:
            self._raw = self.loader.epoch(epoch, batch)
        raw = list(islice(self._raw, min(self.lookahead, limit)))
        self._next = step + len(raw)
        return self.prepare(raw, step)

    def prepare(self, raw: Sequence[Any], step: int) -> list[Prepared]:
        """Prepares the raw batches of step `step` and its next ones."""
        return list(zip(raw, self.ask_teacher(raw), strict=True))

    def ask_teacher(self, batches: Sequence[Any]) -> list[Outputs]:
        """Computes the teacher's outputs for prepared batches in one pass; empty ones without a teacher."""
        if self.teacher is None:
            return [Outputs(torch.zeros(0, device=self.world.device), {})] * len(batches)
        logits, features = self.run_teacher(_joined([batch.image for batch in batches]))
        sizes = [len(batch.index) for batch in batches]
        parts = {name: features[name].split(sizes) for name in self.taps}
        return [
            Outputs(part, {name: values[i] for name, values in parts.items()})
            for i, part in enumerate(logits.split(sizes))
        ]

    def run_teacher(self, images: Tensor) -> Outputs:
        """Computes the teacher's outputs for prepared images."""
        assert self.teacher is not None
        with self.autocast:
            outputs: Outputs = self.teacher(images)
        return outputs


class ImageBatches(BatchSource):
    """Augmented images with the outputs of a teacher that is live, runs ahead, or is in a cache.

    The config is the run's.
    """

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
            balance=train.labels if config.data.sampler == "balanced" else None,
            workers=config.data.workers,
        )
        precision, layout = torch_dtype(config.precision), memory_format(config.layout)
        super().__init__(loader, world, precision=precision, memory_format=layout)
        self.config, self.splits = config, splits
        classes = splits.num_classes
        self.augment = Augment(augment, splits.mean, splits.std, classes, layout).to(world.device)
        self.generator = torch.Generator(world.device)  # of mixup and CutMix
        self.augment_seed: int = config.augment_seed
        self.epoch = self.epoch_view = -1
        self.lookahead = steps_ahead(config, splits.image_size, world)
        self.cached: tuple[str, ...] | None = (
            None if config.teacher_cache is None else config.teacher_cache_taps
        )
        self.from_cache = False
        self.cache: TeacherCache | None = None
        self.rows = CacheRows(config, splits, self.augment, self.steps)

    def serve(self, method: Method, teacher: nn.Module | None, *, fixed: bool) -> None:
        can_read = self.cached is not None and {*method.teacher_taps} <= {*self.cached}
        self.from_cache = fixed and teacher is not None and can_read
        super().serve(method, teacher, fixed=fixed)
        for part in () if teacher is None else own_inputs(teacher):
            size = part.own.image_size or self.splits.image_size
            self.lookahead = min(self.lookahead, steps_ahead(self.config, size, self.world))

    def freeze(self, teacher: nn.Module) -> nn.Module:
        return FrozenTeacher(
            teacher, dict.fromkeys([*self.taps, *(self.cached or () if self.from_cache else ())])
        )

    def open(self, reporter: Reporter) -> None:
        """Compiles the teacher, and opens its cache if the config asks for one.

        Raises:
            ConfigError: images that depend on their batch; a tap that is no vector; a cache's folder that is
                a file, or whose disk is too small.
        """
        if self.teacher is None:
            return
        for part in own_inputs(self.teacher):
            reporter.note(f"teacher {type(part.model).__name__}: images of its own, {part.describe()}")
        if self.from_cache:
            self.config.check_cache()
            self.cache = self._open_cache(self.num_views)
            reporter.note(self.cache.describe())
        elif self.cached is not None and self.config.has_teacher:
            reporter.note("teacher cache: not used, since the method reads features that it does not hold")
        if self.config.compile != "off":
            # Not in the step's mode: a CUDA graph's outputs do not outlive the student's next step.
            self.teacher = cast(nn.Module, torch.compile(self.teacher, dynamic=False))

    def _open_cache(self, num_views: int) -> TeacherCache:
        assert self.model is not None
        assert self.teacher is not None
        size = self.splits.image_size
        logits, features = self.teacher(torch.zeros(1, 3, size, size, device=self.world.device))
        outputs = Outputs(logits, {name: features[name] for name in self.cached or ()})
        streams = self.rows.streams(num_views, self.model, self.precision, outputs)
        return TeacherCache(self.config.teacher_cache, streams)

    def next_batches(self, step: int, limit: int) -> list[Prepared]:
        self.augment.train()
        return super().next_batches(step, limit)

    def prepare(self, raw: Sequence[Batch], step: int) -> list[Prepared]:
        """Augments the raw batches of some steps together and adds the teacher's outputs.

        A batch holds all views of its images, one view after another.
        """
        epoch = step // self.steps
        if epoch != self.epoch:
            self.epoch, self.epoch_view = epoch, self.order.view(epoch)
        draws, changed = [], []  # for each view, by step
        for view in range(self.num_views):
            draws.append([self._draw(batch, step + i, self.epoch_view, view) for i, batch in enumerate(raw)])
            changed.append(self.augment.change(raw, draws[view], strong=view > 0))
        batches = [self._arrange(views) for views in zip(*changed, strict=True)]
        outputs = self.ask_teacher(batches) if self.cache is None else self._look_up(raw, draws, changed)
        return list(zip(batches, outputs, strict=True))

    def _draw(self, batch: Batch, step: int, epoch_view: int, view: int) -> Draw:
        parts, numbers = [epoch_view], batch.index
        if self.order.balance is not None:  # an image comes several times an epoch, even in a batch
            parts, numbers = [step, self.world.rank], torch.arange(len(numbers), device=numbers.device)
        draws = Draws(derive_seed(self.augment_seed, *parts, view, _AUGMENT), numbers)
        if self.augment.config.mixup_alpha or self.augment.config.cutmix_alpha:
            # These depend on the images that meet in a batch.
            self.generator.manual_seed(derive_seed(self.config.seed, step, self.world.rank, _AUGMENT))
        return self.augment.draw(batch.image, draws, self.generator, strong=view > 0)

    def _look_up(
        self, raw: Sequence[Batch], draws: Sequence[Sequence[Draw]], changed: Sequence[Sequence[Batch]]
    ) -> list[Outputs]:
        """Returns the cache's outputs by step; the teacher computes the missing ones."""
        assert self.cache is not None
        kinds, views = (LOGITS, *self.taps), []
        for view in range(self.num_views):
            numbers = self.rows.numbers(view, raw, draws[view], self.epoch_view)
            images = [batch.image for batch in changed[view]]
            stored = self.cache.fill(view, numbers, kinds, partial(self._compute, images))
            sizes = [len(part) for part in images]
            values = (torch.from_numpy(stored[kind]).to(self.world.device).split(sizes) for kind in kinds)
            views.append(list(zip(*values, strict=True)))
        return [
            Outputs(joined[0], dict(zip(self.taps, joined[1:], strict=True)))
            for joined in (
                [_joined(parts) for parts in zip(*step, strict=True)] for step in zip(*views, strict=True)
            )
        ]

    def _compute(self, images: Sequence[Tensor], rows: Numbers) -> dict[str, Values]:
        """Computes all outputs that the cache stores, for some rows of images."""
        joined, count = _joined(images), len(rows)
        if count < len(joined):
            if self.config.compile != "off" or self.world.device.type != "cpu":
                part = -(-len(joined) // _SHAPES)
                rows = np.resize(rows, min(-(-count // part) * part, len(joined)))  # repeats the first ones
            joined = joined[torch.from_numpy(rows).to(joined.device)]
        logits, features = self.run_teacher(joined.contiguous(memory_format=self.memory_format))
        kinds = {LOGITS: logits} | {name: features[name] for name in self.cached or ()}
        return {kind: value[:count].float().cpu().numpy() for kind, value in kinds.items()}

    def _arrange(self, views: Sequence[Batch]) -> Batch:
        batch = views[0] if len(views) == 1 else Batch(*map(torch.cat, zip(*views, strict=True)))
        return batch._replace(image=batch.image.contiguous(memory_format=self.memory_format))


def _joined(images: Sequence[Tensor]) -> Tensor:
    return images[0] if len(images) == 1 else torch.cat(list(images))


def steps_ahead(config: Any, image_size: int, world: World) -> int:
    """Returns the number of steps whose batches a fixed teacher gets in one pass.

    One on a CPU, and on a GPU 16 of 64 CIFAR images, unless the config says otherwise.
    """
    images = (
        config.teacher_batch
        or _TEACHER_PIXELS["cpu" if world.device.type == "cpu" else "gpu"] // image_size**2
    )
    return max(1, images // (config.batch_size // world.size))
