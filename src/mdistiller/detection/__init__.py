"""Distilling torchvision's detectors: data, methods, a Distiller, average precision."""

from mdistiller.detection.bckd import BCKDConfig, bckd_loss
from mdistiller.detection.coco import DetectionSet, DetectionSplits, read_coco, train_transform
from mdistiller.detection.config import DetectionAugmentConfig, DetectionConfig, DetectionDataConfig
from mdistiller.detection.evaluate import average_precision, evaluate_detector
from mdistiller.detection.fgfi import FGFIConfig, fgfi_loss
from mdistiller.detection.learner import DetectionDistiller
from mdistiller.detection.loader import DetectionBatch, DetectionLoader, load_detection
from mdistiller.detection.methods import default_config, list_detection_methods
from mdistiller.detection.models import create_detector, list_detectors

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
