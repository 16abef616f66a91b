"""Command `mdistiller config RECIPE`."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import yaml

from mdistiller.cli.flags import Arg, list_flags
from mdistiller.cli.help import first_sentence, is_everyday
from mdistiller.cli.train import TrainCommand
from mdistiller.recipes import recipe_of
from mdistiller.settings import Settings
from mdistiller.types import Line


class ConfigCommand(TrainCommand):
    """Print the config of a run as YAML: the recipe, the everyday fields, and those that flags change.

    `mdistiller config RECIPE [flags] > FILE.yaml`, and `mdistiller train FILE.yaml` trains it and takes flags
    too. What the file leaves out comes from its recipe. With --json the whole config is JSON, for a file
    FILE.json.
    """

    every: Annotated[bool, Arg(name="all")] = False
    """Print every field."""

    def execute(self) -> None:
        values = self.config.model_dump(mode="json")
        if self.as_json:
            print(json.dumps(values))
            return
        recipe = recipe_of(self.config)
        print("# To train it: mdistiller train FILE.yaml")
        if self.every or recipe is None:
            print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100), end="")
            return
        flags = [flag for flag in list_flags(self) if flag.path[0] == "config"]
        shown = {flag.path[1:] for flag in flags if is_everyday(flag)} | {("recipe",)}
        texts = {flag.path[1:]: first_sentence(flag.text) for flag in flags}
        print("# The recipe has the values of all other fields; --all prints them.")
        print(*_lines(_pick(self.config, recipe, values, shown), texts), sep="\n")


def _pick(
    config: Settings, recipe: object, values: Line, shown: set[tuple[str, ...]], path: tuple[str, ...] = ()
) -> Line:
    """Returns the values of fields that are shown or differ from the recipe's."""
    found: Line = {}
    for name, value in config:
        place, old = (*path, name), getattr(recipe, name, None)
        if isinstance(value, Settings) and isinstance(old, Settings) and not old.is_renamed_by(dict(value)):
            if inner := _pick(value, old, values[name], shown, place):
                found[name] = inner
        elif value != old or place in shown:
            found[name] = values[name]
    return found


def _lines(values: Line, texts: Mapping[tuple[str, ...], str], path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields lines of YAML, each field with its explanation."""
    for name, value in values.items():
        place, indent = (*path, name), "  " * len(path)
        if isinstance(value, dict) and value and place not in texts:
            yield f"{indent}{name}:"
            yield from _lines(value, texts, place)
            continue
        flow = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)
        comment = f"  # {texts[place]}" if place in texts else ""
        yield f"{indent}{name}: {flow.strip()[1:-1]}{comment}"
