"""Loggers of a run's metrics beside metrics.jsonl: TensorBoard and Weights & Biases."""

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mdistiller.config import RunConfig


class Logger(Protocol):
    """Logger of the lines of metrics.jsonl; every call may raise."""

    def log(self, line: dict[str, Any]) -> None:
        """Writes the metrics of one line."""

    def close(self) -> None:
        """Closes the logger after the last line, or when the run is interrupted."""


class TensorBoard:
    """Event files in RUN/tensorboard, with the config as hyper-parameters.

    It does without SummaryWriter, whose thread reports a failed write late and prints a traceback.
    """

    def __init__(self, folder: Path, config: RunConfig, resumed: int | None) -> None:
        import_module("tensorboard")  # an extra; torch's part is always there
        tensorboard = import_module("torch.utils.tensorboard")
        self.summary = import_module("torch.utils.tensorboard.summary")
        self.events = import_module("tensorboard.compat.proto.event_pb2")
        path = folder / "tensorboard"
        path.mkdir(exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names.
        file = open(path / f"events.out.tfevents.{time.time_ns()}", "wb")  # noqa: SIM115
        self.records = tensorboard.RecordWriter(file)
        self._write(file_version="brain.Event:2")
        if resumed is not None:  # hides the events of the steps that are repeated
            session = self.events.SessionLog(status=self.events.SessionLog.START)
            self._write(step=resumed + 1, session_log=session)
        settings = _flat(config.model_dump(mode="json"), ".")
        values = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in settings.items()}
        shown = dict.fromkeys(f"eval/{name}" for name in config.metrics)  # beside the hyper-parameters
        experiment, start, self.end = self.summary.hparams(values, shown)
        self._write(summary=experiment)
        self._write(summary=start)
        self.records.flush()

    def _write(self, **content: Any) -> None:
        self.records.write(self.events.Event(wall_time=time.time(), **content).SerializeToString())

    def log(self, line: dict[str, Any]) -> None:
        for name, value in metrics_of(line).items():
            self._write(step=line["step"], summary=self.summary.scalar(name, value))
        if line["kind"] == "summary":
            self._write(summary=self.end)
        self.records.flush()

    def close(self) -> None:
        self.records.close()


class WandB:
    """A Weights & Biases run with its files in RUN/wandb. WANDB_MODE, WANDB_PROJECT and so on have effect."""

    def __init__(self, folder: Path, config: RunConfig, resumed: int | None) -> None:
        wandb = import_module("wandb")
        path = folder / "wandb" / "run-id"
        if resumed is None or not path.is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            dir=folder,
            id=path.read_text(),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "mdistiller"),
            name=folder.name,
            config=config.model_dump(mode="json"),
            reinit="create_new",  # leaves alone a run that the caller may have open
            settings=wandb.Settings(console="off"),
        )
        # W&B's own step only rises; after a resume, steps are repeated.
        self.run.define_metric("*", step_metric="step")
        self.finished = False

    def log(self, line: dict[str, Any]) -> None:
        self.run.log({"step": line["step"], **metrics_of(line)})
        self.finished = line["kind"] == "summary"

    def close(self) -> None:
        # Without a summary line, the run has failed.
        self.run.finish(exit_code=0 if self.finished else 1)


# By the run folder, the config, and the step from which a run resumes (None: a new run).
LOGGERS: dict[str, Callable[[Path, RunConfig, int | None], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


class Loggers:
    """Loggers of a run's config. A logger that fails gives a warning on stderr and is off from then on."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.on: dict[str, Logger] = {}

    def start(self, resumed: int | None = None) -> None:
        """Starts the loggers; `resumed` is the step from which a run resumes, None in a new run."""
        for name in dict.fromkeys(self.config.log):
            with self._off_if_it_fails(name):
                self.on[name] = LOGGERS[name](self.folder, self.config, resumed)

    def log(self, line: dict[str, Any]) -> None:
        """Passes on one line of metrics.jsonl."""
        for name, logger in list(self.on.items()):
            with self._off_if_it_fails(name):
                logger.log(line)

    def close(self) -> None:
        """Closes all; more calls do nothing."""
        while self.on:
            name, logger = self.on.popitem()
            with self._off_if_it_fails(name):
                logger.close()

    @contextmanager
    def _off_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no failure of a logger may end the run
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                why = f"it is not installed: pip install 'mdistiller[{name}]'"
            else:
                why = " ".join([f"{type(error).__name__}:", *str(error).split()])
            print(f"mdistiller: warning: log: {name} is off, the run goes on; {why}", file=sys.stderr)
            if (logger := self.on.pop(name, None)) is not None:
                with suppress(Exception):
                    logger.close()


def metrics_of(line: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line by name: `train/loss`, `eval/ema/top1`, `summary/best/top1`."""
    rest = {key: value for key, value in line.items() if key not in ("kind", "step")}
    return {k: v for k, v in _flat(rest, "/", f"{line['kind']}/").items() if isinstance(v, int | float)}


def _flat(values: dict[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        is_nested, name = isinstance(value, dict), prefix + key
        found |= _flat(value, separator, name + separator) if is_nested else {name: value}
    return found
