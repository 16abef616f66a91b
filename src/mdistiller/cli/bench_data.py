"""Command `mdistiller bench data`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mdistiller.analysis.bench_data import DataBench, Feed, data_table, find_files
from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.cli.terminal import counted
from mdistiller.data.cores import count_workers
from mdistiller.errors import ConfigError
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.environment import environment
from mdistiller.training.distributed import process_group


@dataclass(frozen=True)
class BenchDataCommand(CommonFlags):
    """Measure the images a second of the loader beside torchvision's ImageFolder and, if installed, timm's.

    The files are streamed from disk. All loaders crop at random, scale, mirror and normalise, with as many
    worker processes, and take turns of one epoch.
    """

    root: tyro.conf.Positional[Path]
    """Folder with class folders of images, or with one of them named train."""
    workers: int | Literal["auto"] = "auto"
    """Worker processes of each loader. `auto`: one for each core that the process may use, at most 16."""
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
    """Folder for bench-data.json and bench-data.md."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller bench data`."""
    c = parse_command(BenchDataCommand, args, prog="mdistiller bench data")
    if not 0 <= c.warmup < c.rounds:
        raise ConfigError(f"warmup: got {c.warmup}; allowed: 0 to rounds - 1 = {c.rounds - 1}")
    for name in ("batch_size", "image_size", "images"):
        if (value := getattr(c, name)) is not None and value < 1:
            raise ConfigError(f"{name}: got {value}; allowed are numbers of at least 1")
    if c.workers != "auto" and c.workers < 0:
        raise ConfigError(f"workers: got {c.workers}; allowed are auto, or a number of at least 0")
    workers = count_workers(c.workers)
    files = find_files(c.root, c.images)
    with process_group(c.device) as world:
        bench = DataBench(files, Feed(c.batch_size, c.image_size, workers, world))
        with counted("round", c.rounds) as done:
            bench.run(c.rounds, done)
    rows = bench.rows(c.warmup)
    settings = {name: getattr(c, name) for name in ("batch_size", "image_size", "rounds", "warmup")}
    settings |= {"images": bench.images, "workers": workers, "device": str(world.device)}
    where = {k: v for k, v in environment(0).items() if k != "command"}
    result = {"settings": settings, "environment": where, "rows": rows}
    if c.out is not None:
        try:
            c.out.mkdir(parents=True, exist_ok=True)
            write_text(c.out / "bench-data.json", json.dumps(result, indent=1) + "\n")
            write_text(c.out / "bench-data.md", data_table(rows))
        except OSError as error:
            raise ConfigError(f"out: cannot write to {c.out}: {error}") from error
    print(json.dumps(result) if c.json else data_table(rows).rstrip())
