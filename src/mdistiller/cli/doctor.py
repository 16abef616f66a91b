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
import yaml

from mdistiller import __version__
from mdistiller.cli.options import Command
from mdistiller.data.cores import count_cores, count_workers
from mdistiller.data.decoder import jpeg_decoder
from mdistiller.data.memory import free_memory
from mdistiller.errors import EXTRAS, install_command
from mdistiller.runs.environment import environment
from mdistiller.training.distributed import pick_device
from mdistiller.training.precision import has_fast_bfloat16
from mdistiller.types import Line


class DoctorCommand(Command):
    """Show what matters for training on this machine, as YAML: versions, devices and their precisions,
    optional packages, loader processes, free memory and disk.
    """

    def execute(self) -> None:
        found = examine()
        text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
        print(json.dumps(found) if self.as_json else text.rstrip())


def examine() -> Line:
    """Collects the facts about this machine and this installation."""
    where = environment(0)
    versions = {"mdistiller": __version__, "python": where["python"]}
    versions |= {name: where["versions"][name] for name in ("torch", "torchvision", "numpy")}
    extras: dict[str, Line] = {}
    for name, (packages, use) in EXTRAS.items():
        # The module of mlflow-skinny is mlflow, that of ray[tune] is ray.
        missing = [p for p in packages if find_spec(p.removesuffix("-skinny").partition("[")[0]) is None]
        extra: Line = {"version": _version(packages[0]), "use": use}
        extra |= {"missing": missing, "install": install_command(name)} if missing else {}
        extras[name] = extra
    devices = [_device(torch.device("cpu"), where["cpu"])]
    for i, gpu in enumerate(where["gpus"]):
        devices.append(_device(torch.device("cuda", i), gpu))
    if torch.backends.mps.is_available():
        devices.append(_device(torch.device("mps"), platform.processor() or "Apple"))
    # Downloaded weights go here, or into the nearest folder above that exists.
    cache = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch"))
    folders = (Path.cwd(), next(path for path in (cache, *cache.parents) if path.exists()))
    return {
        "versions": versions,
        "cuda": f"{where['cuda']}, but no GPU is found"
        if where["cuda"] and not where["gpus"]
        else where["cuda"],
        "platform": where["platform"],
        "devices": devices,
        "auto_device": str(pick_device("auto")),
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "workers": count_workers("auto"),
        "free_memory_gb": _gb(free_memory()),
        "free_disk_gb": {str(path): _gb(shutil.disk_usage(path).free) for path in folders},
        "jpeg": jpeg_decoder()[0],
        "encoding": sys.stdout.encoding,
        "extras": extras,
    }


def _device(device: torch.device, name: str) -> Line:
    """Returns name and fast precisions of a device, and the memory of a GPU."""
    precisions = ["float32"]
    precisions += ["bfloat16"] if has_fast_bfloat16(device) else []
    precisions += ["float16"] if device.type == "cuda" else []
    found: Line = {"device": str(device), "name": name, "precisions": precisions}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {"free_memory_gb": _gb(free), "memory_gb": _gb(total)}
    return found


def _gb(count: int) -> float:
    return round(count / 1e9, 1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name.partition("[")[0])
    except metadata.PackageNotFoundError:
        return None
