"""Models with their weights, and what a run learns from: a teacher, several, or the student's own average."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mdistiller.engine.config import SELF, TrainConfig
from mdistiller.engine.learner import build_method
from mdistiller.errors import CheckpointError, ConfigError
from mdistiller.methods import Average, Method, get_method
from mdistiller.models import ModelConfig, create_model, load_weights
from mdistiller.models.external import pretrained_classes
from mdistiller.models.weights import find_weights, read_about
from mdistiller.taps import logits_of
from mdistiller.types import DataInfo


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """A model of a config, with its checkpoint loaded if it names one.

    A checkpoint of a student to which its method added something is built with it.
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
    load_weights(model, config.checkpoint, config.name)
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
    file, about = find_weights(source), read_about(source)
    if not {"model", "options", "classes"} <= about.keys():
        raise CheckpointError(f"{file} does not say what it holds: it is no student of a run")
    student = ModelConfig(name=about["model"], options=about["options"], checkpoint=file)
    return build_model(student, len(about["classes"])).eval()


class Ensemble(nn.Module):
    """Several teachers as one: the mean of their logits. Each lies at `members.K`."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(models)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, classes]."""
        return torch.stack([logits_of(member(image)) for member in self.members]).mean(0)


def has_teacher(config: TrainConfig) -> bool:
    """Whether a run has a teacher that is not its student's own average."""
    if config.teacher is None or config.teacher.name == SELF:
        return False
    return config.method_class(config.method.method_name).needs_teacher


def build_teacher(config: TrainConfig, num_classes: int) -> nn.Module | None:
    """The teacher of a run, or None where it has none, needs none, or is the student's own average.

    Raises:
        ConfigError: it has neither a checkpoint nor pretrained weights for these classes; a random
            teacher, or a random head on a pretrained one, is a mistake.
    """
    if not has_teacher(config):
        return None
    assert config.teacher is not None
    torch.manual_seed(config.seed)
    model = _trained(config.teacher, num_classes)
    others = []
    for text in config.more_teachers:
        name, _, checkpoint = text.partition("=")
        others.append(_trained(ModelConfig(name=name, checkpoint=checkpoint or None), num_classes))
    return Ensemble([model, *others]) if others else model


def _trained(teacher: ModelConfig, num_classes: int) -> nn.Module:
    model = build_model(teacher, num_classes)
    if teacher.checkpoint is None:
        own = pretrained_classes(model, teacher.options)
        if own is None:
            raise ConfigError(
                f"teacher.checkpoint: the teacher {teacher.name} has no weights; "
                "give --teacher.checkpoint FILE"
            )
        if own != num_classes:
            raise ConfigError(
                f"teacher.checkpoint: {teacher.name} is pretrained on {own} classes and the data has "
                f"{num_classes}: train it on them first and give --teacher.checkpoint FILE"
            )
    return model


def method_for(config: TrainConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo) -> Method:
    """The method of a run: with several teachers and `ensemble=losses`, one for each, averaged."""
    if isinstance(teacher, Ensemble) and config.ensemble == "losses":
        make = get_method(config.method.method_name)
        members = {f"members.{i}": member for i, member in enumerate(teacher.members)}
        return Average(make, config.method, student, members, data)
    return build_method(config.method, student, teacher, data)
