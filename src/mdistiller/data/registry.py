"""Data sets by name."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from mdistiller.data.dataset import Splits
from mdistiller.errors import ConfigError, DataError, UnknownNameError, check_free

if TYPE_CHECKING:
    from mdistiller.data.config import DataConfig

Reader = Callable[["DataConfig"], Splits | tuple[object, object]]
GIVEN = "given-"
"""First part of the name of a data set that was given to a run as objects, by `given_data`."""

_DATASETS: dict[str, Reader] = {}
_GIVEN: dict[str, Reader] = {}
F = TypeVar("F", bound=Reader)


def register_dataset(name: str) -> Callable[[F], F]:
    """Registers a function that reads a data set, as `@register_dataset(name)`.

    The function takes a `DataConfig`, whose `kind` is the name, and returns the whole set: a pair
    (train, test), each a `Dataset` of (image, label) without random transforms or a pair of tensors, as
    `distill` takes them, or `Splits`. Labels may be None. `load_data` then applies the limits and the label
    noise, scales an `ImageSet` to `image_size` and keeps it in memory or streams it. A `StreamSet` is always
    streamed.

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


@contextmanager
def given_data(name: str, reader: Reader) -> Iterator[None]:
    """Registers a data set, under a name that begins with `given-`, for the duration of the context."""
    before = dict(_GIVEN)
    _GIVEN[name] = reader
    try:
        yield
    finally:
        _GIVEN.clear()
        _GIVEN.update(before)


def _read_missing(config: "DataConfig") -> Splits:
    raise DataError(
        f"data.kind: {config.kind!r} was given to the run as objects; give them again: "
        "mdistiller.Run(FOLDER, student=…, teacher=…, data=(train, test))"
    )


def get_reader(name: str) -> Reader:
    """Returns the function that reads a data set; UnknownNameError if there is none.

    A set that was given as objects always has one, so that the config of its run can be read.
    """
    if name.startswith(GIVEN) and name not in _DATASETS:
        return _GIVEN.get(name, _read_missing)
    if name not in _DATASETS:
        raise UnknownNameError("data set", name, _DATASETS)
    return _DATASETS[name]
