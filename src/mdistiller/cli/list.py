"""Command `mdistiller list WHAT`."""

import json
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.errors import UnknownNameError
from mdistiller.recipes import list_recipes
from mdistiller.recipes.describe import recipe_status
from mdistiller.training.task import DEFAULT_TASK, get_task
from mdistiller.types import Line


class ListCommand(Command):
    """List methods, models or recipes."""

    what: Positional[Literal["methods", "models", "recipes"]]
    """What to list."""
    pattern: Positional[str | None] = None
    """Only names that contain this text, ignoring case."""
    task: str = DEFAULT_TASK
    """Task whose methods and models are listed."""

    def execute(self) -> None:
        task = get_task(self.task)
        if self.what == "recipes":
            rows = {name: {"name": name} for name in list_recipes()}
        else:
            listed = task.list_models() if self.what == "models" else task.list_methods()
            rows = {row["name"]: row for row in listed}
        names = [name for name in rows if self.pattern is None or self.pattern.lower() in name.lower()]
        if not names:
            assert self.pattern is not None
            note = " ".join(task.notes.get("models", "").split()) if self.what == "models" else ""
            raise UnknownNameError(self.what.removesuffix("s"), self.pattern, rows, note)
        found = [rows[name] for name in names]
        families = Counter(name.partition(".")[0] for name in names)
        if self.what == "recipes" and self.pattern is None and not self.as_json and sys.stdout.isatty():
            print(*_table([{"family": name, "recipes": n} for name, n in families.items()]), sep="\n")
            print("\nRecipes and their published accuracies: mdistiller list recipes cifar100.dkd")
            return
        if self.what == "recipes":
            found = [{"name": name, "published, %": recipe_status(name)} for name in names]
        if self.as_json:
            print(json.dumps(found))
            return
        lines = _table(found)
        columns = shutil.get_terminal_size().columns
        if "when" in found[0] and sys.stdout.isatty() and max(map(len, lines)) > columns:
            # A terminal gets what helps to choose, with the last column wrapped.
            kept = ("name", "reads", "compares", "detectors", "year", "when")
            lines = _table([{key: row[key] for key in kept if key in row} for row in found])
            indent = " " * lines[0].index("when")
            wrap = textwrap.TextWrapper(columns, subsequent_indent=indent, break_on_hyphens=False)
            lines = [part for line in lines for part in wrap.wrap(line)]
        print(*lines, sep="\n")
        if self.what in task.notes:
            print(f"\n{task.notes[self.what]}")


def _table(rows: Sequence[Line]) -> list[str]:
    """Returns lines of aligned columns, each as wide as its widest cell."""
    columns = []
    for key, first in rows[0].items():
        cells = [key.removeprefix("extra_").replace("_", " "), *(_cell(key, row[key]) for row in rows)]
        width = max(map(len, cells))
        numbers = isinstance(first, int) and key != "year"
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _cell(column: str, value: object) -> str:
    if value is None:
        return "–"
    if not isinstance(value, list):
        return f"{value:,}" if "parameters" in column else str(value)
    text = " ".join(value)
    for suffix in ("", ".preact"):  # `stage1 stage2 stage3` becomes `stage1-3`
        stages = [tap for tap in value if re.fullmatch(rf"stage\d+{re.escape(suffix)}", tap)]
        if len(stages) > 1:
            last = stages[-1].removeprefix("stage")
            text = text.replace(" ".join(stages), f"{stages[0].removesuffix(suffix)}-{last}")
    return text or "–"
