"""The canonical names of taps, and the table from them to places in a model."""

from __future__ import annotations

from collections.abc import Sequence


def tap_table(
    stages: Sequence[str],
    *,
    stem: str | None = None,
    preacts: Sequence[str] = (),
    last_map: str | None = None,
    pooled: str | None = None,
) -> dict[str, str]:
    """Maps `stem`, `stage1` …, `stage1.preact` …, `map`, `pooled` to places, in this order.

    A place is a dotted module path, whose output is meant, or such a path with the suffix `:input`: the
    first positional input of that module. Where a module runs several times in one forward pass, its
    last run counts.
    """
    table = {} if stem is None else {"stem": stem}
    for i, stage in enumerate(stages, 1):
        if preacts:
            table[f"stage{i}.preact"] = preacts[i - 1]
        table[f"stage{i}"] = stage
    if last_map is not None:
        table["last_map"] = last_map
    if pooled is not None:
        table["pooled"] = pooled
    return table
