"""Images a second of this package's loader, torchvision's ImageFolder and timm's loader, on the same files.

    python benchmarks/data_loaders.py DIR [--workers 2] [--image-size 224] [--out results/data_loaders]

DIR has class folders of images, or one of them named train. The files are streamed from disk. All loaders
make training batches of the same kind on the device: a random resized crop, a flip, normalized float32. They
take turns of one epoch each, so that a disturbance affects all of them. timm is left out if it is missing.
"""

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flags import read
from torch import Tensor

from mdistiller.cli.flags import Positional
from mdistiller.data import DataConfig
from mdistiller.data.cores import count_workers
from mdistiller.data.dataset import IMAGENET_MEAN, IMAGENET_STD
from mdistiller.data.encoded import EncodedSet, make_splits
from mdistiller.data.layout import TRAIN, subfolder
from mdistiller.errors import ConfigError, DataError
from mdistiller.models import ModelConfig
from mdistiller.report.markup import markdown_table
from mdistiller.runs.environment import environment
from mdistiller.settings import Settings
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.batches import ImageBatches
from mdistiller.training.distributed import World, process_group

OURS, TORCHVISION, TIMM = "mdistiller", "torchvision ImageFolder", "timm"


class Files(NamedTuple):
    """Training images below a folder, with their classes."""

    folder: Path
    samples: list[tuple[str, int]]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Feed:
    """Batches of all loaders: their size, side of the images in pixels, worker processes, and device."""

    batch_size: int
    image_size: int
    workers: int
    world: World


@dataclass
class _Row:
    epoch: Callable[[], Iterable[Any]]  # starts an epoch of pairs whose first part is a batch of images
    seconds: list[float] = field(default_factory=list)
    cpu: list[float | None] = field(default_factory=list)


class DataBench:
    """Loaders of the same files, and the times of their epochs.

    Each has its own worker processes, which wait while the others have their turn.
    """

    def __init__(self, files: Files, feed: Feed) -> None:
        self.device, self.images = feed.world.device, len(files.samples) // feed.batch_size * feed.batch_size
        if not self.images:
            raise ConfigError(
                f"batch_size: got {feed.batch_size}, but there are {len(files.samples)} images; allowed are "
                "batches of at most as many"
            )
        makers = {OURS: _ours, TORCHVISION: _torchvision}
        if find_spec("timm") is not None:
            makers[TIMM] = _timm
        self._rows = {name: _Row(make(files, feed)) for name, make in makers.items()}

    def run(self, rounds: int) -> None:
        """Times an epoch of each loader a round, each round in another order."""
        rows = list(self._rows.values())
        for _ in range(rounds):
            for row in rows:
                self._time(row)
            rows.append(rows.pop(0))

    def _time(self, row: _Row) -> None:
        seen, cpu, start = 0, _cpu_seconds(), time.perf_counter()
        for images, *_ in row.epoch():
            seen += len(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        row.seconds.append(time.perf_counter() - start)
        after = _cpu_seconds()
        row.cpu.append(None if cpu is None or after is None else after - cpu)
        assert seen == self.images

    def rows(self, warmup: int) -> list[dict[str, Any]]:
        """Returns a row for each loader, without the first `warmup` rounds, in which the workers start."""
        peer = self._rows[TORCHVISION].seconds[warmup:]
        found = []
        for name, row in self._rows.items():
            speeds = [self.images / s for s in row.seconds[warmup:]]
            cpu = [s for s in row.cpu[warmup:] if s is not None]
            found.append(
                {
                    "name": name,
                    "images_per_second": speeds,
                    "median": statistics.median(speeds),
                    "of_torchvision": statistics.median(
                        theirs / own for theirs, own in zip(peer, row.seconds[warmup:], strict=True)
                    ),
                    "cpu_us_an_image": 1e6 * statistics.median(cpu) / self.images if cpu else None,
                }
            )
        return found


def find_files(root: Path, limit: int | None) -> Files:
    """Finds the images in class folders, in `root`/train or in `root`; at most `limit`, spread evenly.

    Raises:
        DataError: there are none.
    """
    from torchvision.datasets import ImageFolder

    try:
        folder = subfolder(root, TRAIN) or root
        found = ImageFolder(str(folder))
    except OSError as error:  # FileNotFoundError for a folder without classes too
        raise DataError(f"{root} has no class folders of images: {error}") from error
    chosen = np.arange(len(found.samples))
    if limit is not None and limit < len(chosen):
        chosen = np.linspace(0, len(chosen) - 1, limit).round().astype(int)
    return Files(folder, [found.samples[i] for i in chosen], tuple(found.classes))


def _ours(files: Files, feed: Feed) -> Callable[[], Iterable[Any]]:
    images = EncodedSet(
        samples=np.array([Path(path) for path, _ in files.samples], dtype=object),
        labels=torch.tensor([label for _, label in files.samples]),
        image_size=feed.image_size,
        resize=feed.image_size,
        random_crop=True,
    )
    splits = make_splits(images, images, files.classes, str(files.folder))
    config = ClassificationConfig(
        data=DataConfig(kind="folder", root=files.folder, workers=feed.workers),
        student=ModelConfig(name="resnet8"),
        batch_size=feed.batch_size,
        drop_last=True,
    )
    source = ImageBatches(config, splits, feed.world)
    starts = count(step=len(source.loader))

    def epoch() -> Iterable[Any]:
        start = next(starts)
        for step in range(start, start + len(source.loader)):
            (batch,) = source.next_batches(step, 1)
            yield batch

    return epoch


def _torchvision(files: Files, feed: Feed) -> Callable[[], Iterable[Any]]:
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    change = [T.RandomResizedCrop(feed.image_size), T.RandomHorizontalFlip(), T.ToTensor()]
    images = ImageFolder(str(files.folder), T.Compose([*change, T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]))
    images.samples = files.samples
    device = feed.world.device
    on_gpu = device.type == "cuda"
    loader = DataLoader(
        images,
        feed.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=feed.workers,
        persistent_workers=feed.workers > 0,
        pin_memory=on_gpu,
    )

    def epoch() -> Iterable[tuple[Tensor, Tensor]]:
        for image, label in loader:
            yield image.to(device, non_blocking=on_gpu), label.to(device, non_blocking=on_gpu)

    return epoch


def _timm(files: Files, feed: Feed) -> Callable[[], Iterable[Any]]:
    timm: Any = import_module("timm.data")  # typed more narrowly than documented

    images = timm.ImageDataset(str(files.folder))
    images.reader.samples = files.samples
    device = feed.world.device
    loader = timm.create_loader(
        images,
        (3, feed.image_size, feed.image_size),
        feed.batch_size,
        is_training=True,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=feed.workers,
        persistent_workers=feed.workers > 0,
        pin_memory=device.type == "cuda",
        device=device,
    )
    return lambda: iter(loader)


def _cpu_seconds() -> float | None:
    """Returns the processor time of this process and its workers so far; None where it is not known."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            stat = Path(f"/proc/{child.pid}/stat").read_text()
        except OSError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def data_table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = []
    for row in rows:
        speeds, cpu = row["images_per_second"], row["cpu_us_an_image"]
        lines.append(
            [
                row["name"],
                f"{row['median']:,.0f}",
                f"{min(speeds):,.0f} – {max(speeds):,.0f}",
                f"{row['of_torchvision']:.2f}",
                "" if cpu is None else f"{cpu:,.0f}",
            ]
        )
    heads = ["loader", "images/s", "lowest – highest", "× ImageFolder", "CPU µs an image"]
    return markdown_table(heads, lines)


class Command(Settings):
    """Measure the images a second of the loader beside torchvision's ImageFolder and timm's."""

    root: Positional[Path]
    """Folder with class folders of images, or with one of them named train."""
    workers: int | None = None
    """Worker processes of each loader. None: one for each core that the process may use, at most 16."""
    batch_size: int = 64
    """Images a batch."""
    image_size: int = 224
    """Side of the square images in pixels."""
    images: int | None = 2048
    """Largest number of images, spread evenly over the classes. None: all."""
    rounds: int = 6
    """Epochs of each loader."""
    warmup: int = 1
    """Rounds at the start that do not count."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""
    out: Path | None = None
    """Folder for data_loaders.json and data_loaders.md."""


def main(c: Command) -> None:
    """Prints the table, and writes it with the speeds of all rounds."""
    if not 0 <= c.warmup < c.rounds:
        raise SystemExit(f"warmup: got {c.warmup}; allowed: 0 to rounds - 1 = {c.rounds - 1}")
    workers = count_workers("auto" if c.workers is None else c.workers)
    with process_group(c.device) as world:
        bench = DataBench(find_files(c.root, c.images), Feed(c.batch_size, c.image_size, workers, world))
        bench.run(c.rounds)
    rows = bench.rows(c.warmup)
    table = data_table(rows)
    print(table)
    if c.out is not None:
        settings = {"images": bench.images, "workers": workers, "device": str(world.device)}
        settings |= {name: getattr(c, name) for name in ("batch_size", "image_size", "rounds", "warmup")}
        log = {"settings": settings, "environment": environment(0), "rows": rows}
        c.out.mkdir(parents=True, exist_ok=True)
        (c.out / "data_loaders.md").write_text(table, encoding="utf-8")
        (c.out / "data_loaders.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(read(Command))
