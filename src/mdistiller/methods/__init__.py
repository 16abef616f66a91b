"""Distillation methods: one file a paper, with its pure losses and its `Method`."""

from mdistiller.methods.base import LogitMethod, Method, MethodConfig
from mdistiller.methods.dkd import DKD, DKDConfig, dkd_loss, nckd_loss, tckd_loss
from mdistiller.methods.features import FeatureConfig, FeatureMethod
from mdistiller.methods.gather import gather
from mdistiller.methods.kd import KD, KDConfig, kd_loss
from mdistiller.methods.none import NoDistillation, NoneConfig
from mdistiller.methods.registry import get_method, list_methods, load_plugin, register

__all__ = [
    "DKD",
    "KD",
    "DKDConfig",
    "FeatureConfig",
    "FeatureMethod",
    "KDConfig",
    "LogitMethod",
    "Method",
    "MethodConfig",
    "NoDistillation",
    "NoneConfig",
    "dkd_loss",
    "gather",
    "get_method",
    "kd_loss",
    "list_methods",
    "load_plugin",
    "nckd_loss",
    "register",
    "tckd_loss",
]
