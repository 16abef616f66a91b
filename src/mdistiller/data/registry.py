"""Data sets by name."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from mdistiller.data.dataset import Splits
from mdistiller.errors import ConfigError, UnknownNameError, check_free

Reader = Callable[[Any], Splits]
_DATASETS: dict[str, Reader] = {}
F = TypeVar("F", bound=Reader)


def register_dataset(name: str) -> Callable[[F], F]:
    """Registers a function that reads a data set, as `@register_dataset(name)`.

    The function takes a `DataConfig`, whose `kind` is the name, and returns the whole set as `Splits`.
    `load_data` then applies the limits and the label noise, scales an `ImageSet` to `image_size` and keeps it
    in memory or streams it. A `StreamSet` is always streamed.

    Raises:
        ConfigError: Another function has the name, or it has characters other than letters, digits, _ and -.
    """

    def add(function: F) -> F:
        check_free("data set", name, function, _DATASETS)
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"data set name {name!r}: allowed are letters, digits, _ and -")
        _DATASETS[name] = function
        return function

    return add


def list_datasets() -> list[str]:
    """Returns the names of all registered data sets, sorted."""
    return sorted(_DATASETS)


def get_reader(name: str) -> Reader:
    """Returns the function that reads a data set; UnknownNameError if there is none."""
    if name not in _DATASETS:
        raise UnknownNameError("data set", name, _DATASETS)
    return _DATASETS[name]
