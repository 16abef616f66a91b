"""The run folder, and what a person sees while a run is under way."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mdistiller.runs.checkpoint import write_text
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.config import read_config
from mdistiller.runs.loggers import Loggers
from mdistiller.errors import ConfigError, TrainingError

CONFIG, ENV, METRICS, STATE = "config.json", "env.json", "metrics.jsonl", "resume.pt"
LOCK = ".lock"
# What may differ when a run goes on: where and how it is computed, not what.
_FREE = (
    "out",
    "device",
    "compile",
    "cuda_graph",
    "teacher_batch",
    "log",
    "log_every",
    "diagnostics",
    "eval_batch_size",
    "plugins",
)


class RunFolder:
    """`config.json`, `env.json`, `metrics.jsonl`, `student.safetensors`, `resume.pt` of one run."""

    def __init__(self, path: Path, config: ClassificationConfig) -> None:
        self.path, self.config = path, config
        self.loggers = Loggers(path, config)
        self._lock: TextIO | None = None

    @classmethod
    def create(cls, config: ClassificationConfig) -> RunFolder:
        """A new folder with the config and the environment in it.

        Raises:
            ConfigError: `config.out` holds a run already.
        """
        path = (
            config.out if config.out is not None else free_folder(f"{config.recipe or 'run'}-s{config.seed}")
        )
        resolved = config.model_copy(update={"out": path}).absolute()
        run = cls(path, resolved)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run.lock()
            if (path / CONFIG).exists():
                raise ConfigError(
                    f"out: {path} holds a run already; choose another folder, "
                    f"or go on with `mdistiller train {path / CONFIG} --resume`"
                )
            (path / METRICS).unlink(missing_ok=True)
            for leftover in (*path.glob(f".{ENV}.*.tmp"), *path.glob(f".{CONFIG}.*.tmp")):
                leftover.unlink(missing_ok=True)  # of a start that was killed here
            write_text(path / ENV, json.dumps(environment(config.seed), indent=2) + "\n")
            # The last: it is what makes the folder a run, which `--resume` goes on with.
            write_text(path / CONFIG, json.dumps(resolved.model_dump(mode="json"), indent=2) + "\n")
        except BaseException as error:
            run.close()
            if isinstance(error, OSError):
                raise ConfigError(f"out: cannot write to {path}: {error}") from error
            raise
        run.loggers.start()
        return run

    @classmethod
    def reopen(cls, config: ClassificationConfig) -> RunFolder:
        """The folder of a run that goes on.

        Raises:
            ConfigError: another process is at it.
        """
        assert config.out is not None
        run = cls(config.out, config.absolute())
        run.lock()
        for leftover in run.path.glob(".*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
        return run

    def lock(self) -> None:
        """Hold the folder for this process alone. The lock of a process that has died is void.

        Raises:
            ConfigError: another process holds it.
        """
        file = open(self.path / LOCK, "a+")  # noqa: SIM115  # open as long as the lock is held
        try:
            # Unlike flock's, it does not pass on to the loader's processes.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ConfigError(f"out: {self.path} is in use by {owner}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._lock = file

    def close(self) -> None:
        """Let the folder go."""
        self.loggers.close()
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns a failure to write, such as a full disk, into a clear end.

        Raises:
            TrainingError: in place of OSError.
        """
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.path}: {error}. What was written before is whole; to go on: "
                f"mdistiller train {self.path / CONFIG} --resume"
            ) from error

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and pass it to the loggers."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.loggers.log(line)

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that lie behind a step, before a run goes on from there."""
        kept = []
        for line in read_metrics(self.path):
            match line:
                case {"step": int(at), "kind": "train" | "eval"} if at <= step:
                    kept.append(line)
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self.path / METRICS, text)
        self.loggers.start(step)


def check_resumable(config: ClassificationConfig) -> None:
    """Make sure that the run in `config.out` is the one that `config` describes.

    Raises:
        ConfigError: there is no run, or its config differs in a field that changes the result.
    """
    if config.out is None:
        raise ConfigError("out: there is no run folder to resume; name it")
    stored = read_config(type(config), config.out / CONFIG).model_dump(mode="json")
    asked = config.absolute().model_dump(mode="json")
    differing = [name for name in stored if name not in _FREE and stored[name] != asked[name]]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"cannot resume {config.out} with another {', '.join(differing)}; "
            f"it was started with {name} = {json.dumps(stored[name])}"
        )


def free_folder(name: str) -> Path:
    """The first of runs/NAME, runs/NAME-2, runs/NAME-3, … that does not exist."""
    # A model's name may have a slash in it (timm/resnet18).
    first = Path("runs") / name.replace("/", "-")
    path, n = first, 1
    while path.exists():
        n += 1
        path = first.with_name(f"{first.name}-{n}")
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, up to one that is no JSON (half-written, as a rule)."""
    lines = []
    path = folder / METRICS
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except (ValueError, RecursionError):
                break
    return lines


def environment(seed: int) -> dict[str, Any]:
    """Versions, hardware, commit and command: what it takes to run the same again."""
    versions = {"torch": str(torch.__version__)}  # with its build, such as +cpu, which the metadata may lack
    for name in ("mdistiller", "torchvision", "numpy", "timm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
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
        "gpus": gpus,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str | None:
    """Commit of the source tree this package runs from, with '+' if it has changes; None elsewhere."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", __file__):
            return None
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


class Reporter(Protocol):
    """Told what a run does. Calls are cheap and happen in the main process only."""

    def start(self, title: str, total: int, done: int) -> None:
        """A run of `total` steps begins at step `done`."""

    def step(self, done: int) -> None:
        """`done` steps have been issued."""

    def evaluated(self, line: dict[str, Any]) -> None:
        """An evaluation line was written; of several runs side by side, it has the run's `name`, too."""

    def stop(self) -> None:
        """The run is over, one way or another."""


class Silent:
    """Shows nothing."""

    def start(self, title: str, total: int, done: int) -> None:
        """Nothing."""

    def step(self, done: int) -> None:
        """Nothing."""

    def evaluated(self, line: dict[str, Any]) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class ProgressDisplay:
    """A progress bar on stderr, with a line for each evaluation above it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def start(self, title: str, total: int, done: int) -> None:
        """Show the bar."""
        self.console.print(title, highlight=False)
        self.task = self.progress.add_task("training", total=total, completed=done)
        self.progress.start()

    def step(self, done: int) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=done)

    def evaluated(self, line: dict[str, Any]) -> None:
        """Print the figures of one evaluation."""
        figure = next(name for name in line if f"best_{name}" in line)
        text = f"{line['name']}  " if "name" in line else ""
        text += f"epoch {line['epoch']:>3}  step {line['step']:>6}  loss {line['train']['loss']:7.4f}  "
        if figure in line["train"]:
            text += f"train {line['train'][figure]:5.2f} %  "
        text += f"{'test' if figure == 'top1' else figure} {line[figure]:5.2f} %  "
        text += f"best {line[f'best_{figure}']:5.2f} %"
        if "ema" in line:
            text += f"  ema {line['ema'][figure]:5.2f} %"
        text += f"  {line['ms_per_step']:.1f} ms/step"
        self.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away."""
        self.progress.stop()
        self.progress.remove_task(self.task)
