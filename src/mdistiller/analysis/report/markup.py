"""Pieces of HTML that the sections share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go

from mdistiller.analysis.report.style import mark


class Section(NamedTuple):
    """A part of the page: its anchor, its heading, its body in HTML."""

    name: str
    title: str
    body: str


class Words(NamedTuple):
    """How a figure of runs is called: as a heading, in a sentence, and on an axis."""

    title: str
    sentence: str
    axis: str


WORDS = {
    "top1": Words("Accuracy", "test accuracy", "test top-1"),
    "AP": Words("Average precision", "test AP (COCO's mean over overlaps of 0.5 to 0.95)", "test AP"),
}


def counted(count: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def drawn(name: str, plot: go.Figure, alt: str, *, height: int = 420) -> str:
    """A plot, under a name of its own on the page, with what it shows in words."""
    plot.update_layout(
        height=height,
        template="none",
        showlegend=False,
        dragmode=False,  # a finger that scrolls the page does not zoom
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    plot.update_xaxes(automargin=True)
    plot.update_yaxes(automargin=True)
    body = plot.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displayModeBar": False, "responsive": True},
    )
    return f'<div role="img" aria-label="{escape(alt)}">{body}</div>'


def figure(*parts: str, caption: str = "") -> str:
    """Drawings with a caption of plain text."""
    return f"<figure>{''.join(parts)}<figcaption>{escape(caption)}</figcaption></figure>"


def panels(parts: Iterable[str]) -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="panels">{"".join(parts)}</div>'


def legend(labels: Iterable[str]) -> str:
    """A button for each row, with its mark; the script hides and shows the row's traces."""
    buttons = []
    for i, label in enumerate(labels):
        colour, _, _, stroke = mark(i)
        buttons.append(
            f'<button type="button" aria-pressed="true" data-row="{escape(label)}">'
            f'<svg width="26" height="8" aria-hidden="true"><line x1="0" y1="4" x2="26" y2="4" '
            f'stroke="{colour}" stroke-width="3" stroke-dasharray="{stroke}"/></svg>{escape(label)}</button>'
        )
    return f'<div class="legend" role="group" aria-label="Shown in the plots">{"".join(buttons)}</div>'


def swatches(names: Sequence[str], colours: Sequence[str]) -> str:
    """What the colours of points mean."""
    parts = [
        f'<span><svg width="12" height="12" aria-hidden="true"><circle cx="6" cy="6" r="5" fill="{colour}"/>'
        f"</svg>{escape(name)}</span>"
        for name, colour in zip(names, colours, strict=True)
    ]
    return f'<div class="legend">{"".join(parts)}</div>'


def shorten(text: str, length: int = 16) -> str:
    """A name for an axis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
