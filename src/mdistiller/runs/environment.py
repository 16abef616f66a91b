"""Versions, hardware, commit and command of a run."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from pydantic import BaseModel

from mdistiller.runs.progress import counted
from mdistiller.types import Line


def environment(seed: int) -> Line:
    """Collects versions, hardware, commit and command, from which a run can be repeated."""
    versions = {"torch": str(torch.__version__)}  # with its build, such as +cpu, which the metadata may lack
    for name in ("mdistiller", "torchvision", "numpy", "timm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": _commit(),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str | None:
    """Returns the commit of this package's source tree, with '+' if it has changes; None without one."""

    def git(*words: str) -> str:
        where = Path(__file__).parent
        done = subprocess.run(
            ["git", *words], cwd=where, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", __file__):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


class Machine(BaseModel, frozen=True):
    """CPU on which times were measured, and the number of its threads."""

    cpu: str
    threads: int

    def __str__(self) -> str:
        return f"{self.cpu}, {counted(self.threads, 'thread')}"


def this_machine() -> Machine:
    """Returns the CPU of this machine, with the threads of this process."""
    return Machine(cpu=_cpu_name(), threads=torch.get_num_threads())
