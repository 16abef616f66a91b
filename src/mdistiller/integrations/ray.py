"""Sweeps over settings on a machine or a cluster of Ray.

Every trial has a run folder. One whose process or machine died is started again and resumes from the state in
its folder, so the folders have to lie where all machines can read and write them.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mdistiller.api import train
from mdistiller.config import RunConfig
from mdistiller.errors import (
    ConfigError,
    MissingPackageError,
    TrainingError,
    UnknownNameError,
    nearest_fields,
)
from mdistiller.methods import load_plugins
from mdistiller.runs.folder import CONFIG
from mdistiller.runs.lock import FolderLock
from mdistiller.runs.progress import Reporter
from mdistiller.settings import flatten, unflatten
from mdistiller.training.task import get_task
from mdistiller.types import Line, Metric

try:
    import ray
    from ray import tune
    from ray.tune.experiment import Trial as TuneTrial
    from ray.tune.schedulers import ASHAScheduler
except ImportError as error:
    raise MissingPackageError("training on a cluster", "ray[tune]", "ray") from error

TRIALS = "trials"
_STATE = "ray"
_BOUNDS = {"min", "max", "log"}
# No statistics to Ray's makers, no loggers beside a run's own, no tables on stdout.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_ANSWER = 10.0  # seconds in which a cluster has to answer
_RETRIES = 5  # starts of a trial after failures of its process or machine
_PATIENCE = 600.0  # seconds in which a process whose machine was lost has to let go of its run folder


@dataclass(frozen=True)
class Resources:
    """Part of a machine that a trial takes, and the cluster."""

    cpus: float = 1
    gpus: float = 0
    address: str | None = None  # of a running cluster; None: this machine alone


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its settings by field, its folder, and its end."""

    settings: dict[str, object]
    out: Path
    epochs: int
    value: float | None  # of the metric in the last evaluation
    error: str | None


def check_space(config: RunConfig, space: Mapping[str, object]) -> None:
    """Checks that every value of a space gives a valid config.

    Args:
        config: the config that the trials change.
        space: lists of values, or mappings with `min`, `max` and, for a logarithmic scale, `log: true`, by
            the name of a field, such as `optim.lr`.

    Raises:
        ConfigError: no field, an entry of another form, an unknown field or a wrong value.
    """
    if not space:
        raise ConfigError("space: got no field; allowed: FIELD=[values], or FIELD={min: …, max: …}")
    known = flatten(config.model_dump())
    for field, entry in space.items():
        if "." not in field and field not in type(config).model_fields:
            raise UnknownNameError("field", field, known, nearest=nearest_fields(field, known))
        if isinstance(entry, list) and entry:
            values = entry
        elif isinstance(entry, dict) and {"min", "max"} <= set(entry) <= _BOUNDS:
            values = [entry["min"], entry["max"]]
            if not all(isinstance(v, int | float) for v in values) or not values[0] < values[1]:
                raise ConfigError(f"space: {field}: got {entry}; need two numbers, min below max")
            if entry.get("log") and values[0] <= 0:
                raise ConfigError(f"space: {field}: got min {values[0]}; with log it has to be above 0")
        else:
            allowed = f"{field}=[1, 2], or {field}={{min: 1, max: 8, log: true}}"
            raise ConfigError(f"space: {field}: got {entry!r}; allowed: {allowed}")
        for value in values:
            config.replace(**unflatten({field: value}))


def sweep(
    config: RunConfig,
    space: Mapping[str, object],
    out: Path,
    *,
    trials: int,
    resources: Resources | None = None,
    early_stopping: bool = True,
    show: Callable[[str], None] = print,
) -> list[Trial]:
    """Trains a config with settings drawn from a space; an interrupted sweep in `out` is continued.

    Args:
        config: the config that all trials share.
        space: values of fields, as `check_space` takes them.
        out: folder of the trials, which all machines of the cluster can write to.
        trials: number of draws. 0: every combination of the lists, once.
        resources: part of a machine for a trial, and the cluster.
        early_stopping: stop the worse trials early by their evaluations (ASHA).
        show: function that shows a line of progress.

    Returns:
        The trials, best first by the last value of the config's first metric.

    Raises:
        ConfigError: a wrong space, or a cluster that cannot be reached.
        TrainingError: no trial came to an evaluation.
    """
    check_space(config, space)
    if not trials and not all(isinstance(entry, list) for entry in space.values()):
        raise ConfigError("trials: got 0, all combinations; a space with min and max needs a number")
    resources = resources or Resources()
    out = Path(os.path.abspath(out))
    metric = config.metrics[0]
    _Lines.show = show
    with cluster(resources):
        # As values: a worker finds a plug-in's class of configs only once it has loaded the plug-in.
        values = config.absolute().model_dump(mode="json")
        threads = max(1, int(resources.cpus))
        run_trial = tune.with_parameters(_run_trial, values=values, out=out, metric=metric, threads=threads)
        run_trial = tune.with_resources(run_trial, {"cpu": resources.cpus, "gpu": resources.gpus})
        scheduler = None
        if early_stopping:
            grace = max(1, config.epochs // 8)
            scheduler = ASHAScheduler(time_attr="epoch", max_t=max(config.epochs, 1), grace_period=grace)
        storage = str(out / _STATE)
        if tune.Tuner.can_restore(storage):
            tuner = tune.Tuner.restore(storage, run_trial, resume_errored=True)
        else:
            tuner = tune.Tuner(
                run_trial,
                param_space={field: _domain(entry, grid=not trials) for field, entry in space.items()},
                tune_config=tune.TuneConfig(
                    metric=metric, mode="max", num_samples=trials or 1, scheduler=scheduler
                ),
                run_config=tune.RunConfig(
                    name=_STATE,
                    storage_path=str(out),
                    failure_config=tune.FailureConfig(max_failures=_RETRIES),
                    callbacks=[_Lines(config.main_metric())],
                    verbose=0,
                ),
            )
        results = tuner.fit()
    found = []
    for result in (results[i] for i in range(len(results))):
        last = result.metrics or {}
        error = None if result.error is None else str(result.error).strip().splitlines()[-1]
        folder = out / TRIALS / str(last.get("trial_id"))
        found.append(
            Trial(dict(result.config or {}), folder, int(last.get("epoch", 0)), last.get(metric), error)
        )
    if all(trial.value is None for trial in found):
        raise TrainingError(f"no trial came to an evaluation; the first ended with: {found[0].error}")
    return sorted(found, key=lambda t: (float("inf") if t.value is None else -t.value, t.out))


@contextmanager
def cluster(resources: Resources) -> Iterator[None]:
    """Connects to the cluster, or starts one on this machine, for the time of the context.

    Raises:
        ConfigError: no cluster at the address, or no machine with these resources.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        _knock(resources.address)
        ray.init(
            address=resources.address or "local",
            log_to_driver=False,
            include_dashboard=None if resources.address else False,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"address: no cluster at {resources.address}: {first}") from error
    try:
        largest = {
            name: max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
            for name in ("CPU", "GPU")
        }
        for name, asked in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            if asked > largest[name]:
                raise ConfigError(
                    f"{name.lower()}s: got {asked:g}, and no machine of the cluster has more than "
                    f"{largest[name]:g}"
                )
        yield
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Connects to HOST:PORT once; OSError where nobody answers, for which Ray itself waits many minutes."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()


def _domain(entry: object, *, grid: bool) -> object:
    """Returns the values of a field in Ray Tune's form; the entry has passed `check_space`."""
    if isinstance(entry, list):
        return tune.grid_search(entry) if grid else tune.choice(entry)
    assert isinstance(entry, dict)
    low, high = entry["min"], entry["max"]
    if isinstance(low, int) and isinstance(high, int):
        return (tune.lograndint if entry.get("log") else tune.randint)(low, high + 1)
    return (tune.loguniform if entry.get("log") else tune.uniform)(low, high)


class _Lines(tune.Callback):
    """Shows a line for each evaluation and each failure of a trial."""

    show: Callable[[str], None] = print
    """Shows a line of the current sweep. No instance holds it: Ray stores those with the sweep."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Line, **info: object
    ) -> None:
        value = f"{self.metric.name} {result[self.metric.name]:{self.metric.spec}}"
        self._show(trial, f"epoch {result['epoch']}  {value}")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object
    ) -> None:
        self._show(trial, "failed")

    def _show(self, trial: TuneTrial, text: str) -> None:
        values = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.config.items())
        type(self).show("  ".join([trial.trial_id, text, *values]))


class _Report(Reporter):
    """Reporter that hands the evaluations to Ray Tune."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def evaluated(self, line: Line) -> None:
        tune.report({"epoch": line["epoch"], self.metric: line[self.metric]})


def _run_trial(fields: Line, *, values: Line, out: Path, metric: str, threads: int) -> None:
    """Trains one trial in its folder, or resumes it there."""
    torch.set_num_threads(threads)
    FolderLock.patience = _PATIENCE
    folder = out / TRIALS / tune.get_context().get_trial_id()
    load_plugins(values["plugins"])
    config = get_task(values["task"]).Config.model_validate(values).replace(**unflatten(fields), out=folder)
    train(config, resume=(folder / CONFIG).exists(), reporter=_Report(metric))
