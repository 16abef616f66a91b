"""Training runs of the benchmarks that go on where an earlier call was stopped."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mdistiller import RunConfig
from mdistiller.errors import ConfigError
from mdistiller.runs.folder import read_metrics
from mdistiller.runs.lock import FolderLock
from mdistiller.runs.progress import Reporter
from mdistiller.training.launch import train


def is_done(folder: Path) -> bool:
    """Whether a run has its summary."""
    return [line["kind"] for line in read_metrics(folder)[-1:]] == ["summary"]


def is_taken(folder: Path) -> bool:
    """Whether another process trains a run."""
    try:
        FolderLock(folder).release()
    except FileNotFoundError:
        return False
    except ConfigError:
        return True
    return False


def run(config: RunConfig) -> None:
    """Trains a run, or resumes it, unless it is finished or another process trains it."""
    folder = config.out
    assert folder is not None
    if is_done(folder) or is_taken(folder):
        return
    has_state = (folder / "resume.pt").is_file()
    if not has_state:
        shutil.rmtree(folder, ignore_errors=True)
    train(config, resume=has_state, reporter=Reporter())


def run_command(folder: Path, *words: Any) -> list[dict[str, Any]]:
    """Trains a run by `mdistiller train WORDS`, or resumes it; returns the lines of its metrics."""
    if not is_done(folder):
        has_begun = (folder / "config.json").exists()
        words = (folder, "--resume") if has_begun else (*words, "--out", folder)
        subprocess.run([sys.executable, "-m", "mdistiller", "train", *map(str, words)], check=True)
    return read_metrics(folder)


def finish(folders: Sequence[Path], configs: Callable[[], Iterable[RunConfig]]) -> None:
    """Trains runs until all their folders are finished, and waits for those that another process trains."""
    while not all(map(is_done, folders)):
        for config in configs():
            run(config)
        if not all(map(is_done, folders)):
            time.sleep(10)


def last_evaluation(folder: Path) -> dict[str, Any]:
    """Returns the line of a run's last evaluation."""
    return [line for line in read_metrics(folder) if line["kind"] == "eval"][-1]


def thin(metrics: str, without: Sequence[str] = ()) -> str:
    """Returns the lines of a metrics file that are kept: one an epoch, six digits after the point.

    Entries `without` are left out.
    """
    lines = (json.loads(line, parse_float=lambda x: round(float(x), 6)) for line in metrics.splitlines())
    kept = ({k: v for k, v in line.items() if k not in without} for line in lines if line["kind"] != "train")
    return "".join(f"{json.dumps(line)}\n" for line in kept)


def keep(folders: Iterable[Path], table: dict[str, Any], out: Path, without: Sequence[str] = ()) -> None:
    """Writes the thinned metrics of runs to OUT/NAME.jsonl, and OUT/table.json."""
    out.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        metrics = thin((folder / "metrics.jsonl").read_text(encoding="utf-8"), without)
        (out / f"{folder.name}.jsonl").write_text(metrics, encoding="utf-8")
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def spread(values: Sequence[float], sign: str = "") -> str:
    """Returns mean and standard deviation of some values; of one that value, of none nothing."""
    text = f"{statistics.fmean(values):{sign}.2f}" if values else ""
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text
