"""torchvision's classifiers as backbones of detectors and segmentation models."""

from pathlib import Path
from typing import Any

from torch import nn

from mdistiller.errors import CheckpointError
from mdistiller.models.external import create_external, tap_points
from mdistiller.models.registry import create_model
from mdistiller.models.weights import load_weights, read_weights


def create_backbone(name: str, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Builds a classifier of torchvision with random weights, those of a file, or torchvision's own.

    Args:
        name: torchvision's name, without `torchvision/`.
        weights: a checkpoint of the classifier (a file, or a run folder of this package), or torchvision's
            name for pretrained weights, such as `DEFAULT`.
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
    if rows is None:
        lack = f"it has no {last}.weight. Train one with --student.name {full}"
        raise CheckpointError(f"{path} is no checkpoint of {full}: {lack}")
    model = create_model(full, rows.shape[0], **options)
    load_weights(model, path)
    return model
