"""Charts as SVG: a canvas, scales with ticks, marks, lines and heat maps.

The colors of text and lines come from `chart.css`, so that a chart follows the page's light or dark scheme.
"""

import base64
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.resources import files

import numpy as np
from PIL import Image

Attribute = str | float | None
_BLUE = (0, 114, 178)


def style() -> str:
    """Returns the CSS of charts, without the values of its variables."""
    return (files("mdistiller.report") / "chart.css").read_text(encoding="utf-8")


def number(value: float) -> str:
    """Returns a coordinate with at most one decimal, as short as SVG allows."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


class Canvas:
    """SVG elements on an area of `width` × `height` pixels."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def add(self, tag: str, content: str = "", /, **attributes: Attribute) -> None:
        """Adds an element. `content` is markup; names end in `_` or have `_` for `-`; None is left out."""
        known = {name.rstrip("_").replace("_", "-"): v for name, v in attributes.items() if v is not None}
        texts = [
            f' {name}="{number(v) if isinstance(v, float | int) else escape(v)}"' for name, v in known.items()
        ]
        self.parts.append(f"<{tag}{''.join(texts)}" + (f">{content}</{tag}>" if content else "/>"))

    def text(
        self, x: float, y: float, content: str, anchor: str | None = None, **attributes: Attribute
    ) -> None:
        """Adds plain text; `anchor` is `middle` or `end`."""
        self.add("text", escape(content), x=x, y=y, text_anchor=anchor, **attributes)

    def line(self, x1: float, y1: float, x2: float, y2: float, **attributes: Attribute) -> None:
        """Adds a straight line."""
        self.add("path", d=f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", **attributes)

    def curve(self, points: Iterable[tuple[float, float]], **attributes: Attribute) -> None:
        """Adds a line through points."""
        self.add("path", d=path(points), fill=attributes.pop("fill", "none"), **attributes)

    def mark(self, shape: str, x: float, y: float, r: float, **attributes: Attribute) -> None:
        """Adds a mark whose area is about that of a circle of radius `r`."""
        if shape == "circle":
            self.add("circle", cx=x, cy=y, r=r, **attributes)
        else:
            corners = [(x + r * dx, y + r * dy) for dx, dy in _SHAPES[shape]]
            self.add("path", d=path(corners) + "z", **attributes)

    def heat(self, values: np.ndarray, x: float, y: float, w: float, h: float, top: float) -> None:
        """Adds a heat map of values from 0: faint blue for 0, opaque from `top` on, clear for NaN."""
        share = np.nan_to_num(0.1 + 0.9 * values / (top or 1)).clip(0, 1)
        cells = np.empty((*share.shape, 4), np.uint8)
        cells[..., :3] = _BLUE
        cells[..., 3] = np.round(share * 31) * (255 / 31)  # few shades, which compress well
        file = io.BytesIO()
        Image.fromarray(cells).save(file, "png", optimize=True)
        uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        area: dict[str, Attribute] = {"x": x, "y": y, "width": w, "height": h}
        self.add("image", href=uri, preserveAspectRatio="none", class_="cells", **area)
        self.add("rect", class_="frame", **area)

    @contextmanager
    def row(self, label: str, *, shown: bool = True, hint: str = "") -> Iterator[None]:
        """Context whose elements belong to a row, which the page can hide; the hint is their tooltip."""
        self.parts.append(f'<g class="row{"" if shown else " off"}" data-row="{escape(label)}">')
        self.parts += [f"<title>{escape(hint)}</title>"] if hint else []
        yield
        self.parts.append("</g>")

    @contextmanager
    def clip(self, x: float, y: float, w: float, h: float) -> Iterator[None]:
        """Context whose elements are cut at a rectangle; coordinates stay those of the canvas."""
        box = " ".join(map(number, (x, y, w, h)))
        size = f'x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}"'
        self.parts.append(f'<svg {size} viewBox="{box}">')
        yield
        self.parts.append("</svg>")

    def inline(self, alt: str, kind: str = "") -> str:
        """Returns an element for a page; `alt` is its content in words."""
        return (
            f'<svg class="plot {kind}" viewBox="0 0 {number(self.width)} {number(self.height)}" role="img" '
            f'aria-label="{escape(alt)}" style="--w:{number(self.width)}px">{"".join(self.parts)}</svg>'
        )


def _star(count: int, turn: float, size: float) -> list[tuple[float, float]]:
    angles = (turn + 2 * math.pi * i / count for i in range(count))
    return [(size * math.sin(a), -size * math.cos(a)) for a in angles]


_SHAPES: dict[str, Sequence[tuple[float, float]]] = {
    "square": _star(4, math.pi / 4, 1.25),
    "diamond": _star(4, 0, 1.3),
    "up": _star(3, 0, 1.45),
    "down": _star(3, math.pi, 1.45),
}


def path(points: Iterable[tuple[float, float]]) -> str:
    """Returns the data of a path of straight lines, in tenths of a pixel, relative where that is shorter."""
    found, last = "", (0, 0)
    for i, (x, y) in enumerate(points):
        here = round(10 * x), round(10 * y)
        dx, dy = ((a - b) / 10 for a, b in zip(here, last, strict=True))
        last = here
        text = number(dx) + (number(dy) if dy < 0 else f" {number(dy)}")
        found += f"M{text}" if i == 0 else f"l{text}"
    return found


class Scale:
    """Position of values on an axis from `start` to `end` in pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, 1e-12)) for v in (value, low, high))
        # Far outside, a path needs no exact position.
        share = min(max((value - low) / (high - low), -9), 9)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Returns about `count` round values within the axis."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**k for k in range(first, last + 1) for s in steps]
                found = [v for v in found if self.low <= v <= self.high]
                if len(found) <= count + 1:
                    break
            if len(found) > 1:
                return found
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Returns the label of a tick."""
    text = f"{value:,.10g}" if abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")


class Frame:
    """Area of a plot within a canvas, with its two axes; values outside are cut off.

    Args:
        x, y: lowest and highest value.
        titles: of the horizontal axis (below its middle) and of the vertical one (above its top).
        whole: ticks of the horizontal axis are whole numbers.
    """

    def __init__(
        self,
        canvas: Canvas,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        titles: tuple[str, str] = ("", ""),
        log: bool = False,
        whole: bool = False,
    ) -> None:
        self.canvas = canvas
        self.top, self.bottom = 12 + 18 * bool(titles[1]), canvas.height - 24 - 18 * bool(titles[0])
        self.y = Scale(*y, self.bottom, self.top, log=log)
        ticks = self.y.ticks(max(2, int((self.bottom - self.top) / 34)))
        texts = [tick_text(value) for value in ticks]
        self.left, self.right = 14 + 7.2 * max(map(len, texts), default=1), canvas.width - 14
        self.x = Scale(*x, self.left, self.right)
        for value, text in zip(ticks, texts, strict=True):
            canvas.line(self.left, self.y(value), self.right, self.y(value), class_="grid")
            canvas.text(self.left - 6, self.y(value) + 4, text, "end", class_="faint")
        for value in self.x.ticks(max(2, int((self.right - self.left) / 75))):
            if whole and value != round(value):
                continue
            canvas.line(self.x(value), self.bottom, self.x(value), self.bottom + 4, class_="axis")
            text = tick_text(value)
            end = "end" if self.x(value) + 4 * len(text) > canvas.width else "middle"
            canvas.text(self.x(value), self.bottom + 18, text, end, class_="faint")
        # The page finds values at the pointer by the ends of this line.
        ends = " ".join(f"{value:.6g}" for value in (self.left, self.right, *x))
        canvas.line(self.left, self.bottom, self.right, self.bottom, class_="axis", data_x=ends)
        canvas.text((self.left + self.right) / 2, canvas.height - 6, titles[0], "middle", class_="faint")
        canvas.text(4, 16, titles[1], class_="faint")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Context whose elements are cut at the frame, with room for marks on its edges."""
        width, height = self.right - self.left, self.bottom - self.top
        with self.canvas.clip(self.left - 4, self.top - 4, width + 8, height + 8):
            yield


def fences(values: Sequence[float]) -> tuple[float, float]:
    """Returns bounds that leave far outliers out: three interquartile ranges beyond the quartiles.

    Fewer than five values have no outliers.
    """
    if len(values) < 5:
        return min(values), max(values)
    first, third = np.percentile(values, (25, 75)).tolist()
    reach = 3 * (third - first)
    inner = [v for v in values if first - reach <= v <= third + reach]
    return min(inner), max(inner)
