"""Configs in files, JSON or YAML."""

import json
from pathlib import Path
from typing import TypeVar

from mdistiller.config import RunConfig
from mdistiller.errors import ConfigError
from mdistiller.settings import validate
from mdistiller.types import Line

YAML = (".yaml", ".yml")
"""Suffixes of configs in YAML; files of any other suffix are JSON."""

Config = TypeVar("Config", bound=RunConfig)


def read_config(kind: type[Config], path: Path) -> Config:
    """Reads a `config.json` of one task, or a file of the same form.

    Raises:
        ConfigError: the file is missing, is no JSON, is of another task, or has a field that is unknown or
            wrong.
    """
    values = read_values(path)
    task = kind.model_fields["task"].default
    if values.get("task", task) != task:
        raise ConfigError(f"{path} is the config of a {values['task']!r} run; expected {task!r}")
    return validate(kind, values, str(path))


def read_values(path: Path) -> Line:
    """Reads the values in a `config.json`, or in a YAML file of the same form, not validated.

    Raises:
        ConfigError: the file is missing or holds no object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = _read_yaml(text) if path.suffix in YAML else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected a run's settings")
    return values


def _read_yaml(text: str) -> object:
    """Parses YAML whose only booleans are true and false: `off` and `no` are words, as for a flag."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, words) for tag, words in found if tag != _BOOL or first in "tTfF"]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


_BOOL = "tag:yaml.org,2002:bool"
