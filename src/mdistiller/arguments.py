"""Configs from the arguments of `distill`: models and data by name, in files, or as objects."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from mdistiller.config import SELF, RunConfig
from mdistiller.data import DataConfig, list_datasets
from mdistiller.data.given import read_given
from mdistiller.data.registry import Reader, given_data
from mdistiller.deploy.hub import local_path
from mdistiller.deploy.student import GivenTeacher, find_teacher
from mdistiller.distiller import AnyMethod
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods import Method, MethodConfig
from mdistiller.models import ModelConfig
from mdistiller.models.own_input import find_input
from mdistiller.models.registry import GIVEN, given_models
from mdistiller.recipes import get_recipe, starts_pretrained
from mdistiller.recipes.family import list_families
from mdistiller.settings import validate
from mdistiller.teacher import hash_weights
from mdistiller.types import Line


@dataclass(frozen=True)
class Objects:
    """Models and data of a run that are no names, by the names that its config has for them."""

    models: dict[str, nn.Module] = field(default_factory=dict)
    data: dict[str, Reader] = field(default_factory=dict)

    @contextmanager
    def known(self) -> Iterator[None]:
        """Context in which the names stand for the objects."""
        with ExitStack() as stack:
            stack.enter_context(given_models(self.models))
            for name, reader in self.data.items():
                stack.enter_context(given_data(name, reader))
            yield


def config_for(
    family: str,
    student: GivenTeacher,
    teacher: GivenTeacher | None,
    method: AnyMethod,
    pretrained: bool | None,
) -> RunConfig:
    """Returns the recipe's config for two models and a method."""
    fields = dict(method) if isinstance(method, Mapping | MethodConfig) else {}
    name = method if isinstance(method, str) else getattr(method, "method_name", fields.get("name"))
    if not isinstance(name, str):
        got = "a built method" if isinstance(method, Method) else "fields without a name"
        raise ConfigError(f"method: got {got}; allowed: a method's name, its config, or fields with `name`")
    own = student.model if isinstance(student.model, ModelConfig) else ModelConfig(name=student.model)
    if pretrained is None:
        pretrained = starts_pretrained(own)
    if (teacher is None) != (name == "none"):
        raise ConfigError(
            f"teacher: got {'None' if teacher is None else 'one'} with method {name!r}; allowed: a teacher "
            "with a method, or None with 'none', the student alone"
        )
    if teacher is None:
        config = get_recipe(f"{family}.student.{own.name}", pretrained=pretrained)
    else:
        config = get_recipe(f"{family}.{name}.{own.name}", teacher=teacher.model, pretrained=pretrained)
    own = own.replace(name=config.student.name)  # aliases are full names there
    changes = {} if isinstance(method, str) else {"method": method}
    return config.replace(student=own, **changes)


def find_model(given: object, role: str, objects: Objects, images: object = None) -> GivenTeacher:
    """Finds a model, and enters a module among the objects."""
    fields = {} if images is None else find_input(images, f"{role}_input", None)._asdict()
    if isinstance(given, nn.Module):
        name = name_of(given, with_weights=role == "teacher")
        objects.models[name] = given
        return GivenTeacher(ModelConfig(name=name, **fields))
    if isinstance(given, Mapping | ModelConfig):
        found = GivenTeacher(validate(ModelConfig, given, role))
    elif isinstance(given, Path) and not given.exists():
        raise ConfigError(f"{role}: {given} is no run folder or student's file")
    elif isinstance(given, str | Path):
        found = find_teacher(local_path(given) if isinstance(given, str) else given)
    else:
        raise ConfigError(
            f"{role}: got a {type(given).__name__}; allowed: a module, a model's name, a run folder, or "
            "fields such as {'name': …, 'checkpoint': …}"
        )
    if not fields or found.model == SELF:
        return found
    model = found.model if isinstance(found.model, ModelConfig) else ModelConfig(name=found.model)
    return GivenTeacher(model.replace(**fields), found.data)


def find_data(given: object, *, labeled: bool = True) -> tuple[str, Line, dict[str, Reader]]:
    """Returns the family of recipes for data, fields of their config, and the reader of objects by name.

    Without labels, a `Dataset` alone serves, of which a tenth is held out.
    """
    fields = given
    if isinstance(given, DataConfig):
        fields = {"kind": given.kind, **given.model_dump(exclude_unset=True)}
    if isinstance(given, Path) or (isinstance(given, str) and given not in list_datasets()):
        if not os.path.exists(given):
            raise UnknownNameError("data set or folder", str(given), list_datasets())
        fields = {"kind": "folder", "root": given}
    elif isinstance(given, str):
        fields = {"kind": given}
    elif isinstance(given, tuple | list) and len(given) == 2 and not hasattr(given[0], "dtype"):
        fields = dict(zip(("train", "test"), given, strict=True))
    elif not labeled and hasattr(given, "__getitem__") and not isinstance(given, Mapping | Tensor):
        fields = {"train": given}
    elif not isinstance(fields, Mapping):
        raise ConfigError(
            f"data: got a {type(given).__name__}, without a test set; allowed: (train, test), "
            "{'train': …, 'val_fraction': 0.1}, a folder, or a data set's name"
        )
    fields = dict(fields)
    if "train" in fields and "test" not in fields and "validation" in fields:  # a DatasetDict
        fields["test"] = fields.pop("validation")
    if "train" not in fields:
        kind = fields.setdefault("kind", "folder")
        return kind if kind in list_families() else "folder", fields, {}
    train, test, classes = (fields.pop(name, None) for name in ("train", "test", "classes"))
    if test is None and not labeled:
        fields.setdefault("val_fraction", 0.1)
    if test is None and fields.get("val_fraction") is None:
        raise ConfigError("data: no test set; give (train, test), or {'train': …, 'val_fraction': 0.1}")
    kind, reader = read_given(train, test, classes, len(fields.get("mean") or "RGB"))
    return "folder", fields | {"kind": kind}, {kind: reader}


def name_of(module: nn.Module, *, with_weights: bool) -> str:
    """Returns the name of a module in a config: its class, and for a teacher a hash of its weights."""
    name = GIVEN + type(module).__name__.replace("_", "")
    return f"{name}-{hash_weights(module)[:8]}" if with_weights else name
