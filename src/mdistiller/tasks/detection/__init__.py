"""Object detection: torchvision's detectors on COCO-format data, methods, evaluation, and the task."""

from mdistiller.tasks.detection.adapter import DetectorAdapter, DetectorPass, Level
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.models import register_detector
from mdistiller.tasks.detection.task import DetectionTask
from mdistiller.training.task import register_task

register_task(DetectionTask())

__all__ = ["DetectionDistiller", "DetectorAdapter", "DetectorPass", "Level", "register_detector"]
