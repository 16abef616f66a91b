"""Image classification as a task."""

import warnings
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from mdistiller.checks import without_logits
from mdistiller.config import RunConfig
from mdistiller.data import Splits, load_data
from mdistiller.data.augment import check_colors
from mdistiller.data.identity import identify
from mdistiller.data.labels import balanced_weights
from mdistiller.distiller import Distiller
from mdistiller.errors import CheckpointError, ClassCountError, ConfigError
from mdistiller.losses import TaskLoss, cross_entropy
from mdistiller.methods import Method, list_methods
from mdistiller.methods.compose import build_method, reads_logits
from mdistiller.models import ModelConfig
from mdistiller.models.external import pretrained_classes
from mdistiller.models.registry import check_model_name
from mdistiller.models.weights import find_weights, read_metadata
from mdistiller.stored import STORED, StoredTeacher, read_outputs
from mdistiller.taps import logits_if_any, probe
from mdistiller.tasks.classification import listing, models
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.deployment import ClassifierDeployment
from mdistiller.tasks.classification.evaluate import (
    ClassificationEvaluator,
    Measure,
    evaluate,
    training_images,
)
from mdistiller.training.batches import BatchSource, ImageBatches
from mdistiller.training.deployment import Deployment
from mdistiller.training.distributed import World, pick_device
from mdistiller.training.precision import lay_out, memory_format
from mdistiller.training.task import Task, try_single_image
from mdistiller.training.trainer import Evaluator
from mdistiller.types import IGNORED, Batch, DataInfo, Line

LOWEST = 5
"""Classes in the text of an evaluation, those of lowest accuracy."""


class ClassificationTask(Task[ClassificationConfig, Splits, Batch]):
    """Classification of images, with labels of one class each."""

    name = "classification"
    notes = listing.NOTES
    Config: ClassVar[type[RunConfig]] = ClassificationConfig
    metadata_keys: ClassVar[tuple[str, ...]] = ("model", "options", "classes", "image_size", "mean", "std")
    measure: ClassVar[Measure] = staticmethod(evaluate)

    def check(self, config: ClassificationConfig) -> None:
        config.check_cache()
        for model in (config.student, *config.teachers):
            if model.name != STORED or model is config.student:
                check_model_name(model.name)
        super().check(config)
        for model in config.more_teachers:
            if model.checkpoint is not None:
                find_weights(model.checkpoint)

    def resolve(self, config: ClassificationConfig) -> ClassificationConfig:
        data = models.data_of_weights(config)
        return config.replace(data=data) if data else config

    def load_data(self, config: ClassificationConfig) -> Splits:
        if config.data.eval_split == "test":
            raise ConfigError(
                "data.eval_split: got 'test', but a run picks its best epoch by evaluation; allowed: "
                "'validation', and afterwards mdistiller eval RUN --data.eval-split test"
            )
        distills = config.has_teacher or config.learns_from_average
        splits = load_data(config.data, pick_device(config.device), unlabeled=distills)
        self.check_kind(splits)
        return splits

    def identify(self, config: ClassificationConfig, data: Splits) -> dict[str, str]:
        return identify(data, config.data.workers)

    def check_kind(self, data: Splits) -> None:
        """Checks that labels are of the task's kind.

        Raises:
            ConfigError: they are not.
        """
        if data.multi_label:
            raise ConfigError(
                "data: its images have several classes each; allowed are the recipes "
                "multilabel.METHOD.MODELS (in Python task='multilabel')"
            )

    def build_model(self, config: ClassificationConfig, model: ModelConfig, data: Splits) -> nn.Module:
        return models.build_model(model, data.num_classes)

    def build_student(self, config: ClassificationConfig, data: Splits) -> nn.Module:
        student = models.build_model(config.student, data.num_classes, new_classifier=True)
        models.order_classes(student, config.student.checkpoint, data, strict=False)
        return student

    def build_teacher(self, config: ClassificationConfig, data: Splits) -> nn.Module:
        teachers: list[nn.Module] = []
        needs_logits = reads_logits(config.method.method_name, config.method_class)
        for teacher in config.teachers:
            if teacher.name == STORED:
                assert teacher.checkpoint is not None
                stored = read_outputs(teacher.checkpoint, data.num_classes)
                teachers.append(models.fit_stored(stored, teacher.checkpoint, data))
                continue
            advice = (
                f"train it on this data first (mdistiller train {config.recipe.partition('.')[0] or 'FAMILY'}"
                f".teacher.{teacher.name}), then give --teacher.checkpoint FILE"
            )
            own: int | None = data.num_classes
            try:
                model = models.build_model(teacher, data.num_classes)
                if teacher.checkpoint is None and not teacher.is_given:
                    own = pretrained_classes(model, teacher.options)
            except ClassCountError as error:
                own, model = error.theirs, None
            if isinstance(model, StoredTeacher):
                teachers.append(models.fit_stored(model, "the stored outputs", data))
                continue
            if model is not None and own == data.num_classes:
                models.order_classes(model, teacher.checkpoint, data)
            elif not needs_logits:
                model = models.build_model(teacher, 0)
            else:  # a new classifier would be random
                pretrained = teacher.checkpoint is None
                has = f"{teacher.name} is pretrained on" if pretrained else f"{teacher.checkpoint} has"
                raise (ConfigError if pretrained else CheckpointError)(
                    f"teacher.checkpoint: {has} {own or 'no'} classes, the data {data.num_classes}: "
                    f"{advice}. Methods that read features alone, such as fitnet, take it as it is"
                )
            teachers.append(models.prepare_for(teacher, model, data))
        if len(teachers) > 1 and any(isinstance(teacher, StoredTeacher) for teacher in teachers):
            raise ConfigError(
                "more_teachers: stored outputs are not averaged with other logits; allowed: ensemble losses, "
                "or a method for each teacher"
            )
        return models.Ensemble(teachers) if len(teachers) > 1 else teachers[0]

    def data_info(self, config: ClassificationConfig, data: Splits) -> DataInfo:
        images = partial(training_images, config, data)
        return DataInfo(data.shape, data.train.labels, config.batch_size, images=images)

    def build_method(
        self, config: ClassificationConfig, student: nn.Module, teacher: nn.Module | None, data: Splits
    ) -> Method:
        models.check_statistics(config, data)
        name = config.method.method_name
        reads = teacher is not None and reads_logits(name, config.method_class)
        if teacher is not None and reads and not models.has_logits(teacher, data):
            raise without_logits(name, f"it returns no logits of the data's {data.num_classes} classes")
        method = build_method(config.method, student, teacher, self.data_info(config, data))
        models.check_labels(method, data.train.labels)
        if method.needs.views > 1:
            check_colors(config.augment, len(data.mean), "strong_policy")
        if method.needs.views > 1 and (config.augment.mixup_alpha or config.augment.cutmix_alpha):
            raise ConfigError(
                f"augment: method {config.method.method_name!r} compares views of the same image, which "
                "mixup and CutMix would mix with different ones; set their alphas to 0"
            )
        return method

    def check_models(
        self,
        config: ClassificationConfig,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Method,
        data: Splits,
    ) -> None:
        # A tap that is not reached, has no tensor or is changed in place raises; not so in a compiled pass.
        logits, _ = probe(student, method.student_taps, data.shape)
        if logits.shape[1:] != (data.num_classes,):
            raise ConfigError(
                f"student: its output has shape [B, {', '.join(map(str, logits.shape[1:]))}]; "
                f"the data has {data.num_classes} classes"
            )
        if teacher is not None:
            probe(teacher, method.teacher_taps, DataInfo(data.shape, logits_of=logits_if_any))

    def task_loss(self, config: ClassificationConfig, data: Splits) -> TaskLoss:
        labels = data.train.labels
        weights = balanced_weights(labels, data.num_classes) if config.class_weights == "balanced" else None
        has_unlabeled = bool((labels == IGNORED).any())
        return cross_entropy(config.label_smoothing, weights=weights, has_unlabeled=has_unlabeled)

    def make_batches(self, config: ClassificationConfig, data: Splits, world: World) -> ImageBatches:
        return ImageBatches(config, data, world)

    def batch_metrics(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        if batch.label.is_floating_point():
            return {"top1": (logits.argmax(1) == batch.label.argmax(1)).sum() * 100.0}
        # The sum is divided by all images, those without a class too.
        share = (batch.label != IGNORED).sum().clamp(min=1) / len(batch.label)
        return {"top1": (logits.argmax(1) == batch.label).sum() * 100.0 / share}

    def check_step(
        self, config: ClassificationConfig, distiller: Distiller, source: BatchSource[Batch], data: Splits
    ) -> None:
        """Tries a single image, where one is left over at an epoch's end.

        Whether it can be trained on depends on models and method: most of this package's have batch norm over
        many pixels. A batch size of 1 is the user's choice, and fails at the first step.
        """
        count, loader = config.optim.accumulate, source.loader
        chosen = _smallest(config.batch_size // source.world.size, count)
        left = _smallest(loader.last, count)
        steps = len(loader)
        if not left == 1 < chosen or min(config.max_steps or steps, config.epochs * steps) < steps:
            return
        views = distiller.method.needs.views
        image = torch.zeros(views, *data.shape, device=source.world.device)
        number = torch.zeros(views, dtype=torch.int64, device=source.world.device)
        label = data.train.labels.new_zeros(views, *data.train.labels.shape[1:], device=number.device)
        try_single_image(config, distiller, Batch(image, label, number))

    def make_evaluator(
        self,
        config: ClassificationConfig,
        data: Splits,
        source: BatchSource[Batch],
        teacher: nn.Module | None,
        world: World,
    ) -> Evaluator:
        given = [*teacher] if isinstance(teacher, nn.ModuleList) else [teacher]
        found = [one for one in given if one is not None and models.has_logits(one, data)]
        teacher = models.Ensemble(found) if len(found) > 1 else next(iter(found), None)
        return ClassificationEvaluator(config, data, self.measure, teacher, world)

    def evaluate(
        self, config: ClassificationConfig, model: ModelConfig, world: World, predictions: Path | None = None
    ) -> Line:
        if predictions is not None:
            raise ConfigError(f"predictions: got a model of task {self.name!r}; allowed: a detector")
        # A wrong name or option must not wait for the data, or for their download.
        assert model.checkpoint is not None
        models.create_stored(model, 2)
        splits = load_data(config.data.replace(train_limit=1, label_noise=0.0, unlabeled=None), world.device)
        self.check_kind(splits)
        network = models.build_model(model, splits.num_classes).to(world.device)
        models.order_classes(network, model.checkpoint, splits)
        lay_out(network, memory_format(config.layout))
        size = read_metadata(model.checkpoint).get("image_size", splits.image_size)
        if size != splits.image_size and world.is_main:
            warnings.warn(
                f"{model.checkpoint} was trained at {size} pixels and is evaluated at {splits.image_size}",
                stacklevel=1,
            )
        evaluator = ClassificationEvaluator(
            config.replace(diagnostics=False),
            splits,
            self.measure,
            None,
            world,
            classes_shown=splits.num_classes,
        )
        metrics = evaluator(network, False)
        left_out = sum(world.gather(evaluator.test.loader.left_out))
        return {**metrics, "images": len(splits.test) - left_out}

    def format_metrics(self, metrics: Line) -> list[str]:
        lowest = sorted(metrics["classes"].items(), key=lambda item: item[1])[:LOWEST]
        return [
            f"top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %  loss {metrics['loss']:.4f}  "
            f"({metrics['images']:,} images)",
            f"mean over the classes: accuracy {metrics['balanced_accuracy']:.2f} %  "
            f"F1 {metrics['macro_f1']:.2f} %",
            "lowest accuracies: " + ", ".join(f"{name} {value:.2f} %" for name, value in lowest),
        ]

    def metadata(self, config: ClassificationConfig, data: Splits, *, is_extended: bool) -> Line:
        metadata = {"model": config.student.name, "options": config.student.options}
        metadata |= {key: getattr(data, key) for key in self.metadata_keys[2:]}
        if is_extended and config.teacher is not None:
            metadata["extension"] = {
                "method": config.method.model_dump(mode="json"),
                "teacher": config.teacher.name,
                "teacher_options": config.teacher.options,
                "image_size": data.image_size,
                "teacher_image_size": models.own_input(config.teacher).image_size or data.image_size,
            }
        return metadata

    def load_student(self, file: Path, metadata: Line) -> nn.Module:
        config = ModelConfig(name=metadata["model"], options=metadata["options"], checkpoint=file)
        return models.build_model(config, len(metadata.get("classes", ()))).eval()

    def check_model(self, name: str) -> None:
        check_model_name(name)

    def list_models(self) -> list[Line]:
        return listing.describe_models()

    def list_methods(self) -> list[Line]:
        return [listing.describe_method(name) for name in list_methods() if self.Config.takes(name)]

    def deployment(self) -> Deployment:
        return ClassifierDeployment()


def _smallest(images: int, parts: int) -> int:
    """Returns the images in the smallest part of a batch that is split (see `torch.chunk`)."""
    size = -(-images // parts)
    return images % size or size
