"""Several runs one after another, and those of `mdistiller train RECIPE --seeds N` with one report."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from mdistiller.api import train
from mdistiller.config import RunConfig
from mdistiller.errors import ConfigError, DataError
from mdistiller.report.runs import RunRecord, load_run, summarize
from mdistiller.runs.folder import CONFIG, check_resumable, free_folder
from mdistiller.runs.progress import Reporter


def is_finished(config: RunConfig) -> bool:
    """Whether the run in `config.out` is finished.

    Raises:
        ConfigError: the folder holds another run.
    """
    assert config.out is not None
    if not (config.out / CONFIG).exists():
        return False
    check_resumable(config, same_precision=True)
    return bool(finished_runs([config]))


def finished_runs(configs: Sequence[RunConfig]) -> list[RunRecord]:
    """Reads the runs of some configs, those that are finished."""
    found = []
    for config in configs:
        assert config.out is not None
        try:
            found.append(load_run(config.out))
        except DataError:
            continue
    return [run for run in found if run.summary is not None]


def train_each(
    configs: Sequence[RunConfig], reporter: Reporter | None = None, *, resume: bool = True
) -> bool:
    """Trains runs one after another; returns whether this is their main process.

    With `resume`, finished runs stay and the others go on from their states.

    Raises:
        ConfigError: a folder holds another run.
    """
    is_main, left = True, [(n, one) for n, one in enumerate(configs, 1) if not (resume and is_finished(one))]
    for number, one in left:
        assert one.out is not None
        if is_main:
            name = f"run {number} of {len(configs)}" if len(configs) > 1 else "run"
            print(f"{name}: {one.out}", file=sys.stderr)
        started = resume and (one.out / CONFIG).exists()
        is_main = train(one, resume=started, reporter=reporter).path is not None
    return is_main


def train_seeds(
    config: RunConfig, seeds: int, reporter: Reporter, *, resume: bool = False, as_json: bool = False
) -> None:
    """Trains a config with several seeds, counting up from its own, and writes `report.html` beside the runs.

    With `resume`, finished runs stay and the others go on from their states.

    Raises:
        ConfigError: fewer than one seed; several processes without a named folder; a folder that is a run.
    """
    if seeds < 1:
        raise ConfigError(f"seeds: got {seeds}; allowed: 1 or more")
    if config.out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("out: several processes need a named folder with --seeds; give --out DIR")
    folder = config.out or free_folder(f"{config.recipe or 'run'}-seeds")
    if (folder / CONFIG).exists():
        raise ConfigError(f"out: {folder} holds a run; allowed with --seeds is a folder for several runs")
    numbers = range(config.seed, config.seed + seeds)
    configs = [config.replace(seed=seed, out=folder / f"s{seed}") for seed in numbers]
    if not train_each(configs, reporter, resume=resume):
        return
    from mdistiller.report import try_report

    folders = [one.out for one in configs if one.out is not None]
    report = try_report(folders, folder / "report.html")
    runs = [load_run(path) for path in folders]
    (row,) = summarize(runs)
    if as_json:
        found = [
            {"out": str(path), **(run.summary.model_dump(exclude_unset=True) if run.summary else {})}
            for path, run in zip(folders, runs, strict=True)
        ]
        written = None if report is None else str(report)
        print(json.dumps({"out": str(folder), "report": written, "row": asdict(row), "runs": found}))
        return
    seeds_text = f"seeds {configs[0].seed} to {configs[-1].seed}"
    metric = config.main_metric()
    means = f"last epoch {metric.text(row.last)}, best {metric.text(row.best)}"
    print(f"{row.label}, {seeds_text}: {row.metric} {means}", file=sys.stderr)
    if report is not None:
        print(f"report: {report}", file=sys.stderr)
