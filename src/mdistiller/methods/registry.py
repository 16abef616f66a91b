"""Methods by name."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods.base import Method, MethodConfig
from mdistiller.methods.compose import Wrapper, sum_of, wrap

_METHODS: dict[str, type[Method]] = {}
# With the registry that each was composed from.
_COMPOSED: dict[str, tuple[dict[str, type[Method]], type[Method]]] = {}
MethodType = TypeVar("MethodType", bound=type[Method])


def register_method(name: str) -> Callable[[MethodType], MethodType]:
    """Class decorator: make a `Method` known as `name`.

    Raises:
        ConfigError: the name is taken by another class, or the class has no `Config` of its own, a child of
            `MethodConfig`.
    """

    def add(cls: MethodType) -> MethodType:
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"method {name!r} is registered already, by {known.__module__}")
        if not name.isidentifier():
            raise ConfigError(f"method name {name!r}: allowed are letters, digits and _")
        needed = f"method {name!r} needs a Config class of its own, a child of MethodConfig"
        if not (isinstance(cls.Config, type) and issubclass(cls.Config, MethodConfig)):
            raise ConfigError(f"{needed}; got {cls.Config!r}")
        # Looked up in the class itself: a Config that extends another method's inherits that one's name.
        if cls.Config.__dict__.get("method_name", "") not in ("", name) or cls.Config is MethodConfig:
            raise ConfigError(needed)
        cls.name = name
        cls.Config.method_name = name
        _METHODS[name] = cls
        return cls

    return add


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def get_method(name: str) -> type[Method]:
    """The method class of a name: a registered one, `A+B` for a sum, or `A-B` for A wrapped around B.

    `+` binds weaker: `lskd-dkd+reviewkd` adds up two methods.

    Raises:
        UnknownNameError: no such method; the message has the nearest names.
        ConfigError: methods that cannot be combined, or DOT, which is none.
    """
    if "+" in name:
        return _once(name, lambda: sum_of(name, get_method))
    first, dash, _ = name.partition("-")
    if first not in _METHODS and first == "dot":
        raise ConfigError(
            f"method {name!r}: DOT is an optimizer and no part of a method; a run has it by the name "
            "dot-METHOD or by --optim.dot-delta, a loop of one's own by mdistiller.training.dot.DOT"
        )
    if first not in _METHODS:
        raise UnknownNameError("method", first, _METHODS, command_hint="A method of your own: --plugin FILE")
    method = _METHODS[first]
    if dash or issubclass(method, Wrapper):
        return _once(name, lambda: wrap(name, method, get_method))
    return method


def _once(name: str, compose: Callable[[], type[Method]]) -> type[Method]:
    # A composed class is made once, as its config's class says which method a config belongs to; but made
    # anew when a plug-in has changed the registry.
    if name not in _COMPOSED or _COMPOSED[name][0] != _METHODS:
        _COMPOSED[name] = dict(_METHODS), compose()
    return _COMPOSED[name][1]


def load_plugin(path: str | Path) -> None:
    """Run a Python file whose `@register` and `@register_model` calls add methods and models.

    The file is code and is trusted as such. A file that was loaded already is left alone.

    Raises:
        ConfigError: the file is missing or raises.
    """
    path = Path(path).resolve()
    # The module's name has to be the same in every process, so that pickles find it.
    name = f"mdistiller_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"plug-in {path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"plug-in {path} failed: {type(error).__name__}: {error}") from error
