"""Numbers of published.toml: hyper-parameters by data set, pair and method, and accuracies by table."""

import tomllib
from importlib.resources import files
from typing import Any

from mdistiller.methods.dkd import DKDConfig
from mdistiller.settings import Settings


class Table(Settings):
    """Top-1 accuracies in percent by pair, in the order of `settings`."""

    settings: tuple[str, ...]
    checked: tuple[str, ...] = ()
    pairs: dict[str, tuple[float, ...]]


class Published(Settings):
    """Contents of published.toml."""

    hyperparameters: dict[str, dict[str, dict[str, dict[str, Any]]]]
    top1: dict[str, Table]


_PUBLISHED = Published.model_validate(
    tomllib.loads((files("mdistiller.recipes") / "published.toml").read_text(encoding="utf-8"))
)
HYPERPARAMETERS = _PUBLISHED.hyperparameters
"""Fields of a method's config by data set, pair TEACHER_STUDENT (or `all`) and method."""
TABLES = tuple(_PUBLISHED.top1)


def find_top1(pair: str, setting: str, tables: tuple[str, ...] = TABLES) -> tuple[float | None, bool]:
    """Returns the top-1 of the first table that has one, or None, and whether it was read in the paper."""
    for table in map(_PUBLISHED.top1.__getitem__, tables):
        found = dict(zip(table.settings, table.pairs[pair], strict=True)) if pair in table.pairs else {}
        if setting in found:
            return found[setting], setting in table.checked
    return None, False


def scaled_beta(method: DKDConfig, beta: float) -> float | str:
    """Returns the β of DKD for a pair: a factor, because a wrapper of DKD may have raised both weights."""
    return method.beta if isinstance(method.beta, str) else method.beta * beta / 8.0


def pairs_of(table: str) -> tuple[str, ...]:
    """Returns the pairs of a table of accuracies."""
    return tuple(_PUBLISHED.top1[table].pairs)
