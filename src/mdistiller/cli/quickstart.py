"""Command `mdistiller quickstart`."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mdistiller.api import train
from mdistiller.cli.options import Command
from mdistiller.errors import ConfigError
from mdistiller.recipes import quickstart as recipe
from mdistiller.report import table, write_report
from mdistiller.report.runs import load_run, summarise
from mdistiller.runs.folder import free_folder
from mdistiller.runs.progress import Reporter
from mdistiller.types import Line

# Columns of the table that fit in a terminal. The page has all columns.
_SHOWN = ("run", "seeds", "last, %", "best, %", "Δ baseline", "seconds", "ms/step")


class _Display(Reporter):
    """Progress bar for the current run, on stderr."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, transient=True)
        self.name = ""

    def start(self, title: str, total: int, done: int, **more: object) -> None:
        self.task = self.progress.add_task(self.name, total=total)

    def step(self, done: int) -> None:
        self.progress.update(self.task, completed=done)

    def evaluated(self, line: Line) -> None:
        self.progress.update(self.task, description=f"{self.name}  test {line['top1']:5.1f} %")

    def stop(self) -> None:
        self.progress.remove_task(self.task)


class QuickstartCommand(Command):
    """Train a teacher, then a small student without it, with KD and with DKD, on real images. It takes two
    minutes on two cores, prints a table and writes a report.
    """

    out: Path | None = None
    """Folder for the runs and the report. None: the first free one of runs/quickstart, -2, …"""
    seeds: int = Field(default=3, ge=1)
    """Seeds for each student."""

    def execute(self) -> None:
        out = self.out if self.out is not None else free_folder("quickstart")
        try:
            taken = out.exists() and any(out.iterdir())
        except OSError as error:
            raise ConfigError(f"out: cannot write to {out}: {error}") from error
        if taken:
            raise ConfigError(f"out: {out} is not empty; choose another folder")
        start = time.perf_counter()
        console = Console(stderr=True)
        console.print(recipe.SETTING, highlight=False)
        display = _Display(console)
        configs = {"teacher": recipe.teacher(out / "teacher")}
        for seed in range(self.seeds):
            for method in recipe.METHODS:
                name = f"{'baseline' if method == 'none' else method}-s{seed}"
                configs[name] = recipe.student(method, seed, out / "teacher", out / name)
        with display.progress:
            for i, (name, config) in enumerate(configs.items(), 1):
                display.name = f"run {i} of {len(configs)}: {name:11}"
                result = train(config, reporter=display)
                console.print(f"{name:11} test {result.summary['last']['top1']:5.1f} %", highlight=False)
        folders = [config.out for config in configs.values() if config.out is not None]
        title = "Quickstart: distilling a digit classifier"
        report = write_report(folders, out / "report.html", title=title, notes=[recipe.SETTING], images=500)
        runs = [load_run(folder) for folder in folders]
        rows = summarise(runs)
        if self.as_json:
            result_rows = [asdict(row) for row in rows]
            print(json.dumps({"setting": recipe.SETTING, "rows": result_rows, "report": str(report)}))
        else:
            head, *body = table(rows, runs[0].main_metric)
            columns = [head.index(name) for name in _SHOWN]
            shown = Table(box=None, pad_edge=False)
            for i in columns:
                shown.add_column(head[i], justify="right" if i else "left", no_wrap=i > 0)
            for line in body:
                shown.add_row(*(line[i] for i in columns))
            Console().print(shown)
        print(f"{time.perf_counter() - start:.0f} s in all; report: {report}", file=sys.stderr)
