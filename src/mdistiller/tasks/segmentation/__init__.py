"""Semantic segmentation: models, methods on pixels and maps, data with masks, evaluation, and the task."""

from mdistiller.methods.cwd import cwd_loss
from mdistiller.tasks.segmentation.cirkd import CIRKDConfig, cirkd_loss
from mdistiller.tasks.segmentation.config import (
    SegmentationAugmentConfig,
    SegmentationConfig,
    SegmentationDataConfig,
)
from mdistiller.tasks.segmentation.cwd import CWDConfig
from mdistiller.tasks.segmentation.data import SegmentationSet, SegmentationSplits, load_segmentation
from mdistiller.tasks.segmentation.evaluate import confusion, evaluate_segmenter, metrics_of
from mdistiller.tasks.segmentation.methods import default_config, list_segmentation_methods
from mdistiller.tasks.segmentation.segmenter import create_segmenter, list_segmenters
from mdistiller.tasks.segmentation.skd import SKDConfig, skd_loss
from mdistiller.tasks.segmentation.task import SegmentationTask
from mdistiller.training.task import register_task

register_task(SegmentationTask())

__all__ = [
    "CIRKDConfig",
    "CWDConfig",
    "SKDConfig",
    "SegmentationAugmentConfig",
    "SegmentationConfig",
    "SegmentationDataConfig",
    "SegmentationSet",
    "SegmentationSplits",
    "SegmentationTask",
    "cirkd_loss",
    "confusion",
    "create_segmenter",
    "cwd_loss",
    "default_config",
    "evaluate_segmenter",
    "list_segmentation_methods",
    "list_segmenters",
    "load_segmentation",
    "metrics_of",
    "skd_loss",
]
