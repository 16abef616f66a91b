"""Command `mdistiller doctor`."""

import json
import os
import platform
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from mdistiller import __version__
from mdistiller.cli.options import Command
from mdistiller.data.cores import count_cores, count_workers
from mdistiller.data.decoder import jpeg_decoder
from mdistiller.data.memory import free_memory
from mdistiller.errors import EXTRAS
from mdistiller.runs.environment import environment
from mdistiller.training.distributed import pick_device
from mdistiller.training.precision import has_fast_bfloat16
from mdistiller.types import Line


class DoctorCommand(Command):
    """Show what matters for training on this machine: versions, devices and their precisions, optional
    packages, loader processes, free memory and disk.
    """

    def execute(self) -> None:
        found = examine()
        print(json.dumps(found) if self.as_json else "\n".join(lines(found)))


def examine() -> Line:
    """Collects the facts about this machine and this installation."""
    where = environment(0)
    versions = {"mdistiller": __version__, "python": where["python"]}
    versions |= {name: where["versions"][name] for name in ("torch", "torchvision", "numpy")}
    extras = {}
    for name, (packages, use) in EXTRAS.items():
        # The module of mlflow-skinny is mlflow, that of ray[tune] is ray.
        missing = [p for p in packages if find_spec(p.removesuffix("-skinny").partition("[")[0]) is None]
        extras[name] = {"missing": missing, "use": use, "version": _version(packages[0])}
    devices = [_device(torch.device("cpu"), where["cpu"])]
    for i, gpu in enumerate(where["gpus"]):
        devices.append(_device(torch.device("cuda", i), gpu))
    if torch.backends.mps.is_available():
        devices.append(_device(torch.device("mps"), platform.processor() or "Apple"))
    return {
        "versions": versions,
        "cuda": where["cuda"],
        "platform": where["platform"],
        "devices": devices,
        "auto_device": str(pick_device("auto")),
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "workers": count_workers("auto"),
        "free_memory": free_memory(),
        "free_disk": {str(path): shutil.disk_usage(path).free for path in (Path.cwd(), _cache_folder())},
        "jpeg": jpeg_decoder()[0],
        "encoding": sys.stdout.encoding,
        "extras": extras,
    }


def _device(device: torch.device, name: str) -> Line:
    """Returns name and precisions of a device, and the memory of a GPU in bytes."""
    precisions = ["float32"]
    precisions += ["bfloat16"] if has_fast_bfloat16(device) else []
    precisions += ["float16"] if device.type == "cuda" else []
    found: Line = {"device": str(device), "name": name, "precisions": precisions}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {"free_memory": free, "memory": total}
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name.partition("[")[0])
    except metadata.PackageNotFoundError:
        return None


def _cache_folder() -> Path:
    """Returns the folder of downloaded weights, or the nearest one above that exists."""
    folder = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch"))
    return next(path for path in (folder, *folder.parents) if path.exists())


def lines(found: Line) -> list[str]:
    """Returns the facts of `examine` as lines of text."""
    shown = [" ".join(f"{name} {version}" for name, version in found["versions"].items()), found["platform"]]
    shown += ["", "devices (fast precisions):"]
    for device in found["devices"]:
        memory = ""
        if "memory" in device:
            memory = f", {device['free_memory'] / 1e9:.1f} of {device['memory'] / 1e9:.1f} GB free"
        shown.append(f"  {device['device']:<8} {device['name']}{memory}: {', '.join(device['precisions'])}")
    shown.append(f"  --device auto selects {found['auto_device']}")
    if len(found["devices"]) == 1:
        built = f"for CUDA {found['cuda']} but finds none" if found["cuda"] else "for CPUs only"
        shown.append(f"  no GPU: torch is built {built}")
    shown += ["", f"cores: {found['cores']}, torch threads: {found['threads']}"]
    shown.append(f"loader processes (--data.workers auto): {found['workers']}")
    shown.append(f"JPEG decoder: {found['jpeg']}")
    shown.append(f"free memory: {found['free_memory'] / 1e9:.1f} GB")
    shown += [f"free disk in {path}: {free / 1e9:.1f} GB" for path, free in found["free_disk"].items()]
    shown += ["", "optional packages:"]
    for name, extra in found["extras"].items():
        state = f"missing {', '.join(extra['missing'])}" if extra["missing"] else extra["version"] or "there"
        shown.append(f"  {name:<12} {state:<8} {extra['use']}")
    if missing := [package for extra in found["extras"].values() for package in extra["missing"]]:
        shown += ["  install the missing ones with", f"    pip install {' '.join(missing)}"]
    return shown
