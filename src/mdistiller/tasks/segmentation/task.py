"""Semantic segmentation as a task."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mdistiller.checks import class_order
from mdistiller.config import SELF
from mdistiller.distiller import Distiller
from mdistiller.errors import CheckpointError, ClassCountError, ConfigError
from mdistiller.methods import Method
from mdistiller.models import ModelConfig
from mdistiller.models.backbone import is_backbone
from mdistiller.models.external import InputConfig, tap_points
from mdistiller.models.own_input import with_own_input
from mdistiller.models.weights import read_metadata
from mdistiller.tasks.classification.models import build_backbone
from mdistiller.tasks.segmentation.config import SegmentationConfig
from mdistiller.tasks.segmentation.data import SegmentationSet, load_segmentation
from mdistiller.tasks.segmentation.deployment import SegmenterDeployment
from mdistiller.tasks.segmentation.loader import SegmentationLoader
from mdistiller.tasks.segmentation.methods import build_method
from mdistiller.tasks.segmentation.pixels import pixel_loss
from mdistiller.tasks.segmentation.segmenter import (
    AUX,
    CLASSIFIERS,
    SegFormer,
    Segmenter,
    build_segmenter,
    check_segmenter,
    resolve_options,
)
from mdistiller.teacher import Teacher
from mdistiller.training.batches import BatchSource
from mdistiller.training.dense import DenseSplits, DenseTask
from mdistiller.training.distributed import World
from mdistiller.training.task import try_single_image
from mdistiller.types import IGNORED, Batch, DataInfo, Line

SegmentationSplits = DenseSplits[SegmentationSet]


class SegmentationTask(DenseTask[SegmentationConfig, SegmentationSet, Batch]):
    """Segmentation of images: a class for each pixel."""

    name = "segmentation"
    Config, build, exports = SegmentationConfig, staticmethod(build_segmenter), SegmenterDeployment()
    metadata_keys = ("model", "options", "classes", "short_side", "mean", "std")

    def check(self, config: SegmentationConfig) -> None:
        check_segmenter(config.student.name)
        teacher, method = config.teacher, config.method.method_name
        if teacher is not None and is_backbone(teacher.name, check_segmenter):
            if method != "tokens":
                raise ConfigError(
                    f"method: got {method!r} with the teacher {teacher.name}, a backbone without masks; "
                    "allowed: tokens, or a segmentation model as the teacher"
                )
        elif teacher is not None and teacher.name != SELF:
            check_segmenter(teacher.name)
        super().check(config)

    def load_data(self, config: SegmentationConfig) -> SegmentationSplits:
        return load_segmentation(config.data)

    def build_model(
        self, config: SegmentationConfig, model: ModelConfig, data: SegmentationSplits
    ) -> nn.Module:
        return build_segmenter(model, data.train.num_classes)

    def build_student(self, config: SegmentationConfig, data: SegmentationSplits) -> nn.Module:
        model = build_segmenter(config.student, data.train.num_classes, new_classifier=True)
        file = config.student.checkpoint
        names = _names(model, {} if file is None else read_metadata(file))
        places = class_order(names, data.train.classes, f"student: {file or 'weights'}", strict=False)
        self.reorder(model, places)
        return model

    def build_teacher(self, config: SegmentationConfig, data: SegmentationSplits) -> nn.Module:
        teacher = config.teacher
        assert teacher is not None
        if is_backbone(teacher.name, check_segmenter):
            return build_backbone(teacher, InputConfig(config.data.mean, config.data.std))
        family = config.recipe.partition(".")[0] or "FAMILY"
        advice = (
            f"train it on this data first (mdistiller train {family}.teacher.{teacher.name}), then give "
            "--teacher RUN"
        )
        file = teacher.checkpoint
        where = f"teacher.checkpoint: {file}" if file is not None else "teacher.options: weights"
        try:
            model = build_segmenter(teacher, data.train.num_classes)
        except ClassCountError as error:
            raise CheckpointError(
                f"{where} has {error.theirs} classes, the data {data.train.num_classes}: {advice}"
            ) from error
        names, classes = getattr(model, "trained", None), data.train.classes
        if names is not None and (not names or (names[0] == "LABEL_0" and len(names) != len(classes))):
            raise ConfigError(f"teacher.options: weights: they have no classifier of {len(classes)} classes")
        trained = {} if file is None else read_metadata(file)
        names, advice = _names(model, trained), f": {advice}"
        self.reorder(model, class_order(names, classes, where, error=ConfigError, advice=advice))
        mean, std = (tuple(trained.get(name, getattr(config.data, name))) for name in ("mean", "std"))
        return with_own_input(model, InputConfig(config.data.mean, config.data.std), InputConfig(mean, std))

    def reorder(self, model: nn.Module, places: Sequence[int] | None) -> None:
        layers = {} if places is None else dict(model.named_modules())
        for parameter in (p for path in CLASSIFIERS if path in layers for p in layers[path].parameters()):
            parameter.data = parameter.data[places]

    def head(self, student: nn.Module) -> tuple[str, ...]:
        assert isinstance(student, Segmenter | SegFormer)
        return (*student.head_paths, *(["aux_classifier"] if AUX in student.tap_points else []))

    def data_info(self, config: SegmentationConfig, data: SegmentationSplits) -> DataInfo:
        # Pixels may be without a class.
        return DataInfo((3, *config.augment.crop), torch.tensor([IGNORED]), config.batch_size)

    def build_method(
        self,
        config: SegmentationConfig,
        student: nn.Module,
        teacher: nn.Module | None,
        data: SegmentationSplits,
    ) -> Method:
        return build_method(config.method, student, teacher, self.data_info(config, data))

    def build_distiller(
        self,
        config: SegmentationConfig,
        student: nn.Module,
        teacher: Teacher | None,
        method: Method,
        data: SegmentationSplits,
    ) -> Distiller:
        aux_weight = config.aux_weight if AUX in tap_points(student) else 0.0
        taps = (AUX,) if aux_weight else ()
        loss = partial(pixel_loss, aux_weight=aux_weight)
        return Distiller(student, teacher, method, task_loss=loss, task_taps=taps, per_position=False)

    def make_batches(
        self, config: SegmentationConfig, data: SegmentationSplits, world: World
    ) -> BatchSource[Batch]:
        return BatchSource(SegmentationLoader(data.train, config, world, training=True), world)

    def batch_metrics(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        known = (batch.label != IGNORED).sum().clamp(min=1)
        right = (logits.argmax(1) == batch.label).sum()
        return {"pixel_accuracy": 100.0 * len(batch.label) * right / known}

    def check_step(
        self,
        config: SegmentationConfig,
        distiller: Distiller,
        source: BatchSource[Batch],
        data: SegmentationSplits,
    ) -> None:
        """Tries a single image, where an epoch's last batch has one: most heads normalize pooled values."""
        if source.loader.last != 1 or config.drop_last:
            return
        image = torch.zeros(1, 3, *config.augment.crop, device=source.world.device)
        label = torch.zeros(1, *config.augment.crop, dtype=torch.int64, device=image.device)
        try_single_image(config, distiller, Batch(image, label, label[:, 0, 0]))

    def format_metrics(self, metrics: Line) -> list[str]:
        lines = [
            f"mIoU {metrics['mIoU']:.2f} %  pixel accuracy {metrics['pixel_accuracy']:.2f} %  "
            f"mean accuracy of classes {metrics['mean_accuracy']:.2f} %  ({metrics['images']:,} images)"
        ]
        width = max(map(len, metrics["classes"]))
        for name, value in metrics["classes"].items():
            lines.append(f"  {name:{width}}  IoU {'    –' if value is None else f'{value:5.2f}'}")
        return lines

    def metadata(self, config: SegmentationConfig, data: SegmentationSplits, *, is_extended: bool) -> Line:
        return {
            "model": config.student.name,
            "options": resolve_options(config.student, trained=True),
            "classes": data.train.classes,
            "short_side": config.augment.short_side,
            "mean": config.data.mean,
            "std": config.data.std,
        }


def _names(model: nn.Module, metadata: Line) -> Sequence[str]:
    """Returns the names of the classes that a model was trained on; none where they are unknown."""
    names: Sequence[str] = metadata.get("classes") or getattr(model, "trained", None) or ()
    return () if [*names[:1]] == ["LABEL_0"] else names
