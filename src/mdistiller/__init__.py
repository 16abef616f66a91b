"""mdistiller: knowledge distillation for PyTorch.

Losses: `mdistiller.functional`. Models and their features: `create_model`, `tap`. In one's own loop:
`Distiller`. Whole runs: the command `mdistiller`, or `mdistiller.engine.run.train`; a run's student:
`load_student`.
"""

from mdistiller.distiller import Distiller
from mdistiller.methods import Method, MethodConfig, register_method
from mdistiller.models import create_model, list_models, register_model
from mdistiller.taps import tap
from mdistiller.tasks.classification.models import load_student
from mdistiller.types import Batch, DataInfo, Outputs

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "DataInfo",
    "Distiller",
    "Method",
    "MethodConfig",
    "Outputs",
    "create_model",
    "list_models",
    "load_student",
    "register_method",
    "register_model",
    "tap",
]
