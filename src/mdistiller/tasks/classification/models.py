"""Models of a classification run with their weights: the student, one teacher or several."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.data import Splits
from mdistiller.distiller import build_method
from mdistiller.errors import CheckpointError, ClassCountError, ConfigError
from mdistiller.methods import Method, get_method
from mdistiller.methods.compose import Average
from mdistiller.models import ModelConfig, create_model, load_weights
from mdistiller.models.external import is_pretrained, pretrained_classes, pretrained_statistics
from mdistiller.models.registry import check_model_name
from mdistiller.models.weights import find_weights, read_metadata
from mdistiller.taps import logits_of
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.types import DataInfo


def check_models(config: ClassificationConfig) -> None:
    """Checks a run's models and checkpoints by name, before the data is read.

    Raises:
        UnknownNameError: no such model.
        CheckpointError: no such checkpoint.
        ConfigError: a library that is not installed, or a teacher without weights.
    """
    teachers = _teachers(config) if config.has_teacher else []
    if teachers and teachers[0].checkpoint is None and not is_pretrained(teachers[0].options):
        raise ConfigError(
            f"teacher.checkpoint: the teacher {teachers[0].name} has no weights; "
            "give --teacher.checkpoint FILE"
        )
    for model in (config.student, *teachers):
        check_model_name(model.name)
        if model.checkpoint is not None:
            find_weights(model.checkpoint)


def build_model(config: ModelConfig, num_classes: int, *, new_classifier: bool = False) -> nn.Module:
    """Builds the model of a config, with its checkpoint loaded if it names one.

    A student that its method extended is built with the extension.

    Args:
        config: the model's config.
        num_classes: classes of the data.
        new_classifier: accept a checkpoint of other classes; see `load_weights`.
    """
    if config.checkpoint is None:
        return create_model(config.name, num_classes=num_classes, **config.options)
    # The checkpoint has every weight: pretrained ones would be fetched in vain.
    options = {k: v for k, v in config.options.items() if k not in ("pretrained", "weights")}
    model = create_model(config.name, num_classes=num_classes, **options)
    extension = read_metadata(config.checkpoint).get("extension")
    if extension is not None:
        teacher = create_model(extension["teacher"], num_classes=num_classes, **extension["teacher_options"])
        settings = dict(extension["method"])
        method_config = get_method(settings["name"]).Config(**settings)
        size = extension["image_size"]
        data = DataInfo((3, size, size), torch.arange(num_classes), 1)
        model = build_method(method_config, model, teacher, data).extend_student(model)
    load_weights(model, config.checkpoint, config.name, new_classifier=new_classifier)
    return model


class Ensemble(nn.Module):
    """Several teachers as one, with the mean of their logits; each has the module path `members.K`."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(models)

    def forward(self, image: Tensor) -> Tensor:
        """Computes logits [B, classes] of images [B, 3, H, W]."""
        return torch.stack([logits_of(member(image)) for member in self.members]).mean(0)


def build_teacher(config: ClassificationConfig, num_classes: int) -> nn.Module:
    """Builds the teacher of a run.

    Raises:
        ConfigError: a pretrained teacher of other classes, whose new classifier would be random.
        CheckpointError: its checkpoint is missing, damaged, or for other classes.
    """
    models = [_trained(config, teacher, num_classes) for teacher in _teachers(config)]
    return Ensemble(models) if len(models) > 1 else models[0]


def _teachers(config: ClassificationConfig) -> list[ModelConfig]:
    assert config.teacher is not None
    return [config.teacher, *config.more_teachers]


def _trained(config: ClassificationConfig, teacher: ModelConfig, num_classes: int) -> nn.Module:
    family = config.recipe.partition(".")[0] or "FAMILY"
    advice = (
        f"train it on this data first (mdistiller train {family}.teacher.{teacher.name}), "
        "then give --teacher.checkpoint FILE"
    )
    try:
        model = build_model(teacher, num_classes)
    except ClassCountError as error:
        raise CheckpointError(
            f"teacher.checkpoint: {teacher.checkpoint} has {error.theirs} classes, the data {num_classes}: "
            + advice
        ) from error
    own = pretrained_classes(model, teacher.options) if teacher.checkpoint is None else num_classes
    if own != num_classes:
        raise ConfigError(
            f"teacher.checkpoint: {teacher.name} is pretrained on {own} classes and the data has "
            f"{num_classes}: {advice}"
        )
    return model


def check_statistics(
    config: ClassificationConfig, student: nn.Module, teacher: nn.Module | None, splits: Splits
) -> None:
    """Warns about a model that was trained on images of another mean and standard deviation.

    Those of a pretrained model are known, and those of a teacher from a run. A student from a run is trained
    further, and adapts.
    """
    models = [(config.student, student)] if config.student.checkpoint is None else []
    if teacher is not None and config.has_teacher:
        members = teacher.members if isinstance(teacher, Ensemble) else [teacher]
        models += zip(_teachers(config), members, strict=True)
    for given, model in models:
        values = _statistics(given, model)
        if values is not None and values != (tuple(splits.mean), tuple(splits.std)):
            mean, std = (" ".join(map(str, three)) for three in values)
            warnings.warn(
                f"{given.name} was trained on images of other mean and standard deviation than the data's "
                f"{splits.mean} and {splits.std}; for those: --data.mean {mean} --data.std {std}",
                stacklevel=2,
            )


def _statistics(config: ModelConfig, model: nn.Module) -> tuple[tuple[float, ...], ...] | None:
    if config.checkpoint is None:
        return pretrained_statistics(model, config.options)
    metadata = read_metadata(config.checkpoint)
    if not {"mean", "std"} <= metadata.keys():
        return None
    return tuple(metadata["mean"]), tuple(metadata["std"])


def method_for(
    config: ClassificationConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
) -> Method:
    """Builds the method of a run: with several teachers and `ensemble=losses`, one for each, averaged."""
    if isinstance(teacher, Ensemble) and config.ensemble == "losses":
        make = get_method(config.method.method_name)
        members = {f"members.{i}": member for i, member in enumerate(teacher.members)}
        return Average(make, config.method, student, members, data)
    return build_method(config.method, student, teacher, data)


def load_student(file: Path, metadata: dict[str, Any]) -> nn.Module:
    """Builds the student in a file, in evaluation mode, on the CPU."""
    config = ModelConfig(name=metadata["model"], options=metadata["options"], checkpoint=file)
    return build_model(config, len(metadata["classes"])).eval()
