"""Canonical names of taps, and the table from them to module paths."""

from collections.abc import Sequence


def tap_table(
    stages: Sequence[str],
    *,
    stem: str | None = None,
    preacts: Sequence[str] = (),
    last_map: str | None = None,
    pooled: str | None = None,
) -> dict[str, str]:
    """Maps `stem`, `stage1.preact`, `stage1` …, `last_map`, `pooled` to module paths, in this order.

    `PATH` names the module's output and `PATH:input` its first positional input. If a module runs several
    times in one forward pass, its last run counts. Names without a path are left out.
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
