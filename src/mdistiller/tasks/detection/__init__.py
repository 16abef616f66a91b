"""Object detection: torchvision's detectors on COCO-format data, methods, evaluation, and the task."""

from mdistiller.tasks.detection.adapter import DetectorAdapter, DetectorPass, Level
from mdistiller.tasks.detection.bckd import BCKDConfig, bckd_box_loss, bckd_loss
from mdistiller.tasks.detection.coco import DetectionSet, DetectionSplits, read_coco, train_transform
from mdistiller.tasks.detection.config import DetectionAugmentConfig, DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.crosskd import CrossKDConfig, crosskd_box_loss
from mdistiller.tasks.detection.cwd import CWDConfig
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.evaluate import average_precision, evaluate_detector
from mdistiller.tasks.detection.fgd import FGDConfig, fgd_focal_losses
from mdistiller.tasks.detection.fgfi import FGFIConfig, fgfi_loss
from mdistiller.tasks.detection.loader import DetectionBatch, DetectionLoader, load_detection
from mdistiller.tasks.detection.methods import default_config, list_detection_methods
from mdistiller.tasks.detection.mgd import MGDConfig, mgd_loss
from mdistiller.tasks.detection.models import create_detector, list_detectors, register_detector
from mdistiller.tasks.detection.pkd import PKDConfig, pkd_loss
from mdistiller.tasks.detection.task import DetectionTask
from mdistiller.training.task import register_task

register_task(DetectionTask())

__all__ = [
    "BCKDConfig",
    "CWDConfig",
    "CrossKDConfig",
    "DetectionAugmentConfig",
    "DetectionBatch",
    "DetectionConfig",
    "DetectionDataConfig",
    "DetectionDistiller",
    "DetectionLoader",
    "DetectionSet",
    "DetectionSplits",
    "DetectionTask",
    "DetectorAdapter",
    "DetectorPass",
    "FGDConfig",
    "FGFIConfig",
    "Level",
    "MGDConfig",
    "PKDConfig",
    "average_precision",
    "bckd_box_loss",
    "bckd_loss",
    "create_detector",
    "crosskd_box_loss",
    "default_config",
    "evaluate_detector",
    "fgd_focal_losses",
    "fgfi_loss",
    "list_detection_methods",
    "list_detectors",
    "load_detection",
    "mgd_loss",
    "pkd_loss",
    "read_coco",
    "register_detector",
    "train_transform",
]
