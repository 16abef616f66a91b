"""Progress of a run on the screen."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from mdistiller.types import Line, Metric


def counted(count: int, noun: str) -> str:
    """Returns `1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


Losses = Callable[[], Mapping[str, float]]
"""Returns the losses of the last steps by name. A call waits for the device."""


class Reporter:
    """Display of a run's progress, here none. Calls are cheap and happen in the main process only."""

    def built(self, trainer: Any, source: Any) -> None:
        """Shows a run that is built, with its trainer and batches, before its first step."""

    def start(self, title: str, total: int, done: int, *, images: int = 1, losses: Losses = dict) -> None:
        """Begins a run.

        Args:
            title: one line for people.
            total: number of steps.
            done: steps that are done.
            images: images of a step.
            losses: see `Losses`.
        """

    def step(self, done: int) -> None:
        """Shows that `done` steps have been issued."""

    def note(self, text: str) -> None:
        """Shows a line about the run."""

    def evaluated(self, line: Line) -> None:
        """Shows a line of evaluation."""

    def stop(self) -> None:
        """Ends the display, whether or not the run finished."""


FIRST_SECONDS = 10.0  # to the first line outside a terminal
LINE_SECONDS = 30.0  # between two lines outside a terminal
BAR = 20  # characters of the bar
BAR_SECONDS = 5.0  # between two readings of the losses for the bar


class ProgressDisplay(Reporter):
    """Steps, images a second, time left and losses on stderr, and a line for each evaluation.

    A bar in a terminal; elsewhere, such as in a log file, a line every 30 seconds. The losses are read from
    the device only when they are shown.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.clock = time.perf_counter
        self.progress = Progress(
            BarColumn(BAR),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            transient=True,
        )

    def built(self, trainers: Any, source: Any) -> None:
        self.metric: Metric = trainers.config.main_metric()

    def start(self, title: str, total: int, done: int, *, images: int = 1, losses: Losses = dict) -> None:
        self._print(title)
        self.task = self.progress.add_task("training", total=total, completed=done, facts="")
        self.total, self.images, self.losses = total, images, losses
        self.first = self.last = done  # at the start, and when losses were last shown
        self.began = self.mark = self.clock()  # the start, and the last step or evaluation
        self.busy = 0.0  # seconds of training since losses were last shown, without evaluations
        self.due = self.began + (BAR_SECONDS if self.console.is_terminal else FIRST_SECONDS)
        if self.console.is_terminal:
            self.progress.start()

    def note(self, text: str) -> None:
        self._print(text)

    def step(self, done: int) -> None:
        now = self.clock()
        self.busy, self.mark = self.busy + now - self.mark, now
        self.progress.update(self.task, completed=done)
        if now >= self.due:
            self.progress.update(self.task, facts=self._facts(done))

    def _facts(self, done: int) -> str:
        """Returns images a second and losses, after a line with them outside a terminal."""
        losses = self.losses()
        now = self.clock()  # all steps so far are done: the losses were read
        self.busy, self.mark = self.busy + now - self.mark, now
        speed = self.images * (done - self.last) / max(self.busy, 1e-9)
        shown = [f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s"]
        shown += [f"{name} {losses[name]:.4g}" for name in sorted(losses, key=lambda name: name != "loss")]
        if not self.console.is_terminal:
            left = (now - self.began) * (self.total - done) / (done - self.first)
            eta = f"ETA {timedelta(seconds=round(left))}"
            self._print("  ".join([f"step {done:,} of {self.total:,}", shown[0], eta, *shown[1:]]))
        self.last, self.busy = done, 0.0
        self.due = now + (BAR_SECONDS if self.console.is_terminal else LINE_SECONDS)
        room = self.console.width - BAR - 2 * len(str(self.total)) - len(" / 00:00:00 ")
        facts = [*shown[1:], shown[0]]  # what counts least is last
        while len("  ".join(facts)) > room and len(facts) > 1:
            facts.pop()
        return "  ".join(facts)

    def evaluated(self, line: Line) -> None:
        metric, name = self.metric, self.metric.name
        # Each with a rank: a narrow terminal leaves out those of the highest ranks, so that a line is one.
        parts = [(0, f"epoch {line['epoch']:>3}"), (6, f"step {line['step']:>6}")]
        parts.append((3, f"loss {line['train']['loss']:7.4f}"))
        if name in line["train"]:
            parts.append((4, f"train {metric.text(line['train'][name], '5.2f')}"))
        parts.append((0, f"{metric.short} {metric.text(line[name], '5.2f')}"))
        parts.append((2, f"best {metric.text(line[f'best_{name}'], '5.2f')}"))
        if "ema" in line:
            parts.append((1, f"ema {metric.text(line['ema'][name], '5.2f')}"))
        parts.append((5, f"{line['ms_per_step']:.1f} ms/step"))
        width = self.console.width if self.console.is_terminal else None
        text = "  ".join(text for _, text in parts)
        while width is not None and len(text) > width and (rank := max(parts)[0]):
            parts = [part for part in parts if part[0] != rank]
            text = "  ".join(text for _, text in parts)
        self._print(text)
        self.mark = self.clock()

    def _print(self, text: str) -> None:
        # A name in brackets is no markup of rich.
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def stop(self) -> None:
        if self.console.is_terminal:  # elsewhere rich would print an empty line
            self.progress.stop()
        self.progress.remove_task(self.task)
