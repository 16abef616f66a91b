"""Object detection as a task."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.methods.changes import change_all, unset
from mdistiller.models import ModelConfig
from mdistiller.models.backbone import is_backbone
from mdistiller.models.external import InputConfig
from mdistiller.tasks.classification.models import build_backbone
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.coco import DetectionBatch, DetectionLoader, DetectionSet
from mdistiller.tasks.detection.config import DetectionConfig
from mdistiller.tasks.detection.deployment import DetectorDeployment
from mdistiller.tasks.detection.distiller import DetectionDistiller, freeze
from mdistiller.tasks.detection.evaluate import METRICS
from mdistiller.tasks.detection.layouts import load_detection
from mdistiller.tasks.detection.levels import settle
from mdistiller.tasks.detection.methods import (
    build_method,
    check_unlabeled,
    describe,
    list_detection_methods,
)
from mdistiller.tasks.detection.models import (
    build_detector,
    known_detectors,
    resolve_options,
)
from mdistiller.tasks.detection.weights import build_for_data, select_classes
from mdistiller.teacher import Teacher
from mdistiller.training.batches import BatchSource
from mdistiller.training.dense import DenseSplits, DenseTask
from mdistiller.training.distributed import World
from mdistiller.types import Line


class DetectionBatches(BatchSource[DetectionBatch]):
    """Batches of images with objects, and a detector as the teacher."""

    def teacher_for(self, method: Method, model: nn.Module, config: Any, *, fixed: bool) -> Teacher:
        return freeze(model.requires_grad_(False).eval().to(self.world.device), method)


DetectionSplits = DenseSplits[DetectionSet]


class DetectionTask(DenseTask[DetectionConfig, DetectionSet, DetectionBatch]):
    """Detection of objects by detectors of torchvision, of transformers and of one's own."""

    name = "detection"
    Config, build, exports = DetectionConfig, staticmethod(build_detector), DetectorDeployment()
    metadata_keys = ("model", "options", "classes", "num_classes")
    pretrained_flag = "--teacher torchvision/NAME --teacher.options weights DEFAULT"
    fixed_shapes = False
    # FitNet's students were better than with 0.2 on both sets of docs/results/detection.md.
    auto_ratio = 4.0
    shows_strength = writes_predictions = True

    def load_data(self, config: DetectionConfig) -> DetectionSplits:
        data = load_detection(config.data)
        if all(annotation.get("iscrowd") for annotation in data.test.ground_truth["annotations"]):
            raise ConfigError(f"data: the test images of {config.data.root} have no object")
        return data

    def build_model(self, config: DetectionConfig, model: ModelConfig, data: DetectionSplits) -> nn.Module:
        return build_for_data(model, data, new=model is not config.teacher, **config.augment.size)

    def reorder(self, model: nn.Module, places: Sequence[int] | None) -> None:
        if places is not None:
            select_classes(model, len(places) + 1, [0, *(place + 1 for place in places)])

    def settle(self, config: DetectionConfig, student: nn.Module) -> DetectionConfig:
        if not unset(config.method):
            return config
        method = change_all(config.method, partial(settle, kind=adapter_of(student).kind))
        return config.model_copy(update={"method": method})

    def build_method(
        self, config: DetectionConfig, student: nn.Module, teacher: nn.Module | None, data: DetectionSplits
    ) -> Method:
        return build_method(config.method, student, teacher)

    def build_distiller(
        self,
        config: DetectionConfig,
        student: nn.Module,
        teacher: Teacher | None,
        method: Method,
        data: DetectionSplits,
    ) -> DetectionDistiller:
        if config.data.unlabeled is not None and config.data.pseudo_score is None:
            check_unlabeled(method)
        return DetectionDistiller(student, teacher, method, pseudo_score=config.data.pseudo_score)

    def build_teacher(self, config: DetectionConfig, data: DetectionSplits) -> nn.Module:
        if config.teacher is not None and is_backbone(config.teacher.name, config.check_name):
            return build_backbone(config.teacher, InputConfig((0.0,) * 3, (1.0,) * 3))
        return super().build_teacher(config, data)

    def make_batches(self, config: DetectionConfig, data: DetectionSplits, world: World) -> DetectionBatches:
        return DetectionBatches(DetectionLoader(data.train, config, world, training=True), world)

    def format_metrics(self, metrics: Line) -> list[str]:
        masks = metrics.get("masks")
        lines = [f"boxes: {_summary(metrics)}  ({metrics['images']:,} images)"]
        lines += [f"masks: {_summary(masks)}"] if masks else []
        width = max(map(len, metrics["categories"]))
        for category, value in metrics["categories"].items():
            more = f"  masks {_percent(masks['categories'][category])}" if masks else ""
            lines.append(f"  {category:{width}}  AP {_percent(value)}{more}")
        return lines

    def metadata(self, config: DetectionConfig, data: DetectionSplits, *, is_extended: bool) -> Line:
        return {
            "model": config.student.name,
            "options": resolve_options(config.student, trained=True, **config.augment.size),
            "classes": data.train.classes,
            "num_classes": data.train.num_classes,
        }

    def list_models(self) -> list[Line]:
        return [{"name": name, "from": origin} for name, origin in known_detectors().items()]

    def list_methods(self) -> list[Line]:
        return [describe(name) for name in list_detection_methods()]


def _summary(metrics: Line) -> str:
    return "  ".join(f"{name} {_percent(metrics[name])}" for name in METRICS)


def _percent(value: float | None) -> str:
    return "    –" if value is None else f"{value:5.2f}"
