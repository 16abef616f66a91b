"""`mdistiller report RUN…`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from mdistiller.analysis.report import write_report
from mdistiller.analysis.runs import load_run, summarise
from mdistiller.errors import ConfigError, DataError
from mdistiller.methods import load_plugin
from mdistiller.runs.folder import CONFIG, ENV, METRICS


@dataclass(frozen=True)
class ReportCommand:
    """One self-contained HTML page over runs, finished or under way: the table, the curves, what is
    transferred, and what the students make of the test images.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders with run folders anywhere below. Runs that differ only in their seed make one
    row."""
    out: Path = Path("report.html")
    """The page to write."""
    images: int = 2000
    """Test images that the students are shown, for the parts on classes, confusions, features and
    correlations, at most; of detectors, boxes on six at most. 0 leaves these out: quicker, and the data is
    not needed."""
    device: str = "auto"
    """Where the students are run: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Python file that registers methods, models and data sets (code: it is run). May be given again."""
    json: bool = False
    """Print the table's rows as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Run `mdistiller report`."""
    c = tyro.cli(ReportCommand, args=args, prog="mdistiller report")
    if not c.runs:
        raise ConfigError("report needs at least one run folder; see mdistiller report --help")
    if c.images < 0:
        raise ConfigError(f"images: got {c.images}; allowed: 0 or more")
    for plugin in c.plugin:
        load_plugin(plugin)
    runs = list(dict.fromkeys(run for path in c.runs for run in _find(path)))
    try:
        path = write_report(runs, c.out, images=c.images, device=c.device)
    except OSError as error:
        raise ConfigError(f"out: cannot write {c.out}: {error}") from error
    if c.json:
        print(json.dumps([asdict(row) for row in summarise([load_run(run) for run in runs])]))
    else:
        print(path)


def _find(path: Path) -> list[Path]:
    """A run folder itself, or those below a folder that is none; a run without figures yet is warned of."""
    if not path.is_dir() or any((path / name).exists() for name in (CONFIG, ENV, METRICS)):
        return [path]
    found = []
    for folder in sorted(file.parent for file in path.rglob(CONFIG)):
        if not ((folder / ENV).exists() or (folder / METRICS).exists()):
            continue
        try:
            load_run(folder)
        except DataError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
        else:
            found.append(folder)
    if not found:
        raise DataError(f"{path} is no run folder, and there is none with an evaluation below it")
    return found
