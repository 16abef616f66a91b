"""Output to terminals: characters that the encoding lacks, and progress of a loop."""

import codecs
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

_HANDLER = "mdistiller"
_ASCII = {
    **{"→": "->", "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "±": "+/-", "≤": "<=", "≥": ">="},
    **{"α": "alpha", "β": "beta", "γ": "gamma", "Δ": "delta", "Σ": "sum", "μ": "u", "µ": "u", "·": "*"},
    **{"│": "|", "─": "-", "━": "-", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "’": "'", "✓": "ok", "✗": "x"},
}


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


def soften_streams() -> None:
    """Lets stdout and stderr write a likeness of characters that their encoding lacks, such as `->`."""
    codecs.register_error(_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # not of every replacement, such as a notebook's
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on stdout: the first column left-aligned, the others right-aligned and never wrapped."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False, markup=False).print(shown)


@contextmanager
def counted(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Context of a loop, with a function that shows on stderr how many of its rounds are done.

    A bar with the time left in a terminal, a line each elsewhere.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, start = Console(stderr=True), time.perf_counter()
    if not console.is_terminal:

        def line(done: int) -> None:
            left = (time.perf_counter() - start) * (total - done) / done
            print(f"{title} {done} of {total}, ETA {timedelta(seconds=round(left))}", file=sys.stderr)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
