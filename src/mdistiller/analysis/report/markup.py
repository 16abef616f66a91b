"""Pieces of HTML, and colours and marks of rows, that the sections share."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from PIL import Image
from plotly.offline import get_plotlyjs
from torch import Tensor

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


class Section(NamedTuple):
    """Part of the page: anchor, heading, and body in HTML."""

    name: str
    title: str
    body: str


class MetricNames(NamedTuple):
    """Names of a metric in a heading, in a sentence, and on an axis."""

    title: str
    sentence: str
    axis: str


_METRIC_NAMES = {
    "top1": MetricNames("Accuracy", "test accuracy", "test top-1"),
    "AP": MetricNames("Average precision", "test AP (COCO's mean over overlaps of 0.5 to 0.95)", "test AP"),
}


def metric_names(metric: str) -> MetricNames:
    """Returns the names of a metric; its field's name serves for one that has no others."""
    return _METRIC_NAMES.get(metric, MetricNames(metric, f"test {metric}", f"test {metric}"))


def counted(count: int, noun: str) -> str:
    """Returns `1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def document(title: str, parts: Iterable[str], *, plots: bool = True) -> str:
    """Returns a self-contained page; `plots` adds plotly and the page's script."""
    here = files("mdistiller.analysis.report")
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    head = f"<title>{escape(title)}</title><style>{style}</style>"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            head + f"<script>{get_plotlyjs()}</script>" * plots,
            f"</head><body><main>\n<h1>{escape(title)}</h1>",
            *parts,
            "</main>" + f"<script>{script}</script>" * plots + "</body></html>",
        ]
    )


def paragraph(text: str, kind: str = "") -> str:
    """Returns plain text as a paragraph."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def panel(title: str, *parts: str) -> str:
    """Returns parts under a small heading."""
    return f"<div><h3>{escape(title)}</h3>{''.join(parts)}</div>"


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]], label: str, kind: str = "") -> str:
    """Returns a table, which scrolls sideways, from cells that are HTML elements."""
    header, body = "".join(head), "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table class="{kind}">'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns a Markdown table whose first `texts` columns are aligned left, the others right."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    lines.insert(1, "|" + " --- |" * texts + " ---: |" * (len(head) - texts))
    return "\n".join(lines) + "\n"


def heads(texts: Iterable[str]) -> list[str]:
    """Returns column headings as table cells."""
    return [f'<th scope="col">{escape(text)}</th>' for text in texts]


def drawn(name: str, plot: go.Figure, alt: str, *, height: int = 420) -> str:
    """Returns a plot as HTML, with `name` as its unique id and `alt` as its content in words."""
    clear = "rgba(0,0,0,0)"
    plot.update_layout(height=height, template="none", paper_bgcolor=clear, plot_bgcolor=clear)
    plot.update_layout(showlegend=False, dragmode=False)  # a finger that scrolls the page does not zoom
    plot.update_xaxes(automargin=True).update_yaxes(automargin=True)
    config = {"displayModeBar": False, "responsive": True}
    body = plot.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return f'<div role="img" aria-label="{escape(alt)}">{body}</div>'


def figure(*parts: str, caption: str = "") -> str:
    """Returns drawings with a caption of plain text."""
    return f"<figure>{''.join(parts)}<figcaption>{escape(caption)}</figcaption></figure>"


def panels(parts: Iterable[str]) -> str:
    """Returns panels side by side, as many as fit."""
    return f'<div class="panels">{"".join(parts)}</div>'


def folded(title: str, body: str, *, unfolded: bool) -> str:
    """Returns a part that a click on its title shows and hides."""
    return f"<details{' open' * unfolded}><summary>{escape(title)}</summary>{body}</details>"


def legend(labels: Iterable[str]) -> str:
    """Returns a button for each row, which hides and shows the row in all plots."""
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-row="{escape(label)}">'
        f'<svg width="26" height="8" aria-hidden="true"><line x1="0" y1="4" x2="26" y2="4" '
        f'stroke="{mark(i).colour}" stroke-width="3" stroke-dasharray="{mark(i).stroke}"/></svg>'
        f"{escape(label)}</button>"
        for i, label in enumerate(labels)
    )
    return f'<div class="legend" role="group" aria-label="Rows in the plots">{buttons}</div>'


def swatches(names: Sequence[str], colours: Sequence[str]) -> str:
    """Returns a key to the colours of points."""
    parts = "".join(
        f'<span><svg width="12" height="12" aria-hidden="true"><circle cx="6" cy="6" r="5" fill="{colour}"/>'
        f"</svg>{escape(name)}</span>"
        for name, colour in zip(names, colours, strict=True)
    )
    return f'<div class="legend">{parts}</div>'


def image_uri(image: Tensor, side: int, kind: str) -> str:
    """Returns an image [H, W, 3] of 0 to 255 as a data URI of at most `side` pixels, `png` or `jpeg`."""
    picture = Image.fromarray(image.to(torch.uint8).cpu().contiguous().numpy())
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def shorten(text: str, length: int = 16) -> str:
    """Returns a name cut to at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
