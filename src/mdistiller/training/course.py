"""Runs as coroutines, and what takes one or several of them to the end."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

from mdistiller.errors import MDistillerError
from mdistiller.training.batches import Fed
from mdistiller.training.signals import Stop

Course = Generator[int, Fed | str | None, dict[str, Any]]
"""A run: yields the number of the step it stands before; is sent what the next steps are given, or why it
has to stop, which it does with an error; returns its summary."""


class Source(Protocol):
    """Where batches come from."""

    def take(self, step: int, most: int) -> Sequence[Fed]:
        """What each run is given for the next steps: at most `most`, and no further than the epoch's end."""


def drive(
    feed: Source, courses: Sequence[Course], total: int, stop: Stop
) -> list[dict[str, Any] | MDistillerError]:
    """Take runs to their ends side by side, those first that are behind; each one's summary or error.

    Args:
        feed: has been joined by all of them, in this order.
        courses: the runs, not begun.
        total: steps of each.
        stop: whether a signal asks for their end. Steps whose batches are drawn are done before.
    """
    ends: dict[int, dict[str, Any] | MDistillerError] = {}
    at: dict[int, int] = {}

    def go_on(place: int, sent: Fed | str | None) -> None:
        at.pop(place, None)
        try:
            at[place] = courses[place].send(sent)
        except StopIteration as end:
            ends[place] = end.value
        except MDistillerError as error:
            ends[place] = error

    try:
        for place in range(len(courses)):
            go_on(place, None)
        while at:
            step = min(at.values())
            last = [place for place in at if at[place] == step]
            # Up to where the next ones stand.
            upto = min((other for other in at.values() if other > step), default=total)
            fed = feed.take(step, upto - step)
            done = len(fed[0])
            for place in last:
                go_on(place, fed[place])
            # After every step: several processes answer together.
            answers = [stop.asked(step + i) for i in range(1, done + 1)]
            if any(answers):
                for place in list(at):
                    go_on(place, stop.signal or "a signal to another process")
    finally:
        for course in courses:
            course.close()
    return [ends[place] for place in range(len(courses))]
