"""Command `mdistiller show RECIPE`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from mdistiller.cli.options import CommonFlags, parse_command
from mdistiller.recipes.describe import recipe_lines, show_recipe


@dataclass(frozen=True)
class ShowCommand(CommonFlags):
    """Show a recipe: the published runs with their figures and origin, and the recipe's own values."""

    recipe: tyro.conf.Positional[str]
    """Name of a recipe, such as cifar100.dkd.resnet32x4_resnet8x4."""


def command(args: Sequence[str]) -> None:
    """Runs `mdistiller show`."""
    c = parse_command(ShowCommand, args, prog="mdistiller show")
    if c.json:
        print(json.dumps(show_recipe(c.recipe)))
    else:
        print(*recipe_lines(c.recipe), sep="\n")
