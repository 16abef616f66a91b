"""Models of a classification run with their weights: the student, one teacher or several."""

import warnings
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mdistiller.checks import class_order
from mdistiller.data import Splits
from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError
from mdistiller.methods import Method, get_method
from mdistiller.methods.compose import build_method
from mdistiller.models import ModelConfig, create_model, load_weights
from mdistiller.models.external import (
    InputConfig,
    input_config,
    is_pretrained,
    pretrained_classes,
    without_pretraining,
)
from mdistiller.models.layers import classifier_paths
from mdistiller.models.own_input import OwnInput, with_own_input, without_own_input
from mdistiller.models.registry import check_model_name
from mdistiller.models.weights import find_weights, initialize_classifier, read_metadata
from mdistiller.settings import explain
from mdistiller.stored import STORED, StoredTeacher
from mdistiller.taps import logits_if_any, logits_of, probe
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.types import IGNORED, DataInfo, Line


def data_of_weights(config: ClassificationConfig) -> Line:
    """Returns the fields of `data` left open that follow from the student's pretrained weights.

    These are mean and standard deviation, and for a folder of images, which has no size of its own, the image
    size: from the metadata of a run, or from timm's or torchvision's tables.
    """
    data, found = config.data, _input_of_weights(config.student, by_name=True)._asdict()
    fields = ("mean", "std", "image_size") if data.is_own else ("mean", "std")
    return {name: found[name] for name in fields if getattr(data, name) is None and found[name] is not None}


def _input_of_weights(model: ModelConfig, *, by_name: bool = False) -> InputConfig:
    """Returns mean, standard deviation and size of the images of a model's weights, None where unknown.

    Those of a run are in its metadata, those of pretrained weights in the tables of timm and torchvision. Of
    a file without metadata they are unknown, or those of its model's name (`by_name`).
    """
    if model.checkpoint is not None:
        find_weights(model.checkpoint)
        if metadata := read_metadata(model.checkpoint):
            mean, std = (tuple(metadata[name]) if name in metadata else None for name in ("mean", "std"))
            return InputConfig(mean, std, metadata.get("image_size"))
    is_known = is_pretrained(model.options) if model.checkpoint is None else by_name
    if not is_known:
        return InputConfig()
    check_model_name(model.name)
    return input_config(model.name, model.options) or InputConfig()


def build_model(config: ModelConfig, num_classes: int, *, new_classifier: bool = False) -> nn.Module:
    """Builds the model of a config, with its checkpoint loaded if it names one.

    A student that its method extended is built with the extension. `new_classifier` accepts a checkpoint of
    other classes; see `load_weights`.
    """
    if config.checkpoint is None:
        model = create_model(config.name, num_classes=num_classes, **config.options)
        if pretrained_classes(model, config.options) not in (None, num_classes):
            initialize_classifier(model, classifier_paths(model))
        return model
    model = create_stored(config, num_classes)
    load_weights(model, config.checkpoint, config.name, new_classifier=new_classifier)
    return model


def create_stored(config: ModelConfig, num_classes: int | None = None) -> nn.Module:
    """Builds the model of a config for the weights of its checkpoint, which are not loaded.

    Raises:
        ConfigError: an option that the model does not take; CheckpointError if it is the checkpoint's.
    """
    assert config.checkpoint is not None
    metadata = read_metadata(config.checkpoint)
    extension = metadata.get("extension")
    try:
        model = create_model(config.name, num_classes=num_classes, **without_pretraining(config.options))
        return model if extension is None or num_classes is None else _extend(model, metadata, num_classes)
    except UnknownNameError:
        raise
    except ConfigError as error:
        if metadata.get("options") != config.options or config.is_given:
            raise
        raise CheckpointError(f"{config.checkpoint}: {error}") from error


def _extend(student: nn.Module, metadata: Line, num_classes: int) -> nn.Module:
    extension = metadata["extension"]
    options = without_pretraining(extension["teacher_options"])
    teacher = create_model(extension["teacher"], num_classes=num_classes, **options)
    settings, size = extension["method"], extension["image_size"]
    own = InputConfig(image_size=extension.get("teacher_image_size", size))
    teacher = with_own_input(teacher, InputConfig(image_size=size), own)
    data = DataInfo((len(metadata["mean"]), size, size), torch.arange(num_classes), 1)
    try:
        method_config = get_method(settings["name"]).Config(**settings)
    except ValidationError as error:
        raise explain(error, "extension.method") from error
    return build_method(method_config, student, teacher, data).extend_student(student)


def has_logits(teacher: nn.Module, data: Splits) -> bool:
    """Whether a teacher returns logits of the data's classes."""
    found = probe(teacher, (), DataInfo(data.shape, logits_of=logits_if_any)).logits
    headless = getattr(without_own_input(teacher), "num_classes", None) == 0  # timm's
    return found.shape[1:] == (data.num_classes,) and not headless


def own_input(teacher: ModelConfig) -> InputConfig:
    """Returns mean, standard deviation and size of a teacher's images, None where they are the data's.

    Its config comes first, then its weights.
    """
    known = _input_of_weights(teacher)
    return InputConfig(
        teacher.mean or known.mean, teacher.std or known.std, teacher.image_size or known.image_size
    )


def prepare_for(teacher: ModelConfig, model: nn.Module, data: Splits) -> nn.Module:
    """Returns a teacher that takes the student's images, prepared for the data, and sees its own."""
    return with_own_input(model, InputConfig(data.mean, data.std, data.image_size), own_input(teacher))


def build_teacher(teacher: ModelConfig, data: Splits) -> nn.Module:
    """Builds a teacher as `build_model`, for images that are prepared for the data.

    Raises:
        ConfigError: its outputs are stored.
    """
    if teacher.name == STORED:
        raise ConfigError(
            f"teacher: its outputs are stored in {teacher.checkpoint}; it runs on no other images"
        )
    model = build_model(teacher, data.num_classes)
    order_classes(model, teacher.checkpoint, data, strict=False)
    return prepare_for(teacher, model, data)


def build_backbone(teacher: ModelConfig, given: InputConfig) -> nn.Module:
    """Builds a teacher without a classifier, for images of a mean and standard deviation and of any size.

    Raises:
        ConfigError: mean, standard deviation or size of its own images are not known.
    """
    own = own_input(teacher)
    if open_fields := [name for name, value in own._asdict().items() if value is None]:
        raise ConfigError(
            f"teacher.{open_fields[0]}: unknown for {teacher.name}; give --teacher.mean, --teacher.std and "
            "--teacher.image-size, those of the images that it was trained on"
        )
    return OwnInput(build_model(teacher, 0), given, own)


class Ensemble(nn.Module):
    """Several teachers as one, with the mean of their logits; each has the module path `members.K`."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(models)

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([logits_of(member(image)) for member in self.members]).mean(0)


def order_classes(model: nn.Module, checkpoint: Path | None, data: Splits, *, strict: bool = True) -> None:
    """Reorders the classes of a run's model to match the data, as `class_order`, in place.

    `checkpoint` is its run, or its file. Other names are an error with `strict` and where the data came with
    its names.

    Raises:
        CheckpointError: as `class_order`, and for a model without a known classifier.
    """
    found = () if checkpoint is None else read_metadata(checkpoint).get("classes", ())
    places = class_order(found, data.classes, checkpoint, strict=strict and data.named)
    if places is None:
        return
    order = torch.tensor(places)
    layers = [model.get_submodule(path) for path in classifier_paths(model)]
    known = [m for m in layers if isinstance(m, nn.Linear | nn.Conv2d) and len(m.weight) == len(order)]
    if not known or len(known) < len(layers):
        raise CheckpointError(
            f"{checkpoint} has the data's classes in another order, and {type(model).__name__} has no known "
            "classifier in which to change it; allowed are models with a tap 'pooled' before a linear layer"
        )
    for layer in known:
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor.data = tensor.data[order.to(tensor.device)]


def fit_stored(teacher: StoredTeacher, source: object, data: Splits) -> StoredTeacher:
    """Returns stored outputs with rows in the order of the training images, columns in that of the classes.

    Raises:
        ConfigError: as `StoredTeacher.fit`.
        CheckpointError: as `class_order`.
    """
    places = class_order(teacher.classes or (), data.classes, source, strict=data.named)
    return teacher.fit(data.train, places)


def check_statistics(config: ClassificationConfig, splits: Splits) -> None:
    """Warns about a pretrained student that gets images of other mean and deviation than it was trained on.

    One from a run is trained further, and adapts.
    """
    student = _input_of_weights(config.student)
    if config.student.checkpoint is not None or not (student.mean and student.std):
        return
    if student[:2] != (tuple(splits.mean), tuple(splits.std)):
        mean, std = (" ".join(map(str, three)) for three in (student.mean, student.std))
        warnings.warn(
            f"{config.student.name} was trained on images of other mean and standard deviation than the "
            f"data's {splits.mean} and {splits.std}; for those: data.mean {mean} and data.std {std}",
            stacklevel=2,
        )


def check_labels(method: Method, labels: Tensor) -> None:
    """Checks that a method can train on images without a class.

    Raises:
        ConfigError: it reads the labels, and either no image has a class or it cannot skip those without.
    """
    unlabeled = labels == IGNORED
    if not unlabeled.any() or not method.needs.labels:
        return
    name = method.config.method_name
    if unlabeled.all():
        raise ConfigError(
            f"method {name!r} reads the labels, and no training image has a class; allowed are methods that "
            "do not, such as 'kd'"
        )
    if method.needs.every_label:
        raise ConfigError(
            f"method {name!r} needs the class of every training image, and {int(unlabeled.sum()):,} have "
            "none; allowed are methods that skip them, such as 'dkd', or that read no labels, such as 'kd'"
        )
