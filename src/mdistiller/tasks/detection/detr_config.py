"""Configs of transformers' detectors, from options and from folders, which are read as data only.

A folder's files are JSON and safetensors. Of a config only the fields of the architecture are taken, and its
backbone is one of `_BACKBONES` with random weights: nothing in a folder runs code or fetches a file.
"""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError, UnknownNameError, one_line
from mdistiller.models.backbone import backbone_hint
from mdistiller.models.own_input import find_input
from mdistiller.types import Line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PREFIX = "transformers/"
CLASSES = {"d_fine": "DFine", "detr": "Detr", "rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "yolos": "Yolos"}
"""Names of detectors, which are transformers' model types, and of their classes there."""
MULTISCALE = ("d_fine", "rt_detr", "rt_detr_v2")
"""Detectors with several levels, a sigmoid for each class, and images without normalization."""
FOLDERS = ("weights", "config")
IMAGES = ("size", "mean", "std")
_BACKBONES = ("hgnet_v2", "resnet", "rt_detr_resnet", "timm_backbone")
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def kind_of(name: str) -> str | None:
    """Returns the model type in a detector's name; None for a detector that is not transformers'."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def load_class(kind: str, suffix: str) -> Any:
    """Returns a class of transformers; raises MissingPackageError without the package, or in an old one."""
    try:
        import transformers

        if int(transformers.__version__.partition(".")[0]) < 5:  # its configs have no fields
            raise ImportError(transformers.__version__)
        return getattr(transformers, CLASSES[kind] + suffix)
    except (ImportError, AttributeError) as error:
        what = f"detector '{PREFIX}{kind}'"
        raise MissingPackageError(what, "transformers 5", "transformers") from error


def resolve(kind: str, options: Line) -> Line:
    """Returns all options of a detector, without a folder among them, for building it again.

    Args:
        kind: the model type.
        options: a folder, as `weights` or, for random ones, `config`; `size`, the side in pixels of the
            square to which images are scaled; their `mean` and `std`; fields of transformers' config. These
            precede the folder's.

    Raises:
        ConfigError: a wrong or missing value; UnknownNameError: an unknown option.
        CheckpointError: a folder's file that is missing or damaged.
    """
    given = {name: value for name, value in options.items() if value is not None}
    folders = {name: Path(given.pop(name)) for name in FOLDERS if name in given}
    if len(folders) > 1:
        raise ConfigError(f"detector '{PREFIX}{kind}': got weights and config; allowed: one of them")
    known = _fields(load_class(kind, "Config"))
    for name in given:
        if name not in (*known, *IMAGES):
            allowed = [*FOLDERS, *IMAGES, *known]
            what = f"option of detector '{PREFIX}{kind}'"
            raise UnknownNameError(what, name, allowed, backbone_hint(name))
    base = _read_folder(kind, next(iter(folders.values())), known) if folders else {}
    if "weights" not in folders:
        normal = {"mean": [0.0] * 3, "std": [1.0] * 3} if kind in MULTISCALE else _IMAGENET
        base = {"size": 640, **normal, **base}
        if kind in MULTISCALE:
            base["freeze_backbone_batch_norms"] = False  # frozen, random ones would never be trained
    if isinstance(base.get("backbone_config"), dict) and isinstance(given.get("backbone_config"), dict):
        given["backbone_config"] = base["backbone_config"] | given["backbone_config"]
    for name in IMAGES:
        if name not in base | given:
            where = f"{folders['weights']}/preprocessor_config.json"
            raise ConfigError(f"{where} gives no {name} of squares: give it as an option")
    return base | given


def _fields(config_class: type) -> list[str]:
    """Lists the fields of an architecture, without those of every config."""
    from transformers import PreTrainedConfig

    base = {field.name for field in fields(PreTrainedConfig)}
    return [f.name for f in fields(config_class) if f.name not in base and not f.name.startswith("_")]


def _read(file: Path) -> Line:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: got a {type(found).__name__}; allowed: an object")
    return found


def _read_folder(kind: str, folder: Path, known: list[str]) -> Line:
    """Returns the fields of a folder's architecture, and size and normalization of its images."""
    whole, file = _read(folder / "config.json"), folder / "preprocessor_config.json"
    if whole.get("model_type") != kind:
        raise ConfigError(f"{folder} holds a {whole.get('model_type')!r}; you asked for '{PREFIX}{kind}'")
    found = {name: whole[name] for name in known if whole.get(name) is not None}
    if kind == "detr" and "backbone_config" not in found and whole.get("use_timm_backbone", True):
        timm = {"model_type": "timm_backbone", "features_only": True, "out_indices": [1, 2, 3, 4]}
        found["backbone_config"] = timm | {"backbone": whole.get("backbone") or "resnet50"}
    if not file.is_file():
        return found
    images = _read(file)
    if not images.get("do_rescale", True) or abs(images.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ConfigError(f"{file}: do_rescale: the images are not scaled to [0, 1]")
    match images.pop("size", None):
        case {"height": int(side), "width": int(width)} if side == width:
            found["size"] = side
    if not images.get("do_normalize", True):
        images |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    normal = find_input(images, str(file))
    return found | {n: x for n, x in (("mean", normal.mean), ("std", normal.std)) if x is not None}


def build_config(kind: str, num_labels: int, values: Line) -> "PreTrainedConfig":
    """Builds transformers' config of resolved options.

    Raises:
        ConfigError: a wrong value, or another backbone than those that are known.
    """
    own = {name: value for name, value in values.items() if name not in IMAGES}
    try:
        if kind != "yolos":
            own["backbone_config"] = backbone = _backbone(kind, own.get("backbone_config") or {})
            channels = getattr(backbone, "hidden_sizes", None)
            if kind in MULTISCALE and channels:  # as many levels as the backbone has
                own.setdefault("encoder_in_channels", [channels[i - 1] for i in backbone.out_indices])
        found: PreTrainedConfig = load_class(kind, "Config")(**own, num_labels=num_labels)
    except ConfigError:
        raise
    except Exception as error:  # of transformers' own validation, of several classes
        raise ConfigError(f"detector '{PREFIX}{kind}' does not take {values!r}: {one_line(error)}") from error
    return found


def _backbone(kind: str, values: Line) -> Any:
    name = values.get("model_type", {"d_fine": "hgnet_v2", "detr": "resnet"}.get(kind, "rt_detr_resnet"))
    if name not in _BACKBONES:
        raise ConfigError(f"backbone_config.model_type: got {name!r}; allowed: {', '.join(_BACKBONES)}")
    if name == "timm_backbone":
        try:
            import timm
        except ImportError as error:
            raise MissingPackageError("backbone 'timm_backbone'", "timm", "timm") from error
        if not timm.is_model(values.get("backbone", "")):  # hf-hub:NAME is an address
            raise UnknownNameError("timm model", str(values.get("backbone")), timm.list_models())
    from transformers import AutoConfig

    config_class = type(AutoConfig.for_model(name))
    # A saved config has both of these.
    levels = next((n for n in ("out_indices", "out_features") if values.get(n) is not None), None)
    default = {} if levels else {"out_indices": [4] if kind == "detr" else [2, 3, 4]}
    known = {*_fields(config_class), levels}
    return config_class(**default | {key: value for key, value in values.items() if key in known})


def class_names(folder: Path) -> tuple[dict[str, int] | None, int]:
    """Returns the labels of a folder's named classes, from 1, and the number of all with the background."""
    names = _read(folder / "config.json").get("id2label") or {}
    if not isinstance(names, dict) or {str(i) for i in range(len(names))} != set(names):
        raise CheckpointError(f"{folder}/config.json: id2label: got {str(names)[:100]}; allowed: ids from 0")
    named = {str(n): int(i) + 1 for i, n in names.items() if not re.fullmatch(r"LABEL_\d+|N/A", str(n))}
    return named, 1 + (len(names) or 2)  # transformers leaves two out


def read_state(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of a folder, from safetensors alone; raises CheckpointError where there are none."""
    from safetensors.torch import load_file

    try:
        state = {key: value for f in folder.glob("model*.safetensors") for key, value in load_file(f).items()}
    except Exception as error:
        raise CheckpointError(f"{folder}: the weights cannot be read: {one_line(error)}") from error
    if not state:
        raise CheckpointError(f"{folder} has no weights in the format safetensors")
    return state
