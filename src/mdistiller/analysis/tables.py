"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns a Markdown table whose first `texts` columns are aligned left, the others right."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    lines.insert(1, "|" + " --- |" * texts + " ---: |" * (len(head) - texts))
    return "\n".join(lines) + "\n"
