"""mdistiller: knowledge distillation for PyTorch.

Losses: `mdistiller.functional`. A whole method in one's own training loop: `Distiller`. Models and their
features: `create_model`, `tap`. Whole runs: `distill`, `train`, `get_recipe`, `Run`; or the command
`mdistiller`.

Names are imported on first use, so that `import mdistiller` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdistiller import functional as functional
    from mdistiller.api import Run, distill, train
    from mdistiller.config import RunConfig
    from mdistiller.data import ImageSet, Splits, register_dataset
    from mdistiller.deploy.predict import load_export
    from mdistiller.deploy.student import load_student, save_student
    from mdistiller.distiller import Distiller
    from mdistiller.methods import Method, MethodConfig, list_methods, register_method
    from mdistiller.models import create_model, list_models, register_model
    from mdistiller.recipes import get_recipe, list_recipes
    from mdistiller.stored import StoredTeacher
    from mdistiller.taps import tap
    from mdistiller.tasks.detection import (
        DetectionDistiller,
        DetectorAdapter,
        DetectorPass,
        Level,
        register_detector,
    )
    from mdistiller.training.task import Task, register_task
    from mdistiller.types import Batch, DataInfo, Metric, Outputs

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "DataInfo",
    "DetectionDistiller",
    "DetectorAdapter",
    "DetectorPass",
    "Distiller",
    "ImageSet",
    "Level",
    "Method",
    "MethodConfig",
    "Metric",
    "Outputs",
    "Run",
    "RunConfig",
    "Splits",
    "StoredTeacher",
    "Task",
    "create_model",
    "distill",
    "get_recipe",
    "list_methods",
    "list_models",
    "list_recipes",
    "load_export",
    "load_student",
    "register_dataset",
    "register_detector",
    "register_method",
    "register_model",
    "register_task",
    "save_student",
    "tap",
    "train",
]

_MODULES = {
    "api": ("Run", "distill", "train"),
    "config": ("RunConfig",),
    "data": ("ImageSet", "Splits", "register_dataset"),
    "deploy.predict": ("load_export",),
    "deploy.student": ("load_student", "save_student"),
    "distiller": ("Distiller",),
    "methods": ("Method", "MethodConfig", "list_methods", "register_method"),
    "models": ("create_model", "list_models", "register_model"),
    "recipes": ("get_recipe", "list_recipes"),
    "stored": ("StoredTeacher",),
    "taps": ("tap",),
    "tasks.detection": (
        *("DetectionDistiller", "DetectorAdapter", "DetectorPass", "Level"),
        "register_detector",
    ),
    "training.task": ("Task", "register_task"),
    "types": ("Batch", "DataInfo", "Metric", "Outputs"),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module(f"{__name__}.functional")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "functional"])
