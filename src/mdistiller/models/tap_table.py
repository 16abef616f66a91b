"""Canonical names of taps, and the table from them to module paths."""

import re
from collections.abc import Sequence

from torch import nn


def tap_table(
    stages: Sequence[str],
    *,
    stem: str | None = None,
    preacts: Sequence[str] = (),
    last_map: str | None = None,
    classifier: str | None = None,
) -> dict[str, str]:
    """Maps `stem`, `stage1.preact`, `stage1` …, `last_map`, `pooled` to module paths, in this order.

    `PATH` names the module's output and `PATH:input` its first positional input. If a module runs several
    times in one forward pass, its last run counts. Names without a path are left out. `pooled` is the input
    of the classifier.
    """
    table = {"stem": stem}
    for i, stage in enumerate(stages, 1):
        if preacts:
            table[f"stage{i}.preact"] = preacts[i - 1]
        table[f"stage{i}"] = stage
    table |= {"last_map": last_map, "pooled": None if classifier is None else f"{classifier}:input"}
    return {name: path for name, path in table.items() if path is not None}


def last_linear(model: nn.Module) -> str | None:
    """Returns the path of a model's last linear layer, adapters included; None if there is none."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return re.split(r"(?:^|\.)(?:base_layer|lora_\w+|modules_to_save)\b", paths[-1])[0] if paths else None


def without_adapters(model: nn.Module) -> nn.Module:
    """Returns the model to which PEFT's module adds adapters; any other model as it is."""
    find = getattr(model, "get_base_model", None)
    return find() if callable(find) else model
