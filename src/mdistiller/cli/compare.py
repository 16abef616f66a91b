"""`mdistiller compare RUN…`."""

import shutil
import sys
import textwrap
from pathlib import Path

import torch
from pydantic import Field

from mdistiller.analysis.compare import compare
from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.cli.terminal import print_table
from mdistiller.errors import ConfigError
from mdistiller.report.costs import compared_columns
from mdistiller.report.markup import markdown_table
from mdistiller.report.runs import load_run


class CompareCommand(Command):
    """Compare the teacher, the student alone, distilled students and their exports on the CPU: accuracy,
    parameters, multiply-accumulates, file size and milliseconds per image. Later reports on these runs
    include the table.
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders with one test set."""
    exports: tuple[Path, ...] = ()
    """Folders that `mdistiller export` wrote, such as RUN/export/*. A torch-export graph may run code when
    opened: name only those you trust."""
    batch: tuple[int, ...] | None = None
    """Batch sizes to time. None: 1 and 32, or only 1 for models that accept any image size, timed on the
    first test image."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads. None: torch's choice, or OMP_NUM_THREADS."""
    eval: bool = True
    """Evaluate all models on the test set. Otherwise the recorded metrics are printed."""
    markdown: bool = False
    """Print a Markdown table in a terminal too, as in a pipe or a file."""

    def execute(self) -> None:
        if not self.runs:
            raise ConfigError("compare needs at least one run folder; see mdistiller compare --help")
        before = torch.get_num_threads()
        try:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            found = compare(self.runs, self.exports, batches=self.batch, evaluate=self.eval)
        finally:
            torch.set_num_threads(before)
        if self.as_json:
            print(found.model_dump_json())
            return
        head, *rows = compared_columns(found, load_run(self.runs[0]).main_metric)
        shape = f", images of shape {list(found.image_shape)}" if found.image_shape else ""
        note = f"{found.metric} on {found.test_set}; milliseconds per image on {found.machine}{shape}"
        if self.markdown or not sys.stdout.isatty():
            print(f"{markdown_table(head, rows)}\n{note}")
            return
        print_table([name.replace(", ", "\n") for name in head], rows)
        print(f"\n{textwrap.fill(note, shutil.get_terminal_size().columns)}")
