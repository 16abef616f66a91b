"""Registry of methods by name."""

import hashlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.methods.base import Method, MethodConfig
from mdistiller.methods.features import FeatureConfig

PLUGIN = "mdistiller_plugin_"
"""First part of the name of a plug-in's module."""

_SHARED_CONFIGS = (MethodConfig, FeatureConfig)
_METHODS: dict[str, type[Method]] = {}
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
        kind = vars(cls).get("Config")
        if not (isinstance(kind, type) and issubclass(kind, MethodConfig)) or kind in _SHARED_CONFIGS:
            raise ConfigError(
                f"method {name!r} needs a Config class of its own, which extends MethodConfig; got {kind!r}; "
                f"allowed: in the class {cls.__name__} a line such as `Config = {cls.__name__}Config`"
            )
        # Looked up in the class itself: a Config that extends another method's Config inherits its name.
        if vars(kind).get("own_name", name) != name:
            raise ConfigError(
                f"method {name!r} needs a Config class of its own; {kind.__name__} is of {kind.own_name!r}"
            )
        cls.name = name
        kind.own_name = name
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


def registered_method(name: str) -> type[Method]:
    """Returns the class that is registered under a name.

    Raises:
        UnknownNameError: no such method; the message has the nearest names.
    """
    if name not in _METHODS:
        raise UnknownNameError("method", name, _METHODS, command_hint="A method of your own: --plugin FILE")
    return _METHODS[name]


def load_plugin(path: str | Path) -> None:
    """Runs a Python file that registers methods, models or data sets; does nothing the second time.

    The file runs as trusted code: it is one that the user gave to this very command or call.

    Raises:
        ConfigError: the file is missing or raises.
    """
    path = Path(path).resolve()
    # The same module name in every process, so that pickles find it.
    name = f"{PLUGIN}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
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


def load_plugins(files: Iterable[str | Path]) -> None:
    """Runs Python files in turn, as `load_plugin`."""
    for file in files:
        load_plugin(file)


def recorded_plugins(recorded: object) -> tuple[list[Path], str]:
    """Finds the plug-ins that a stored config names among the loaded ones; none is run.

    Returns:
        The loaded files, each at the recorded path, or of its name where nothing is there any more, and a
        sentence about those that are not loaded, empty if there are none.
    """
    paths = [Path(p) for p in recorded if isinstance(p, str | Path)] if isinstance(recorded, list) else []
    modules = (module for name, module in sys.modules.items() if name.startswith("mdistiller_plugin_"))
    loaded = [Path(str(module.__file__)) for module in modules]
    found: list[Path] = []
    flags: list[str] = []
    for path in paths:
        match = [f for f in loaded if f.name == path.name]
        if os.path.exists(path):
            match = [f for f in match if not f.exists() or f.samefile(path)]
        found += match[:1]
        if not match:
            text = str(path)
            flags.append(f"--plugin {shlex.quote(text) if text.isprintable() else ascii(text)}")
    asked = f"Code runs only where it is asked for: give {' '.join(flags)} (in Python plugins=[…])"
    return found, asked if flags else ""
