"""Colors and marks of rows, bound to their methods: a method has the same color on every page."""

import re
from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32

from mdistiller.methods import get_method, list_methods

# Okabe and Ito's colors, which suit any color vision, without black and yellow, and more.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5CCB"),
    *("#8C6D31", "#B8383F", "#5F9E1F", "#00A0A8", "#A64CA6", "#6878E8", "#B59A2C"),
)
ALONE, EVALUATED = "#7d8590", "#b0498f"
SHAPES = ("circle", "square", "diamond", "up", "down")
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 4")
# Methods that most papers have on one page, and so differ in color.
_FIRST = ("dkd", "kd", "crd", "reviewkd", "at", "fitnet", "simkd")


class Look(NamedTuple):
    """Appearance of a row: color, shape of its mark, and stroke-dasharray of its line."""

    color: str
    shape: str
    dash: str


def looks(methods: Mapping[str, str]) -> dict[str, Look]:
    """Returns the look of each row from its method, by label.

    The color follows from the method alone. So does the mark, unless an earlier row has color and mark.
    """
    found: dict[str, Look] = {}
    for label, method in methods.items():
        color, first = _bound(method)
        styles = [Look(color, SHAPES[i % 5], DASHES[i % 5]) for i in range(first, first + 5)]
        found[label] = next((look for look in styles if look not in found.values()), styles[0])
    return found


def _bound(method: str) -> tuple[str, int]:
    """Returns a method's color and the number of its mark."""
    if method in ("none", ""):
        return (ALONE, 0) if method else (EVALUATED, 2)
    if method in _FIRST:
        return COLORS[_FIRST.index(method)], 0
    code = crc32(method.encode())
    own = COLORS[2:]  # KD and DKD are on most pages
    return own[code % len(own)], 1 + code // len(own) % (len(SHAPES) - 1)


def method_title(method: str) -> str:
    """Returns a method's name for a reader, as its class writes it: `lskd-reviewkd` is LSKD-ReviewKD."""
    return "".join(_written(part) for part in re.split(r"([+-])", method))


def _written(name: str) -> str:
    known = get_method(name).__name__.removesuffix("Method") if name in list_methods() else ""
    if known.lower() == name.replace("_", ""):
        return known
    return name.upper() if len(name) <= 4 else name  # short names are abbreviations
