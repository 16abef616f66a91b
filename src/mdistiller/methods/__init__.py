"""Distillation methods: one module per paper, with its pure losses and its `Method`.

Every module of this package is imported, and `register_method` adds its methods to the registry.
"""

import importlib
import pkgutil
from typing import Any

from mdistiller.methods.base import Card, LogitMethod, Losses, Method, MethodConfig, Needs
from mdistiller.methods.compose import Sum, Wrapper, WrapperConfig, get_method, method_config
from mdistiller.methods.features import FeatureConfig, FeatureMethod
from mdistiller.methods.registry import (
    list_methods,
    load_plugin,
    load_plugins,
    recorded_plugins,
    register_method,
    registered_class,
)

__all__ = [
    "Card",
    "FeatureConfig",
    "FeatureMethod",
    "LogitMethod",
    "Losses",
    "Method",
    "MethodConfig",
    "Needs",
    "Sum",
    "Wrapper",
    "WrapperConfig",
    "get_method",
    "list_methods",
    "load_plugin",
    "load_plugins",
    "method_config",
    "recorded_plugins",
    "register_method",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    if (found := registered_class(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
