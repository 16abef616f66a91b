"""What a step is given: augmented images, and what the teacher says of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdistiller.data import Augment, Splits, StreamSet
from mdistiller.engine.config import TrainConfig
from mdistiller.engine.distributed import World
from mdistiller.engine.evaluate import autocast
from mdistiller.engine.learner import Teacher
from mdistiller.engine.log import Reporter
from mdistiller.engine.table import TeacherTable, build_logits, open_table
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.types import Batch, Outputs

# A GPU is not full with a batch of small images, say 64 of CIFAR's; a CPU is, and its caches hold no more.
_TEACHER_PIXELS = {"cpu": 1, "cuda": 1024 * 32 * 32}


class Feed:
    """Augments, and asks the teacher: live, ahead of the student, or from a table.

    Args:
        config: the run's settings.
        splits: the data.
        augment: what happens to the images.
        teacher: the teacher, None for methods without one.
        teacher_step: the teacher as it is called in a step, compiled perhaps.
        method: the method: what it reads of the teacher, and how many views it wants.
        generator: of the augmentation.
        here: this process.
        ahead: whether the teacher stays the same from step to step, so that it may run ahead.
    """

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        augment: Augment,
        teacher: Teacher | None,
        teacher_step: nn.Module | None,
        method: Method,
        generator: torch.Generator,
        here: World,
        *,
        ahead: bool,
    ) -> None:
        self.config, self.splits = config, splits
        self.augment, self.generator = augment, generator
        self.teacher, self.teacher_step = teacher, teacher_step
        self.views = method.views
        self.world = here
        self.precision: torch.dtype = getattr(torch, config.precision)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.table: TeacherTable | None = None
        self.tabulates = ahead and teacher is not None and not method.teacher_taps and self.views == 1
        images = config.teacher_batch or _TEACHER_PIXELS[here.device.type] // splits.image_size**2
        mine = config.batch_size // here.size
        self.ahead = max(1, images // mine) if ahead else 1
        """Steps whose batches are prepared together."""

    def open_table(self, reporter: Reporter) -> None:
        """Get the teacher's table, if the config asks for one and the method reads logits alone.

        Raises:
            ConfigError: images whose variants can't be counted.
        """
        folder, images, augment = self.config.teacher_table, self.splits.train, self.config.augment
        if folder is None or not self.tabulates:
            return
        if isinstance(images, StreamSet) or augment.mixup_alpha or augment.cutmix_alpha:
            raise ConfigError("teacher_table: it needs images in memory, without mixup and CutMix")
        if augment.policy != "none":
            raise ConfigError(f"teacher_table: policy {augment.policy!r} has too many variants of an image")
        teacher, step = self.teacher, self.teacher_step
        assert teacher is not None
        assert step is not None

        def build() -> Tensor:
            reporter.start("teacher's table", len(images) * self.augment.variants(images.images), 0)
            try:
                return build_logits(
                    step,
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

    def prepare(self, raws: Sequence[Batch]) -> list[tuple[Batch, Outputs]]:
        """Augment raw batches, and let the teacher look at all of them in one pass, or look them up.

        A batch has all views of its images, one view after another.
        """
        if self.table is not None:
            return [self._look_up(raw, self.table) for raw in raws]
        batches = []
        for raw in raws:
            views = [self.augment(raw, self.generator, strong=i > 0) for i in range(self.views)]
            batches.append(self._arrange(Batch(*map(join, zip(*views, strict=True)))))
        if self.teacher_step is None:
            return [(batch, Outputs(batch.image.new_zeros(0), {})) for batch in batches]
        with autocast(self.world.device, self.precision):
            logits, features = self.teacher_step(join([batch.image for batch in batches]))
        sizes = [len(batch.image) for batch in batches]
        pieces = {name: value.split(sizes) for name, value in features.items()}
        return [
            (batch, Outputs(logits, {name: piece[i] for name, piece in pieces.items()}))
            for i, (batch, logits) in enumerate(zip(batches, logits.split(sizes), strict=True))
        ]

    def _look_up(self, raw: Batch, table: TeacherTable) -> tuple[Batch, Outputs]:
        draw = self.augment.draw(raw.image, self.generator)
        batch = self.augment(raw, self.generator, draw=draw)
        return self._arrange(batch), table.lookup(raw.index, self.augment.variant(raw.image, draw))

    def _arrange(self, batch: Batch) -> Batch:
        return batch._replace(image=batch.image.contiguous(memory_format=self.memory_format))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Parts as one batch; a single one is not copied."""
    return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]
