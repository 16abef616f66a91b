"""Families of recipes: one data set, its models and the published settings."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import ClassVar

from mdistiller.config import SELF, RunConfig
from mdistiller.errors import UnknownNameError, nearest_names
from mdistiller.methods import MethodConfig, get_method, list_methods
from mdistiller.methods.changes import takes_auto
from mdistiller.models import ModelConfig, list_models
from mdistiller.models.external import like_external
from mdistiller.models.registry import GIVEN
from mdistiller.recipes.apply import train_as, tune
from mdistiller.recipes.published import PublishedRun, find_runs, run_of

PAIR = "pair of models TEACHER_STUDENT"
HINT = "All models: mdistiller list models"


@dataclass(frozen=True)
class Family:
    """Recipes over one data set; this class serves classification, children other tasks.

    baseline: the config that trains one model on the labels, before `schedule`.
    pairs: the pairs TEACHER_STUDENT that are listed.
    change: changes the hyperparameters of a method, and of its parts, for a pair. None: to those published.
    aliases: short names of models.
    teacher_config: the teacher's config by its name, with weights where there are published ones.
    settings: the source of the settings of `change`, for the line at the start of a run; empty: `published`.
    published: the file of published runs that serves the family's pairs; empty: none does.
    schedules: whether pairs have the optimizer and length of their published runs.
    own_data: whether the published runs are of the family's data; False: only their settings serve.
    finetune: the config that trains one pretrained model on the labels, where it differs from the baseline.
    method: the method of `distill` where none is given.
    photographs: an unknown model's nearest names are those of torchvision and timm, not the CIFAR models.
    """

    Config: ClassVar[type[RunConfig]] = RunConfig
    """The task's config, which knows the methods."""

    about: ClassVar[str] = ""
    """Form of pairs and models, where they are more than the names of models."""

    labeled: ClassVar[bool] = True
    """Whether the data have labels."""

    baseline: Callable[[str], RunConfig]
    pairs: tuple[str, ...]
    change: Callable[[MethodConfig, str, str], MethodConfig] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    teacher_config: Callable[[str], ModelConfig] = lambda name: ModelConfig(name=name)
    finetune: Callable[[str], RunConfig] | None = None
    photographs: bool = False
    method: str = "dkd"
    settings: str = ""
    published: str = ""
    schedules: bool = True
    own_data: bool = True

    def models(self) -> tuple[list[str], list[str]]:
        """Lists the models of the recipes `FAMILY.teacher.MODEL` and `FAMILY.student.MODEL`."""
        pairs = [split_pair(pair, self.aliases) for pair in self.pairs]
        teachers, students = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
        return teachers, students

    def methods(self) -> list[str]:
        """Lists the methods that distill a pair."""
        return [n for n in list_methods() if get_method(n).needs.teacher and self.Config.takes(n)]

    def find_model(self, name: str) -> str:
        """Returns the full name of a model.

        Raises:
            UnknownNameError: no such model.
        """
        if not _is_model(name, self.aliases):
            known = [*self.aliases, *list_models()]
            raise UnknownNameError("model", name, known, nearest=self._nearest(name))
        return self.aliases.get(name, name)

    def find_teacher(self, name: str) -> str:
        """Returns the full name of a teacher; errors as `find_model`."""
        return self.find_model(name)

    def split_pair(self, pair: str) -> tuple[str, str]:
        """Splits a pair of a recipe name into the full names of teacher and student."""
        try:
            teacher, student = split_pair(pair, self.aliases)
        except UnknownNameError as error:
            near = self._pairs_like(pair) if self.photographs else []
            if self.photographs and not near and _is_model(pair, self.aliases):
                near = [f"TEACHER_{pair}"]
            if near or error.name == pair:
                families = (self,) if self.photographs else all_families().values()
                known = [pair for family in families for pair in family.pairs]
                raise UnknownNameError(PAIR, pair, known, HINT, nearest=near) from None
            if not self.photographs:
                raise
            near = self._nearest(error.name)
            raise UnknownNameError(error.what, error.name, (), HINT, nearest=near) from None
        return self.aliases.get(teacher, teacher), self.aliases.get(student, student)

    def split_open(self, models: str) -> tuple[str, str]:
        """Splits a pair like `split_pair`, or returns an empty teacher and the student that stands alone."""
        try:
            return self.split_pair(models)
        except UnknownNameError as error:
            try:
                return "", self.find_model(models)
            except UnknownNameError as alone:
                raise (error if error.nearest else alone) from None

    def join_pair(self, teacher: str, student: str) -> str:
        """Returns the pair of two full names, as a recipe's name has it."""
        return f"{teacher}_{student}"

    def published_pair(self, teacher: str, student: str) -> str:
        """Returns the pair of two full names as the file of published runs has it."""
        short = {name: key for key, name in self.aliases.items()}
        return self.join_pair(short.get(teacher, teacher), short.get(student, student))

    def find_runs(self, method: str, pair: str) -> tuple[PublishedRun, ...]:
        """Finds the published runs on the family's data; recipes take their values from the first one.

        Args:
            method: name of a method, `none` for a student alone.
            pair: the pair as the file has it, or a student's name.
        """
        return find_runs(self.published, method, pair) if self.published and self.own_data else ()

    def tune(self, method: MethodConfig, teacher: str, student: str) -> MethodConfig:
        """Returns a method with the hyperparameters of a pair."""
        if self.change is not None:
            return self.change(method, teacher, student)
        if not self.published:
            return method
        return tune(self.published, method, self.published_pair(teacher, student))

    def schedule(self, config: RunConfig, method: str, pair: str) -> RunConfig:
        """Returns a config with the optimizer and length of a published run; arguments as in `find_runs`."""
        if not self.published or not self.schedules:
            return config
        return train_as(config, run_of(self.published, method, pair))

    def _nearest(self, name: str) -> list[str]:
        """Returns the models that are suggested for an unknown one; [] leaves it to its error."""
        return nearest_names(name, self.aliases)[:1] + like_external(name) if self.photographs else []

    def _pairs_like(self, pair: str) -> list[str]:
        """Returns the pairs with a library for each name without one, such as those of resnet50_resnet18."""
        parts = pair.split("_")
        for i in range(1, len(parts)):
            halves = ["_".join(parts[:i]), "_".join(parts[i:])]
            teachers, students = (
                [half] if _is_model(half, self.aliases) else like_external(half, exact=True)
                for half in halves
            )
            if teachers and students:
                # Of the same library where both have them.
                count = max(len(teachers), len(students))
                return ["_".join(both) for both in zip(teachers * count, students * count, strict=False)][
                    :count
                ]
        return []

    def method_config(self, name: str) -> MethodConfig:
        """Returns the default config of a method."""
        return self.Config.method_named(name)


_FAMILIES: dict[str, Family] = {}


def register_family(name: str, family: Family) -> None:
    """Makes the recipes NAME.METHOD.MODELS known, of a task in a plug-in too."""
    _FAMILIES[name] = family


def _built_in() -> dict[str, str]:
    """Returns the task of each built-in family, without importing the task."""
    found: dict[str, str] = import_module("mdistiller.tasks").FAMILIES
    return found


def list_families() -> list[str]:
    """Lists the families by name, those of plug-ins last."""
    return list(dict.fromkeys([*_built_in(), *_FAMILIES]))


def find_family(name: str) -> Family | None:
    """Returns a family by its name, None if there is no such one; its task is imported first."""
    if name not in _FAMILIES and (task := _built_in().get(name)) is not None:
        import_module(f"mdistiller.tasks.{task}.recipes")
    return _FAMILIES.get(name)


def all_families() -> dict[str, Family]:
    """Returns all families by name; their tasks are imported."""
    return {name: family for name in list_families() if (family := find_family(name)) is not None}


def split_name(recipe: str) -> tuple[str, str, str]:
    """Splits the name of a recipe into family, method and models; what is missing is empty."""
    family, method, models = (*recipe.split(".", 2), "", "")[:3]
    return family, method, models


def measure(method: MethodConfig, teacher: str) -> MethodConfig:
    """Returns a method's config with the weight `auto` where it may be, without its parts.

    Against the student's own average no weight can be measured before the first step.
    """
    return method.replace(weight="auto") if takes_auto(method) and teacher != SELF else method


def split_pair(pair: str, aliases: Collection[str] = ()) -> tuple[str, str]:
    """Splits `wrn_40_2_wrn_16_2` at the first underscore with a known model on either side.

    Raises:
        UnknownNameError: no underscore separates two models.
    """
    parts = pair.split("_")
    halves = [("_".join(parts[:i]), "_".join(parts[i:])) for i in range(1, len(parts))]
    known = [(_is_model(t, aliases) or t == SELF, _is_model(s, aliases)) for t, s in halves]
    if (True, True) in known:
        return halves[known.index((True, True))]
    # If one half is a model, the other half is the unknown name.
    for which, role, half in (((False, True), "teacher", 0), ((True, False), "student", 1)):
        if known.count(which) == 1:
            name = halves[known.index(which)][half]
            raise UnknownNameError(role, name, [*aliases, *list_models()], HINT)
    raise UnknownNameError(PAIR, pair, (), HINT)


def _is_model(name: str, aliases: Collection[str]) -> bool:
    return name in aliases or name in list_models() or name.startswith(("timm/", "torchvision/", GIVEN))
