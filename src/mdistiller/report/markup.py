"""Pieces of HTML that the sections share."""

import base64
import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mdistiller.report.looks import Look
from mdistiller.report.spread import MeanStd
from mdistiller.report.svg import Canvas, style

LONG = 20  # rows or classes up to which a table is shown without a click


class Section(NamedTuple):
    """Part of the page: anchor, heading, and body in HTML, which may be shown only after a click."""

    name: str
    title: str
    body: str
    folded: bool = False

    def element(self) -> str:
        """Returns the section as HTML."""
        head = f'<h2 id="{self.name}">{escape(self.title)}</h2>'
        inner = (
            f"<details><summary>{head}</summary>{self.body}</details>" if self.folded else head + self.body
        )
        return f'<section aria-labelledby="{self.name}">{inner}</section>'


def document(title: str, parts: Iterable[str]) -> str:
    """Returns a self-contained page."""
    here = files("mdistiller.report")
    css, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    head = f'<title>{escape(title)}</title><style>{css}</style><style id="chart-style">{style()}</style>'
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            head,
            f"</head><body><main>\n<h1>{escape(title)}</h1>",
            *parts,
            f"</main><script>{script}</script></body></html>",
        ]
    )


def paragraph(text: str, kind: str = "") -> str:
    """Returns plain text as a paragraph."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def from_here(text: str) -> str:
    """Returns text whose paths below the current folder are relative to it."""
    return re.sub(rf"(?<![^\s'\"(]){re.escape(os.path.join(os.getcwd(), ''))}", "", text)


def panel(title: str, *parts: str) -> str:
    """Returns parts under a small heading."""
    return f"<div><h3>{escape(title)}</h3>{''.join(parts)}</div>"


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    """Returns a table as CSV. Text that a spreadsheet would run as a formula gets an apostrophe."""
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows(map(_plain, row) for row in rows)
    return sheet.getvalue()


def _plain(cell: str) -> str:
    is_number = re.fullmatch(r"[+-]?[\d.,]+(e[+-]?\d+)?", cell)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number else cell


def _buttons(*kinds: str) -> str:
    buttons = "".join(f'<button type="button" data-save="{kind.lower()}">{kind}</button>' for kind in kinds)
    return f'<div class="save" role="group" aria-label="Save as">{buttons}</div>'


def chart(name: str, drawings: Sequence[Canvas], alt: str, table: Iterable[Sequence[str]]) -> str:
    """Returns a chart with buttons that save it.

    Args:
        name: unique id, and name of the saved files.
        drawings: one drawing, or a wide and a narrow one, of which the page shows the one that fits.
        alt: content in words.
        table: numbers of the chart, header first.
    """
    kinds = ("",) if len(drawings) == 1 else ("wide", "narrow")
    svgs = "".join(drawing.inline(alt, kind) for drawing, kind in zip(drawings, kinds, strict=True))
    data = f'<pre class="data" hidden>\n{escape(csv_text(table))}</pre>'
    return f'<div class="chart" id="{name}">{svgs}{_buttons("SVG", "PNG", "CSV")}{data}</div>'


def html_table(
    head: Iterable[str], rows: Iterable[Iterable[str]], label: str, kind: str = "", *, name: str = ""
) -> str:
    """Returns a table, which scrolls sideways, from cells that are HTML elements.

    With a `name`, a button saves it as CSV.
    """
    header, body = "".join(head), "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table class="{kind}">'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return f'<div class="chart" id="{name}">{table}{_buttons("CSV")}</div>' if name else table


def text_table(
    head: Iterable[str], rows: Iterable[Sequence[str]], label: str, kind: str = "", *, name: str = ""
) -> str:
    """Returns a table of plain text, whose first column has the names of its rows; see `html_table`."""
    cells = (
        [f'<th scope="row">{escape(first)}</th>', *(f"<td>{escape(text)}</td>" for text in rest)]
        for first, *rest in rows
    )
    return html_table(heads(head), cells, label, kind, name=name)


def value_text(value: float | MeanStd | None, spec: str) -> str:
    """Returns a number with a proper minus sign; a dash for None."""
    return "–" if value is None else format(value, spec).replace("-", "−")


def sortable(texts: Iterable[str]) -> list[str]:
    """Returns column headings whose buttons sort the table."""
    return [
        f'<th scope="col" aria-sort="none"><button type="button">{escape(text)}</button></th>'
        for text in texts
    ]


def markdown_text(text: str) -> str:
    """Returns plain text on one line, with the characters of cells, links, code and HTML escaped."""
    return re.sub(r"[\\|`\[\]]", r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns a Markdown table whose first `texts` columns are aligned left, the others right."""
    lines = ["| " + " | ".join(map(markdown_text, line)) + " |" for line in (head, *rows)]
    lines.insert(1, "|" + " --- |" * texts + " ---: |" * (len(head) - texts))
    return "\n".join(lines) + "\n"


def heads(texts: Iterable[str]) -> list[str]:
    """Returns column headings as table cells."""
    return [f'<th scope="col">{escape(text)}</th>' for text in texts]


def figure(*parts: str, caption: str = "") -> str:
    """Returns drawings with a caption of plain text."""
    return f"<figure>{''.join(parts)}<figcaption>{escape(caption)}</figcaption></figure>"


def panels(parts: Iterable[str]) -> str:
    """Returns panels side by side, as many as fit."""
    return f'<div class="panels">{"".join(parts)}</div>'


def folded(title: str, body: str, *, unfolded: bool = False) -> str:
    """Returns a part that a click on its title shows and hides."""
    return f"<details{' open' * unfolded}><summary>{escape(title)}</summary>{body}</details>"


def long_table(table: str, count: int, lines: str) -> str:
    """Returns a table of `count` `lines`, folded if these are many."""
    return table if count <= LONG else folded(f"{count} {lines}", table)


def swatch(look: Look) -> str:
    """Returns a small picture of a row's line and mark."""
    canvas = Canvas(30, 12)
    canvas.line(0, 6, 30, 6, stroke=look.color, stroke_width=2.5, stroke_dasharray=look.dash or None)
    canvas.mark(look.shape, 15, 6, 4.5, fill=look.color)
    return f'<svg width="30" height="12" aria-hidden="true">{"".join(canvas.parts)}</svg>'


def legend(looks: Mapping[str, Look], shown: Sequence[str]) -> str:
    """Returns a button for each row, which shows and hides the row in all charts with lines."""
    buttons = {
        label: f'<button type="button" aria-pressed="{str(label in shown).lower()}" '
        f'data-row="{escape(label)}">{swatch(look)}{escape(label)}</button>'
        for label, look in looks.items()
    }
    first, more = ([b for label, b in buttons.items() if (label in shown) is on] for on in (True, False))
    rest = folded(f"{len(more)} more", "".join(more)) if more else ""
    return f'<div class="legend" role="group" aria-label="Rows in the charts">{"".join(first)}{rest}</div>'


def picture(image: Tensor, side: int, alt: str) -> str:
    """Returns an image [H, W, 3] of 0 to 255 as wide as its panel, of at most `side` pixels.

    It is a PNG or a JPEG, whichever has fewer bytes; `alt` is its content in words.
    """
    pixels = Image.fromarray(image.to(torch.uint8).cpu().contiguous().numpy())
    pixels.thumbnail((side, side))
    found = []
    for name, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        file = io.BytesIO()
        pixels.save(file, name, **options)
        found.append(f"data:image/{name};base64,{base64.b64encode(file.getvalue()).decode()}")
    return f'<img src="{min(found, key=len)}" alt="{escape(alt)}" width="100%">'


def shorten(text: str, length: int = 16) -> str:
    """Returns a name cut to at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
