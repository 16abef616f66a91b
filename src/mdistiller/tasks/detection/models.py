"""Detectors by name: torchvision's heads on a feature pyramid of a classification backbone."""

import inspect
from collections.abc import Callable, Container, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload

from torch import nn

from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError, check_free
from mdistiller.models import ModelConfig, load_weights
from mdistiller.models.backbone import create_backbone
from mdistiller.models.external import get_torchvision
from mdistiller.models.weights import read_metadata, read_weights
from mdistiller.taps import probe
from mdistiller.tasks.detection.detr import create_detr
from mdistiller.tasks.detection.detr_config import CLASSES, FOLDERS, PREFIX, kind_of, resolve

_CHANNELS = 256
_SIDES = ("short_side", "long_side", "min_size", "max_size")


class _Backbone(NamedTuple):
    """Layout of a torchvision classifier as a backbone.

    body: module path of the convolutional part; "" for the classifier itself.
    stages: children of the body, first the stem, then the stages with strides 4, 8, 16 and 32.
    frozen_stages: number of stages that are frozen with pretrained weights.
    """

    body: str
    stages: tuple[tuple[str, ...], ...]
    frozen_stages: int


# The reference trains all of MobileNetV2 and freezes a ResNet's stem and first stage.
_RESNET = _Backbone("", (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)), 2)
_MOBILENET_STAGES = tuple(tuple(map(str, range(a, b))) for a, b in pairwise((0, 1, 4, 7, 14, 18)))
BACKBONES = dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101"), _RESNET)
BACKBONES["mobilenet_v2"] = _Backbone("features", _MOBILENET_STAGES, 0)
# Names of torchvision's classes; torchvision takes a second to load.
ARCHITECTURES = {"fasterrcnn": "FasterRCNN", "maskrcnn": "MaskRCNN", "retinanet": "RetinaNet", "fcos": "FCOS"}
ONE_STAGE = ("retinanet", "fcos")
# Files of torchvision, by the hash in their names, whose frozen norms have an epsilon of 0.
_WITHOUT_EPSILON = ("258fb6c6", "bf2d0c1e", "fc266e95", "eeacb38b")
_GIVEN = ("backbone", "num_classes", "min_size", "max_size", "kwargs")


_DETECTORS: dict[str, Callable[..., nn.Module]] = {}
F = TypeVar("F", bound=Callable[..., nn.Module])


@overload
def register_detector(function: F, /) -> F: ...
@overload
def register_detector(name: str, /) -> Callable[[F], F]: ...
def register_detector(given: F | str, /) -> F | Callable[[F], F]:
    """Registers a function of a detector, as `@register_detector` or as `@register_detector(name)`.

    The function takes `num_classes` (with the background) and any options, and returns a detector of
    torchvision or a module with a `detector_adapter` (see `DetectorAdapter`). Arguments `short_side` and
    `long_side`, if it has them, get the size of the images in evaluation. In training, images come scaled.

    Raises:
        ConfigError: another function or a built-in detector has the name, or it has characters other than
            letters, digits and _.
    """
    if isinstance(given, str):
        return lambda function: _add(given, function)
    return _add(given.__name__, given)


def _add(name: str, function: F) -> F:
    check_free("detector", name, function, _DETECTORS)
    if name in _built_in() or not name.isidentifier():
        raise ConfigError(f"detector name {name!r}: allowed are letters, digits and _, and no built-in name")
    _DETECTORS[name] = function
    return function


def _built_in() -> list[str]:
    return [f"{architecture}_{backbone}" for architecture in ARCHITECTURES for backbone in BACKBONES]


def list_detectors() -> list[str]:
    """Lists the names of this package's detectors and of registered ones, sorted."""
    return sorted([*_built_in(), *_DETECTORS])


def known_detectors() -> dict[str, str]:
    """Returns the names of all detectors, each with its origin."""
    from torchvision.models import detection, list_models

    built = dict.fromkeys(_built_in(), "torchvision's head on a backbone of its classifiers")
    theirs = {f"torchvision/{name}": "torchvision" for name in list_models(module=detection)}
    sets = dict.fromkeys((PREFIX + kind for kind in CLASSES), "transformers")
    own = {name: f"registered by {function.__module__}" for name, function in _DETECTORS.items()}
    return dict(sorted((built | theirs | sets | own).items()))


def check_detector(name: str) -> None:
    """Checks the name of a detector; raises UnknownNameError where there is none."""
    if name.startswith("torchvision/"):
        from torchvision.models import detection, list_models

        short, known = name.removeprefix("torchvision/"), list_models(module=detection)
        if short not in known:
            raise UnknownNameError("torchvision detector", short, known)
    elif (kind := kind_of(name)) is not None:
        if kind not in CLASSES:
            raise UnknownNameError("transformers detector", kind, list(CLASSES))
    elif name not in list_detectors():
        hint = "torchvision's own: torchvision/NAME, those of transformers: transformers/NAME"
        own = "A detector of your own: --plugin FILE, with @mdistiller.register_detector"
        raise UnknownNameError("detector", name, list_detectors(), hint, command_hint=own)


def create_detector(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Builds a detector; it has random weights unless an option gives some.

    Args:
        name: `ARCHITECTURE_BACKBONE`, such as `fasterrcnn_resnet18`; `torchvision/NAME` or
            `transformers/NAME`; or a name that is registered.
        num_classes: classes with the background; those of the weights for the option `weights`.
        options: of `ARCHITECTURE_BACKBONE` those of `build_on_backbone`, of `transformers/NAME` those of
            `detr_config.resolve`; otherwise the arguments of torchvision's or of the registered function.

    Raises:
        UnknownNameError: no such detector or option.
        ConfigError: an invalid option.
        CheckpointError: the weights are missing, damaged or of another architecture.
    """
    check_detector(name)
    if name.startswith("torchvision/"):
        model = _torchvision(name, num_classes, options)
        _check_values(name, options, type(model))
        return model
    if (kind := kind_of(name)) is not None:
        return create_detr(kind, num_classes, **options)
    if name in _DETECTORS:
        function = _DETECTORS[name]
        signature = inspect.signature(function)
        try:
            signature.bind(num_classes=num_classes, **options)
        except TypeError as error:
            allowed = ", ".join(p for p in signature.parameters if p != "num_classes") or "none"
            raise ConfigError(f"detector {name!r}: {error}; its options: {allowed}") from None
        return function(num_classes=num_classes, **options)
    return build_on_backbone(name, num_classes, **options)


def build_on_backbone(
    name: str,
    num_classes: int,
    *,
    short_side: int = 800,
    long_side: int = 1333,
    backbone_weights: str | Path | None = None,
    batch_norm: Literal["auto", "frozen", "plain"] = "auto",
    frozen_stages: int | None = None,
    **options: object,
) -> nn.Module:
    """Builds a torchvision detector with a feature pyramid on a classification backbone.

    The detector takes training images in their own size. In evaluation it scales images and predicts in
    pixels of the unscaled image.

    Args:
        name: `ARCHITECTURE_BACKBONE`.
        num_classes: classes with the background.
        short_side: length of the short side in evaluation, in pixels.
        long_side: limit of the long side in pixels.
        backbone_weights: a checkpoint of the backbone as a classifier (of torchvision's layout: a file, or a
            run folder of this package), or torchvision's name for pretrained weights, such as `DEFAULT`.
        batch_norm: batch norm of the backbone: `frozen` statistics, scale and shift, or `plain`; `auto`:
            frozen with backbone weights.
        frozen_stages: number of the backbone's first stages that are frozen, the stem being the first.
            None: with backbone weights 2 of a ResNet (as in Detectron2) and none of MobileNetV2, otherwise
            none.
        options: further arguments of torchvision's detector class, such as `box_score_thresh`.

    Raises:
        UnknownNameError, ConfigError, CheckpointError: as `create_detector`.
    """
    architecture, _, backbone_name = name.partition("_")
    pretrained = backbone_weights is not None
    if batch_norm not in ("auto", "frozen", "plain"):
        raise ConfigError(f"batch_norm: got {batch_norm!r}; allowed: auto, frozen, plain")
    from torchvision.models import detection

    detector_class = getattr(detection, ARCHITECTURES[architecture])
    known = [p for p in inspect.signature(detector_class).parameters if p not in _GIVEN]
    for option in options:
        if option not in known:  # torchvision would ignore it
            raise UnknownNameError(f"option of detector {name!r}", option, known)
    _check_values(name, options | {"short_side": short_side, "long_side": long_side}, detector_class)
    layout = BACKBONES[backbone_name]
    if frozen_stages is None:
        frozen_stages = layout.frozen_stages if pretrained else 0
    classifier = create_backbone(backbone_name, backbone_weights)
    if batch_norm == "frozen" or (batch_norm == "auto" and pretrained):
        freeze_batch_norm(classifier)
    backbone = _pyramid(classifier, layout, frozen_stages, one_stage=architecture in ONE_STAGE)
    sizes = {"min_size": short_side, "max_size": long_side}
    try:  # _skip_resize: the loader has scaled the training images
        detector: nn.Module = detector_class(backbone, num_classes, _skip_resize=True, **sizes, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"detector {name!r} does not take {options!r}: {error}") from error
    _start_boxes(detector)
    return detector


def _check_values(name: str, options: Mapping[str, object], detector_class: type[nn.Module]) -> None:
    """Raises a ConfigError for numbers with which torchvision would stop in a pass."""
    own = inspect.signature(build_on_backbone).parameters
    taken = {**own, **inspect.signature(detector_class).parameters}
    for option, value in options.items():
        default = taken[option].default if option in taken else None
        several = list(value) if isinstance(value, list | tuple) else None
        if option in ("image_mean", "image_std"):
            three = several is not None and len(several) == 3 and all(_is_number(v, float) for v in several)
            fits, needed = value is None or three, "three numbers from 0"
        elif option in _SIDES:
            sides = several if several is not None and option == "min_size" else [value]
            fits, needed = all(_is_number(side, int, lowest=1) for side in sides), "a whole number from 1"
        elif isinstance(default, int | float):
            kind = "a whole number" if isinstance(default, int) else "a number"
            fits, needed = _is_number(value, type(default)), f"{kind} from 0"
        else:
            continue
        if not fits:
            raise ConfigError(f"{option} of detector {name!r}: got {value!r:.60}; allowed: {needed}")


def _is_number(value: Any, kind: type, *, lowest: int = 0) -> bool:
    return type(value) in (int, kind) and lowest <= value < 2**31


def build_detector(config: ModelConfig, num_classes: int, **defaults: int) -> nn.Module:
    """Builds the detector of a config, with its checkpoint loaded if it names one; see `resolve_options`."""
    options = resolve_options(config, trained=config.checkpoint is not None, **defaults)
    model = create_detector(config.name, num_classes, **options)
    if config.checkpoint is not None:
        if config.name not in _DETECTORS and options.get("batch_norm", "auto") == "auto":
            _freeze_as_in(model, config.checkpoint)
        load_weights(model, config.checkpoint, config.name)
        if config.checkpoint.stem.rpartition("-")[2] in _WITHOUT_EPSILON:
            _usual_epsilon(model, 0.0)
    return model


def resolve_options(config: ModelConfig, *, trained: bool, **defaults: int) -> dict[str, object]:
    """Returns a detector's options: the config's before `defaults`, and these before the checkpoint's.

    `trained`: the detector is built for a checkpoint with every weight.
    """
    metadata = {} if config.checkpoint is None else read_metadata(config.checkpoint)
    stored = metadata.get("options") if metadata.get("model") == config.name else None
    options = dict(stored) if isinstance(stored, dict) else {}
    if (kind := kind_of(config.name)) is not None:
        # A folder is read for a new detector only: a trained one has the values of its own, which are stored.
        given = {k: v for k, v in config.options.items() if not (stored and k in FOLDERS)}
        options = {k: v for k, v in options.items() if k not in FOLDERS} | given
        return resolve(kind, options) if trained else options
    if config.name in _DETECTORS:
        taken = inspect.signature(_DETECTORS[config.name]).parameters
        defaults = {name: value for name, value in defaults.items() if name in taken}
    options |= ({} if config.name.startswith("torchvision/") else defaults) | config.options
    if trained:
        kept = options.pop("backbone_weights", None)
        if kept is not None and options.get("batch_norm", "auto") == "auto":
            options["batch_norm"] = "frozen"
        if config.name.startswith("torchvision/"):
            # A checkpoint replaces weights that may need a network.
            loading = [options.pop(key, None) for key in ("weights", "pretrained", "weights_backbone")]
            if any(loading):
                options.pop("trainable_backbone_layers", None)  # has no effect without them
    return options


def freeze_batch_norm(module: nn.Module, among: Container[str] | None = None) -> None:
    """Replaces batch norms in a module by ones with the same statistics, scale and shift, all fixed.

    `among`: module paths of those to replace; None: all.
    """
    from torchvision.ops import FrozenBatchNorm2d

    for path, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, nn.BatchNorm2d) and (among is None or path in among):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, frozen)


def _freeze_as_in(model: nn.Module, checkpoint: Path) -> None:
    """Freezes the batch norms that are frozen in a checkpoint: those without a counter of batches."""
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        keys = {key.removeprefix("model.") for key in read_weights(checkpoint)}
        frozen = {path for path in norms if f"{path}.running_var" in keys}
        freeze_batch_norm(model, {path for path in frozen if f"{path}.num_batches_tracked" not in keys})


def _usual_epsilon(model: nn.Module, epsilon: float | None = None) -> None:
    """Gives frozen norms the epsilon of a new one, with the same results: a file of weights has no epsilon.

    epsilon: the epsilon that the weights were trained with. None: the norms' own.
    """
    from torchvision.ops import FrozenBatchNorm2d

    usual = FrozenBatchNorm2d(1).eps
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var += (module.eps if epsilon is None else epsilon) - usual
            module.eps = usual


def _start_boxes(model: nn.Module) -> None:
    """Lets the boxes of a new FCOS start about one stride from each point to each side.

    torchvision's head ends in a ReLU behind a bias of 0. A side that is zero everywhere gets no gradient. The
    paper's exp(x) is 1 where x is 0.
    """
    from torchvision.models.detection.fcos import FCOSRegressionHead

    for module in model.modules():
        if isinstance(module, FCOSRegressionHead):
            nn.init.ones_(module.bbox_reg.bias)


def _pyramid(classifier: nn.Module, layout: _Backbone, frozen_stages: int, *, one_stage: bool) -> nn.Module:
    """Builds levels of strides 4 to 32 and a pooled one, or (one-stage) 8 to 32 and two convolved ones."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    if frozen_stages not in range(len(layout.stages) + 1):
        raise ConfigError(f"frozen_stages: got {frozen_stages}; allowed are 0 to {len(layout.stages)}")
    body = classifier.get_submodule(layout.body)
    for stage in layout.stages[:frozen_stages]:
        for child in stage:
            body.get_submodule(child).requires_grad_(False)
    ends = [stage[-1] for stage in layout.stages[2 if one_stage else 1 :]]
    prefix = f"{layout.body}." if layout.body else ""
    features = probe(classifier, [prefix + end for end in ends], (3, 64, 64)).features
    return BackboneWithFPN(
        body,
        {end: str(level) for level, end in enumerate(ends)},
        [feature.shape[1] for feature in features.values()],
        _CHANNELS,
        extra_blocks=LastLevelP6P7(_CHANNELS, _CHANNELS) if one_stage else LastLevelMaxPool(),
    )


def _torchvision(name: str, num_classes: int, options: dict[str, object]) -> nn.Module:
    options = {"weights": None, "weights_backbone": None} | options
    if options.pop("pretrained", False):
        options["weights"] = "DEFAULT"
    if name.startswith("torchvision/ssdlite") and options["weights"] is None and options["weights_backbone"]:
        # torchvision builds another architecture around them, which no option of its own builds again.
        raise ConfigError(f"weights_backbone of detector {name!r}: allowed is None; give weights DEFAULT")
    options["num_classes"] = num_classes
    try:
        model = get_torchvision(name.removeprefix("torchvision/"), options)
    except UnknownNameError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"detector {name!r} does not take {options!r}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"pretrained weights of {name!r} could not be loaded: {error}") from error
    if options["weights"] is None:
        _start_boxes(model)
    else:
        _usual_epsilon(model)
    return model
