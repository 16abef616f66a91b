"""Rows of CIFAR-100 at a quarter of the epochs, one run after another, for a CPU with nothing else to do.

    nice -n 19 python benchmarks/rows.py --data-root DIR --teachers DIR --work DIR

A run takes one to two hours of one core. A call that was stopped goes on within the epoch where it was;
finished runs are those of results/quarter, whatever is left in the folder of the runs. Several calls share
the queue; those with a seed each (`--seeds 0`, `--seeds 1`) share the teacher's outputs of a seed in a cache.
After each run its metrics are copied to results/quarter, and the table of all finished ones is written to
results/quarter/table.md.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flags import read
from resumable import is_done, run, spread

from mdistiller.recipes.experiments import Cell, get_experiment
from mdistiller.settings import Settings
from mdistiller.tasks.classification.cells import models_of
from mdistiller.tasks.classification.experiments import BASIC

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quarter"
MORE = ("TCKD alone", "NCKD alone", "LSKD+DKD", "DIST", "ReviewKD")
KEPT = ("cpu", "threads", "commit")
"""Entries of a run's environment that are kept."""


class Row(NamedTuple):
    """A run: pair, setting and seed."""

    pair: str
    setting: str
    seed: int

    @property
    def name(self) -> str:
        """Returns the name of its folder and files."""
        return f"{self.pair}.{self.setting.replace(' ', '-')}-s{self.seed}"


QUEUE = (
    *(Row("resnet56_resnet20", setting, seed) for seed in range(3) for setting in BASIC),
    *(Row("resnet56_resnet20", setting, 0) for setting in MORE),
    *(Row(pair, setting, 0) for pair in ("vgg13_vgg8", "wrn_40_2_wrn_16_2") for setting in BASIC),
)


class Command(Settings):
    """Train the runs of the queue that are missing."""

    data_root: Path
    """Folder of CIFAR-100."""
    teachers: Path
    """Folder with NAME.pt of each teacher."""
    work: Path
    """Folder of the runs, outside the repository."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs to train."""
    threads: int = 1
    """Threads of the training."""
    epochs: int | None = None
    """Other epochs than a quarter's, to try the script; such runs are not copied."""


def cells() -> dict[tuple[str, str], Cell]:
    """Returns the cells of the table of CIFAR-100 by pair and setting."""
    return {(cell.pair, cell.setting): cell for cell in get_experiment("cifar100").cells("quarter")}


def train(c: Command, row: Row, cell: Cell) -> None:
    """Trains a run, or goes on with it, and copies what is kept of it."""
    folder = c.work / row.name
    changes: dict[str, Any] = {"data": {"root": c.data_root}, "seed": row.seed, "out": folder}
    changes |= {"precision": "bfloat16", "layout": "channels_last", "device": "cpu"}
    if cell.teacher is not None:
        changes["teacher"] = {"checkpoint": c.teachers / f"{cell.teacher.key}.pt"}
        changes["teacher_cache_format"] = "fp16"
        changes["teacher_cache"] = c.work / f"cache-{row.pair}-s{row.seed}"
    if c.epochs is not None:
        changes["epochs"] = c.epochs
    run(cell.config.replace(**changes))
    if c.epochs is None and is_done(folder):
        keep(row, folder)


def keep(row: Row, folder: Path) -> None:
    """Copies the metrics of a run, with its environment as their first line."""
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    env = {name: env[name] for name in KEPT} | {"torch": env["versions"]["torch"]}
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    RESULTS.mkdir(parents=True, exist_ok=True)
    first = json.dumps({"kind": "environment", **env})
    (RESULTS / f"{row.name}.jsonl").write_text(f"{first}\n{metrics}", encoding="utf-8")


def table(known: dict[tuple[str, str], Cell]) -> Iterator[str]:
    """Yields the lines of the table of all finished runs."""
    yield "| teacher → student | setting | last epoch, % | best epoch, % | seeds | published, 240 epochs, % |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for pair, setting in dict.fromkeys((row.pair, row.setting) for row in QUEUE):
        names = [row.name for row in QUEUE if (row.pair, row.setting) == (pair, setting)]
        found = [
            summary(RESULTS / f"{name}.jsonl") for name in names if (RESULTS / f"{name}.jsonl").is_file()
        ]
        if not found:
            continue
        last, best = (spread([s[key]["top1"] for s in found]) for key in ("last", "best"))
        ends = f"{last} | {best} | {len(found)} | {known[pair, setting].status}"
        yield f"| {' → '.join(models_of(pair))} | {setting} | {ends} |"


def summary(file: Path) -> dict[str, Any]:
    """Returns the last line of a run's metrics."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    return found


def main(c: Command) -> None:
    """Works through a part of the queue."""
    torch.set_num_threads(c.threads)
    known = cells()
    for row in QUEUE:
        if row.seed in c.seeds and not (RESULTS / f"{row.name}.jsonl").is_file():
            print(row.name, file=sys.stderr, flush=True)
            train(c, row, known[row.pair, row.setting])
    if RESULTS.is_dir():
        (RESULTS / "table.md").write_text("\n".join(table(known)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(read(Command))
