"""Embeddings from images without labels, as a task."""

from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from mdistiller.config import RunConfig
from mdistiller.data import Splits, load_data
from mdistiller.distiller import Distiller
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.models import ModelConfig
from mdistiller.taps import probe
from mdistiller.tasks.classification import models
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.deployment import ClassifierDeployment, Prediction
from mdistiller.tasks.classification.evaluate import training_images
from mdistiller.tasks.classification.task import ClassificationTask
from mdistiller.tasks.embed.config import EmbedConfig
from mdistiller.tasks.embed.evaluate import EmbedEvaluator, embedding_of
from mdistiller.teacher import Teacher
from mdistiller.training.batches import BatchSource, ImageBatches
from mdistiller.training.deployment import Deployment, Model, ModelInput
from mdistiller.training.distributed import World, pick_device
from mdistiller.training.task import Task
from mdistiller.training.trainer import Evaluator
from mdistiller.types import Batch, DataInfo, Line


class EmbedBatches(ImageBatches):
    """Augmented images, and a teacher that returns embeddings."""

    def __init__(self, config: Any, splits: Splits, world: World) -> None:
        super().__init__(config, splits, world)
        self.logits_of = embedding_of
        self.pairs: list[tuple[Method, nn.Module]] = []
        """Each teacher with its method, whose losses the evaluation computes."""

    def teacher_for(self, method: Method, model: nn.Module, config: Any, *, fixed: bool) -> Teacher:
        self.pairs.append((method, model))
        return super().teacher_for(method, model, config, fixed=fixed)


class EmbedTask(ClassificationTask):
    """Distillation of a teacher's features on images without labels; models have no classifier."""

    name = "embed"
    Config: ClassVar[type[RunConfig]] = EmbedConfig
    metadata_keys = ("model", "options", "image_size", "mean", "std")
    build_student = Task.build_student
    build_method = Task.build_method
    batch_metrics = Task.batch_metrics
    evaluate = Task.evaluate
    format_metrics = Task.format_metrics

    def list_methods(self) -> list[Line]:
        return [row for row in super().list_methods() if row["name"] != "none"]

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

    def build_teacher(self, config: ClassificationConfig, data: Splits) -> nn.Module:
        assert config.teacher is not None
        return models.prepare_for(config.teacher, models.build_model(config.teacher, 0), data)

    def data_info(self, config: ClassificationConfig, data: Splits) -> DataInfo:
        images = partial(training_images, config, data)
        shape, size = data.shape, config.batch_size
        return DataInfo(shape, None, size, logits_of=embedding_of, images=images, are_embeddings=True)

    def check_models(
        self,
        config: ClassificationConfig,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Method,
        data: Splits,
    ) -> None:
        assert teacher is not None
        for model, taps in ((student, method.student_taps), (teacher, method.teacher_taps)):
            probe(model, taps, self.data_info(config, data))

    def build_distiller(
        self,
        config: ClassificationConfig,
        student: nn.Module,
        teacher: Teacher | None,
        method: Method,
        data: Splits,
    ) -> Distiller:
        return Distiller(student, teacher, method, task_loss=lambda *_: {}, logits_of=embedding_of)

    def make_batches(self, config: ClassificationConfig, data: Splits, world: World) -> ImageBatches:
        return EmbedBatches(config, data, world)

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
        return EmbedEvaluator(config, data, source.pairs, world)

    def deployment(self) -> Deployment:
        return EmbedDeployment()


class EmbedDeployment(ClassifierDeployment):
    """Graphs from normalized images, float32 [B, C, S, S], to embeddings [B, D]."""

    outputs = ("embedding",)
    hub_task = "image-feature-extraction"
    read = staticmethod(embedding_of)
    show_code = "print(embedding[0])"
    load_test_set = Deployment.load_test_set

    def describe(self, fields: ModelInput) -> dict[str, str]:
        return super().describe(fields) | {"output": "embeddings [B, D]"}

    def predict(
        self, model: Model, fields: ModelInput, images: list[Tensor], top: int
    ) -> list[list[Prediction]]:
        raise ConfigError(
            "predict: this student has embeddings and no classes; give --out FILE.npy or FILE.parquet (in "
            "Python `Predictor.outputs`)"
        )
