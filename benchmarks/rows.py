"""Rows of CIFAR-100 at a quarter of the epochs, one after another, for a CPU with nothing else to do.

    nice -n 19 python benchmarks/rows.py --data-root DIR --teachers DIR --out DIR

Every start goes on where the last one ended, within an epoch too: stop it with Ctrl-C or SIGTERM to its
process group. `--collect` trains nothing; it copies the metrics of the finished runs to `results/quarter`
and writes their table to `results/quarter/table.md`, from which `docs/results/quarter.md` is made.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quarter"


class Rows(NamedTuple):
    """Settings of a pair that train side by side, for the seeds below a number."""

    pair: str
    settings: tuple[str, ...]
    seeds: int


BASIC = ("baseline", "KD", "DKD")
MORE = ("TCKD alone", "NCKD alone", "LSKD+DKD", "DIST", "ReviewKD")
QUEUE = (
    *(Rows("resnet56_resnet20", BASIC, seeds) for seeds in (1, 2, 3)),
    Rows("resnet56_resnet20", MORE, 1),
    Rows("vgg13_vgg8", BASIC, 1),
    Rows("wrn_40_2_wrn_16_2", BASIC, 1),
)


@dataclass
class Command:
    """Train the rows of the queue, or collect the finished ones."""

    data_root: Path
    """Folder of CIFAR-100."""
    teachers: Path
    """Folder with NAME.pt of each teacher."""
    out: Path
    """Folder of the runs, outside the repository: it grows to some hundred megabytes."""
    threads: int = 1
    """Threads of the training."""
    collect: bool = False
    """Train nothing."""


def reproduce(command: Command, rows: Rows, *, run: bool) -> None:
    """Runs `mdistiller reproduce` for some rows in a process of its own, which resumes what it finds."""
    words = [
        *(sys.executable, "-m", "mdistiller", "reproduce", "cifar100", "--scale", "quarter"),
        *("--pairs", rows.pair, "--settings", *rows.settings, "--seeds", str(rows.seeds)),
        *("--together", str(len(rows.settings)), "--precision", "bfloat16", "--device", "cpu"),
        *("--data-root", str(command.data_root), "--teachers", str(command.teachers)),
        *("--out", str(command.out), "--run" if run else "--no-run"),
    ]
    threads = {"OMP_NUM_THREADS": str(command.threads), "OMP_WAIT_POLICY": "passive"}
    subprocess.run(words, check=True, env=os.environ | threads)


def collect(command: Command) -> None:
    """Copies the metrics of finished runs and the rows of their tables into the repository."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    last = {(rows.pair, rows.settings): rows for rows in QUEUE}
    parts = []
    for rows in last.values():
        reproduce(command, rows, run=False)
        parts.append((command.out / "cifar100.md").read_text(encoding="utf-8"))
    (RESULTS / "table.md").write_text("\n".join(parts), encoding="utf-8")
    for metrics in sorted(command.out.glob("runs/*/metrics.jsonl")):
        if '"kind": "summary"' in metrics.read_text(encoding="utf-8"):
            shutil.copy(metrics, RESULTS / f"{metrics.parent.name}.jsonl")


def main(command: Command) -> None:
    """Works through the queue."""
    if not command.collect:
        for rows in QUEUE:
            print(f"{rows.pair}: {', '.join(rows.settings)}; seeds below {rows.seeds}", file=sys.stderr)
            reproduce(command, rows, run=True)
    collect(command)


if __name__ == "__main__":
    main(tyro.cli(Command))
