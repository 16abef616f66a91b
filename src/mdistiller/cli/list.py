"""`mdistiller list WHAT`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from mdistiller.analysis.methods import describe_method
from mdistiller.methods import list_methods, load_plugin
from mdistiller.models import create_model, list_models
from mdistiller.recipes import DOT, list_recipes
from mdistiller.recipes.coco import list_detection_recipes


@dataclass(frozen=True)
class ListCommand:
    """Names and facts of what is there."""

    what: tyro.conf.Positional[Literal["methods", "models", "recipes"]]
    """What to list."""
    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose @register and @register_model calls add methods and models (code: it is run). May
    be given again."""
    json: bool = False
    """Print as JSON on stdout."""


def _methods() -> list[dict[str, Any]]:
    student, teacher = create_model("resnet8x4"), create_model("resnet32x4")
    rows = [describe_method(name, student, teacher) for name in list_methods()]
    return sorted([*rows, DOT], key=lambda row: row["name"])


def _models() -> list[dict[str, Any]]:
    rows = []
    for name in list_models():
        model = create_model(name)
        rows.append({"name": name, "parameters": sum(p.numel() for p in model.parameters())})
    return rows


def _recipes() -> list[dict[str, Any]]:
    rows = [{"name": name, "command": "train"} for name in list_recipes()]
    return rows + [{"name": name, "command": "detect train"} for name in list_detection_recipes()]


def command(args: Sequence[str]) -> None:
    """Run `mdistiller list`."""
    c = tyro.cli(ListCommand, args=args, prog="mdistiller list")
    for path in c.plugin:
        load_plugin(path)
    sources = {
        "methods": _methods,
        "models": _models,
        "recipes": _recipes,
    }
    rows = sources[c.what]()
    if c.json:
        print(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        numbers = isinstance(rows[0][column], int) and column != "year"
        fold = column in ("paper", "name")
        table.add_column(column.replace("_", " "), justify="right" if numbers else "left", no_wrap=not fold)
    for row in rows:
        table.add_row(*(_cell(column, value) for column, value in row.items()))
    Console().print(table)
    if c.what == "methods":
        print(
            "\nTaps and extra trainable parameters: default settings, resnet32x4 → resnet8x4 on CIFAR-100.\n"
            "A+B adds methods up, A-B wraps A around B (a wrapper alone wraps kd): dkd+reviewkd, lskd-dkd."
        )


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return _short(value)
    return f"{value:,}" if "parameters" in column else str(value)


def _short(taps: list[str]) -> str:
    """`stage1 stage2 stage3` as `stage1-3`, the rest as it is."""
    text = " ".join(taps)
    for suffix in ("", ".preact"):
        stages = [tap for tap in taps if re.fullmatch(rf"stage\d+{re.escape(suffix)}", tap)]
        if len(stages) > 1:
            last = stages[-1].removeprefix("stage")
            text = text.replace(" ".join(stages), f"{stages[0].removesuffix(suffix)}-{last}")
    return text or "–"
