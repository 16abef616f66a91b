"""Models of timm and torchvision, and the canonical taps of any model."""

import inspect
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from mdistiller.errors import (
    CheckpointError,
    ConfigError,
    MissingPackageError,
    UnknownNameError,
    nearest_names,
)
from mdistiller.models.tap_table import last_linear, tap_table, transformers_points, without_adapters
from mdistiller.types import Line

LIBRARIES = ("timm", "torchvision")
_MOBILENET_V3 = ("width_mult", "reduced_tail", "dilated")  # options that no signature names
_SECONDS = 10.0  # longest wait for a silent host


def create_external(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Builds a model whose name passes `check_external`; arguments and errors as `create_model`.

    timm takes `pretrained=True`; torchvision `weights=NAME`, or `pretrained=True` for its default weights.
    In-place activations become ordinary ones, which changes no number. Auxiliary classifiers are left out,
    so that the model returns logits.
    """
    library, _, short = name.partition("/")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        with limited_wait():
            if library == "timm":
                import timm

                model = timm.create_model(short, **classes | options)
            else:
                model = _build_torchvision(short, num_classes, options)
    except (ConfigError, CheckpointError, ImportError):
        raise
    except Exception as error:  # the libraries' errors are of many types
        wrong = isinstance(error, KeyError | TypeError | ValueError)
        if not options and not wrong:  # a bug of the library
            raise
        if wrong or not is_pretrained(options) or not isinstance(error, OSError | RuntimeError):
            why = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"model {name!r} does not take {options!r}: {why[:300]}") from error
        why = " ".join(str(error).split()).rstrip(".")
        by_hand = _manual_download(short, options) if library == "torchvision" else ""
        raise CheckpointError(
            f"pretrained weights of {name!r} cannot be loaded: {why}. Without a network, {by_hand}give the "
            "weights as a file: --student.checkpoint FILE, --teacher.checkpoint FILE"
        ) from error
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    return model


@contextmanager
def limited_wait() -> Iterator[None]:
    """Context in which torch.hub waits 10 seconds for a silent host, not as long as the system does."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def check_external(name: str) -> None:
    """Raises UnknownNameError for a name that the library lacks, ConfigError if timm is not installed."""
    library, _, short = name.partition("/")
    if library == "timm":
        try:
            import timm
        except ImportError as error:
            raise MissingPackageError(f"model {name!r}", "timm", "timm") from error
        if not timm.is_model(short):
            raise UnknownNameError("timm model", short, timm.list_models())
        return
    import torchvision

    # The registry also has detectors and segmentation models, which return no logits.
    known = torchvision.models.list_models(module=torchvision.models)
    if short not in known:
        raise UnknownNameError("torchvision model", short, known)


def like_external(name: str, *, exact: bool = False) -> list[str]:
    """Returns the models of torchvision and timm by a name without library, such as `timm/resnet18`.

    Unless `exact`, models of a like name if there is none of the name. The libraries that are installed are
    loaded, so it is for messages.
    """
    import torchvision

    libraries = {"torchvision": torchvision.models.list_models(module=torchvision.models)}
    with suppress(ImportError):
        import timm

        libraries["timm"] = timm.list_models()
    like = [] if exact else nearest_names(name, (short for known in libraries.values() for short in known))
    found = [
        f"{lib}/{short}"
        for short in dict.fromkeys((name, *like))
        for lib, known in libraries.items()
        if short in known
    ]
    return [full for full in found if full.endswith(f"/{name}")] or found


def is_pretrained(options: Line) -> bool:
    """Whether the options of an external model ask for pretrained weights."""
    return bool(options.get("pretrained") or options.get("weights"))


def without_pretraining(options: Line) -> Line:
    """Returns a model's options less those that load weights, for a model that gets others.

    They may name a file, or an address.
    """
    loading = ("weights", "checkpoint_path", "cache_dir")
    return {k: v for k, v in options.items() if k not in loading and not k.startswith("pretrained")}


def _build_torchvision(name: str, num_classes: int | None, options: Line) -> nn.Module:
    options = dict(options)
    if options.pop("pretrained", False):
        options.setdefault("weights", "DEFAULT")
    if options.get("weights") is not None:
        # With weights, torchvision accepts only the number of classes that they have.
        model = get_torchvision(name, options)
        if num_classes is not None:
            _replace_classifier(model, num_classes, name)
        return model
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True, **options}
    if num_classes is not None:
        options["num_classes"] = num_classes
    return get_torchvision(name, options)


def get_torchvision(name: str, options: Line) -> nn.Module:
    """Builds a model of torchvision; raises UnknownNameError for an option that torchvision would ignore."""
    from torchvision.models import get_model, get_model_builder

    model = get_model(name, **options)
    taken = inspect.signature(type(model)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        known = {*taken, *inspect.signature(get_model_builder(name)).parameters} - {"kwargs"}
        known |= {*_MOBILENET_V3} if name.startswith(("mobilenet_v3", "ssdlite")) else set()
        for option in options.keys() - known:
            raise UnknownNameError(f"option of model 'torchvision/{name}'", option, known)
    return model


def _manual_download(name: str, options: Line) -> str:
    import torchvision

    weights = options.get("weights") or "DEFAULT"
    if isinstance(weights, str):
        weights = torchvision.models.get_model_weights(name)[weights]
    return f"save {weights.url} in {torch.hub.get_dir()}/checkpoints, or "


def _replace_classifier(model: nn.Module, num_classes: int, name: str) -> None:
    path = last_linear(model)
    if path is None:
        raise ConfigError(f"model 'torchvision/{name}' has no linear classifier to replace")
    old = model.get_submodule(path)
    assert isinstance(old, nn.Linear)
    if old.out_features != num_classes:
        model.set_submodule(path, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))


def pretrained_classes(model: nn.Module, options: Line) -> int | None:
    """Returns the classes of an external model's pretrained classifier; None without pretraining."""
    if not is_pretrained(options):
        return None
    config = getattr(model, "pretrained_cfg", None)  # timm's
    return config["num_classes"] if isinstance(config, dict) and "num_classes" in config else 1000


def without_classifier(model: nn.Module) -> nn.Module:
    """Takes the classifier from a model, which then returns its input [B, D]; taps keep their names.

    The model is changed. One that is neither of this package, timm, torchvision or transformers, nor has
    `tap_points`, stays as it is: its last layer may be anything.
    """
    kind = type(model).__module__.partition(".")[0]
    points = tap_points(model)
    is_known = hasattr(model, "tap_points") or kind in ("timm", "torchvision", "transformers")
    if is_known and "pooled" in points:
        model.set_submodule(points["pooled"].removesuffix(":input"), nn.Identity())
        model.tap_points = points  # type: ignore[assignment]
    return model


class InputConfig(NamedTuple):
    """Mean, standard deviation and side in pixels of a model's images; None where unknown."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None


def input_config(name: str, options: Line) -> InputConfig | None:
    """Returns the images of a model's published weights, by timm's or torchvision's tables.

    None for models of this package, and where the library has no weights. Weights named in the options are
    those; without a name they are the library's default.
    """
    library, _, short = name.partition("/")
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(short)
        if config is None or not config.mean or not config.std:
            return None
        size = options.get("img_size", config.input_size[-1])
        if options.get("in_chans", 3) != len(config.mean):  # adapted by timm
            return InputConfig(image_size=size)
        return InputConfig(tuple(config.mean), tuple(config.std), size)
    if library == "torchvision":
        import torchvision

        weights = torchvision.models.get_model_weights(short)
        if not len(weights):
            return None
        chosen = options.get("weights") or "DEFAULT"
        try:
            chosen = weights[chosen.rpartition(".")[2]] if isinstance(chosen, str) else chosen
        except KeyError:  # the model function has the message
            return None
        preset = chosen.transforms()
        return InputConfig(tuple(preset.mean), tuple(preset.std), preset.crop_size[0])
    return None


def tap_points(model: nn.Module) -> dict[str, str]:
    """Maps the canonical tap names of a model to module paths (see `tap_table`), from stem to classifier.

    The names are `stem`, `stage1` …, `stage1.preact` … (the value before the stage's last ReLU), `last_map`
    (the feature map [B, D, H, W] whose mean over space is `pooled`) and `pooled` (the input of the
    classifier); those that the model lacks are left out. Stages are [B, C, H, W] as a rule, tokens [B, N, C]
    in vision transformers (one stage per block) and [B, H, W, C] in Swin transformers, see
    `mdistiller.models.layouts`.

    The table is the model's own attribute `tap_points`, whose paths may name a layout (`PATH@LAYOUT`), or
    follows from timm's `feature_info` or from the architectures of torchvision and transformers. For any
    other model it has only `pooled`, the input of its last linear layer.
    """
    if (inner := without_adapters(model)) is not model:
        prefix = next(path for path, module in model.named_modules() if module is inner)
        return {name: f"{prefix}.{path}" for name, path in tap_points(inner).items()}
    own = getattr(model, "tap_points", None)
    if isinstance(own, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in own.items()):
        return {name: path.partition("@")[0] for name, path in own.items()}
    infos = getattr(model, "feature_info", None)
    if isinstance(infos, list):
        return _timm_points(model, infos)
    if type(model).__module__.startswith("transformers."):
        return transformers_points(model)
    return _torchvision_points(model)


# First parts of the module paths in `feature_info` that precede the first stage.
_STEM = re.compile(r"(stem|conv|bn|norm|act|relu|layer0|patch_embed)", re.IGNORECASE)


def _timm_points(model: nn.Module, infos: list[Line]) -> dict[str, str]:
    modules = {path: m for path, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    infos = [info for info in infos if isinstance(info, dict) and info.get("module")]
    paths: list[str] = [info["module"] for info in infos]
    stem = None
    if paths and (_STEM.match(paths[0].removeprefix("features.")) or infos[0].get("reduction") == 1):
        stem = paths.pop(0)
    # Some models list paths that exist only after `features_only=True`, or whose outputs are lists.
    if len(set(paths)) < len(paths) or any(path not in modules for path in paths):
        paths = []
    preacts = [p for path in paths if (p := _residual_preact(path, modules[path])) is not None]
    return tap_table(
        paths,
        stem=stem if stem in modules else None,
        preacts=preacts if len(preacts) == len(paths) else (),
        last_map=_timm_last_map(model),
        classifier=_timm_classifier(model),
    )


def _timm_last_map(model: nn.Module) -> str | None:
    """Returns the path of the pooled feature map; None if layers separate the pooling and the classifier."""
    classifier = _timm_classifier(model)
    if not isinstance(getattr(model, "global_pool", None), nn.Module) or classifier is None:
        return None
    in_features = getattr(model.get_submodule(classifier), "in_features", -1)  # none without a head
    same_width = getattr(model, "num_features", None) == in_features
    return "global_pool:input" if same_width and "." not in classifier else None


def _timm_classifier(model: nn.Module) -> str | None:
    """Returns the path of the last linear layer in timm's (first) classifier, or what stands for it."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return last_linear(model)
    head = get_classifier()
    if isinstance(head, tuple):  # with a distillation token, the first head reads the class token
        head = head[0]
    path = next((path for path, module in model.named_modules() if module is head), None)
    if isinstance(head, nn.Identity):  # a model without a head (num_classes=0) returns `pooled`
        return path
    inner = None if path is None or isinstance(head, nn.ModuleList) else last_linear(head)
    if inner is None:
        return None
    return f"{path}.{inner}" if inner else path


def _residual_preact(path: str, stage: nn.Module) -> str | None:
    """Returns the input of the last ReLU in a stage of timm's or torchvision's ResNet blocks."""
    if not isinstance(stage, nn.Sequential) or len(stage) == 0:
        return None
    block = stage[-1]
    if type(block).__name__ not in ("BasicBlock", "Bottleneck"):
        return None
    # torchvision's `relu` runs after each convolution, and its last run counts.
    names = (n for n in ("act3", "act2", "relu") if isinstance(getattr(block, n, None), nn.Module))
    return next((f"{path}.{len(stage) - 1}.{name}:input" for name in names), None)


def _torchvision_points(model: nn.Module) -> dict[str, str]:
    kind = type(model).__name__.removeprefix("Quantizable")
    stem: str | None = None
    stages: Sequence[str] = ()
    preacts: Sequence[str] = ()
    if not type(model).__module__.startswith("torchvision."):
        pass
    elif kind == "ResNet":
        stem, stages = "relu", ["layer1", "layer2", "layer3", "layer4"]
        preacts = [p for s in stages if (p := _residual_preact(s, model.get_submodule(s))) is not None]
    elif kind == "VGG":
        pools = [i for i, m in enumerate(_children(model, "features")) if isinstance(m, nn.MaxPool2d)]
        # As in the zoo's VGG, the first of the five blocks is the stem.
        stem, *stages = [f"features.{i - 1}" for i in pools]
        preacts = [f"{s}:input" for s in stages]
    elif kind in ("MobileNetV2", "MobileNetV3", "EfficientNet"):
        # The last child is the 1x1 convolution of the head.
        stem, stages = "features.0", _before_downsampling(model, "features", 1, -1)
    elif kind == "MNASNet":
        stem, stages = "layers.7", _before_downsampling(model, "layers", 8, 14)
    elif kind in ("ConvNeXt", "SwinTransformer"):
        # The even children downsample, the odd ones are the stages.
        stem = "features.0"
        stages = [f"features.{i}" for i in range(1, len(_children(model, "features")), 2)]
    elif kind == "DenseNet":
        # An in-place function follows the batch norm after the last block, so that one is no tap.
        stem, stages = "features.relu0", [f"features.denseblock{i}" for i in (1, 2, 3, 4)]
    elif kind == "RegNet":
        stem, stages = "stem", [f"trunk_output.block{i}" for i in (1, 2, 3, 4)]
    elif kind == "ShuffleNetV2":
        stem, stages = "conv1", ["stage2", "stage3", "stage4"]
    elif kind == "VisionTransformer":
        stages = [f"encoder.layers.{n}" for n, _ in model.get_submodule("encoder.layers").named_children()]
    # VGG, AlexNet and ConvNeXt have more than a mean between the last map and the classifier.
    last_map = "avgpool:input" if kind in ("ResNet", "RegNet") else None
    table = tap_table(stages, stem=stem, preacts=preacts, last_map=last_map, classifier=last_linear(model))
    present = {path for path, _ in model.named_modules()}
    return {name: path for name, path in table.items() if path.removesuffix(":input") in present}


def _children(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


def _before_downsampling(model: nn.Module, path: str, start: int, stop: int) -> list[str]:
    """Returns the children in [start, stop) that precede a strided one, and the last child."""
    children = _children(model, path)
    strided = [
        any(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in child.modules()) for child in children
    ]
    chosen = list(range(len(children)))[start:stop]
    return [f"{path}.{i}" for i in chosen if i == chosen[-1] or strided[i + 1]]
