"""Models: the zoo, those of timm and torchvision, weights from files, and canonical taps."""

from mdistiller.models import cifar, imagenet  # noqa: F401  (registers their models)
from mdistiller.models.external import tap_points
from mdistiller.models.registry import ModelConfig, create_model, list_models, register_model
from mdistiller.models.weights import load_weights

__all__ = ["ModelConfig", "create_model", "list_models", "load_weights", "register_model", "tap_points"]
