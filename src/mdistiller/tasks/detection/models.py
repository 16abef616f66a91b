"""Detectors by name: torchvision's heads over a feature pyramid of a classification backbone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError
from mdistiller.models import ModelConfig, create_model, load_weights
from mdistiller.models.external import create_external, tap_points
from mdistiller.models.weights import read_metadata, read_weights
from mdistiller.taps import probe

_CHANNELS = 256


class _Backbone(NamedTuple):
    """How a torchvision classifier becomes a backbone.

    body: where its convolutional part lies; "" if that is the classifier itself.
    stages: the children of the body, stem first, then the stages with strides 4, 8, 16 and 32.
    frozen_stages: how many stay fixed when it is pretrained.
    """

    body: str
    stages: tuple[tuple[str, ...], ...]
    frozen_stages: int


def _children(*bounds: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(str, range(a, b))) for a, b in pairwise(bounds))


# The reference code base trains all of MobileNetV2, and leaves a ResNet's stem and first stage fixed.
_RESNET = _Backbone("", (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)), 2)
BACKBONES = {
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _RESNET,
    "resnet101": _RESNET,
    "mobilenet_v2": _Backbone("features", _children(0, 1, 4, 7, 14, 18), 0),
}
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "fasterrcnn": detection.FasterRCNN,
    "maskrcnn": detection.MaskRCNN,
    "retinanet": detection.RetinaNet,
    "fcos": detection.FCOS,
}
ONE_STAGE = ("retinanet", "fcos")
_GIVEN = ("backbone", "num_classes", "min_size", "max_size", "kwargs")


def list_detectors() -> list[str]:
    """Names of all detectors that `create_detector` builds itself, sorted."""
    return sorted(f"{architecture}_{backbone}" for architecture in ARCHITECTURES for backbone in BACKBONES)


def create_detector(
    name: str,
    num_classes: int,
    *,
    short_side: int = 800,
    long_side: int = 1333,
    backbone_weights: str | Path | None = None,
    batch_norm: Literal["auto", "frozen", "plain"] = "auto",
    frozen_stages: int | None = None,
    **options: Any,
) -> nn.Module:
    """A torchvision detector with a feature pyramid over a classification backbone.

    In training it takes images as large as they come; in evaluation it scales them, and predicts in pixels
    of the image that it was given.

    Args:
        name: `ARCHITECTURE_BACKBONE`, such as `fasterrcnn_resnet18`; or `torchvision/NAME` for a detector
            that torchvision builds, which takes torchvision's arguments in `options`.
        num_classes: classes with the background.
        short_side: length in pixels of the short side in evaluation.
        long_side: the most that the long side gets.
        backbone_weights: a checkpoint of the backbone as a classifier (of torchvision's layout: a file, or a
            run folder of this package), or torchvision's name for pretrained weights, such as `DEFAULT`.
        batch_norm: of the backbone: `frozen` statistics, scale and shift, or `plain`; `auto`: frozen with
            backbone weights.
        frozen_stages: how many of the backbone's first stages stay as they are, the stem being the first.
            None: with backbone weights 2 of a ResNet's (as in Detectron2) and none of MobileNetV2's,
            otherwise none.
        options: further arguments of torchvision's detector class, such as `box_score_thresh`.

    Raises:
        UnknownNameError: no such detector.
        ConfigError: an option that cannot be.
        CheckpointError: the weights are missing, damaged or of another architecture.
    """
    if name.startswith("torchvision/"):
        return _torchvision(name, num_classes, options)
    architecture, _, backbone_name = name.partition("_")
    if architecture not in ARCHITECTURES or backbone_name not in BACKBONES:
        raise UnknownNameError("detector", name, list_detectors(), "torchvision's own: torchvision/NAME")
    if batch_norm not in ("auto", "frozen", "plain"):
        raise ConfigError(f"batch_norm: got {batch_norm!r}; allowed: auto, frozen, plain")
    frozen = batch_norm == "frozen" or (batch_norm == "auto" and backbone_weights is not None)
    known = [p for p in inspect.signature(ARCHITECTURES[architecture]).parameters if p not in _GIVEN]
    for option in options:
        if option not in known:  # torchvision would take it, and do nothing with it
            raise UnknownNameError(f"option of detector {name!r}", option, known)
    about = BACKBONES[backbone_name]
    if frozen_stages is None:
        frozen_stages = about.frozen_stages if backbone_weights is not None else 0
    classifier = _classifier(backbone_name, backbone_weights)
    if frozen:
        freeze_batch_norm(classifier)
    backbone = _pyramid(classifier, about, frozen_stages, one_stage=architecture in ONE_STAGE)
    try:
        model = ARCHITECTURES[architecture](
            backbone,
            num_classes,
            min_size=short_side,
            max_size=long_side,
            _skip_resize=True,  # of training images, which come in their size
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"detector {name!r} does not take {options!r}: {error}") from error
    return model


def build_detector(config: ModelConfig, num_classes: int, **defaults: Any) -> nn.Module:
    """The detector of a config, with its checkpoint if it names one; for options see `resolve_options`."""
    options = resolve_options(config, trained=config.checkpoint is not None, **defaults)
    model = create_detector(config.name, num_classes, **options)
    if config.checkpoint is not None:
        load_weights(model, config.checkpoint, config.name)
    return model


def resolve_options(config: ModelConfig, *, trained: bool, **defaults: Any) -> dict[str, Any]:
    """The options of a config's detector: those that its checkpoint names, if it is a run's, then `defaults`,
    then the config's own. `trained`: to build it for a checkpoint that has every weight.
    """
    about = {} if config.checkpoint is None else read_metadata(config.checkpoint)
    stored = about.get("options") if about.get("detector") == config.name else None
    options = dict(stored) if isinstance(stored, dict) else {}
    options |= ({} if config.name.startswith("torchvision/") else defaults) | config.options
    if trained:
        kept = options.pop("backbone_weights", None)
        if kept is not None and options.get("batch_norm", "auto") == "auto":
            options["batch_norm"] = "frozen"
    return options


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm in `module` by one whose statistics, scale and shift stay as they are now."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            state = child.state_dict()
            state.pop("num_batches_tracked", None)
            frozen.load_state_dict(state)
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)


def _classifier(name: str, weights: str | Path | None) -> nn.Module:
    if weights is None:
        return create_model(f"torchvision/{name}", 2)
    path = Path(weights)
    if not path.exists() and path.parent == Path() and not path.suffix:
        return create_external(f"torchvision/{name}", 1000, weights=str(weights))
    state = read_weights(path)
    model = create_model(f"torchvision/{name}", 2)
    last = tap_points(model)["pooled"].removesuffix(":input")
    rows = state.get(f"{last}.weight")
    if rows is None:
        raise CheckpointError(
            f"{path} is no checkpoint of torchvision/{name}: it has no {last}.weight. Train one with "
            f"--student.name torchvision/{name}"
        )
    model = create_model(f"torchvision/{name}", rows.shape[0])
    load_weights(model, path)
    return model


def _pyramid(classifier: nn.Module, about: _Backbone, frozen_stages: int, *, one_stage: bool) -> nn.Module:
    """Levels of strides 4 to 32 and a pooled one; of a one-stage detector 8 to 32 and two convolved ones."""
    if not 0 <= frozen_stages <= len(about.stages):
        raise ConfigError(f"frozen_stages: got {frozen_stages}; allowed are 0 to {len(about.stages)}")
    body = classifier.get_submodule(about.body)
    for stage in about.stages[:frozen_stages]:
        for child in stage:
            body.get_submodule(child).requires_grad_(False)
    ends = [stage[-1] for stage in about.stages[2 if one_stage else 1 :]]
    prefix = f"{about.body}." if about.body else ""
    features = probe(classifier, [prefix + end for end in ends], (3, 64, 64)).features
    return BackboneWithFPN(
        body,
        {end: str(level) for level, end in enumerate(ends)},
        [feature.shape[1] for feature in features.values()],
        _CHANNELS,
        extra_blocks=LastLevelP6P7(_CHANNELS, _CHANNELS) if one_stage else LastLevelMaxPool(),
    )


def _torchvision(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    short = name.removeprefix("torchvision/")
    known = torchvision.models.list_models(module=detection)
    if short not in known:
        raise UnknownNameError("torchvision detector", short, known)
    options = {"weights": None, "weights_backbone": None} | options
    if options["weights"] is None:
        options["num_classes"] = num_classes
    try:
        return torchvision.models.get_model(short, **options)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"detector {name!r} does not take {options!r}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"pretrained weights of {name!r} could not be had: {error}") from error
