r"""Kill a run with SIGKILL again and again: does it end with the same bits as one that was left alone?

    OMP_NUM_THREADS=1 python benchmarks/kills.py --trials 200 --out results/kills
    OMP_NUM_THREADS=1 python benchmarks/kills.py --what cache --trials 30 --out results/kills-cache
    OMP_NUM_THREADS=1 python benchmarks/kills.py --what ddp --kills 10 --fewest-kills 10 --trials 3 \
        --out results/kills-ddp

The run is a short one on the embedded digits with everything that has a state: CRD with its memory bank, an
average of the weights, mixup, crops and flips. Each trial starts it anew, kills it one to three times, and
goes on each time with `mdistiller train RUN/config.json --resume`. Its end is compared with that of a run
that was never killed: weights, averaged weights, the whole state, the lines of metrics (less what a clock
measured). A kill comes at a uniform moment of the run, from taking its folder to its end; in a share of the
cases it waits from there for the write of a state. To save time, processes are forked from one that has
loaded the libraries; with `--fresh` each loads them itself.

With `--what cache`, a trial is five runs on one teacher cache, of three methods and five seeds: two begin
together on an empty folder and record, three begin once it has rows, and read them. All five are killed. The
bytes of the cache are compared, too. With `--what ddp`, a run is two processes under torchrun; half of the
kills take both and torchrun, the others one of the two.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Literal

import sklearn.datasets  # noqa: F401  # imported here once, not by each forked process
import torch
import torch._dynamo
import torch.fx.experimental.symbolic_shapes
import torchvision  # noqa: F401
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
# The writers, then the readers. Features on `pooled` are read from the cache, too.
SHARED = ("dkd", "rkd", "dkd", "rkd", "dist")
CACHED = f"{SMALL} --batch-size 16 --epochs 6 --ema 0.9 --log-every 2 --teacher-cache-taps pooled"
CLOCK = ("seconds", "ms_per_step", "epoch_ms")


class Command(Settings):
    """Kills of short runs."""

    out: Path
    """Folder for kills.json and kills.md."""
    what: Literal["run", "cache", "ddp"] = "run"
    """What is killed: a run, each of five runs on one cache, or a run of two processes."""
    trials: int = 200
    """Runs that are killed."""
    seed: int = 0
    """Of the moments."""
    kills: int = 3
    """The most kills of one run."""
    fewest_kills: int = 1
    """The fewest kills of one run."""
    write_share: float = 0.4
    """Share of the kills that wait for the write of a state."""
    fresh: bool = False
    """Start a new Python for each process."""

    def start(self, *words: object) -> ForkProcess:
        """`mdistiller train WORDS` in a process of its own, or in two under torchrun."""
        argv = ["train", *map(str, words)]

        def work() -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no progress
            if self.what == "ddp":
                from torch.distributed.run import main

                sys.exit(main(["--standalone", "--nproc-per-node", "2", "-m", "mdistiller", *argv]))
            if self.fresh:
                os.execv(sys.executable, [sys.executable, "-m", "mdistiller", *argv])
            sys.exit(run(argv))

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        return process

    def live(
        self, words: tuple[object, ...], out: Path, duration: float, rng: random.Random, seen: Counter[str]
    ) -> Iterator[None]:
        """A run from its start to its end, killed and resumed several times; yields while it waits."""
        kills, before = rng.randint(self.fewest_kills, self.kills), ""
        process = self.start(*words, "--out", out)
        for _ in range(kills):  # each within its part of the run
            delay, at_write = rng.random() * duration / max(kills, 1), rng.random() < self.write_share
            while process.is_alive() and owner(out) in ("", before):
                yield
            before, moment = owner(out), time.monotonic() + delay
            while process.is_alive() and time.monotonic() < moment:
                yield
            while at_write and not unfinished(out, ".resume.pt.") and process.is_alive():
                yield
            kill(process, out, rng if self.what == "ddp" else None, seen)
            is_run = (out / "config.json").exists()
            process = self.start(*((out / "config.json", "--resume") if is_run else (*words, "--out", out)))
        while process.is_alive():
            yield
        seen["runs"] += 1
        seen["runs that failed"] += process.exitcode != 0
        seen["runs with a file left half-written"] += unfinished(out)

    def trial(
        self, words: list[tuple[object, ...]], out: Path, duration: float, rng: random.Random | None
    ) -> Counter[str]:
        """All runs of a trial at once, the last three of five once the first two have recorded rows."""
        seen, c = Counter[str](), self if rng else self.replace(kills=0, fewest_kills=0)
        rng, shared = rng or random.Random(0), out / "cache"
        more = [("--teacher-cache", shared)] if self.what == "cache" else [()]
        lives = [
            c.live((*each, *more[0]), out / f"run{i}", duration, rng, seen) for i, each in enumerate(words)
        ]
        begun = lives[:2]
        while begun or len(lives) > 2:
            begun = [each for each in begun if next(each, seen) is None]
            if len(lives) > 2 and any(path.stat().st_blocks > 8 for path in shared.glob("*.rows")):
                begun, lives = begun + lives[2:], []
            time.sleep(0.0005)
        return seen


def owner(out: Path) -> str:
    """The process that holds a folder, or held it when it was killed."""
    try:
        return (out / ".lock").read_text()
    except FileNotFoundError:
        return ""


def unfinished(out: Path, prefix: str = ".") -> bool:
    """Whether a file is being written, or was left half-written by a kill."""
    if not out.is_dir():
        return False
    return any(name.startswith(prefix) and name.endswith(".tmp") for name in os.listdir(out))


def kill(process: ForkProcess, out: Path, rng: random.Random | None, seen: Counter[str]) -> None:
    """Kill a run, of two processes with `rng`, and count what that left."""
    victims = [process.pid] if process.is_alive() else []
    if rng and victims:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(child) for child in children]
        one = workers and rng.random() < 0.5
        seen["kills of one of two processes"] += bool(one)
        victims = [rng.choice(workers)] if one else [process.pid, *workers]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    process.join()
    if process.exitcode == 0:
        seen["too late, the run had ended"] += 1
        return
    assert rng or process.exitcode == -9, f"the run failed by itself: exit code {process.exitcode}"
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


def cache_of(out: Path) -> dict[str, bytes]:
    """The files of rows by name."""
    return {path.name: path.read_bytes() for path in (out / "cache").glob("*.rows")}


def main(c: Command) -> None:
    """Kill, go on, compare, and write the counts."""
    rng, began = random.Random(c.seed), time.monotonic()
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = ("--teacher.checkpoint", folder / "teacher")
        first = c.replace(what="run")
        first.start(
            "digits.teacher.resnet14", *SMALL.split(), "--epochs", 1, "--out", folder / "teacher"
        ).join()
        words: list[tuple[object, ...]] = [(*RUN.split(), *teacher)]
        if c.what == "ddp":  # ten kills, about two epochs apart
            words[0] = (*words[0], "--epochs", 24)
        if c.what == "cache":
            names = [f"digits.{method}.resnet14_resnet8" for method in SHARED]
            words = [(name, *CACHED.split(), *teacher, "--seed", i) for i, name in enumerate(names)]
        started = time.monotonic()
        assert not c.trial(words, folder / "whole", 0.0, None)["runs that failed"]
        duration = time.monotonic() - started
        whole = [ending(folder / "whole" / f"run{i}") for i in range(len(words))]
        rows = cache_of(folder / "whole")
        for trial in range(c.trials):
            out = folder / f"trial{trial}"
            seen += c.trial(words, out, duration, rng)
            same_ends = [same(ending(out / f"run{i}"), end) for i, end in enumerate(whole)]
            seen["runs that ended like the whole one"] += sum(same_ends)
            if rows:
                seen["caches"] += 1
                seen["caches with the bytes of the whole one"] += cache_of(out) == rows
            shutil.rmtree(out)
            print(f"{trial + 1} of {c.trials}: {dict(seen)}", file=sys.stderr)
    about = environment(c.seed)
    del about["command"]  # the module's docstring has it, without the paths of this machine
    log = {"environment": about, "what": c.what, "fresh": c.fresh}
    log |= {"seconds": time.monotonic() - began, "counts": seen}
    c.out.mkdir(parents=True, exist_ok=True)
    (c.out / "kills.json").write_text(json.dumps(log, indent=1))
    table = "| what | count |\n| --- | ---: |\n" + "".join(f"| {k} | {v:,} |\n" for k, v in seen.items())
    (c.out / "kills.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main(read(Command))
