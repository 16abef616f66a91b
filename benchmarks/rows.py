"""Rows of CIFAR-100, one run after another, for a CPU with nothing else to do.

    nice -n 19 python benchmarks/rows.py --data-root DIR --teachers DIR --work DIR

A run of a quarter of the epochs takes one to two hours of one core, one of all (`--scale full`) five to
twelve. A call that was stopped resumes within the epoch where it was; finished runs are those of
results/SCALE, whatever is left in the folder of the runs. Several calls share the queue; those with a seed
each (`--seeds 0`, `--seeds 1`) share the teacher's outputs of a seed in a cache. After each run its metrics
are thinned into results/SCALE, and the table of all finished ones is written to results/SCALE/table.md.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from flags import read
from resumable import is_done, run, spread, thin

from mdistiller.recipes.experiments import Cell, get_experiment
from mdistiller.settings import Settings
from mdistiller.tasks.classification.experiments import models_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
BASIC = ("baseline", "KD", "DKD")
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
    scale: Literal["quarter", "full"] = "quarter"
    """Length of the runs: a quarter of the epochs, or all 240."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs to train."""
    threads: int = 1
    """Threads of the training."""
    epochs: int | None = None
    """Other epochs than the scale's, to try the script; such runs are not copied."""

    @property
    def results(self) -> Path:
        """Folder of the metrics that are kept."""
        return RESULTS / self.scale

    def cells(self) -> dict[tuple[str, str], Cell]:
        """Returns the cells of the table of CIFAR-100 by pair and setting."""
        found = get_experiment("cifar100").cells("paper" if self.scale == "full" else "quarter")
        return {(cell.pair, cell.setting): cell for cell in found}


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
        keep(c, row, folder)


def keep(c: Command, row: Row, folder: Path) -> None:
    """Writes the thinned metrics of a run, with its environment as their first line."""
    env = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    env = {name: env[name] for name in KEPT} | {"torch": env["versions"]["torch"]}
    metrics = thin((folder / "metrics.jsonl").read_text(encoding="utf-8"))
    c.results.mkdir(parents=True, exist_ok=True)
    first = json.dumps({"kind": "environment", **env})
    (c.results / f"{row.name}.jsonl").write_text(f"{first}\n{metrics}", encoding="utf-8")


def table(results: Path, known: dict[tuple[str, str], Cell]) -> Iterator[str]:
    """Yields the lines of the table of all finished runs."""
    yield "| teacher → student | setting | last epoch, % | best epoch, % | seeds | published, 240 epochs, % |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for pair, setting in dict.fromkeys((row.pair, row.setting) for row in QUEUE):
        names = [row.name for row in QUEUE if (row.pair, row.setting) == (pair, setting)]
        files = [results / f"{name}.jsonl" for name in names]
        found = [summary(file) for file in files if file.is_file()]
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
    known = c.cells()
    for row in QUEUE:
        if row.seed in c.seeds and not (c.results / f"{row.name}.jsonl").is_file():
            print(row.name, file=sys.stderr, flush=True)
            train(c, row, known[row.pair, row.setting])
    if c.results.is_dir():
        (c.results / "table.md").write_text("\n".join(table(c.results, known)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(read(Command))
