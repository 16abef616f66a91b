"""Output to terminals: characters that the encoding lacks, and progress of a loop."""

import codecs
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

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


def tracked(title: str, rounds: Sequence[T]) -> Iterable[T]:
    """Returns the rounds of a loop; in a terminal, a bar with the time left shows how many are done."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(rounds, title, console=console, transient=True, disable=not console.is_terminal)
