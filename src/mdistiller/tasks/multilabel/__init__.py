"""Classification of images with several classes each: config, task, evaluation."""

from mdistiller.tasks.multilabel.task import MultiLabelTask
from mdistiller.training.task import register_task

register_task(MultiLabelTask())
