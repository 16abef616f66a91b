"""Kill a run with SIGKILL again and again: does it end with the same bits as one that was left alone?

    OMP_NUM_THREADS=1 python benchmarks/kills.py --trials 200 --out results/kills

The run is a short one on the embedded digits with everything that has a state: CRD with its memory bank, an
average of the weights, mixup, crops and flips. Each trial starts it anew, kills it one to three times, and
goes on each time with `mdistiller train RUN/config.json --resume`. Its end is compared with that of a run
that was never killed: weights, averaged weights, the whole state, the lines of metrics (less what a clock
measured). A kill comes at a uniform moment of the run, from taking its folder to its end; in a share of the
cases it waits from there for the write of a state. To save time, processes are forked from one that has
loaded the libraries; with `--fresh` each loads them itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from flags import read
from safetensors.torch import load_file

from mdistiller.cli.main import run
from mdistiller.runs.checkpoint import load_state
from mdistiller.runs.environment import environment
from mdistiller.runs.folder import read_metrics
from mdistiller.settings import Settings

SMALL = "--data.train-limit 96 --data.test-limit 50 --device cpu"
RUN = f"digits.crd.resnet14_resnet8 {SMALL} --batch-size 16 --epochs 6 --ema 0.9 --augment.mixup-alpha 0.2"
RUN += " --method.negatives 32 --method.feature-dim 8 --log-every 2"
CLOCK = ("seconds", "ms_per_step", "epoch_ms")


class Command(Settings):
    """Kills of short runs."""

    out: Path
    """Folder for kills.json and kills.md."""
    trials: int = 200
    """Runs that are killed."""
    seed: int = 0
    """Of the moments."""
    kills: int = 3
    """The most kills of one run."""
    write_share: float = 0.4
    """Share of the kills that wait for the write of a state."""
    fresh: bool = False
    """Start a new Python for each process."""

    def start(self, *words: object) -> ForkProcess:
        """`mdistiller train WORDS` in a process of its own."""
        argv = ["train", *map(str, words)]

        def work() -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no progress
            if self.fresh:
                os.execv(sys.executable, [sys.executable, "-m", "mdistiller", *argv])
            sys.exit(run(argv))

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        return process


def wait_for_lock(out: Path, process: ForkProcess) -> float:
    """The moment at which a process has taken the folder."""
    lock = out / ".lock"
    while process.is_alive() and not (lock.exists() and f"process {process.pid} " in lock.read_text()):
        time.sleep(0.001)
    return time.monotonic()


def unfinished(out: Path, prefix: str = ".") -> bool:
    """Whether a file is being written, or was left half-written by a kill."""
    return any(name.startswith(prefix) and name.endswith(".tmp") for name in os.listdir(out))


def kill(process: ForkProcess, out: Path, delay: float, at_write: bool, seen: Counter[str]) -> None:
    """Kill a run some seconds after it has taken its folder, and count what that left."""
    moment = wait_for_lock(out, process) + delay
    while process.is_alive() and time.monotonic() < moment:
        time.sleep(0.0005)
    while at_write and not unfinished(out, ".resume.pt.") and process.is_alive():
        pass
    process.kill()
    process.join()
    if process.exitcode == 0:
        seen["too late, the run had ended"] += 1
        return
    assert process.exitcode == -9, f"the run failed by itself: exit code {process.exitcode}"
    first, second = ((out / name).exists() for name in ("resume.pt", "resume.previous.pt"))
    seen["kills"] += 1
    seen["kills during the write of a state"] += unfinished(out, ".resume.pt.")
    seen["kills between the two renames of a state"] += second and not first
    seen["kills during the write of another file"] += unfinished(out) and not unfinished(out, ".resume.pt.")
    seen["kills before the first state"] += not first and not second
    seen["kills before there was a config.json"] += not (out / "config.json").exists()


def ending(out: Path) -> list[Any]:
    """All that two equal runs have in common."""
    weights = [load_file(out / name) for name in ("student.safetensors", "ema_student.safetensors")]
    return [*weights, load_state(out / "resume.pt"), read_metrics(out)]


def same(a: Any, b: Any) -> bool:
    """Whether two nests of containers are equal bit for bit, but for the clock's figures."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key in CLOCK or same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def main(c: Command) -> None:
    """Kill, go on, compare, and write the counts."""
    rng, began = random.Random(c.seed), time.monotonic()
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        c.start("digits.teacher.resnet14", *SMALL.split(), "--epochs", 1, "--out", folder / "teacher").join()
        words = (*RUN.split(), "--teacher.checkpoint", folder / "teacher", "--out")
        process = c.start(*words, folder / "whole")
        locked = wait_for_lock(folder / "whole", process)
        process.join()
        duration, whole = time.monotonic() - locked, ending(folder / "whole")
        for trial in range(c.trials):
            out, kills = folder / f"run{trial}", rng.randint(1, c.kills)
            process = c.start(*words, out)
            for _ in range(kills):  # each within its part of the run
                kill(process, out, rng.random() * duration / kills, rng.random() < c.write_share, seen)
                is_run = (out / "config.json").exists()
                process = c.start(*((out / "config.json", "--resume") if is_run else (*words, out)))
            process.join()
            seen["runs"] += 1
            seen["runs that ended like the whole one"] += process.exitcode == 0 and same(ending(out), whole)
            seen["runs with a file left half-written"] += unfinished(out)
            print(f"{trial + 1} of {c.trials}: {dict(seen)}", file=sys.stderr)
    about = environment(c.seed)
    del about["command"]  # the module's docstring has it, without the paths of this machine
    log = {"environment": about, "fresh": c.fresh, "seconds": time.monotonic() - began, "counts": seen}
    c.out.mkdir(parents=True, exist_ok=True)
    (c.out / "kills.json").write_text(json.dumps(log, indent=1))
    table = "| what | count |\n| --- | ---: |\n" + "".join(f"| {k} | {v:,} |\n" for k, v in seen.items())
    (c.out / "kills.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main(read(Command))
