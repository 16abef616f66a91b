"""A detector for a data set from weights that were trained on other classes, matched by their names."""

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mdistiller.data.encoded import some
from mdistiller.errors import CheckpointError, ConfigError
from mdistiller.models import ModelConfig
from mdistiller.models.weights import read_metadata, read_weights
from mdistiller.tasks.detection.coco import DetectionSet
from mdistiller.tasks.detection.detr import Detr
from mdistiller.tasks.detection.detr_config import class_names, kind_of
from mdistiller.tasks.detection.models import build_detector
from mdistiller.training.dense import DenseSplits

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

_HEAD = "head.classification_head"
_SIGMOID = f"{_HEAD}.cls_logits"
# Layers with outputs for each class, and whether those of one class lie side by side.
_LAYERS = {
    "roi_heads.box_predictor.cls_score": True,
    "roi_heads.box_predictor.bbox_pred": True,
    "roi_heads.mask_predictor.mask_fcn_logits": True,
    _SIGMOID: False,  # the classes of each anchor
}
# `.1` is SSDlite's second convolution.
_SSD = re.compile(rf"({re.escape(_HEAD)}\.module_list\.\d+(\.1)?)\.weight")
_PRETRAINED = ("backbone_weights", "weights", "pretrained", "weights_backbone")  # options
_PRIOR = -math.log(99)  # logit of 0.01, from which torchvision starts a sigmoid


def build_for_data(
    config: ModelConfig, data: DenseSplits[DetectionSet], *, new: bool, **size: int
) -> nn.Module:
    """Builds the detector of a config for a data set, with the weights that the config names.

    These are a checkpoint, or the option `weights`: torchvision's of `torchvision/NAME`, a folder's of
    `transformers/NAME`. Outputs follow the names of the data's classes, with a warning where they move; with
    `new` those of classes that the weights lack start from small random weights, with another one. `size` is
    as in `build_detector`.

    Raises:
        ConfigError: classes are missing in the weights, without `new`; or outputs would have to move in a
            detector of one's own, where those of a class are not known.
        CheckpointError: the weights name more or fewer classes than they have outputs of.
    """
    num_classes = data.train.num_classes
    field, origin, known, count = _trained_on(config)
    wanted = {name: label for label, name in enumerate(data.train.classes, 1)}
    if origin is None or (known == wanted and count in (None, num_classes)):
        return build_detector(config, num_classes, **size)
    if count is None and config.checkpoint is not None:
        bare = {k: v for k, v in config.options.items() if k not in _PRETRAINED}
        plain = config.model_copy(update={"checkpoint": None, "options": bare})
        count = _count(config.checkpoint, build_detector(plain, num_classes, **size), num_classes)
        known = known or _coco_labels(config.name, count)
    if count is None or (known is None and count == num_classes):
        model = build_detector(config, num_classes, **size)
        if known is not None:
            raise ConfigError(f"{field}: {origin} has the classes {some([*known])}. {_fixed(model)}")
        return model
    known = known or {}
    if known and max(known.values()) + 1 != count:
        raise CheckpointError(f"{origin} names {len(known)} classes, and has outputs of {count - 1}")
    missing = [name for name in wanted if name not in known]
    lacks = some([*map(repr, missing)])
    if missing and not new:
        names = some([*known]) if known else f"{count - 1} without names"
        raise ConfigError(f"teacher.{field}: {origin} has no class {lacks} of the data; it has {names}")
    if missing:
        warnings.warn(f"{origin} has no class {lacks}: their outputs start from small weights", stacklevel=2)
    elif sorted(wanted, key=known.__getitem__) != [*wanted]:
        warnings.warn(f"{origin}: its classes were put into the data's order, by their names", stacklevel=2)
    model = build_detector(config, count, **size)
    select_classes(model, count, [0, *map(known.get, data.train.classes)])
    return model


@torch.no_grad()
def select_classes(model: nn.Module, count: int, rows: Sequence[int | None]) -> None:
    """Gives a detector of `count` classes a new class for each of `rows`: one of its labels, or None.

    Raises:
        ConfigError: a detector of one's own, whose outputs of a class are not known.
    """
    if isinstance(model, Detr):
        model.select_classes(rows)
        return
    layers = _layers(model.state_dict())
    if not layers:
        raise ConfigError(_fixed(model))
    for path, together in layers.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        parts = {}
        for key, old in layer.named_parameters():
            per_class = old.unflatten(0, (count, -1) if together else (-1, count))
            per_class = per_class if together else per_class.transpose(0, 1)
            own = [_new(per_class[0], key, path) if row is None else per_class[row] for row in rows]
            whole = torch.stack(own, 0 if together else 1)
            parts[key] = nn.Parameter(whole.flatten(0, 1).contiguous())
        for key, value in parts.items():
            setattr(layer, key, value)
        size = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
        setattr(layer, size, len(parts["weight"]))
    if any(path.startswith(_HEAD) for path in layers):
        setattr(model.get_submodule(_HEAD), "num_classes" if _SIGMOID in layers else "num_columns", len(rows))


def _fixed(model: nn.Module) -> str:
    return f"Which outputs of {type(model).__name__} are of which class is unknown, so none can move"


def _new(like: Tensor, key: str, path: str) -> Tensor:
    if key == "weight":
        return torch.randn_like(like) * 0.01
    return torch.full_like(like, _PRIOR if path == _SIGMOID else 0.0)


def _layers(keys: Iterable[str]) -> dict[str, bool]:
    """Returns the layers with outputs for each class in a state dict, as `_LAYERS`."""
    found = {path: together for path, together in _LAYERS.items() if f"{path}.weight" in keys}
    return found | {match[1]: False for match in map(_SSD.fullmatch, keys) if match}


def _trained_on(
    config: ModelConfig,
) -> "tuple[str, Path | WeightsEnum | None, dict[str, int] | None, int | None]":
    """Returns the field and the origin of a config's weights, the labels of their classes, and their number.

    The labels are by name, None where the classes have none. The number counts the background; None: only the
    weights tell it. The origin is None for a config without weights.
    """
    short, is_set = config.name.removeprefix("torchvision/"), kind_of(config.name) is not None
    checkpoint = config.checkpoint
    given = config.options.get("weights") or ("DEFAULT" if config.options.get("pretrained") else None)
    if checkpoint is not None:
        metadata = read_metadata(checkpoint)
        names = metadata.get("classes")
        known = {name: label for label, name in enumerate(names, 1)} if names else None
        # Outputs of other detectors are counted, as one's own may have none that belong to a class.
        return "checkpoint", checkpoint, known, metadata.get("num_classes") if is_set else None
    if given and is_set:
        return "options", Path(given), *class_names(Path(given))
    if given and short != config.name:
        from torchvision.models import get_model_weights

        with suppress(KeyError, TypeError):  # no such weights; building says so
            weights = get_model_weights(short).verify(given)
            return "options", weights, _names(weights), len(weights.meta["categories"])
    return "", None, None, None


def _names(weights: "WeightsEnum") -> dict[str, int]:
    """Returns the labels of the classes of torchvision's weights by name."""
    named = enumerate(weights.meta["categories"])
    return {name: label for label, name in named if label and name != "N/A"}


def _coco_labels(name: str, count: int | None) -> dict[str, int] | None:
    """Returns the labels of torchvision's detector, if a file without names has COCO's 91 classes as well."""
    from torchvision.models import get_model_weights

    short = name.removeprefix("torchvision/")
    found = next(iter(get_model_weights(short)), None) if short != name else None
    return _names(found) if found is not None and count == len(found.meta["categories"]) == 91 else None


def _rows(state: dict[str, Tensor]) -> dict[str, int]:
    """Returns the number of outputs of each layer with outputs for each class."""
    return {path: len(state[f"{path}.weight"]) for path in _layers(state)}


def _count(path: Path, model: nn.Module, num_classes: int) -> int | None:
    """Returns the number of classes in a checkpoint; None where its architecture is not the model's."""
    own, theirs = _rows(model.state_dict()), _rows(read_weights(path))
    counts = {theirs.get(name, 0) * num_classes / rows for name, rows in own.items()}
    count = counts.pop() if len(counts) == 1 else 0.0
    return int(count) if count > 1 and count == int(count) else None
