"""Configs of transformers' detectors: options, published sizes, and folders, which are read as data only.

A folder's files are JSON and safetensors. Of a config only the fields of the architecture are taken, and a
backbone is one of those in `_BACKBONES`, with random weights: nothing in a folder runs code or fetches a file.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError, UnknownNameError, one_line
from mdistiller.types import Line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PREFIX = "transformers/"
CLASSES = {"d_fine": "DFine", "detr": "Detr", "rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "yolos": "Yolos"}
"""Names of detectors, which are transformers' model types, and of their classes there."""
SQUARE = ("d_fine", "rt_detr", "rt_detr_v2")
"""Detectors that take squares, of 640 pixels as published and with values in [0, 1]."""
FOLDERS = ("weights", "config")
IMAGES = ("size", "short_side", "long_side", "mean", "std")
_BACKBONES = ("hgnet_v2", "resnet", "rt_detr_resnet", "timm_backbone")
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def _hgnet(stem: list[int], width: int, out: list[int], blocks: list[int], layers: int, **more: object) -> Line:
    """Returns the fields of an HGNetV2 that differ between its sizes; `width` is of the first stage's layers."""
    return {
        "stem_channels": stem,
        "stage_in_channels": [stem[-1], *out[:-1]],
        "stage_mid_channels": [width, 2 * width, 4 * width, 8 * width],
        "stage_out_channels": out,
        "hidden_sizes": out,
        "stage_num_blocks": blocks,
        "stage_numb_of_layers": [layers] * 4,
        **more,
    }


_B0 = _hgnet([3, 16, 16], 16, [64, 256, 512, 1024], [1, 1, 2, 1], 3, use_learnable_affine_block=True)
_B2 = _hgnet([3, 24, 32], 32, [96, 384, 768, 1536], [1, 1, 3, 1], 4, use_learnable_affine_block=True)
_B5 = _hgnet([3, 32, 64], 64, [128, 512, 1024, 2048], [1, 2, 5, 2], 6)
_POINTS = {"decoder_n_points": [3, 6, 3]}
_BASIC = {"hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
_WIDE = {"encoder_ffn_dim": 2048, "encoder_hidden_dim": 384, "decoder_in_channels": [384] * 3}
_RT_DETR: dict[str, Line] = {
    "r18": {"backbone_config": _BASIC | {"depths": [2, 2, 2, 2]}, "hidden_expansion": 0.5, "decoder_layers": 3},
    "r34": {"backbone_config": _BASIC | {"depths": [3, 4, 6, 3]}, "hidden_expansion": 0.5, "decoder_layers": 4},
    "r50": {},
    "r101": {"backbone_config": {"depths": [3, 4, 23, 3]}, **_WIDE},
}
# As in transformers' conversion of the published checkpoints.
PRESETS: dict[str, dict[str, Line]] = {
    "d_fine": {
        "n": {
            "backbone_config": _B0 | {"out_indices": [3, 4]},
            "encoder_hidden_dim": 128,
            "d_model": 128,
            "encoder_ffn_dim": 512,
            "decoder_ffn_dim": 512,
            "decoder_in_channels": [128, 128],
            "decoder_n_points": [6, 6],
            "decoder_layers": 3,
            "encode_proj_layers": [1],
            "feat_strides": [16, 32],
            "num_feature_levels": 2,
            "depth_mult": 0.5,
            "hidden_expansion": 0.34,
        },
        "s": {"backbone_config": _B0, "decoder_layers": 3, "hidden_expansion": 0.5, "depth_mult": 0.34, **_POINTS},
        "m": {"backbone_config": _B2, "decoder_layers": 4, "depth_mult": 0.67, **_POINTS},
        "l": _POINTS,
        "x": {"backbone_config": _B5, **_WIDE, **_POINTS},
    },
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
}


def kind_of(name: str) -> str | None:
    """Returns the model type in a detector's name; None for a detector that is not transformers'."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def load_class(kind: str, suffix: str) -> Any:
    """Returns a class of transformers; raises MissingPackageError where it or scipy, for losses, is missing."""
    try:
        import scipy.optimize
        import transformers
    except ImportError as error:
        raise MissingPackageError(f"detector '{PREFIX}{kind}'", "transformers and scipy", "transformers") from error
    found = getattr(transformers, CLASSES[kind] + suffix, None)
    if found is None:
        version = transformers.__version__
        raise ConfigError(f"detector '{PREFIX}{kind}': transformers {version} lacks it; install a newer one")
    return found


def resolve(kind: str, options: Line, sizes: Mapping[str, int] | None = None) -> Line:
    """Returns all options of a detector, without a folder or a preset, for building it again.

    Args:
        kind: the model type.
        options: `weights` or `config`, a folder; `preset`, a published size; `size`, or `short_side` and
            `long_side`, of images in pixels; their `mean` and `std`; and fields of transformers' config, which
            precede those of the folder or preset.
        sizes: `short_side` and `long_side` where neither options nor folder have one; not for squares.

    Raises:
        ConfigError: a wrong or missing value.
        UnknownNameError: an unknown option or preset.
        CheckpointError: a folder's file that is missing or damaged.
    """
    given = {name: value for name, value in options.items() if value is not None}
    sources = {name: given.pop(name) for name in (*FOLDERS, "preset") if name in given}
    if len(sources) > 1:
        raise ConfigError(f"detector '{PREFIX}{kind}': got {' and '.join(sources)}; allowed: one of them")
    known = _fields(load_class(kind, "Config"))
    allowed = [*FOLDERS, "preset", "size", "mean", "std", *known]
    allowed += [] if kind in SQUARE else ["short_side", "long_side"]
    for name in given:
        if name not in allowed:
            raise UnknownNameError(f"option of detector '{PREFIX}{kind}'", name, allowed)
    base: Line = {}
    if "preset" in sources:
        presets = PRESETS.get(kind, {})
        if sources["preset"] not in presets:
            raise UnknownNameError(f"preset of detector '{PREFIX}{kind}'", str(sources["preset"]), [*presets])
        base = presets[sources["preset"]]
    folder = next((Path(sources[name]) for name in FOLDERS if name in sources), None)
    if folder is not None:
        base = _read_folder(kind, folder, known)
    if kind in SQUARE and "weights" not in sources:
        base = {**base, "freeze_backbone_batch_norms": False}  # frozen, random ones would never be trained
    layers = [{} if "weights" in sources else _published(kind), dict(sizes or {}) if kind not in SQUARE else {}]
    layers += [{} if folder is None else _read_processor(folder, given), given]
    images: Line = {}
    for layer in layers:
        if "size" in layer or "short_side" in layer:  # a square replaces two limits, and these a square
            images = {name: value for name, value in images.items() if name in ("mean", "std")}
        images |= {name: value for name, value in layer.items() if name in IMAGES}
    for name in ("mean", "std", "size"):
        if name not in images and not (name == "size" and "short_side" in images):
            raise ConfigError(f"{folder} has no preprocessor_config.json: state {name} among the options")
    merged = {**base, **given, **images}
    if isinstance(base.get("backbone_config"), dict) and isinstance(given.get("backbone_config"), dict):
        merged["backbone_config"] = base["backbone_config"] | given["backbone_config"]
    return merged


def _published(kind: str) -> Line:
    if kind in SQUARE:
        return {"size": 640, "mean": [0.0] * 3, "std": [1.0] * 3}
    return {"short_side": 800, "long_side": 1333, **_IMAGENET}


def _fields(config_class: type) -> list[str]:
    """Lists the fields of an architecture, without those of every config."""
    from transformers import PreTrainedConfig

    base = {field.name for field in fields(PreTrainedConfig)}  # type: ignore[arg-type]
    return [f.name for f in fields(config_class) if f.name not in base and not f.name.startswith("_")]


def _read(folder: Path, name: str) -> Line:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / name}: got a {type(found).__name__}; allowed: an object")
    return found


def _read_folder(kind: str, folder: Path, known: list[str]) -> Line:
    whole = _read(folder, "config.json")
    if whole.get("model_type") != kind:
        raise ConfigError(f"{folder} holds a {whole.get('model_type')!r}; you asked for '{PREFIX}{kind}'")
    found = {name: whole[name] for name in known if whole.get(name) is not None}
    if kind == "detr" and "backbone_config" not in found and whole.get("use_timm_backbone", True):
        timm = {"model_type": "timm_backbone", "features_only": True, "out_indices": [1, 2, 3, 4]}
        found["backbone_config"] = timm | {"backbone": whole.get("backbone") or "resnet50"}
    return found


def _read_processor(folder: Path, given: Line) -> Line:
    """Returns the size and the normalization of a folder's images; what is given needs no file."""
    if not (folder / "preprocessor_config.json").is_file():
        return {}
    found = _read(folder, "preprocessor_config.json")
    if not found.get("do_rescale", True) or abs(found.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ConfigError(f"{folder}/preprocessor_config.json: images are not scaled to [0, 1]")
    normal = {name: found.get(f"image_{name}") for name in ("mean", "std")}
    if not found.get("do_normalize", True):
        normal = {"mean": [0.0] * 3, "std": [1.0] * 3}
    size = found.get("size")
    if isinstance(size, int):  # of before 2023
        size = {"shortest_edge": size, "longest_edge": found.get("max_size", 1333)}
    sides = [(size or {}).get(name) for name in ("height", "width", "shortest_edge", "longest_edge")]
    if sides[0] is not None and sides[0] == sides[1]:
        return normal | {"size": sides[0]}
    if None not in sides[2:]:
        return normal | {"short_side": sides[2], "long_side": sides[3]}
    if "size" in given:
        return normal
    raise ConfigError(f"{folder}/preprocessor_config.json: size: got {size!r}; allowed: a square, or two edges")


def build_config(kind: str, num_labels: int, values: Line) -> "PreTrainedConfig":
    """Builds transformers' config of resolved options, with a backbone of random weights.

    Raises:
        ConfigError: a wrong value, or another backbone than those that are known.
    """
    config_class = load_class(kind, "Config")
    own = {name: value for name, value in values.items() if name not in IMAGES}
    if "backbone_config" in _fields(config_class):
        own["backbone_config"] = backbone = _backbone(kind, own.get("backbone_config") or {})
        channels = getattr(backbone, "hidden_sizes", None)
        if kind in SQUARE and channels:  # as many levels as the backbone has
            own.setdefault("encoder_in_channels", [channels[i - 1] for i in backbone.out_indices])
    try:
        found: PreTrainedConfig = config_class(**own, num_labels=num_labels)
    except Exception as error:  # of transformers' own validation, of several classes
        raise ConfigError(f"detector '{PREFIX}{kind}' does not take {own!r}: {one_line(error)}") from error
    return found


def _backbone(kind: str, values: Line) -> "PreTrainedConfig":
    usual = {"d_fine": "hgnet_v2", "detr": "resnet"}.get(kind, "rt_detr_resnet")
    name = values.get("model_type", usual)
    if name not in _BACKBONES:
        raise ConfigError(f"backbone_config.model_type: got {name!r}; allowed: {', '.join(_BACKBONES)}")
    if name == "timm_backbone":
        try:
            import timm
        except ImportError as error:
            raise MissingPackageError("backbone 'timm_backbone'", "timm", "timm") from error
        if not timm.is_model(values.get("backbone", "")):  # a prefix such as hf-hub: names an address
            raise UnknownNameError("timm model", str(values.get("backbone")), timm.list_models())
    from transformers import AutoConfig

    config_class = type(AutoConfig.for_model(name))
    known = {*_fields(config_class), "out_indices", "out_features"}
    default: Line = {"out_features": ["stage4"]} if kind == "detr" else {"out_indices": [2, 3, 4]}
    if {"out_indices", "out_features"} & values.keys():
        default = {}
    if values.get("out_indices") is not None:  # a saved config has both
        known.discard("out_features")
    try:
        return config_class(**default | {key: value for key, value in values.items() if key in known})
    except Exception as error:
        raise ConfigError(f"backbone_config does not take {values!r}: {one_line(error)}") from error


def class_names(folder: Path) -> dict[str, int]:
    """Returns the labels of a folder's classes by name, from 1; empty where its config names none."""
    names = _read(folder, "config.json").get("id2label") or {}
    if not isinstance(names, dict) or sorted(map(str, names)) != sorted(str(i) for i in range(len(names))):
        raise CheckpointError(f"{folder}/config.json: id2label: the ids are not 0 to {len(names) - 1}")
    return {str(n): int(i) + 1 for i, n in names.items() if not re.fullmatch(r"LABEL_\d+|N/A", str(n))}


def count_classes(folder: Path) -> int:
    """Returns the number of a folder's classes, without the background."""
    whole = _read(folder, "config.json")
    return len(whole.get("id2label") or ()) or int(whole.get("num_labels", 2))


def read_state(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of a folder, from safetensors alone; raises CheckpointError where there are none."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no weights in the format safetensors")
    try:
        return {key: value for file in files for key, value in load_file(file).items()}
    except Exception as error:
        raise CheckpointError(f"{folder}: the weights cannot be read: {one_line(error)}") from error
