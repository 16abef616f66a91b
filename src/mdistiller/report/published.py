"""Section of the report that has the published run of each row's recipe."""

from mdistiller.errors import MDistillerError
from mdistiller.recipes import get_recipe
from mdistiller.recipes.describe import differences, find_published, status
from mdistiller.report.markup import Section, paragraph, text_table
from mdistiller.report.page_rows import PageRows
from mdistiller.report.runs import RunRecord
from mdistiller.runs.folder import CONFIG
from mdistiller.training.task import load_config


def published(page: PageRows) -> list[Section]:
    """Returns a table of each row's recipe: figure, origin, and the fields that the run changes."""
    rows = []
    for label, runs in page.groups.items():
        recipe = runs[0].config.get("recipe")
        if isinstance(recipe, str) and recipe and (cells := _cells(recipe, runs[0])):
            rows.append([label, *cells])
    if not rows:
        return []
    head = ("run", page.metric.head("published"), "origin", "this run")
    body = text_table(head, rows, "Table of published runs")
    note = paragraph(
        "The published top-1 of each recipe says whether it is of the last epoch or of the best one on the "
        "test set. Compare it only with a run that has the recipe's values and data.",
        "note",
    )
    return [Section("published", "Published runs", body + note, folded=True)]


def _cells(recipe: str, run: RunRecord) -> tuple[str, str, str] | None:
    try:
        runs, config = find_published(recipe).runs, load_config(run.path / CONFIG)
        changes = differences(config, get_recipe(config.recipe))
    except MDistillerError:  # a recipe of a plug-in, or of another version
        return None
    if not runs:
        return None
    origin = "; ".join(dict.fromkeys([runs[0].source, runs[0].figures])).strip("; ")
    return status(runs), origin, "; ".join(changes) or "as the recipe"
