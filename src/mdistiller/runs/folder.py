"""The folder of a run: its files, its lock, and its metrics."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from mdistiller.config import MEASURED, RunConfig, with_choices_of
from mdistiller.errors import ConfigError, TrainingError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.config_file import read_config
from mdistiller.runs.environment import environment
from mdistiller.runs.lock import FolderLock
from mdistiller.runs.loggers import Loggers
from mdistiller.types import Line

CONFIG, ENV, METRICS, STATE = "config.json", "env.json", "metrics.jsonl", "resume.pt"
EMA_FILE = f"ema_{STUDENT_FILE}"
# Fields that may differ when a run is resumed: they change where and how it is computed, not its result.
_FREE = {"out", "device", "compile", "teacher_batch", "eval_batch_size"}
_FREE |= {"log", "log_every", "diagnostics", "plugins", "save_minutes"}
# And so of `data`. Only `memory` resident may crop decoded images, where the others crop those in files.
_FREE_DATA = {"root", "workers", "memory_limit_gb"}
_READ = {"auto", "stream"}


class RunFolder:
    """`config.json`, `env.json`, `metrics.jsonl`, `student.safetensors`, `resume.pt` of one run."""

    def __init__(self, path: Path, config: RunConfig, usual: RunConfig | None = None) -> None:
        self.path, self.config = path, config
        self.loggers = Loggers(path, config, usual)
        self.lock: FolderLock | None = None

    @classmethod
    def create(cls, config: RunConfig, usual: RunConfig | None = None) -> RunFolder:
        """Makes a new folder; loggers show what differs from the `usual` config, such as that of the recipe.

        Raises:
            ConfigError: `config.out` has a run already, or cannot be written.
        """
        path = config.out or free_folder(f"{config.recipe or 'run'}-s{config.seed}")
        resolved = config.model_copy(update={"out": path}).absolute()
        run = cls(path, resolved, usual)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run.lock = FolderLock(path)
            if (path / CONFIG).exists():
                resume = f"go on with `mdistiller train {path / CONFIG} --resume` (in Python resume=True)"
                raise ConfigError(f"out: {path} holds a run already; choose another folder, or {resume}")
            (path / METRICS).unlink(missing_ok=True)
            for leftover in (*path.glob(f".{ENV}.*.tmp"), *path.glob(f".{CONFIG}.*.tmp")):
                leftover.unlink(missing_ok=True)  # of a start that was killed here
            write_text(path / ENV, json.dumps(environment(config.seed), indent=2) + "\n")
            # The last file: it makes the folder a run that can be resumed.
            write_text(path / CONFIG, json.dumps(resolved.model_dump(mode="json"), indent=2) + "\n")
        except BaseException as error:
            run.close()
            if isinstance(error, OSError):
                raise ConfigError(f"out: cannot write to {path}: {error}") from error
            raise
        run.loggers.start()
        return run

    @classmethod
    def reopen(cls, config: RunConfig, usual: RunConfig | None = None) -> RunFolder:
        """Opens the folder of a run that is resumed; raises ConfigError if another process uses it."""
        assert config.out is not None
        run = cls(config.out, config.absolute(), usual)
        run.lock = FolderLock(run.path)
        for leftover in run.path.glob(".*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
        return run

    def close(self) -> None:
        """Closes the loggers and releases the folder."""
        self.loggers.close()
        if self.lock is not None:
            self.lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context that raises TrainingError for a failure to write (OSError), such as a full disk."""
        try:
            yield
        except OSError as error:
            resume = f"mdistiller train {self.path / CONFIG} --resume"
            whole = f"{error}. What was written before is whole; to go on: {resume}"
            raise TrainingError(f"cannot write to {self.path}: {whole}") from error

    def log(self, line: Line) -> None:
        """Appends one line to metrics.jsonl, and passes it to the loggers."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.loggers.log(line)

    def rewind(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after a step, before a run resumes from there."""
        lines = []
        for line in read_metrics(self.path):
            match line:
                case {"step": int(at), "kind": "train" | "eval"} if at <= step:
                    lines.append(line)
        write_text(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
        self.loggers.start(step)


def check_resumable(config: RunConfig, *, same_precision: bool = False) -> RunConfig:
    """Checks that the run in `config.out` is the one that `config` describes; returns its stored config.

    Another precision or layout gives a warning: another machine may lack the first one, and the run is still
    of use. With `same_precision` it is an error, as for runs that are compared.

    Raises:
        ConfigError: there is no run, or its config differs in a field that changes the result.
    """
    if config.out is None:
        raise ConfigError("out: there is no run folder to resume; name it")
    run = read_config(type(config), config.out / CONFIG)
    stored = run.model_dump(mode="json")
    asked = with_choices_of(config, run).absolute().model_dump(mode="json")
    ours, theirs = stored.get("data"), asked.get("data")
    if isinstance(ours, dict) and isinstance(theirs, dict):
        same = _FREE_DATA | ({"memory"} if {ours.get("memory"), theirs.get("memory")} <= _READ else set())
        asked["data"] = theirs | {name: ours[name] for name in same & ours.keys()}
    differing = [name for name in stored if name not in _FREE and stored[name] != asked[name]]
    if not same_precision and set(differing) <= set(MEASURED):
        for name in differing:
            warnings.warn(
                f"{name}: {config.out} was started with {stored[name]} and resumes with {asked[name]}; its "
                "end is not that of a run with one of them",
                stacklevel=2,
            )
        return run
    if differing:
        name = differing[0]
        start = f"it was started with {name} = {json.dumps(stored[name])}"
        raise ConfigError(f"cannot resume {config.out} with another {', '.join(differing)}; {start}")
    return run


def free_folder(name: str) -> Path:
    """Returns the first of runs/NAME, runs/NAME-2, runs/NAME-3, … that does not exist."""
    name = name.replace("/", "-")  # a model's name may contain a slash (timm/resnet18)
    paths = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in count(1))
    return next(path for path in paths if not path.exists())


def read_metrics(folder: Path) -> list[Line]:
    """Reads the lines of a run's metrics.jsonl, up to the first that is no JSON (usually half-written)."""
    path, lines = folder / METRICS, []
    if path.is_file():
        with suppress(ValueError, RecursionError):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                lines.append(json.loads(text))
    return lines
