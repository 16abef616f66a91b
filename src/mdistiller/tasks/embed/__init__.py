"""Embeddings from images without labels, by the features of a teacher: config, task, evaluation."""

from mdistiller.tasks.embed.task import EmbedTask
from mdistiller.training.task import register_task

register_task(EmbedTask())
