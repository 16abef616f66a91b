"""Output to terminals: tables, and progress of a loop."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


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
