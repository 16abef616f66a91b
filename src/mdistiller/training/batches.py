"""What a step is given: augmented images, and what the teacher says of them. For one run, or for several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mdistiller.data import Augment, Splits, StreamSet, make_loader
from mdistiller.data.loader import derive_seed
from mdistiller.distiller import Teacher
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.runs.folder import Reporter
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import autocast
from mdistiller.training.distributed import World
from mdistiller.training.teacher_table import TeacherTable, build_logits, open_table
from mdistiller.types import Batch, Outputs, join

# A GPU is not full with a batch of small images, say 64 of CIFAR's; a CPU is, and its caches hold no more.
_TEACHER_PIXELS = {"cpu": 1, "cuda": 1024 * 32 * 32}
_AUGMENT = 1  # keeps the augmentation's seeds apart from others

Fed = list[tuple[Any, Any]]
"""For each of some steps, what a learner is given: the augmented batch, and the teacher's outputs for it (a
detector's learner asks the teacher itself)."""


def steps_ahead(config: ClassificationConfig, image_size: int, here: World) -> int:
    """Steps whose batches a fixed teacher sees in one pass: one on a CPU, 16 of 64 CIFAR images on a GPU."""
    images = config.teacher_batch or _TEACHER_PIXELS[here.device.type] // image_size**2
    return max(1, images // (config.batch_size // here.size))


class _Reader(NamedTuple):
    """What a run reads: views of each image, the teacher's features by tap, and whether a table will do."""

    views: int
    taught: bool
    taps: tuple[str, ...]
    tabulates: bool


class Feed:
    """Augments, and asks the teacher: live, ahead of the student, or from a table.

    Several runs may join: they see the same images, and share what the teacher says. All that is random
    follows from the seed, the step and the rank, so it does not matter who else has joined, or where a run
    starts.

    Args:
        config: the run's settings; of several runs, those of one with a teacher.
        splits: the data.
        here: this process.
    """

    def __init__(self, config: ClassificationConfig, splits: Splits, here: World) -> None:
        augment, train = config.augment, splits.train
        if isinstance(train, StreamSet) and train.random_crop:
            if augment.crop == "padded":
                splits = replace(splits, train=replace(train, random_crop=False))
            else:  # cropped once already, from the whole image
                augment = augment.model_copy(update={"crop": "padded", "padding": 0})
        self.config, self.splits, self.world = config, splits, here
        self.augment = Augment(augment, splits.mean, splits.std, splits.num_classes).to(here.device)
        self.generator = torch.Generator(here.device)
        mine = config.batch_size // here.size
        self.loader = make_loader(
            splits.train,
            mine,
            device=here.device,
            seed=config.seed,
            shuffle=True,
            drop_last=config.drop_last,
            rank=here.rank,
            world_size=here.size,
            workers=config.data.workers,
        )
        self.precision: torch.dtype = getattr(torch, config.precision)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.ahead = steps_ahead(config, splits.image_size, here)
        """Steps whose batches are prepared together."""
        self.readers: list[_Reader] = []
        self.table: TeacherTable | None = None
        self.step = -1  # the next one of `_batches`
        self._batches: Iterator[Batch] = iter(())
        self._model: nn.Module | None = None
        self._teacher: Teacher | None = None
        self._call: nn.Module | None = None

    def join(self, method: Method, teacher: nn.Module | None, *, fixed: bool) -> int:
        """Take in a run; returns its place in what `take` and `prepare` give.

        Args:
            method: how many views it wants, and what it reads of the teacher.
            teacher: the teacher, frozen here; the same one for all runs that have one.
            fixed: whether it stays as it is from step to step, so that it may run ahead.
        """
        if not fixed:
            self.ahead = 1
        if teacher is not None:
            assert self._model in (None, teacher), "one feed has one teacher"
            self._model = teacher.requires_grad_(False).eval()
        tabulates = fixed and teacher is not None and not method.teacher_taps and method.views == 1
        self.readers.append(_Reader(method.views, teacher is not None, method.teacher_taps, tabulates))
        return len(self.readers) - 1

    @property
    def tabulates(self) -> bool:
        """Whether a table would be read."""
        return any(reader.tabulates for reader in self.readers)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, tapped for all runs that have joined so far."""
        names = tuple(dict.fromkeys(name for reader in self.readers for name in reader.taps))
        if self._model is not None and (self._teacher is None or self._teacher.tapped.names != names):
            if self._teacher is not None:
                self._teacher.tapped.untap()
            self._teacher = Teacher(self._model, names).to(self.world.device)
            if self.config.channels_last:
                self._teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._call = self._teacher
            if self.config.compile:
                self._call = cast(nn.Module, torch.compile(self._teacher, dynamic=False))
        return self._teacher

    def open_table(self, reporter: Reporter) -> None:
        """Get the teacher's table, if the config asks for one and a method reads logits alone.

        Raises:
            ConfigError: images whose variants can't be counted.
        """
        teacher, call = self.teacher, self._call
        folder, images, augment = self.config.teacher_table, self.splits.train, self.config.augment
        if folder is None or not self.tabulates:
            return
        if isinstance(images, StreamSet) or augment.mixup_alpha or augment.cutmix_alpha:
            raise ConfigError("teacher_table: it needs images in memory, without mixup and CutMix")
        if augment.crop == "resized":
            raise ConfigError(
                "teacher_table: crop 'resized' has too many variants of an image, 'padded' has few"
            )
        if augment.policy != "none":
            raise ConfigError(f"teacher_table: policy {augment.policy!r} has too many variants of an image")
        assert teacher is not None
        assert call is not None

        def build() -> Tensor:
            reporter.start("teacher's table", len(images) * self.augment.variants(images.images), 0)
            try:
                return build_logits(
                    call,
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

        # The main process first: it builds and writes what the others then read.
        if not self.world.is_main:
            self.world.wait()
        self.table = open_table(
            folder,
            teacher.tapped.model,
            images,
            self.augment,
            self.precision,
            self.world.device,
            build=build if self.world.is_main else None,
        )
        if self.world.is_main:
            self.world.wait()

    def take(self, step: int, most: int) -> list[Fed]:
        """What each run is given for the next steps: at most `most`, and no further than the epoch's end."""
        epoch, batch = divmod(step, len(self.loader))
        if step != self.step or batch == 0:
            self._batches = self.loader.epoch(epoch)
            for _ in range(batch):
                next(self._batches)
        raws = list(islice(self._batches, min(self.ahead, most)))
        self.step = step + len(raws)
        self.augment.train()
        return self.prepare(raws, step)

    def prepare(self, raws: Sequence[Batch], step: int) -> list[Fed]:
        """Augment the raw batches of step `step` and its next, and let the teacher look at all of them in one
        pass, or look them up; for each run.

        A batch has all views of its images, one view after another.
        """
        counts = {reader.views for reader in self.readers}
        draws = []  # for each step, those of each view
        for i, raw in enumerate(raws):
            self.generator.manual_seed(derive_seed(self.config.seed, step + i, self.world.rank, _AUGMENT))
            views = range(max(counts))
            draws.append([self.augment.draw(raw.image, self.generator, strong=view > 0) for view in views])
        changed = [
            self.augment.change(raws, drawn, strong=view > 0)
            for view, drawn in enumerate(zip(*draws, strict=True))
        ]
        batches = {
            count: [self._arrange(views[:count]) for views in zip(*changed, strict=True)] for count in counts
        }
        looked_up = []
        if self.table is not None:
            for raw, (drawn, *_) in zip(raws, draws, strict=True):
                looked_up.append(self.table.lookup(raw.index, self.augment.variant(raw.image, drawn)))
        live: dict[int, list[Outputs]] = {}
        fed = []
        for reader in self.readers:
            own = batches[reader.views]
            if not reader.taught:
                told = [Outputs(batch.image.new_zeros(0), {}) for batch in own]
            elif self.table is not None and reader.tabulates:
                told = looked_up
            else:
                if reader.views not in live:
                    live[reader.views] = self._ask(own)
                told = [
                    Outputs(logits, {name: features[name] for name in reader.taps})
                    for logits, features in live[reader.views]
                ]
            fed.append(list(zip(own, told, strict=True)))
        return fed

    def _ask(self, batches: list[Batch]) -> list[Outputs]:
        """The teacher's outputs, from one pass."""
        assert self.teacher is not None
        assert self._call is not None
        with autocast(self.world.device, self.precision):
            logits, features = self._call(join([batch.image for batch in batches]))
        sizes = [len(batch.image) for batch in batches]
        pieces = {name: value.split(sizes) for name, value in features.items()}
        return [
            Outputs(piece, {name: values[i] for name, values in pieces.items()})
            for i, piece in enumerate(logits.split(sizes))
        ]

    def _arrange(self, views: Sequence[Batch]) -> Batch:
        """All views of a batch, one after another."""
        batch = Batch(*map(join, zip(*views, strict=True)))
        return batch._replace(image=batch.image.contiguous(memory_format=self.memory_format))
