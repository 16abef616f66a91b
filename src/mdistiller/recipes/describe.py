"""Published runs and recipes in words: figures, origin, settings, and changes of a config from its recipe."""

from statistics import fmean
from typing import NamedTuple

from mdistiller.config import RunConfig, with_choices_of
from mdistiller.recipes import BASELINES, get_recipe, recipe_of
from mdistiller.recipes.family import find_family, split_name
from mdistiller.recipes.published import (
    UNPUBLISHED,
    PublishedRun,
    Values,
    find_reproduced,
    run_of,
    teacher_top1,
)
from mdistiller.runs.progress import counted
from mdistiller.settings import flatten
from mdistiller.types import Line


class Found(NamedTuple):
    """Published runs of a recipe on the same data, the first one of which has the recipe's values.

    `values` is the run with the recipe's values, of the pair or of all pairs; None where no file serves.
    `reproduced` are runs in which others repeated them.
    """

    runs: tuple[PublishedRun, ...]
    values: PublishedRun | None
    reproduced: tuple[Values, ...] = ()


def find_published(recipe: str) -> Found:
    """Finds the published runs of a recipe, given by its name."""
    prefix, method, models = split_name(recipe)
    family = find_family(prefix)
    if family is None or not models:
        return Found((), None)
    if method in BASELINES:
        found = teacher_top1(family.published, models) if family.published and family.own_data else None
        if method == "teacher" and found is not None:
            run = run_of(family.published, "none", models)
            figure = {"top1": found[:1], "figures": found[1], "epoch": "last"}
            return Found((run.model_copy(update=figure),), run)
        method, pair = "none", models
    else:
        teacher, student = family.split_open(models)
        pair = family.published_pair(teacher, student)
    runs = family.find_runs(method, pair)
    values = run_of(family.published, method, pair) if family.published and family.schedules else None
    reproduced = (
        find_reproduced(family.published, method, pair) if family.published and family.own_data else ()
    )
    return Found(runs, values, reproduced)


def figure_text(run: PublishedRun) -> str:
    """Returns a run's figure with its epoch, such as `76.32 (best)`; a mean, if there are several."""
    if not run.top1:
        return "no figure" if run.tuned else "no figure, default settings"
    marks: list[str] = [run.epoch if run.epoch != "unstated" else "epoch unstated"]
    marks += [] if run.tuned else ["default settings"]
    marks += ["unverified"] if run.unverified else []
    return f"{fmean(run.top1):.2f} ({', '.join(marks)})"


def status(runs: tuple[PublishedRun, ...]) -> str:
    """Returns the published figure of a recipe, or a text in place of it."""
    if not runs:
        return UNPUBLISHED
    if runs[0].top1:
        return figure_text(runs[0])
    other = next((run for run in runs if run.top1 and run.optimizer == runs[0].optimizer), None)
    if other is not None:
        return f"{figure_text(other)[:-1]}, other settings)"
    return f"{'settings' if runs[0].tuned else 'schedule'}, no figure"


def recipe_status(recipe: str) -> str:
    """Returns the published figure of a recipe by its name, or a text in place of it."""
    return status(find_published(recipe).runs)


def show_recipe(name: str) -> Line:
    """Returns a recipe's published runs with their origin, where there are any, and its own values.

    Raises:
        UnknownNameError: no such family, method or model.
        ConfigError: the name is not of the form FAMILY.METHOD.MODELS.
    """
    config = get_recipe(name, open_teacher=True)
    found = find_published(config.recipe)
    published = [run.model_dump(mode="json", exclude_defaults=True) for run in found.runs]
    shown = {
        "recipe": config.recipe,
        "status": status(found.runs),
        "published": published,
        "reproduced": [run.model_dump(mode="json", exclude_defaults=True) for run in found.reproduced],
        "default_source": _source_of(found),
        "default": _values_of(config),
    }
    return {name: value for name, value in shown.items() if value}


def _source_of(found: Found) -> str:
    if found.runs:
        run = found.runs[0]
        return run.source if run.tuned else f"{run.source}; the method's fields are {UNPUBLISHED}"
    if found.values is not None and found.values.source:
        return f"{UNPUBLISHED}; values of other pairs or data, from {found.values.source}"
    return UNPUBLISHED


def describe_source(config: RunConfig) -> str | None:
    """Returns the origin of a config's values, and those that differ from its recipe's; None without one."""
    if (recipe := recipe_of(config)) is None:
        return None
    family = find_family(split_name(config.recipe)[0])
    text = (family.settings if family else "") or _source_of(find_published(config.recipe))
    changed = [line for line in differences(config, recipe) if line.startswith("method.")]
    return f"{text}; changed: {', '.join(changed)}" if changed else text


def _values_of(config: RunConfig) -> Line:
    """Returns a config's values under the names of a published run."""
    optim, in_epochs = config.optim, config.max_steps is None
    drops = optim.schedule == "step"
    values = {
        **{"optimizer": optim.name, "lr": optim.lr, "momentum": optim.momentum},
        **{"nesterov": optim.nesterov or None, "weight_decay": optim.weight_decay},
        **{"batch_size": config.batch_size, "epochs": config.epochs if in_epochs else None},
        **{"steps": config.max_steps, "drops": list(drops_of(config)) if drops else None},
        **{"schedule": None if drops else optim.schedule, "clip_norm": optim.clip_norm},
        "deltas": list(optim.deltas) if optim.name == "deepkd" else None,
        "method": config.method.model_dump(mode="json"),
    }
    return {name: value for name, value in values.items() if value is not None}


def drops_of(config: RunConfig) -> tuple[float, ...]:
    """Returns the epochs (steps, if `max_steps` ends the run) after which the rate drops."""
    length = config.epochs if config.max_steps is None else config.max_steps
    return tuple(round(milestone * length, 2) for milestone in config.optim.milestones)


def method_lines(values: Line, prefix: str = "method.") -> list[str]:
    """Lists the fields of a method as text, by dotted name, without the parts' task_weight of 0."""
    named = {f"{prefix}{name}": value for name, value in flatten(values).items()}
    hidden = {name for name, value in named.items() if name.endswith(".task_weight") and not value}
    hidden |= {name for name, value in named.items() if name.split(".")[-1] == "name" or value in ((), None)}
    return [f"{name} {_text(value)}" for name, value in named.items() if name not in hidden]


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def describe_length(config: RunConfig) -> str | None:
    """Returns a line with the learning rate's drops, for a run longer or shorter than its recipe.

    None: the run has its recipe's length, or no recipe.
    """
    recipe = recipe_of(config)
    if recipe is None or (config.epochs, config.max_steps) == (recipe.epochs, recipe.max_steps):
        return None
    own, usual = (
        counted(c.epochs, "epoch") if c.max_steps is None else counted(c.max_steps, "step")
        for c in (config, recipe)
    )
    text = f"{own} instead of the recipe's {usual}"
    if config.optim.schedule != "step":
        return f"{text}, with the {config.optim.schedule} schedule scaled to fit"
    drops, usual_drops = (", ".join(f"{drop:g}" for drop in drops_of(c)) for c in (config, recipe))
    kept = ", as in the recipe" if drops == usual_drops else f", not after {usual_drops}"
    return f"{text}; the learning rate drops after {drops}{kept}"


def differences(config: RunConfig, recipe: RunConfig) -> list[str]:
    """Lists fields of optimizer, length, batch and method that differ from the recipe's, with both values."""
    mine, usual = (flatten(_values_of(c)) for c in (config, with_choices_of(recipe, config)))
    return [
        f"{name} {_text(mine.get(name))} for {_text(usual.get(name))}"
        for name in dict.fromkeys([*mine, *usual])
        if mine.get(name) != usual.get(name)
    ]
