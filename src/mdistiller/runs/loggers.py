"""Loggers of a run beside metrics.jsonl, TensorBoard, Weights & Biases and MLflow, and their few charts."""

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Protocol

from mdistiller.config import RunConfig, with_choices_of
from mdistiller.errors import install_command
from mdistiller.settings import flatten
from mdistiller.types import Line

_TRANSFER = ("agreement", "tckd", "nckd")
METRIC = "metric/"
"""Beginning of the names of the charts of the run's result."""


def charted(line: Line, metrics: Sequence[str]) -> dict[str, float]:
    """Returns the values of a line of metrics.jsonl that have a chart, by names such as `loss/dkd`.

    Metrics are the names of an evaluation's, the one that picks the best epoch first. A value that is
    missing in the line, or no number, is left out.
    """
    first = metrics[0]
    found: dict[str, object] = {}
    if line["kind"] == "train":
        losses = {k: v for k, v in line.items() if k not in ("kind", "step", "epoch", "lr", "loss", *metrics)}
        found |= {f"{METRIC}{name}_train": line[name] for name in metrics if name != "loss" and name in line}
        found["loss/total"] = line.get("loss")
        if len(losses) > 1:  # the task's alone is the total
            found |= {f"loss/{name}": value for name, value in losses.items()}
        found["loss/learning_rate"] = line.get("lr")
    elif line["kind"] == "eval":
        found |= {f"{METRIC}{name}": line.get(name) for name in (first, f"best_{first}")}
        found[f"{METRIC}{first}_ema"] = _part(line, "ema").get(first)
        found["loss/test"] = line.get("loss")
        seen = _part(_part(line, "diagnostics"), "test")
        found |= {f"transfer/{name}": seen.get(name) for name in _TRANSFER}
        found["speed/ms_per_step"] = line.get("ms_per_step")
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _part(values: Line, name: str) -> Line:
    part = values.get(name)
    return part if isinstance(part, dict) else {}


class Logger(Protocol):
    """Logger of the charts of a run; every call may raise."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of charts at a step."""

    def close(self, finished: bool) -> None:
        """Closes the logger after the run's end, or when the run fails or is interrupted."""


class TensorBoard:
    """Event files in RUN/tensorboard, with what differs from the recipe as hyperparameters.

    It does without SummaryWriter, whose thread reports a failed write late and prints a traceback.
    """

    def __init__(
        self, folder: Path, config: RunConfig, changed: Mapping[str, object], resumed: int | None
    ) -> None:
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
        values = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in changed.items()}
        first = config.metrics[0]
        shown = {f"{METRIC}{first}": None, f"{METRIC}best_{first}": None}  # beside the hyperparameters
        experiment, start, self.end = self.summary.hparams(values, shown)
        self._write(summary=experiment)
        self._write(summary=start)
        self.records.flush()

    def _write(self, **content: object) -> None:
        self.records.write(self.events.Event(wall_time=time.time(), **content).SerializeToString())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step=step, summary=self.summary.scalar(name, value))
        self.records.flush()

    def close(self, finished: bool) -> None:
        if finished:
            self._write(summary=self.end)
        self.records.close()


class WandB:
    """A Weights & Biases run with its files in RUN/wandb. WANDB_MODE, WANDB_PROJECT and so on have effect."""

    def __init__(
        self, folder: Path, config: RunConfig, changed: Mapping[str, object], resumed: int | None
    ) -> None:
        wandb = import_module("wandb")
        known = read_id(folder / "wandb", resumed) or write_id(folder / "wandb", secrets.token_hex(4))
        self.run = wandb.init(
            dir=folder,
            id=known,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "mdistiller"),
            name=folder.name,
            config=changed,
            reinit="create_new",  # leaves alone a run that the caller may have open
            settings=wandb.Settings(console="off"),
        )
        # W&B's own step only rises; after a resume, steps are repeated.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            self.run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """An MLflow run, on the server of MLFLOW_TRACKING_URI or in files in RUN/mlflow."""

    def __init__(
        self, folder: Path, config: RunConfig, changed: Mapping[str, object], resumed: int | None
    ) -> None:
        import_module("mlflow")  # the missing package of the warning
        client, self.entities = import_module("mlflow.tracking"), import_module("mlflow.entities")
        path = folder / "mlflow"
        known = read_id(path, resumed)
        # MLflow asks for it, as files of metrics get no new features. No other store needs so few packages.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (path / "store").absolute().as_uri()
        self.client = client.MlflowClient(uri)
        if known is not None:
            self.id = known
            self.client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mdistiller")
        experiment = self.client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.id = write_id(path, self.client.create_run(where, run_name=folder.name).info.run_id)
        parameters = [self.entities.Param(k, str(v)) for k, v in changed.items()]
        self.client.log_batch(self.id, params=parameters)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "FAILED")


def read_id(folder: Path, resumed: int | None) -> str | None:
    """Reads the logger's id of the run that resumes; None for a new run or a new logger."""
    file = folder / "run-id"
    return file.read_text() if resumed is not None and file.is_file() else None


def write_id(folder: Path, name: str) -> str:
    """Writes a logger's id of a run, and returns it."""
    folder.mkdir(exist_ok=True)
    (folder / "run-id").write_text(name)
    return name


_NO_PARAMETERS = {"task", "recipe", "out", "log", "plugins"}


def hyper_parameters(config: RunConfig, usual: RunConfig | None) -> Line:
    """Returns the name of a run's recipe, and by dotted name the fields that differ from its `usual` config.

    None: from the defaults of all fields.
    """
    if usual is None:
        usual = type(config).model_validate({"student": config.student})
    both = config.absolute(), with_choices_of(usual, config).absolute()
    mine, theirs = (flatten(c.model_dump(mode="json", exclude=_NO_PARAMETERS)) for c in both)
    return {"recipe": config.recipe} | {k: v for k, v in mine.items() if k not in theirs or v != theirs[k]}


# By the run folder, the config, its hyperparameters, and the step from which a run resumes; None: a new one.
LOGGERS: dict[str, Callable[[Path, RunConfig, Mapping[str, object], int | None], Logger]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


class Loggers:
    """Loggers of a run's config. A logger that fails gives a warning on stderr and is off from then on."""

    def __init__(self, folder: Path, config: RunConfig, usual: RunConfig | None = None) -> None:
        self.folder, self.config, self.usual = folder, config, usual
        self.on: dict[str, Logger] = {}
        self.finished = False  # without a summary line, the run has failed

    def start(self, resumed: int | None = None) -> None:
        """Starts the loggers, of a new run or of one that resumes from a step."""
        for name in dict.fromkeys(self.config.log):
            with self._off_if_it_fails(name):
                changed = hyper_parameters(self.config, self.usual)
                self.on[name] = LOGGERS[name](self.folder, self.config, changed, resumed)

    def log(self, line: Line) -> None:
        """Passes on the charts' values in one line of metrics.jsonl."""
        self.finished = line["kind"] == "summary"
        values = charted(line, self.config.metrics)
        for name, logger in list(self.on.items()):
            with self._off_if_it_fails(name):
                logger.log(line["step"], values)

    def close(self) -> None:
        """Closes all; more calls do nothing."""
        while self.on:
            name, logger = self.on.popitem()
            with self._off_if_it_fails(name):
                logger.close(self.finished)

    @contextmanager
    def _off_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no failure of a logger may end the run
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                why = f"it is not installed: {install_command(name)}"
            else:
                why = " ".join([f"{type(error).__name__}:", *str(error).split()])
            print(f"mdistiller: warning: log: {name} is off, the run goes on; {why}", file=sys.stderr)
            if (logger := self.on.pop(name, None)) is not None:
                with suppress(Exception):
                    logger.close(finished=False)
