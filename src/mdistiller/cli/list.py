"""`mdistiller list WHAT`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from mdistiller.methods import get_method, list_methods, load_plugin
from mdistiller.models import create_model, list_models
from mdistiller.recipes import list_recipes


@dataclass(frozen=True)
class ListCommand:
    """Names and facts of what is there."""

    what: tyro.conf.Positional[Literal["methods", "models", "recipes"]]
    """What to list."""
    plugin: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose @register calls add methods or models (code: it is run). May be given again."""
    json: bool = False
    """Print as JSON on stdout."""


def _methods() -> list[dict[str, Any]]:
    found = [get_method(name) for name in list_methods()]
    return [{"name": m.name, "kind": m.kind, "year": m.year, "paper": m.paper} for m in found]


def _models() -> list[dict[str, Any]]:
    rows = []
    for name in list_models():
        model = create_model(name)
        rows.append({"name": name, "parameters": sum(p.numel() for p in model.parameters())})
    return rows


def command(args: Sequence[str]) -> None:
    """Run `mdistiller list`."""
    c = tyro.cli(ListCommand, args=args, prog="mdistiller list")
    for path in c.plugin:
        load_plugin(path)
    sources = {
        "methods": _methods,
        "models": _models,
        "recipes": lambda: [{"name": r} for r in list_recipes()],
    }
    rows = sources[c.what]()
    if c.json:
        print(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = [f"{v:,}" if column == "parameters" else v for column, v in row.items()]
        table.add_row(*("–" if v is None else str(v) for v in cells))
    Console().print(table)
