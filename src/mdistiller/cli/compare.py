"""`mdistiller compare RUN…`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from mdistiller.analysis.compare import compare
from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.deploy.measure import BATCHES
from mdistiller.errors import ConfigError
from mdistiller.report.bought import compared_columns
from mdistiller.report.markup import markdown_table
from mdistiller.report.runs import load_run


@dataclass(frozen=True)
class CompareCommand(CommonFlags):
    """Print accuracy, parameters, multiply-accumulates, file size and milliseconds an image, on the CPU, of a
    teacher, a student alone, distilled students and their exports. The report of the runs then has them too.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders with one test set. Exports in RUN/export are among the rows."""
    exports: tuple[Path, ...] = ()
    """Further folders that `mdistiller export` wrote."""
    batch: tuple[int, ...] = BATCHES
    """Batch sizes whose times are measured."""
    threads: int | None = None
    """Threads of the CPU. None: those that torch chooses, or OMP_NUM_THREADS."""
    eval: bool = True
    """Evaluate all models on the test set. Otherwise the recorded metrics are printed."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller compare`."""
    c = parse_command(CompareCommand, args, prog="mdistiller compare")
    if not c.runs:
        raise ConfigError("compare needs at least one run folder; see mdistiller compare --help")
    if c.threads is not None and c.threads < 1:
        raise ConfigError(f"threads: got {c.threads}; allowed: 1 or more")
    before = torch.get_num_threads()
    try:
        if c.threads is not None:
            torch.set_num_threads(c.threads)
        found = compare(c.runs, c.exports, batches=c.batch, evaluate=c.eval)
    finally:
        torch.set_num_threads(before)
    if c.json:
        print(found.model_dump_json())
        return
    head, *rows = compared_columns(found, load_run(c.runs[0]).main_metric)
    print(markdown_table(head, rows), end="")
    print(f"\n{found.metric} on {found.test_set}; milliseconds an image on {found.machine}")
