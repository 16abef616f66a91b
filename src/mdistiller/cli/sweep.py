"""Command `mdistiller sweep RECIPE`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import Field

from mdistiller.cli.flags import Repeated
from mdistiller.cli.train import TrainCommand
from mdistiller.errors import ConfigError
from mdistiller.runs.checkpoint import write_text
from mdistiller.runs.folder import CONFIG, free_folder
from mdistiller.types import Metric

if TYPE_CHECKING:
    from mdistiller.integrations.ray import Trial


class SweepCommand(TrainCommand):
    """Train a recipe with many settings on Ray Tune, and write one report over the trials.

    mdistiller sweep RECIPE --space FIELD=VALUES … [--trials N] [flags of train]. The trials that lag behind
    are stopped early, by their evaluations. The same command with the --out of an interrupted sweep continues
    it.

    All flags of `mdistiller train RECIPE` apply too; they are common to the trials.
    """

    space: Repeated[tuple[str, ...]] = ()
    """Field and values, FIELD=[1, 2, 4] or FIELD={min: 0.01, max: 0.2, log: true}, or a YAML file of lines
    FIELD: VALUES. May be given again."""
    trials: int = Field(default=0, ge=0)
    """Number of draws. 0: all combinations of the lists."""
    cpus: float = 1
    """Cores of a trial."""
    gpus: float = 0
    """GPUs of a trial; a fraction lets several share one."""
    address: str | None = None
    """Address of a running cluster, or auto for the one of this machine. None: this machine alone."""
    early_stopping: bool = True
    """Stop the worse trials early (ASHA)."""

    def execute(self) -> None:
        from mdistiller.integrations.ray import Resources, sweep

        for name in ("resume", "dry_run"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name}: not allowed with sweep; --out of an interrupted sweep continues it"
                )
        if self.seeds is not None:
            raise ConfigError(f"seeds: got {self.seeds}; allowed with sweep: --space 'seed=[0, 1, 2]'")
        out = self.config.out or free_folder(f"{self.config.recipe or 'run'}-sweep")
        if (out / CONFIG).exists():
            raise ConfigError(f"out: {out} holds a run; allowed is a new folder, or that of a sweep")
        trials = sweep(
            self.config,
            read_space(self.space),
            out,
            trials=self.trials,
            resources=Resources(self.cpus, self.gpus, self.address),
            early_stopping=self.early_stopping,
            show=lambda line: print(line, file=sys.stderr),
        )
        _write(trials, out, self.config.main_metric(), as_json=self.as_json)


def read_space(words: Sequence[str]) -> dict[str, object]:
    """Reads FIELD=VALUES, with values in YAML, and YAML files of such entries.

    Raises:
        ConfigError: a word of neither form, or no YAML.
    """
    space: dict[str, object] = {}
    for word in words:
        field, has_values, values = word.partition("=")
        try:
            if has_values:
                space[field.strip().replace("-", "_")] = yaml.safe_load(values)
                continue
            found = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"space: {word!r} is no FIELD=VALUES and no YAML file: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"space: {word} holds a {type(found).__name__}; need lines FIELD: VALUES")
        space |= found
    return space


def _write(trials: "list[Trial]", out: Path, metric: Metric, *, as_json: bool) -> None:
    """Writes `sweep.json` and `report.html`, and prints the trials, best first."""
    from mdistiller.report import try_report

    rows = [asdict(trial) | {"out": str(trial.out)} for trial in trials]
    write_text(out / "sweep.json", json.dumps({"metric": metric.name, "trials": rows}, indent=1) + "\n")
    report = try_report([trial.out for trial in trials if trial.value is not None], out / "report.html")
    if as_json:
        written = None if report is None else str(report)
        print(json.dumps({"out": str(out), "report": written, "metric": metric.name, "trials": rows}))
        return
    for trial in trials:
        value = "failed"
        if trial.value is not None:
            value = f"{metric.name} {trial.value:{metric.spec}} after {trial.epochs} epochs"
        print(f"{value}  {' '.join(f'--{k} {v}' for k, v in trial.settings.items())}  {trial.out}")
    if report is not None:
        print(f"report: {report}", file=sys.stderr)
