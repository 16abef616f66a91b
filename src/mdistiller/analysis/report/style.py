"""Colours and marks of the plots."""

from __future__ import annotations

from typing import NamedTuple

# Okabe and Ito's colours, which suit any colour vision, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = (("solid", ""), ("dash", "5 3"), ("dot", "2 2"), ("dashdot", "5 2 1 2"))
_SYMBOLS = ("circle", "square", "diamond", "triangle-up")
GAIN, LOSS, TEACHER = "#0072B2", "#D55E00", "#8a8f98"


class Mark(NamedTuple):
    """Appearance of a row: colour, plotly's dash and symbol, and the dash as SVG's stroke-dasharray."""

    colour: str
    dash: str
    symbol: str
    stroke: str


def mark(i: int) -> Mark:
    """Returns the mark of row i: the colours in turn, then again with another dash and symbol."""
    again = i // len(COLOURS) % len(_DASHES)
    dash, stroke = _DASHES[again]
    return Mark(COLOURS[i % len(COLOURS)], dash, _SYMBOLS[again], stroke)
