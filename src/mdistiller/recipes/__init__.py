"""Recipes: configs of known settings, found by dotted names.

`FAMILY.METHOD.TEACHER_STUDENT` distills a pair with any method (`A+B` adds methods up, `A-B` wraps A around
B); the teacher `self` is the student's own moving average. `FAMILY.teacher.MODEL` and `FAMILY.student.MODEL`
train one model on the labels, `folder.finetune.MODEL` a pretrained one. Every field can be changed
afterwards.
"""

from mdistiller.config import SELF, RunConfig
from mdistiller.errors import ConfigError, MDistillerError, UnknownNameError
from mdistiller.methods import method_config
from mdistiller.methods.compose import needs_teacher
from mdistiller.models import ModelConfig
from mdistiller.models.external import is_pretrained
from mdistiller.recipes.family import Family, all_families, find_family, register_family, split_name
from mdistiller.recipes.published import all_runs

__all__ = [
    "BASELINES",
    "Family",
    "get_recipe",
    "list_recipes",
    "recipe_of",
    "register_family",
    "set_method",
    "set_teacher",
    "starts_pretrained",
]

BASELINES = ("teacher", "student", "finetune")


def list_recipes() -> list[str]:
    """Lists the recipe names of the known pairs and of all published runs.

    Any other two models make a pair as well.
    """
    names: list[str] = []
    for name, family in all_families().items():
        known = [(method, pair) for method in family.methods() for pair in family.pairs]
        runs = all_runs(family.published) if family.published and family.own_data else ()
        known += [(run.method, run.pair) for run in runs if run.method != "none"]
        names += [f"{name}.{method}.{pair}" for method, pair in dict.fromkeys(known)]
        teachers, students = family.models()
        names += [f"{name}.teacher.{model}" for model in teachers]
        names += [f"{name}.student.{model}" for model in students]
        if family.finetune is not None:
            names += [f"{name}.finetune.{model}" for model in dict.fromkeys([*teachers, *students])]
    return names


def get_recipe(
    name: str,
    method: str | None = None,
    *,
    teacher: ModelConfig | str | None = None,
    pretrained: bool = False,
    open_teacher: bool = False,
) -> RunConfig:
    """Returns the config of a recipe.

    Args:
        name: name of the recipe.
        method: another method than the recipe's.
        teacher: another teacher than the recipe's: a config, or a model's name; the recipe may then be
            `FAMILY.METHOD.STUDENT`.
        pretrained: whether the student starts from pretrained weights; the values are then those of
            `FAMILY.finetune.MODEL` where the family has it.
        open_teacher: accept `FAMILY.METHOD.STUDENT` without a teacher, to show its settings.

    Raises:
        UnknownNameError: no such family, method or model; the message has the nearest names.
        ConfigError: the name is not of the form FAMILY.METHOD.MODELS.
    """
    if method is not None:
        name = _rename(name, method)
    prefix, chosen, models = split_name(name)
    family = find_family(prefix)
    if family is None:
        raise UnknownNameError("recipe", name, list_recipes(), "All: mdistiller list recipes --json")
    baseline = family.baseline
    if chosen == "finetune" and family.finetune is None:
        have = ", ".join(f"{key}.finetune.MODEL" for key, other in all_families().items() if other.finetune)
        raise ConfigError(f"recipe {name!r}: {prefix} has no recipe for fine-tuning; allowed: {have}")
    if family.finetune is not None and (pretrained or chosen == "finetune"):
        baseline = family.finetune
    if not chosen or not models:
        raise ConfigError(
            f"recipe {name!r}: a recipe is {prefix}.METHOD.TEACHER_STUDENT, {prefix}.teacher.MODEL "
            f"or {prefix}.student.MODEL; such as {prefix}.dkd.{family.pairs[0]}"
        )
    if chosen in BASELINES and teacher is not None:
        raise ConfigError(
            f"teacher: recipe {name!r} trains on labels alone; to distill, use {prefix}.METHOD.STUDENT"
        )
    if chosen in BASELINES:
        model = family.find_model(models)
        config = family.schedule(baseline(model), "none", model)
        if baseline is family.finetune:
            name = f"{prefix}.finetune.{models}"
        return config.model_copy(update={"recipe": name})
    if teacher is None:
        first, student = family.split_open(models) if open_teacher else family.split_pair(models)
        given = _teacher_of(family, first) if first else None
    else:
        student = family.split_open(models)[1]
        given = _teacher_of(family, teacher)
        first = given.name
        name = f"{prefix}.{chosen}.{family.join_pair(first, student)}"
    config = baseline(student)
    chosen_config = family.method_config(chosen)
    if not needs_teacher(chosen_config.method_name, config.method_class):
        raise ConfigError(f"recipe {name!r}: method {chosen!r} takes no teacher; use {prefix}.student.MODEL")
    update = {
        "recipe": name,
        "teacher": given,
        "method": family.tune(chosen_config, first, student),
        "ema": 0.999 if first == SELF else config.ema,
    }
    config = family.schedule(config, chosen, family.published_pair(first, student))
    return config.model_copy(update=update)


def _teacher_of(family: Family, teacher: ModelConfig | str) -> ModelConfig:
    if isinstance(teacher, ModelConfig):
        return teacher
    if teacher == SELF:
        return ModelConfig(name=SELF)
    return family.teacher_config(family.find_teacher(teacher))


def starts_pretrained(student: ModelConfig) -> bool:
    """Whether a student starts from weights, so that a recipe of its family fine-tunes it."""
    return student.checkpoint is not None or is_pretrained(student.options)


def recipe_of(config: RunConfig) -> RunConfig | None:
    """Returns the config of the recipe that a config came from; None without one."""
    if not config.recipe:
        return None
    try:
        return get_recipe(config.recipe, pretrained=starts_pretrained(config.student))
    except MDistillerError:  # of a plug-in, or of another version
        return None


def set_teacher(config: RunConfig, teacher: ModelConfig | str) -> RunConfig:
    """Returns a config with another teacher, and the recipe renamed.

    Raises:
        ConfigError: the config has no teacher so far, as its method takes none.
        UnknownNameError: no such model.
    """
    if config.teacher is None:
        raise ConfigError(
            "teacher: the run has none, so its method takes none; choose one with --method NAME"
        )
    prefix, method, models = split_name(config.recipe)
    family = find_family(prefix)
    if family is None:
        given = ModelConfig(name=teacher) if isinstance(teacher, str) else teacher
        return config.replace(teacher=given)
    given = _teacher_of(family, teacher)
    pair = family.join_pair(given.name, family.split_open(models)[1])
    return config.replace(teacher=given, recipe=f"{prefix}.{method}.{pair}")


def set_method(config: RunConfig, name: str) -> RunConfig:
    """Returns a config with another method, with its settings in the recipe, and the recipe renamed."""
    recipe = _rename(config.recipe, name) if config.recipe else ""
    method = method_config(name, config.method_class)
    known = find_family(recipe.partition(".")[0]) is not None
    if known and needs_teacher(name, config.method_class):
        method = get_recipe(recipe).method
    return config.model_copy(update={"method": method, "recipe": recipe})


def _rename(recipe: str, method: str) -> str:
    """Returns a recipe's name with another method: `cifar100.kd.PAIR` and `dkd` give `cifar100.dkd.PAIR`.

    Raises:
        UnknownNameError: no such method.
        ConfigError: the recipe trains one model, so there is no pair to distill.
    """
    prefix, old, models = split_name(recipe)
    family = find_family(prefix)
    _ = method_config(method) if family is None else family.method_config(method)
    if old in BASELINES:
        raise ConfigError(
            f"method: recipe {recipe!r} trains one model on the labels; "
            f"to distill, use {prefix}.{method}.TEACHER_STUDENT"
        )
    return f"{prefix}.{method}.{models}" if models else recipe
