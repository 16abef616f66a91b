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
    from mdistiller.api import Run as Run, distill as distill, train as train
    from mdistiller.config import RunConfig as RunConfig
    from mdistiller.data import ImageSet as ImageSet, Splits as Splits, register_dataset as register_dataset
    from mdistiller.deploy.predict import load_export as load_export
    from mdistiller.deploy.student import load_student as load_student, save_student as save_student
    from mdistiller.distiller import Distiller as Distiller
    from mdistiller.methods import (
        Method as Method,
        MethodConfig as MethodConfig,
        list_methods as list_methods,
        register_method as register_method,
    )
    from mdistiller.models import (
        create_model as create_model,
        list_models as list_models,
        register_model as register_model,
    )
    from mdistiller.recipes import get_recipe as get_recipe, list_recipes as list_recipes
    from mdistiller.stored import StoredTeacher as StoredTeacher
    from mdistiller.taps import tap as tap
    from mdistiller.tasks.detection import (
        DetectionDistiller as DetectionDistiller,
        DetectorAdapter as DetectorAdapter,
        DetectorPass as DetectorPass,
        Level as Level,
        register_detector as register_detector,
    )
    from mdistiller.training.task import Task as Task, register_task as register_task
    from mdistiller.types import Batch as Batch, DataInfo as DataInfo, Metric as Metric, Outputs as Outputs

__version__ = "0.1.0"

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
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module(f"{__name__}.functional")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "functional"])
