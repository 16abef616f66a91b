"""Image classification: config, task, models, evaluation."""

from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.task import ClassificationTask
from mdistiller.training.task import register_task

register_task(ClassificationTask())

__all__ = ["ClassificationConfig", "ClassificationTask"]
