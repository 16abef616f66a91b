"""Registry of methods by name."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods.base import Method, MethodConfig
from mdistiller.methods.compose import Wrapper, WrapperConfig, sum_of, wrap
from mdistiller.methods.features import FeatureConfig

_SHARED_CONFIGS = (MethodConfig, FeatureConfig, WrapperConfig)
_METHODS: dict[str, type[Method]] = {}
# Composed classes, each with the registry that it was composed from.
_COMPOSED: dict[str, tuple[dict[str, type[Method]], type[Method]]] = {}
MethodType = TypeVar("MethodType", bound=type[Method])


def register_method(name: str) -> Callable[[MethodType], MethodType]:
    """Returns a class decorator that registers a `Method` under a name.

    Raises:
        ConfigError: the name is taken by another class or is no identifier, or the class has no `Config` of
            its own that extends `MethodConfig`.
    """

    def add(cls: MethodType) -> MethodType:
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"method {name!r} is registered already, by {known.__module__}")
        if not name.isidentifier():
            raise ConfigError(f"method name {name!r}: allowed are letters, digits and _")
        needed = f"method {name!r} needs a Config class of its own, which extends MethodConfig"
        if not (isinstance(cls.Config, type) and issubclass(cls.Config, MethodConfig)):
            raise ConfigError(f"{needed}; got {cls.Config!r}")
        # Looked up in the class itself: a Config that extends another method's Config inherits its name.
        if cls.Config.__dict__.get("method_name", "") not in ("", name) or cls.Config in _SHARED_CONFIGS:
            raise ConfigError(needed)
        cls.name = name
        if "year" not in cls.__dict__ and cls.paper[-4:].isdigit():
            cls.year = int(cls.paper[-4:])
        cls.Config.method_name = name
        _METHODS[name] = cls
        return cls

    return add


def list_methods() -> list[str]:
    """Returns the names of all registered methods, sorted."""
    return sorted(_METHODS)


def registered_class(name: str) -> type[Method] | type[MethodConfig] | None:
    """Returns the registered method or config class of a name such as `DKDConfig`; None if there is none."""
    classes = (cls for method in _METHODS.values() for cls in (method, method.Config))
    return next((cls for cls in classes if cls.__name__ == name), None)


def get_method(name: str) -> type[Method]:
    """Returns the class of a method: a registered one, `A+B` for a sum, or `A-B` for A wrapped around B.

    `+` binds weaker: `lskd-dkd+reviewkd` is the sum of two methods.

    Raises:
        UnknownNameError: no such method; the message has the nearest names.
        ConfigError: methods that cannot be combined.
    """
    if "+" in name:
        return _once(name, lambda: sum_of(name, get_method))
    first, dash, _ = name.partition("-")
    if first not in _METHODS and first == "dot":
        raise ConfigError(
            f"method {name!r}: DOT is an optimizer and not a method: --optim.name dot, or "
            'OptimConfig(name="dot"), with any method'
        )
    if first not in _METHODS:
        raise UnknownNameError("method", first, _METHODS, command_hint="A method of your own: --plugin FILE")
    method = _METHODS[first]
    if dash or issubclass(method, Wrapper):
        return _once(name, lambda: wrap(name, method, get_method))
    return method


def _once(name: str, compose: Callable[[], type[Method]]) -> type[Method]:
    # A config belongs to a method by its class, so a composed class is made once, and again only after a
    # plug-in has changed the registry.
    if name not in _COMPOSED or _COMPOSED[name][0] != _METHODS:
        _COMPOSED[name] = dict(_METHODS), compose()
    return _COMPOSED[name][1]


def load_plugin(path: str | Path) -> None:
    """Runs a Python file that registers methods, models or data sets; does nothing the second time.

    The file runs as trusted code.

    Raises:
        ConfigError: the file is missing or raises.
    """
    path = Path(path).resolve()
    # The same module name in every process, so that pickles find it.
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
