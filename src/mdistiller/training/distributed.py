"""Process group of a run under `torchrun`, and sums over its processes."""

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mdistiller.errors import ConfigError
from mdistiller.types import Line

V = TypeVar("V")


@dataclass(frozen=True)
class World:
    """This process in its group: device, rank (0 … size - 1), number of processes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Averages a tensor over all processes, in place."""
        return self.sum(values).div_(self.size)

    def gather(self, value: V) -> list[V]:
        """Collects a picklable value of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """Copies the main process's buffers to every process: batch-norm statistics differ between them."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def pick_device(name: str) -> torch.device:
    """Returns the device of a name: auto, cpu, cuda, cuda:N or mps; raises ConfigError where there is none.

    auto is a CUDA GPU or the CPU, never mps, on which this package has not been tried.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        known = False
    if not known:
        raise ConfigError(f"device: got {name!r}; allowed: auto, cpu, cuda, cuda:N, mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device: got {name!r}, but torch finds no such GPU (Apple's Metal) here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: got {name!r}, but {torch.cuda.device_count()} GPUs are visible here")
    return device


def restarted(out: Path | None) -> bool:
    """Whether torchrun started these processes again after one was lost, and the run's folder is there.

    Raises:
        ConfigError: torchrun may start again (`--max-restarts`), and the run folder has no fixed name.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return False
    if out is None:
        raise ConfigError(
            "out: with torchrun --max-restarts a run goes on in its folder; name it (--out DIR)"
        )
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and (out / "config.json").is_file()


def _join(device: torch.device) -> None:
    """Joins the process group of the current start of these processes."""
    options: Line = {"device_id": device} if device.type == "cuda" else {}
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps one store over its restarts, with addresses of processes that are gone: reading
        # those fails or never ends. Several hosts may count their restarts differently.
        store, rank, size = next(rendezvous("env://"))
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        options |= {"store": PrefixStore(f"start{start}", store), "rank": rank, "world_size": size}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """Context of the processes of a run: those that torchrun started, or this one by itself."""
    picked = pick_device(device)
    if dist.is_initialized():
        yield World(picked, dist.get_rank(), dist.get_world_size())
        return
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if picked.type == "mps" and several:
        raise ConfigError("device: mps takes one process; got several (torchrun)")
    if picked.type == "cuda" and several:
        picked = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if picked.type == "cuda" and picked.index is not None:
        torch.cuda.set_device(picked)  # streams, captures and waits that name no device are the current one's
    if not several:
        yield World(picked)
        return
    _join(picked)
    try:
        yield World(picked, dist.get_rank(), dist.get_world_size())
        dist.barrier()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # DDP has a reference to the group, too. If that were the last one, it would be freed with the
        # interpreter locked, and wait forever for a thread of the group that waits for the interpreter.
        gc.collect()
        dist.destroy_process_group()
