"""Data sets by name."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from mdistiller.data.dataset import Splits
from mdistiller.errors import ConfigError, UnknownNameError

Reader = Callable[[Any], Splits]

_DATASETS: dict[str, Reader] = {}

F = TypeVar("F", bound=Reader)


def register_dataset(name: str) -> Callable[[F], F]:
    """Registers a function that reads a data set, as `@register_dataset(name)`.

    The function takes a `DataConfig`, whose `kind` is the name, and returns the whole set as `Splits`.
    `load_data` then applies the limits and the label noise, scales an `ImageSet` to `image_size` and keeps it
    in memory or streams it. A `StreamSet` is always streamed.

    Raises:
        ConfigError: Another function has the name, or the name has other characters than letters, digits,
            _ and -.
    """

    def add(function: F) -> F:
        old = _DATASETS.get(name)
        own = (function.__module__, function.__qualname__)
        # A file that is imported again (a plug-in, a reload) replaces its own entry.
        if old is not None and (old.__module__, old.__qualname__) != own:
            raise ConfigError(f"data set name {name!r} is taken by {old.__module__}.{old.__qualname__}")
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"data set name {name!r}: allowed are letters, digits, _ and -")
        _DATASETS[name] = function
        return function

    return add


def list_datasets() -> list[str]:
    """Returns the names of all registered data sets, sorted."""
    return sorted(_DATASETS)


def get_reader(name: str) -> Reader:
    """Returns the function that reads a data set.

    Raises:
        UnknownNameError: No such data set.
    """
    if name not in _DATASETS:
        raise UnknownNameError("data set", name, _DATASETS)
    return _DATASETS[name]
