"""Command `mdistiller report RUN…`."""

import json
import sys
import textwrap
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.errors import ConfigError, DataError
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.report import file_name, report_text, write_report
from mdistiller.report.answer import answer
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import load_run, summarize
from mdistiller.runs.folder import CONFIG, ENV, METRICS


class ReportCommand(Command):
    """Write a self-contained HTML page about finished or running runs, and print its answer: which method
    is best, and by how much. The page adds ranked results, curves, knowledge transfer, and predictions on
    test images. Other formats contain the answer and tables.
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders, or folders that contain run folders at any depth. Runs that differ only in their seed make
    one row."""
    format: Literal["html", "md", "latex", "csv", "json"] = "html"
    """html: the whole page. md, latex: answer and table. csv, json: all numbers; mean, standard deviation
    and n are apart."""
    out: Path | None = None
    """The file to write; - for stdout. None: report.html, report.md, report.tex, …"""
    images: int = Field(default=2000, ge=0)
    """Largest number of test images on which the students run, for the sections on classes and
    correlations, on a detector's classes, errors and boxes, or on masks (at most six). 0 leaves these
    sections out: it is quicker, and the data is not needed."""
    device: str = "auto"
    """Device of the students: auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""

    def execute(self) -> None:
        if not self.runs:
            raise ConfigError("report needs at least one run folder; see mdistiller report --help")
        runs = list(dict.fromkeys(run for path in self.runs for run in _find(path)))
        if self.out == Path("-"):
            if self.as_json:
                raise ConfigError("out: - and --json would both write to stdout; allowed: one of them")
            sys.stdout.write(report_text(runs, images=self.images, device=self.device, format=self.format))
            return
        out = self.out or Path(file_name(self.format))
        try:
            path = write_report(runs, out, images=self.images, device=self.device, format=self.format)
        except OSError as error:
            raise ConfigError(f"out: cannot write {out}: {error}") from error
        if self.as_json:
            print(json.dumps([asdict(row) for row in summarize([load_run(run) for run in runs])]))
            return
        page = PageRows.of([load_run(run) for run in runs])
        for found in (answer(contest, page.groups) for contest in page.contests):
            print(textwrap.fill(f"{found.sentence} {found.note}".strip(), 80), file=sys.stderr)
        print(path)


def _find(path: Path) -> list[Path]:
    """Returns a run folder, or those below another folder. A run without an evaluation gives a warning."""
    if not path.is_dir() or any((path / name).exists() for name in (CONFIG, ENV, METRICS, STUDENT_FILE)):
        return [path]
    found = []
    for folder in sorted(file.parent for file in path.rglob(CONFIG)):
        if not ((folder / ENV).exists() or (folder / METRICS).exists()):
            continue
        try:
            load_run(folder)
            found.append(folder)
        except DataError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    if not found:
        raise DataError(f"{path} is no run folder, and no folder below it is a run with an evaluation")
    return found
