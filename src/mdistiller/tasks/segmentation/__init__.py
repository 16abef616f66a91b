"""Semantic segmentation: models, methods on pixels and maps, data with masks, evaluation, and the task."""

from mdistiller.tasks.segmentation.task import SegmentationTask
from mdistiller.training.task import register_task

register_task(SegmentationTask())
