"""`mdistiller compare RUN…`."""

from pathlib import Path

import torch
from pydantic import Field

from mdistiller.analysis.compare import compare
from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.errors import ConfigError
from mdistiller.report.bought import compared_columns
from mdistiller.report.markup import markdown_table
from mdistiller.report.runs import load_run


class CompareCommand(Command):
    """Print metric, parameters, multiply-accumulates, file size and milliseconds an image, on the CPU, of a
    teacher, a student alone, distilled students and their exports. The report of the runs then has them too.
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders with one test set."""
    exports: tuple[Path, ...] = ()
    """Folders that `mdistiller export` wrote, such as RUN/export/*. A torch-export graph may run code when
    opened: name only those you trust."""
    batch: tuple[int, ...] | None = None
    """Batch sizes whose times are measured. None: 1 and 32, or 1 for models of images of any size, which run
    on the first test image."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the CPU. None: those that torch chooses, or OMP_NUM_THREADS."""
    eval: bool = True
    """Evaluate all models on the test set. Otherwise the recorded metrics are printed."""

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
        print(markdown_table(head, rows), end="")
        shape = f", images of shape {list(found.image_shape)}" if found.image_shape else ""
        print(f"\n{found.metric} on {found.test_set}; milliseconds an image on {found.machine}{shape}")
