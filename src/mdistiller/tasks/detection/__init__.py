"""Distilling torchvision's detectors: data, methods, a Distiller, average precision."""

from mdistiller.tasks.detection.bckd import BCKDConfig, bckd_loss
from mdistiller.tasks.detection.coco import DetectionSet, DetectionSplits, read_coco, train_transform
from mdistiller.tasks.detection.config import DetectionAugmentConfig, DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.evaluate import average_precision, evaluate_detector
from mdistiller.tasks.detection.fgfi import FGFIConfig, fgfi_loss
from mdistiller.tasks.detection.learner import DetectionDistiller
from mdistiller.tasks.detection.loader import DetectionBatch, DetectionLoader, load_detection
from mdistiller.tasks.detection.methods import default_config, list_detection_methods
from mdistiller.tasks.detection.models import create_detector, list_detectors

__all__ = [
    "BCKDConfig",
    "DetectionAugmentConfig",
    "DetectionBatch",
    "DetectionConfig",
    "DetectionDataConfig",
    "DetectionDistiller",
    "DetectionLoader",
    "DetectionSet",
    "DetectionSplits",
    "FGFIConfig",
    "average_precision",
    "bckd_loss",
    "create_detector",
    "default_config",
    "evaluate_detector",
    "fgfi_loss",
    "list_detection_methods",
    "list_detectors",
    "load_detection",
    "read_coco",
    "train_transform",
]
