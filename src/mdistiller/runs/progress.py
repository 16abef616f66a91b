"""Progress of a run on the screen."""

from __future__ import annotations

from typing import Any, Protocol


class Reporter(Protocol):
    """Display of a run's progress, by default none. Calls are cheap and happen in the main process only."""

    def start(self, title: str, total: int, done: int) -> None:
        """Begins a run of `total` steps, of which `done` are done."""
        return

    def step(self, done: int) -> None:
        """Shows that `done` steps have been issued."""
        return

    def note(self, text: str) -> None:
        """Shows a line about the run."""
        return

    def evaluated(self, line: dict[str, Any]) -> None:
        """Shows a line of evaluation; of several runs side by side, it also has the run's `name`."""
        return

    def stop(self) -> None:
        """Ends the display, whether or not the run finished."""
        return


class Silent(Reporter):
    """Reporter that shows nothing."""


class ProgressDisplay(Reporter):
    """Progress bar on stderr, with a line for each evaluation above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def start(self, title: str, total: int, done: int) -> None:
        self.console.print(title, highlight=False)
        self.task = self.progress.add_task("training", total=total, completed=done)
        self.progress.start()

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def step(self, done: int) -> None:
        self.progress.update(self.task, completed=done)

    def evaluated(self, line: dict[str, Any]) -> None:
        metric = next(name for name in line if f"best_{name}" in line)
        text = f"{line['name']}  " if "name" in line else ""
        text += f"epoch {line['epoch']:>3}  step {line['step']:>6}  loss {line['train']['loss']:7.4f}  "
        if metric in line["train"]:
            text += f"train {line['train'][metric]:5.2f} %  "
        text += f"{'test' if metric == 'top1' else metric} {line[metric]:5.2f} %  "
        text += f"best {line[f'best_{metric}']:5.2f} %"
        if "ema" in line:
            text += f"  ema {line['ema'][metric]:5.2f} %"
        text += f"  {line['ms_per_step']:.1f} ms/step"
        self.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self.progress.stop()
        self.progress.remove_task(self.task)
