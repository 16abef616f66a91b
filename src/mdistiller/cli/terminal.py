"""Output to terminals whose encoding lacks some characters."""

import codecs
import sys

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
