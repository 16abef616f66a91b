"""Models with their weights, and what a run learns from: a teacher, several, or the student's own average."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mdistiller.config import SELF
from mdistiller.data import Splits
from mdistiller.distiller import build_method
from mdistiller.errors import CheckpointError, ClassCountError, ConfigError
from mdistiller.methods import Average, Method, get_method
from mdistiller.models import ModelConfig, create_model, load_weights
from mdistiller.models.external import is_pretrained, pretrained_classes, pretrained_statistics
from mdistiller.models.registry import check_model_name
from mdistiller.models.weights import find_weights, read_about
from mdistiller.runs.student import find_student, read_student
from mdistiller.taps import logits_of
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.types import DataInfo


def check_models(config: ClassificationConfig) -> None:
    """What can be known of a run's models without its data: a typo should not wait for that.

    Raises:
        UnknownNameError: no such model.
        CheckpointError: no such checkpoint.
        ConfigError: a library that isn't installed, or a teacher without weights.
    """
    for model in (config.student, *(_teachers(config) if has_teacher(config) else ())):
        check_model_name(model.name)
        if model.checkpoint is not None:
            find_weights(model.checkpoint)


def build_model(config: ModelConfig, num_classes: int, *, new_classifier: bool = False) -> nn.Module:
    """A model of a config, with its checkpoint loaded if it names one.

    A checkpoint of a student to which its method added something is built with it. For `new_classifier` see
    `load_weights`.
    """
    if config.checkpoint is None:
        return create_model(config.name, num_classes=num_classes, **config.options)
    # The checkpoint has every weight: pretrained ones would be fetched in vain.
    options = {k: v for k, v in config.options.items() if k not in ("pretrained", "weights")}
    model = create_model(config.name, num_classes=num_classes, **options)
    addition = read_about(config.checkpoint).get("deployed")
    if addition is not None:
        teacher = create_model(addition["teacher"], num_classes=num_classes, **addition["teacher_options"])
        settings = dict(addition["method"])
        method_config = get_method(settings["name"]).Config(**settings)
        size = addition["image_size"]
        data = DataInfo((3, size, size), torch.arange(num_classes), 1)
        model = build_method(method_config, model, teacher, data).deployed(model)
    load_weights(model, config.checkpoint, config.name, new_classifier=new_classifier)
    return model


def load_student(source: str | Path) -> nn.Module:
    """The student of a run, in evaluation mode, on the CPU; what its method added to it included.

    Args:
        source: a run folder, or a student's .safetensors file from one.

    Returns:
        from normalised images [B, 3, H, W] to logits [B, classes].

    Raises:
        CheckpointError: no such file, or one that does not say what it holds.
        UnknownNameError: a model of a plug-in that has not been imported.
    """
    file = find_student(Path(source))
    about = read_student(file)
    student = ModelConfig(name=about["model"], options=about["options"], checkpoint=file)
    return build_model(student, len(about["classes"])).eval()


def build_student(config: ClassificationConfig, num_classes: int) -> nn.Module:
    """The student of a run, as it starts: from a checkpoint of other classes too, with a new classifier."""
    # Seeded here, so that every method's student starts from the same weights.
    torch.manual_seed(config.seed)
    return build_model(config.student, num_classes, new_classifier=True)


class Ensemble(nn.Module):
    """Several teachers as one: the mean of their logits. Each lies at `members.K`."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(models)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, classes]."""
        return torch.stack([logits_of(member(image)) for member in self.members]).mean(0)


def has_teacher(config: ClassificationConfig) -> bool:
    """Whether a run has a teacher that is not its student's own average."""
    if config.teacher is None or config.teacher.name == SELF:
        return False
    return config.method_class(config.method.method_name).needs_teacher


def build_teacher(config: ClassificationConfig, num_classes: int) -> nn.Module | None:
    """The teacher of a run, or None where it has none, needs none, or is the student's own average.

    Raises:
        ConfigError: it has neither a checkpoint nor pretrained weights for these classes; a random
            teacher, or a random head on a pretrained one, is a mistake.
        CheckpointError: its checkpoint is missing, damaged, or for other classes.
    """
    if not has_teacher(config):
        return None
    torch.manual_seed(config.seed)
    models = [_trained(config, teacher, num_classes) for teacher in _teachers(config)]
    return Ensemble(models) if len(models) > 1 else models[0]


def _teachers(config: ClassificationConfig) -> list[ModelConfig]:
    assert config.teacher is not None
    if config.teacher.checkpoint is None and not is_pretrained(config.teacher.options):
        raise ConfigError(
            f"teacher.checkpoint: the teacher {config.teacher.name} has no weights; "
            "give --teacher.checkpoint FILE"
        )
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
    """Warn where a model has seen images of another mean and standard deviation than it will get.

    Those of a pretrained model are known, and those of a teacher from a run. A student from a run is trained
    on, and gets used to others.
    """
    models = [(config.student, student)] if config.student.checkpoint is None else []
    if teacher is not None and has_teacher(config):
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
    about = read_about(config.checkpoint)
    return (tuple(about["mean"]), tuple(about["std"])) if {"mean", "std"} <= about.keys() else None


def method_for(
    config: ClassificationConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
) -> Method:
    """The method of a run: with several teachers and `ensemble=losses`, one for each, averaged."""
    if isinstance(teacher, Ensemble) and config.ensemble == "losses":
        make = get_method(config.method.method_name)
        members = {f"members.{i}": member for i, member in enumerate(teacher.members)}
        return Average(make, config.method, student, members, data)
    return build_method(config.method, student, teacher, data)
