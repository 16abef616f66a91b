"""torchvision's classifiers as backbones of detectors and segmentation models."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from warnings import catch_warnings

from torch import nn

from mdistiller.errors import CheckpointError, UnknownNameError
from mdistiller.models.external import create_external, tap_points
from mdistiller.models.registry import check_model_name, create_model
from mdistiller.models.weights import load_weights, read_weights


def backbone_hint(option: str) -> str:
    """Returns the end of an error for models that do not take an option: those that start from a backbone."""
    if option != "backbone_weights":
        return ""
    return (
        "Detectors and segmentation models on torchvision's ResNet or MobileNet start from a backbone, such "
        "as fcos_resnet18 and deeplabv3_resnet18"
    )


def is_backbone(name: str, find: Callable[[str], object]) -> bool:
    """Whether a name is that of a classifier or another backbone, and of no model that `find` knows."""
    for lookup, found in ((find, False), (check_model_name, True)):
        with suppress(UnknownNameError):
            lookup(name)
            return found
    return False


def create_backbone(name: str, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Builds a classifier of torchvision with random weights, those of a file, or torchvision's own.

    Args:
        name: torchvision's name, without `torchvision/`.
        weights: a checkpoint of the network, with or without its classifier (a file, or a run folder of this
            package), or torchvision's name for pretrained weights, such as `DEFAULT`.
        options: further arguments of torchvision's function.

    Raises:
        CheckpointError: the weights are missing, damaged or of another architecture.
    """
    full = f"torchvision/{name}"
    if weights is None:
        return create_model(full, 2, **options)
    path = Path(weights)
    if not path.exists() and path.parent == Path() and not path.suffix:
        return create_external(full, 1000, weights=str(weights), **options)
    last = tap_points(create_model(full, 2))["pooled"].removesuffix(":input")
    rows = read_weights(path).get(f"{last}.weight")
    model = create_model(full, 2 if rows is None else rows.shape[0], **options)
    try:
        with catch_warnings(category=UserWarning, action="ignore"):  # nothing reads the classifier
            load_weights(model, path, new_classifier=rows is None)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Train a checkpoint of {full} with --student.name {full}") from error
    return model
