"""Loaders of batches on the device, in an order that depends only on the seed and the epoch."""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Generic, Literal, NamedTuple, Required, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mdistiller.data.augment import Augment
from mdistiller.data.config import AugmentConfig
from mdistiller.data.cores import Workers, count_workers
from mdistiller.data.dataset import ImageSet, Splits, StreamSet
from mdistiller.errors import ConfigError, DataError
from mdistiller.seeding import derive_seed
from mdistiller.types import Batch

S = TypeVar("S")
T = TypeVar("T")


class Order(TypedDict, total=False):
    """Order and device of a loader's batches; the defaults are those of `SampleOrder`."""

    device: Required[torch.device | str]
    seed: int  # of the order, together with the number of the epoch
    crop_seed: int | None  # of random crops from files, together with the view; None: `seed`
    cycle: int | None  # epochs after which the views repeat; None: each epoch has a view of its own
    shuffle: bool  # draw a new order each epoch; otherwise keep the order of the set
    drop_last: bool  # leave out a smaller last batch
    rank: int  # number of this process
    world_size: int  # number of the processes that share each epoch


class SampleOrder:
    """Order and length of all loaders.

    With `shuffle`, every rank has the same number of samples: the permutation of the epoch is repeated from
    its start until it divides evenly, and rank r gets every `world_size`-th sample from r. The i-th batches
    of all ranks together equal the i-th batch of one process with a `world_size` times larger batch. Without
    `shuffle`, rank r gets the samples r, r + world_size, …: each sample once.

    Raises:
        DataError: An empty data set.
        ConfigError: A batch size or rank out of range, or no batch left with `drop_last`.
    """

    left_out = 0
    """Unreadable samples of this rank in the last epoch."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int = 0,
        crop_seed: int | None = None,
        cycle: int | None = None,
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
        self.crop_seed, self.cycle = seed if crop_seed is None else crop_seed, cycle
        self.rank, self.world_size = rank, world_size
        self.samples = math.ceil(size / world_size) if shuffle else len(range(rank, size, world_size))
        if drop_last and self.samples < batch_size:
            raise ConfigError(
                f"batch_size: got {batch_size}, but there are {self.samples} images a process and drop_last "
                "leaves no batch; allowed are smaller batches, or drop_last off"
            )
        self.batch_size = min(batch_size, max(self.samples, 1))

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def last(self) -> int:
        """Number of images in the last batch of an epoch."""
        return min(self.samples - (len(self) - 1) * self.batch_size, self.batch_size)

    def view(self, epoch: int) -> int:
        """Returns the number of an epoch's view: random choices for an image are those of its view."""
        return epoch if self.cycle is None else epoch % self.cycle

    def order(self, epoch: int) -> Tensor:
        """Returns the sample indices of this rank in an epoch, int64 on the CPU, the same for any device."""
        if not self.shuffle:
            return torch.arange(self.rank, self.size, self.world_size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        wrapped = torch.arange(self.rank, self.samples * self.world_size, self.world_size) % self.size
        return torch.randperm(self.size, generator=generator)[wrapped]


class ResidentLoader(SampleOrder):
    """Loader of a set that is copied to the device as a whole; `batch_size` is that of this rank."""

    def __init__(self, images: ImageSet, batch_size: int, **order: Unpack[Order]) -> None:
        super().__init__(len(images), batch_size, **order)
        self._images = images.images.to(self.device)
        self._labels = images.labels.to(self.device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yields an epoch from batch `first`: image [B, H, W, C], label and index int64 [B]."""
        # One copy per epoch, so that no step waits for the device.
        for index in self.order(epoch).to(self.device).split(self.batch_size)[first : len(self)]:
            yield Batch(self._images.index_select(0, index), self._labels.index_select(0, index), index)


class Part(NamedTuple, Generic[T]):
    """Batch as read by a worker."""

    samples: T
    position: Tensor  # of the samples, int64
    errors: list[str]  # of those that cannot be read


class _BatchReader(Dataset, Generic[S, T]):
    """Reads whole batches by keys (view seed, position), which make a sample the same in any worker."""

    def __init__(self, read: Callable[[int, int], S], collate: Callable[[list[S]], T]) -> None:
        self.read, self.collate = read, collate

    def __getitems__(self, keys: list[tuple[int, int]]) -> Part[T]:
        samples, kept, errors = [], [], []
        for seed, position in keys:
            try:
                samples.append(self.read(position, seed))
                kept.append(position)
            except DataError as error:  # an exception would arrive wrapped in the worker's traceback
                errors.append(str(error))
        return Part(self.collate(samples), torch.tensor(kept, dtype=torch.int64), errors)


def _leave_group(worker: int) -> None:
    """Moves a worker out of the main process's group, which Ctrl-C and often SIGTERM reach as a whole.

    Only the main process handles these signals: it finishes its step, which needs the workers, and then ends
    them. Workers without a main process end by themselves.
    """
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def _as_read(part: object) -> object:
    return part


class WorkerLoader(SampleOrder, Generic[T]):
    """Base of loaders that read batches in worker processes, the same batches for any number of workers.

    Args:
        size: number of samples.
        batch_size: that of this rank.
        read: reads a sample by its position and the seed of the view, or raises DataError.
        collate: makes the samples of a batch one value, in the worker.
        on_error: whether an unreadable sample raises, or is left out with a warning.
        workers: number of processes. 0: the main process reads.
        order: see `Order`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        read: Callable[[int, int], S],
        collate: Callable[[list[S]], T],
        *,
        on_error: Literal["raise", "skip"],
        workers: Workers,
        **order: Unpack[Order],
    ) -> None:
        super().__init__(size, batch_size, **order)
        workers = count_workers(workers)
        self._on_error = on_error
        self._keys: list[list[tuple[int, int]]] = []  # of the epoch that was begun last, by batch
        # Without its own generator, a DataLoader draws from the global one.
        self._generator = torch.Generator()
        self._loader = DataLoader(
            _BatchReader(read, collate),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_as_read,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=self._generator,
            worker_init_fn=_leave_group,
        )

    def _parts(self, epoch: int, first: int = 0) -> Iterator[Part[T]]:
        """Yields what is read of the batches of an epoch, from number `first`.

        Raises:
            DataError: An unreadable image; with on_error=skip, a batch without a readable one in training,
                and an epoch without one in evaluation.
        """
        seed = derive_seed(self.crop_seed, self.view(epoch))
        keys = [(seed, position) for position in self.order(epoch).tolist()]
        starts = range(0, len(keys), self.batch_size)
        self._keys[:] = [keys[i : i + self.batch_size] for i in starts][first : len(self)]
        self._generator.manual_seed(seed)
        failed = 0
        try:
            for part in self._loader:
                failed += len(part.errors)
                is_fatal = part.errors and (self._on_error == "raise" or failed == len(keys))
                if is_fatal or (self.shuffle and not len(part.position)):
                    failed = 0
                    raise DataError(part.errors[0])
                if len(part.position):
                    yield part
        finally:  # also if the caller leaves the epoch before its end
            self.left_out = failed
            if failed:
                images = "image" if failed == 1 else "images"
                warnings.warn(f"an epoch left out {failed} {images} that cannot be read", stacklevel=3)

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=self.device.type == "cuda")


def _read_image(images: StreamSet, position: int, seed: int) -> Tensor:
    return images.read(position, derive_seed(seed, position))


def _stack(images: list[Tensor]) -> Tensor:
    # In a worker, it stacks them in shared memory.
    stacked: Tensor = default_collate(images) if images else torch.empty(0)
    return stacked


class StreamLoader(WorkerLoader[Tensor]):
    """Loader of a streamed set: order and random crops are the same for any number of workers."""

    def __init__(
        self, images: StreamSet, batch_size: int, *, workers: Workers = "auto", **order: Unpack[Order]
    ) -> None:
        read = partial(_read_image, images)
        super().__init__(
            len(images), batch_size, read, _stack, on_error=images.on_error, workers=workers, **order
        )
        self._labels = images.labels

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yields an epoch as `ResidentLoader.epoch` does; errors as `_parts`."""
        for image, index, _ in self._parts(epoch, first):
            yield Batch(*map(self._to_device, (image, self._labels[index], index)))


def evaluation_size(given: int | None, side: int) -> int:
    """Returns the number of squares of `side` pixels in an evaluation batch; None: by memory, at most 500."""
    return min(500, max(1, 2**21 // side**2)) if given is None else given


def make_loader(
    images: ImageSet | StreamSet, batch_size: int, *, workers: Workers = "auto", **order: Unpack[Order]
) -> ResidentLoader | StreamLoader:
    """Builds a `ResidentLoader` or a `StreamLoader`, which document the arguments (`workers` for streams)."""
    if isinstance(images, ImageSet):
        return ResidentLoader(images, batch_size, **order)
    return StreamLoader(images, batch_size, workers=workers, **order)


class PlainBatches:
    """Batches of a set in its order, without random changes: normalized images, the same in each iteration.

    Args:
        images: the set.
        splits: the data, whose mean and standard deviation the images get.
        batch_size: see `evaluation_size`.
        memory_format: that of the images.
        workers: as `make_loader`, and so is `order`.
    """

    def __init__(
        self,
        images: ImageSet | StreamSet,
        splits: Splits,
        batch_size: int | None,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        workers: Workers = "auto",
        **order: Unpack[Order],
    ) -> None:
        if isinstance(images, StreamSet):
            images = replace(images, random_crop=False)
        size = evaluation_size(batch_size, splits.image_size)
        order["shuffle"] = False
        self.loader = make_loader(images, size, workers=workers, **order)
        augment = Augment(AugmentConfig(), splits.mean, splits.std, splits.num_classes, memory_format)
        self.augment = augment.to(self.loader.device).eval()

    def __iter__(self) -> Iterator[Batch]:
        return map(self.augment, self.loader.epoch(0))
