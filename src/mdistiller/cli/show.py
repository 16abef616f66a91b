"""Command `mdistiller show RECIPE`."""

import json

import yaml

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.recipes.describe import show_recipe


class ShowCommand(Command):
    """Show a recipe as YAML: the published runs with figures and origin, and the recipe's own values."""

    recipe: Positional[str]
    """Name of a recipe, such as cifar100.dkd.resnet32x4_resnet8x4."""

    def execute(self) -> None:
        shown = show_recipe(self.recipe)
        if self.as_json:
            print(json.dumps(shown))
        else:
            print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100), end="")
