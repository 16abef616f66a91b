"""`mdistiller report RUN…`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from mdistiller.analysis.report import write_report
from mdistiller.analysis.runs import load_run, summarise
from mdistiller.errors import ConfigError


@dataclass(frozen=True)
class ReportCommand:
    """One self-contained HTML page over runs, finished or under way: a table and the curves."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders. Runs that differ only in their seed make one row."""
    out: Path = Path("report.html")
    """The page to write."""
    json: bool = False
    """Print the table's rows as JSON on stdout."""


def command(args: Sequence[str]) -> None:
    """Run `mdistiller report`."""
    c = tyro.cli(ReportCommand, args=args, prog="mdistiller report")
    if not c.runs:
        raise ConfigError("report needs at least one run folder; see mdistiller report --help")
    try:
        path = write_report(list(c.runs), c.out)
    except OSError as error:
        raise ConfigError(f"out: cannot write {c.out}: {error}") from error
    if c.json:
        print(json.dumps([asdict(row) for row in summarise([load_run(run) for run in c.runs])]))
    else:
        print(path)
