"""Command `mdistiller list WHAT`."""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mdistiller.analysis.methods import describe_method
from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.errors import UnknownNameError
from mdistiller.methods import list_methods
from mdistiller.models import create_model, list_models
from mdistiller.recipes import list_recipes
from mdistiller.recipes.describe import recipe_status
from mdistiller.training.task import DEFAULT_TASK, get_task


@dataclass(frozen=True)
class ListCommand(CommonFlags):
    """List methods, models or recipes with their properties."""

    what: tyro.conf.Positional[Literal["methods", "models", "recipes"]]
    """Kind of names to list."""
    pattern: tyro.conf.Positional[str | None] = None
    """List only names that contain this text, in lower or upper case."""
    task: str = DEFAULT_TASK
    """Task whose methods and models are listed: classification, or for detectors detection."""


Row = dict[str, Any]
"""Properties by column; `name` is the first."""


def _methods(names: Sequence[str]) -> list[Row]:
    return [describe_method(name) for name in names]


def _models(names: Sequence[str]) -> list[Row]:
    return [{"name": name, "parameters": _count_parameters(name)} for name in names]


class _WithoutDraws(TorchFunctionMode):
    """Leaves out the random draws of weights, which take most of a model's construction."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _count_parameters(name: str) -> int:
    with _WithoutDraws():
        return sum(p.numel() for p in create_model(name, 100).parameters())


# Functions for all names, and for the properties of some.
_SOURCES: dict[str, tuple[Callable[[], list[str]], Callable[[Sequence[str]], list[Row]]]] = {
    "methods": (list_methods, _methods),
    "models": (list_models, _models),
    "recipes": (
        list_recipes,
        lambda names: [{"name": name, "published, %": recipe_status(name)} for name in names],
    ),
}


def _source(c: ListCommand) -> tuple[Callable[[], list[str]], Callable[[Sequence[str]], list[Row]]]:
    if c.task == DEFAULT_TASK or c.what == "recipes":
        return _SOURCES[c.what]
    task = get_task(c.task)
    rows = {row["name"]: row for row in (task.list_models() if c.what == "models" else task.list_methods())}
    return lambda: list(rows), lambda names: [rows[name] for name in names]


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller list`."""
    c = parse_command(ListCommand, args, prog="mdistiller list")
    list_names, properties = _source(c)
    known = list_names()
    names = [name for name in known if c.pattern is None or c.pattern.lower() in name.lower()]
    if not names:
        assert c.pattern is not None
        raise UnknownNameError(c.what.removesuffix("s"), c.pattern, known)
    rows = properties(names)
    if c.json:
        print(json.dumps(rows))
        return
    lines = _table(rows)
    papers: list[str] = []
    if c.what == "methods" and sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns
        if max(map(len, lines)) > columns:
            # A wide last column would wrap into the others, so the papers get a list of their own.
            wrap = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
            wrap.subsequent_indent = " " * (2 + max(map(len, names)))
            for line in _table([{"name": row["name"], "paper": row["paper"]} for row in rows]):
                papers += wrap.wrap(line)
            lines = _table([{key: row[key] for key in row if key != "paper"} for row in rows])
    print(*lines, *([""] if papers else []), *papers, sep="\n")
    if c.what == "methods" and c.task == DEFAULT_TASK:
        print(
            "\nTaps, and number of parameters that train besides the student's, with default\n"
            "settings for resnet32x4 → resnet8x4 on CIFAR-100. A+B adds methods, A-B wraps A\n"
            "around B (a single wrapper wraps kd): dkd+reviewkd, lskd-dkd."
        )


def _table(rows: Sequence[Row]) -> list[str]:
    """Returns lines of aligned columns, each as wide as its widest cell."""
    columns = []
    for key, first in rows[0].items():
        cells = [key.removeprefix("extra_").replace("_", " "), *(_cell(key, row[key]) for row in rows)]
        width = max(map(len, cells))
        numbers = isinstance(first, int) and key != "year"
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _cell(column: str, value: Any) -> str:
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
