"""Models: the zoo, timm's and torchvision's, their weights, and the places worth tapping in them."""

from mdistiller.models import cifar, imagenet  # noqa: F401  (they register their models)
from mdistiller.models.external import tap_points
from mdistiller.models.registry import ModelConfig, create_model, list_models, register_model
from mdistiller.models.weights import load_weights

__all__ = [
    "ModelConfig",
    "create_model",
    "list_models",
    "load_weights",
    "register_model",
    "tap_points",
]
