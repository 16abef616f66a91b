"""Distillation methods: one file a paper, with its pure losses and its `Method`."""

from mdistiller.methods.base import (
    Method,
    MethodConfig,
    get_method,
    list_methods,
    load_plugin,
    register,
)
from mdistiller.methods.dkd import DKD, DKDConfig, dkd_loss, nckd_loss, tckd_loss
from mdistiller.methods.kd import KD, KDConfig, kd_loss
from mdistiller.methods.none import NoDistillation, NoneConfig

__all__ = [
    "DKD",
    "KD",
    "DKDConfig",
    "KDConfig",
    "Method",
    "MethodConfig",
    "NoDistillation",
    "NoneConfig",
    "dkd_loss",
    "get_method",
    "kd_loss",
    "list_methods",
    "load_plugin",
    "nckd_loss",
    "register",
    "tckd_loss",
]
