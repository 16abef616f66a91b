"""Prepared batches: augmented images with the teacher's outputs, for one run or for several."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from mdistiller.data import Augment, ImageSet, Splits, StreamSet, make_loader
from mdistiller.distiller import FrozenTeacher
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.runs.progress import Reporter
from mdistiller.seeding import derive_seed
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast, memory_format, torch_dtype
from mdistiller.training.teacher_table import TeacherTable, build_logits, open_table
from mdistiller.types import Batch, Outputs

# Pixels in one pass of a teacher that runs ahead. A batch of 64 small images leaves most of a GPU idle; a CPU
# is busy with it, and its caches hold no more.
_TEACHER_PIXELS = {"cpu": 1, "gpu": 1024 * 32 * 32}
_AUGMENT = 1  # keeps the augmentation's seeds apart from others

Prepared = tuple[Any, Any]
"""A prepared batch and the teacher's outputs for it."""


class Loader(Protocol):
    """Raw batches on the device, in an order that follows from the seed and the epoch."""

    def __len__(self) -> int:
        """Number of batches of an epoch."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """Returns the batches of an epoch (from 0), from number `first` on."""


class Reader(NamedTuple):
    """A run's needs: views of each image, whether it has a teacher, and the teacher's features by tap."""

    num_views: int
    has_teacher: bool
    taps: tuple[str, ...]
    from_table: bool


class BatchSource:
    """Batches with the outputs of a live teacher, for all runs that join.

    The runs get the same batches and share the teacher's pass. Everything random follows from the seed, the
    step and the rank, so neither other runs nor the step at which a run begins change what it gets.

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
        self.precision, self.memory_format = precision, memory_format
        self.autocast = autocast(world.device, precision)
        self.lookahead = 1
        """Steps whose batches are prepared together."""
        self.readers: list[Reader] = []
        self.model: nn.Module | None = None
        self.teacher: nn.Module | None = None
        self._next = -1  # step of the next batch of the iterator
        self._raw: Iterator[Any] = iter(())

    def join(self, method: Method, teacher: nn.Module | None, *, fixed: bool) -> None:
        """Adds a run, whose batches come last in the lists of `next_batches`.

        All runs that have a teacher have the same one; it is put into evaluation mode for good. A `fixed`
        teacher stays the same from step to step, so that it may run ahead.
        """
        if not fixed:
            self.lookahead = 1
        if teacher is not None:
            assert self.model in (None, teacher), "runs side by side have one teacher"
            self.model = teacher.requires_grad_(False).eval()
        from_table = fixed and teacher is not None and not method.teacher_taps and method.num_views == 1
        self.readers.append(Reader(method.num_views, teacher is not None, method.teacher_taps, from_table))

    def open(self, reporter: Reporter) -> None:
        """Prepares for the first step, after `tap_teacher`; called once."""

    def tap_teacher(self) -> None:
        """Taps the teacher for all runs that have joined, and moves it to the device."""
        if self.model is None:
            return
        taps = dict.fromkeys(name for reader in self.readers for name in reader.taps)
        teacher = FrozenTeacher(self.model, taps).to(self.world.device)
        self.teacher = teacher.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def next_batches(self, step: int, limit: int) -> list[list[Prepared]]:
        """Prepares at most `limit` steps after `step`, none beyond the epoch's end; for each run a list."""
        epoch, batch = divmod(step, len(self.loader))
        if step != self._next or batch == 0:
            self._raw = self.loader.epoch(epoch, batch)
        raw = list(islice(self._raw, min(self.lookahead, limit)))
        self._next = step + len(raw)
        return self.prepare(raw, step)

    def prepare(self, raw: Sequence[Any], step: int) -> list[list[Prepared]]:
        """Prepares the raw batches of step `step` and its next ones, for each run."""
        outputs = self.ask_teacher(raw)
        return [
            list(zip(raw, self.outputs_for(reader, outputs, raw), strict=True)) for reader in self.readers
        ]

    def ask_teacher(self, batches: Sequence[Any]) -> list[Outputs] | None:
        """Computes the teacher's outputs for prepared batches in one pass; None without a teacher."""
        if self.teacher is None:
            return None
        images = batches[0].image if len(batches) == 1 else torch.cat([batch.image for batch in batches])
        with self.autocast:
            logits, features = self.teacher(images)
        sizes = [len(batch.index) for batch in batches]
        parts = {name: value.split(sizes) for name, value in features.items()}
        return [
            Outputs(part, {name: values[i] for name, values in parts.items()})
            for i, part in enumerate(logits.split(sizes))
        ]

    def outputs_for(
        self, reader: Reader, outputs: Sequence[Outputs] | None, batches: Sequence[Any]
    ) -> list[Outputs]:
        """Selects the teacher's outputs that a run reads; empty ones for a run without a teacher."""
        if not reader.has_teacher:
            return [Outputs(torch.zeros(0, device=self.world.device), {}) for _ in batches]
        assert outputs is not None
        return [Outputs(logits, {name: f[name] for name in reader.taps}) for logits, f in outputs]


class ImageBatches(BatchSource):
    """Augmented images with the outputs of a teacher that is live, runs ahead, or is in a table.

    The config is the run's; of several runs, that of one with a teacher.
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
        loader = make_loader(
            splits.train,
            config.batch_size // world.size,
            device=world.device,
            seed=config.seed,
            shuffle=True,
            drop_last=config.drop_last,
            rank=world.rank,
            world_size=world.size,
            workers=config.data.workers,
        )
        precision, layout = torch_dtype(config.precision), memory_format(config.layout)
        super().__init__(loader, world, precision=precision, memory_format=layout)
        self.config, self.splits = config, splits
        self.augment = Augment(augment, splits.mean, splits.std, splits.num_classes).to(world.device)
        self.generator = torch.Generator(world.device)
        self.lookahead = steps_ahead(config, splits.image_size, world)
        self.table: TeacherTable | None = None
        self.view_counts: set[int] = set()  # of the runs that have joined

    def join(self, method: Method, teacher: nn.Module | None, *, fixed: bool) -> None:
        super().join(method, teacher, fixed=fixed)
        self.view_counts.add(method.num_views)

    def open(self, reporter: Reporter) -> None:
        """Compiles the teacher, and opens its table if the config asks for one.

        Raises:
            ConfigError: a table of images whose variants are too many or cannot be counted.
        """
        if self.teacher is None:
            return
        if self.config.compile:
            self.teacher = cast(nn.Module, torch.compile(self.teacher, dynamic=False))
        folder, images, augment = self.config.teacher_table, self.splits.train, self.augment.config
        if folder is None or not any(reader.from_table for reader in self.readers):
            return
        if isinstance(images, StreamSet) or augment.mixup_alpha or augment.cutmix_alpha:
            raise ConfigError(
                "teacher_table: it needs decoded images in memory (--data.memory resident), "
                "without mixup and CutMix"
            )
        many = "has too many variants of an image"
        if augment.crop == "resized":
            raise ConfigError(f"teacher_table: crop 'resized' {many}, 'padded' has few")
        if augment.color_jitter or augment.erase or augment.vertical_flip:
            raise ConfigError(f"teacher_table: colour jitter, erasing or a vertical flip {many}")
        if augment.policy != "none":
            raise ConfigError(f"teacher_table: policy {augment.policy!r} {many}")
        assert self.model is not None
        # The main process first: it builds and writes the file that the others then read.
        if not self.world.is_main:
            self.world.wait()
        build = (lambda: self._build_table(images, reporter)) if self.world.is_main else None
        device = self.world.device
        self.table = open_table(folder, self.model, images, self.augment, self.precision, device, build=build)
        if self.world.is_main:
            self.world.wait()

    def _build_table(self, images: ImageSet, reporter: Reporter) -> Tensor:
        assert self.teacher is not None
        reporter.start("teacher's table", len(images) * self.augment.variants(images.images), 0)
        try:
            return build_logits(
                self.teacher,
                images,
                self.augment,
                self.precision,
                self.world.device,
                num_classes=self.splits.num_classes,
                memory_format=self.memory_format,
                done=reporter.step,
            )
        finally:
            reporter.stop()

    def next_batches(self, step: int, limit: int) -> list[list[Prepared]]:
        self.augment.train()
        return super().next_batches(step, limit)

    def prepare(self, raw: Sequence[Batch], step: int) -> list[list[Prepared]]:
        """Augments the raw batches of some steps together and adds the teacher's outputs, for each run.

        A batch holds all views of its images, one view after another.
        """
        counts = self.view_counts
        draws, from_table = [], []  # for each step, the draws of each view
        for i, batch in enumerate(raw):
            self.generator.manual_seed(derive_seed(self.config.seed, step + i, self.world.rank, _AUGMENT))
            draws.append(self.augment.draw_views(batch.image, self.generator, max(counts)))
        changed = []
        for view, drawn in enumerate(zip(*draws, strict=True)):
            changed.append(self.augment.change(raw, drawn, strong=view > 0))
        by_step = list(zip(*changed, strict=True))
        batches = {count: [self._arrange(views[:count]) for views in by_step] for count in counts}
        if self.table is not None:
            for batch, (drawn, *_) in zip(raw, draws, strict=True):
                variants = self.augment.variant(batch.image, drawn)
                from_table.append(self.table.lookup(batch.index, variants))
        live: dict[int, list[Outputs] | None] = {}
        prepared = []
        for reader in self.readers:
            own = batches[reader.num_views]
            if self.table is not None and reader.from_table:
                outputs = from_table
            else:
                if reader.has_teacher and reader.num_views not in live:
                    live[reader.num_views] = self.ask_teacher(own)
                outputs = self.outputs_for(reader, live.get(reader.num_views), own)
            prepared.append(list(zip(own, outputs, strict=True)))
        return prepared

    def _arrange(self, views: Sequence[Batch]) -> Batch:
        batch = views[0] if len(views) == 1 else Batch(*map(torch.cat, zip(*views, strict=True)))
        return batch._replace(image=batch.image.contiguous(memory_format=self.memory_format))


def steps_ahead(config: Any, image_size: int, world: World) -> int:
    """Returns the number of steps whose batches a fixed teacher gets in one pass.

    One on a CPU, and on a GPU 16 of 64 CIFAR images, unless the config says otherwise.
    """
    images = (
        config.teacher_batch
        or _TEACHER_PIXELS["cpu" if world.device.type == "cpu" else "gpu"] // image_size**2
    )
    return max(1, images // (config.batch_size // world.size))
