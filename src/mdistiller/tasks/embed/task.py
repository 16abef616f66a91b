"""Embeddings from images without labels, as a task."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from mdistiller.config import RunConfig
from mdistiller.data import Splits, load_data
from mdistiller.distiller import Distiller
from mdistiller.errors import ConfigError
from mdistiller.methods import Method, get_method
from mdistiller.methods.compose import build_method
from mdistiller.models import ModelConfig
from mdistiller.taps import probe
from mdistiller.tasks.classification import models
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import training_images
from mdistiller.tasks.classification.task import ClassificationTask
from mdistiller.tasks.embed.config import EmbedConfig, suits
from mdistiller.tasks.embed.deployment import EmbedDeployment
from mdistiller.tasks.embed.evaluate import EmbedEvaluator, embedding_of
from mdistiller.teacher import Teacher
from mdistiller.training.batches import BatchSource, ImageBatches
from mdistiller.training.deployment import Deployment
from mdistiller.training.distributed import World, pick_device
from mdistiller.training.task import Task
from mdistiller.training.trainer import Evaluator
from mdistiller.types import Batch, DataInfo, Line, Outputs


class EmbedBatches(ImageBatches):
    """Augmented images, and a teacher that returns embeddings."""

    method: Method

    def __init__(self, config: EmbedConfig, splits: Splits, world: World) -> None:
        super().__init__(config, splits, world)
        self.logits_of = embedding_of

    def teacher_for(self, method: Method, model: nn.Module, *, fixed: bool) -> Teacher:
        self.method = method  # the evaluation computes its losses
        return super().teacher_for(method, model, fixed=fixed)


class EmbedTask(ClassificationTask):
    """Distillation of a teacher's features on images without labels."""

    name = "embed"
    Config: ClassVar[type[RunConfig]] = EmbedConfig
    metadata_keys = ("model", "options", "image_size", "mean", "std")
    format_metrics = Task.format_metrics

    def list_methods(self) -> list[Line]:
        return [row for row in super().list_methods() if suits(get_method(row["name"]))]

    def check(self, config: ClassificationConfig) -> None:
        if not config.has_teacher:
            raise ConfigError(
                "teacher: task embed learns from a teacher other than the student; give a recipe "
                "embed.METHOD.STUDENT and --teacher MODEL"
            )
        super().check(config)

    def load_data(self, config: ClassificationConfig) -> Splits:
        return load_data(config.data, pick_device(config.device))

    def build_model(self, config: ClassificationConfig, model: ModelConfig, data: Splits) -> nn.Module:
        return models.build_model(model, 0)

    def build_student(self, config: ClassificationConfig, data: Splits) -> nn.Module:
        return models.build_model(config.student, 0)

    def build_teacher(self, config: ClassificationConfig, data: Splits) -> nn.Module:
        assert config.teacher is not None
        return models.prepare_for(config.teacher, models.build_model(config.teacher, 0), data)

    def data_info(self, config: ClassificationConfig, data: Splits) -> DataInfo:
        shape = (3, data.image_size, data.image_size)
        images = partial(training_images, config, data)
        return DataInfo(
            shape, None, config.batch_size, logits_of=embedding_of, images=images, are_embeddings=True
        )

    def build_method(
        self, config: ClassificationConfig, student: nn.Module, teacher: nn.Module | None, data: Splits
    ) -> Method:
        models.check_statistics(config, student, teacher, data)
        return build_method(config.method, student, teacher, self.data_info(config, data))

    def check_models(
        self,
        config: ClassificationConfig,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Method,
        data: Splits,
    ) -> None:
        info = self.data_info(config, data)
        probe(student, method.student_taps, info)
        assert teacher is not None
        probe(teacher, method.teacher_taps, info)

    def build_distiller(
        self,
        config: ClassificationConfig,
        student: nn.Module,
        teacher: Teacher | None,
        method: Method,
        data: Splits,
    ) -> Distiller:
        return Distiller(student, teacher, method, task_loss=no_loss, logits_of=embedding_of)

    def make_batches(self, config: ClassificationConfig, data: Splits, world: World) -> ImageBatches:
        assert isinstance(config, EmbedConfig)
        return EmbedBatches(config, data, world)

    def batch_metrics(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        return {}

    def make_evaluator(
        self,
        config: ClassificationConfig,
        data: Splits,
        source: BatchSource[Batch],
        teacher: nn.Module | None,
        world: World,
    ) -> Evaluator:
        assert isinstance(config, EmbedConfig)
        assert isinstance(source, EmbedBatches)
        assert teacher is not None
        return EmbedEvaluator(config, data, source.method, teacher, world)

    def evaluate(
        self, config: ClassificationConfig, model: ModelConfig, world: World, predictions: Path | None = None
    ) -> Line:
        return Task.evaluate(self, config, model, world, predictions)

    def metadata(self, config: ClassificationConfig, data: Splits, *, is_extended: bool) -> Line:
        metadata = super().metadata(config, replace(data, classes=()), is_extended=False)
        del metadata["classes"]
        return metadata

    def load_student(self, file: Path, metadata: Line) -> nn.Module:
        config = ModelConfig(name=metadata["model"], options=metadata["options"], checkpoint=file)
        return models.build_model(config, 0).eval()

    def deployment(self) -> Deployment:
        return EmbedDeployment()


def no_loss(outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Returns no task loss: there are no labels."""
    return {}
