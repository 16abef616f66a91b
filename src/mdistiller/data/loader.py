"""Batches on the device, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mdistiller.data.dataset import ImageSet, StreamSet
from mdistiller.errors import ConfigError, DataError
from mdistiller.types import Batch


def derive_seed(*parts: int) -> int:
    """One seed (63 bits) from several non-negative numbers, such that any change gives an unrelated one."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Order(TypedDict, total=False):
    """Which samples a loader gives, and where; the defaults are `SampleOrder`'s.

    device: where the batches are wanted.
    seed: of the order; with the epoch's number it fixes it.
    shuffle: a new order each epoch; otherwise the set's own.
    drop_last: leave out a last batch that is smaller.
    rank, world_size: this process and the number of processes that share each epoch.
    """

    device: Required[torch.device | str]
    seed: int
    shuffle: bool
    drop_last: bool
    rank: int
    world_size: int


class SampleOrder:
    """Order and length, which all loaders share.

    With `shuffle` every rank gets the same number of samples: the epoch's permutation is continued from
    its start until it divides evenly, and dealt out in turn, so that the i-th batches of all ranks together
    are what one process with a batch `world_size` times as large would get. Without `shuffle` rank r
    gets samples r, r + world_size, …: each sample once.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if size < 1:
            raise DataError("the data set is empty")
        if batch_size < 1:
            raise ConfigError(f"batch_size: got {batch_size}, need at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: got {rank}, allowed are 0 to world_size - 1 = {world_size - 1}")
        self.size = size
        self.device = torch.device(device)
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        if shuffle:
            self.samples = math.ceil(size / world_size)
        else:
            self.samples = len(range(rank, size, world_size))
        if drop_last and self.samples < batch_size:
            raise ConfigError(
                f"batch_size: got {batch_size}, but there are {self.samples} images a process and drop_last "
                "leaves no batch; allowed are smaller batches, or drop_last off"
            )
        self.batch_size = min(batch_size, max(self.samples, 1))

    def __len__(self) -> int:
        """Number of batches an epoch, on this rank."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def last(self) -> int:
        """Images in an epoch's last batch."""
        return min(self.samples - (len(self) - 1) * self.batch_size, self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The sample indices of this rank in `epoch`, int64 on the CPU (the same whatever the device)."""
        if not self.shuffle:
            return torch.arange(self.rank, self.size, self.world_size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        permutation = torch.randperm(self.size, generator=generator)
        wrapped = torch.arange(self.rank, self.samples * self.world_size, self.world_size) % self.size
        return permutation[wrapped]

    def _batches(self, epoch: int) -> list[Tensor]:
        return list(self.order(epoch).split(self.batch_size))[: len(self)]


class ResidentLoader(SampleOrder):
    """Batches cut from a set that lives on the device whole.

    Args:
        images: the set; it is copied to `device`.
        batch_size: images a batch on this rank.
        order: see `Order`.

    Raises:
        ConfigError: a batch size or rank that cannot be.
    """

    def __init__(self, images: ImageSet, batch_size: int, **order: Unpack[Order]) -> None:
        super().__init__(len(images), batch_size, **order)
        self._images = images.images.to(self.device)
        self._labels = images.labels.to(self.device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch`, from number `first` on: image uint8 [B, H, W, 3], label and index int64 [B]."""
        # The only copy of the epoch: the loop itself never waits for the device.
        for index in self.order(epoch).to(self.device).split(self.batch_size)[first : len(self)]:
            yield Batch(self._images.index_select(0, index), self._labels.index_select(0, index), index)


class _Part(NamedTuple):
    """What a worker sends: the images it could read (None: not one), and why it could not read the others."""

    image: Tensor | None
    label: Tensor
    position: Tensor
    errors: list[str]


class _Reader(Dataset):
    """Reads a batch at a time from keys (epoch seed, index), so that a crop is the same in any worker."""

    def __init__(self, images: StreamSet) -> None:
        self.images = images

    def __getitems__(self, keys: list[tuple[int, int]]) -> _Part:
        images, kept, errors = [], [], []
        for seed, position in keys:
            try:
                images.append(self.images.read(position, derive_seed(seed, position)))
                kept.append(position)
            except DataError as error:  # sent as text: one raised here arrives wrapped in a traceback
                errors.append(str(error))
        index = torch.tensor(kept, dtype=torch.int64)
        return _Part(torch.stack(images) if images else None, self.images.labels[index], index, errors)


class EpochKeys:
    """The batch sampler: a reader's keys (epoch seed, index) of the epoch that was set last."""

    def __init__(self) -> None:
        self.seed = 0
        self.batches: list[Tensor] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([[(self.seed, i) for i in batch.tolist()] for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


def leave_group(worker: int) -> None:
    """Ctrl-C goes to all processes of a group, a scheduler's SIGTERM may. They are for the main process,
    which finishes its step with what the readers give, and then ends them; without it they end themselves.
    """
    if hasattr(os, "setpgid"):  # Windows has none
        os.setpgid(0, 0)


def _as_is(part: Any) -> Any:
    return part


class WorkerLoader(SampleOrder):
    """Whole batches read by worker processes while the device computes, the same for any number of them.

    Args:
        images: the set, with its length and its `on_error`.
        reader: reads a batch of keys (epoch seed, index); gives a tuple with `position` int64, of the images
            that it could read, and `errors`, why it could not read the others.
        batch_size: images a batch on this rank.
        workers: processes that read (0: this one).
        order: see `Order`.
    """

    def __init__(
        self, images: Any, reader: Dataset, batch_size: int, *, workers: int, **order: Unpack[Order]
    ) -> None:
        super().__init__(len(images), batch_size, **order)
        self._set, self._keys = images, EpochKeys()
        # A generator of its own: a DataLoader otherwise draws from the global one, which others use.
        self._generator = torch.Generator()
        self._loader = DataLoader(
            reader,
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=self._generator,
            worker_init_fn=leave_group,
        )

    def _parts(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """What the reader gives for the batches of an epoch, from number `first` on.

        Raises:
            DataError: an image cannot be read; with on_error=skip, none of a batch can.
        """
        self._keys.seed = derive_seed(self.seed, epoch)
        self._keys.batches = self._batches(epoch)[first:]
        self._generator.manual_seed(self._keys.seed)
        failed = 0
        try:
            for part in self._loader:
                if not len(part.position) or (part.errors and self._set.on_error == "raise"):
                    raise DataError(part.errors[0])
                failed += len(part.errors)
                yield part
        finally:  # also where the epoch is left before its end
            if failed:
                images = "image" if failed == 1 else "images"
                warnings.warn(f"an epoch left out {failed} {images} that cannot be read", stacklevel=3)

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True)


class StreamLoader(WorkerLoader):
    """Batches read by worker processes while the device computes.

    Arguments as for `ResidentLoader`, with `workers`: the number of processes (0: read in this one). The
    order and the random crops are the same for any number of workers.
    """

    def __init__(
        self, images: StreamSet, batch_size: int, *, workers: int = 2, **order: Unpack[Order]
    ) -> None:
        super().__init__(images, _Reader(images), batch_size, workers=workers, **order)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch`, from number `first` on: image uint8 [B, H, W, 3], label and
        index int64 [B].

        Raises:
            DataError: an image cannot be read; with on_error=skip, none of a batch can.
        """
        for image, label, index, _ in self._parts(epoch, first):
            yield Batch(*map(self._to_device, (image, label, index)))


def make_loader(
    images: ImageSet | StreamSet, batch_size: int, *, workers: int = 2, **order: Unpack[Order]
) -> ResidentLoader | StreamLoader:
    """The loader that fits the set; see there for the arguments (`workers` is for streams)."""
    if isinstance(images, ImageSet):
        return ResidentLoader(images, batch_size, **order)
    return StreamLoader(images, batch_size, workers=workers, **order)
