"""Memory that is free on this machine and on its GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

_UNKNOWN = 8_000_000_000  # bytes, on a system that does not report its memory


def free_memory(device: torch.device | None = None) -> int:
    """Returns the free memory in bytes: of a GPU, or of this machine for any other device.

    Memory of the machine is shared by the processes that torchrun starts on it.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes that are free on the machine, or in the control group of this process if less."""
    return max(0, min([_machine(proc), *_control_groups(proc, groups)]))


def _machine(proc: Path) -> int:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        names = os.sysconf_names
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN


def _control_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Yields the free bytes of this process's control group and of those around it, versions 1 and 2."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    versions = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, inside = groups / "memory" if controllers else groups, Path(path.strip("/"))
        for folder in (base / inside, *(base / parent for parent in inside.parents)):
            for limit, used in versions:
                try:
                    # The text "max" is no number: no limit.
                    free = int((folder / limit).read_text()) - int((folder / used).read_text())
                except (OSError, ValueError):
                    continue
                yield free + _cache(folder)


def _cache(folder: Path) -> int:
    """Returns the bytes of cached files, which the kernel drops when memory is needed."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
