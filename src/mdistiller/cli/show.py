"""Command `mdistiller show RECIPE`."""

import json

from mdistiller.cli.flags import Positional
from mdistiller.cli.options import Command
from mdistiller.recipes.describe import recipe_lines, show_recipe


class ShowCommand(Command):
    """Show a recipe: the published runs with their figures and origin, and the recipe's own values."""

    recipe: Positional[str]
    """Name of a recipe, such as cifar100.dkd.resnet32x4_resnet8x4."""

    def execute(self) -> None:
        if self.as_json:
            print(json.dumps(show_recipe(self.recipe)))
        else:
            print(*recipe_lines(self.recipe), sep="\n")
