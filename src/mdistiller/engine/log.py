"""The run folder, and what a person sees while a run is under way."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mdistiller.engine.checkpoint import write_text
from mdistiller.engine.config import TrainConfig, load_config
from mdistiller.errors import ConfigError
from mdistiller.models import ModelConfig

CONFIG, ENV, METRICS, STATE = "config.json", "env.json", "metrics.jsonl", "resume.pt"
# What may differ when a run goes on: where and how it is computed, not what.
_FREE = ("out", "device", "compile", "log_every", "eval_batch_size", "plugins")


class RunFolder:
    """`config.json`, `env.json`, `metrics.jsonl`, `student.safetensors`, `resume.pt` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: TrainConfig) -> RunFolder:
        """A new folder with the config and the environment in it.

        Raises:
            ConfigError: `config.out` holds a run already.
        """
        path = (
            config.out if config.out is not None else free_folder(f"{config.recipe or 'run'}-s{config.seed}")
        )
        if (path / CONFIG).exists():
            raise ConfigError(
                f"out: {path} holds a run already; choose another folder, "
                f"or go on with `mdistiller train {path / CONFIG} --resume`"
            )
        resolved = _absolute(config.model_copy(update={"out": path}))
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / METRICS).unlink(missing_ok=True)
            write_text(path / CONFIG, json.dumps(resolved.model_dump(mode="json"), indent=2) + "\n")
            write_text(path / ENV, json.dumps(environment(config.seed), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"out: cannot write to {path}: {error}") from error
        return cls(path)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that lie behind a step, before a run goes on from there."""
        kept = [
            line for line in read_metrics(self.path) if line["step"] <= step and line["kind"] != "summary"
        ]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self.path / METRICS, text)


def _absolute(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths, so that it repeats from any folder."""

    def model(m: ModelConfig | None) -> ModelConfig | None:
        if m is None or m.checkpoint is None:
            return m
        return m.model_copy(update={"checkpoint": m.checkpoint.absolute()})

    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"root": config.data.root.absolute()}),
            "student": model(config.student),
            "teacher": model(config.teacher),
            "out": config.out and config.out.absolute(),
        }
    )


def check_resumable(config: TrainConfig) -> None:
    """Make sure that the run in `config.out` is the one that `config` describes.

    Raises:
        ConfigError: there is no run, or its config differs in a field that changes the result.
    """
    if config.out is None:
        raise ConfigError("out: there is no run folder to resume; name it")
    stored = load_config(config.out / CONFIG).model_dump(mode="json")
    asked = _absolute(config).model_dump(mode="json")
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
    """The lines of a run's metrics.jsonl so far; a half-written last line is left out."""
    lines = []
    path = folder / METRICS
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
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
        """An evaluation line was written."""

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
        text = (
            f"epoch {line['epoch']:>3}  step {line['step']:>6}  loss {line['train']['loss']:7.4f}  "
            f"train {line['train']['top1']:5.2f} %  test {line['top1']:5.2f} %  "
            f"best {line['best_top1']:5.2f} %"
        )
        if "ema" in line:
            text += f"  ema {line['ema']['top1']:5.2f} %"
        text += f"  {line['ms_per_step']:.1f} ms/step"
        self.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away."""
        self.progress.stop()
