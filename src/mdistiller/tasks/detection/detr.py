"""Detectors of transformers that predict a set of boxes: D-FINE, RT-DETR and RT-DETRv2.

They are built from options and from folders, which are read as data only: JSON and safetensors. Of a config
only the fields of the architecture are taken, and its backbone is one of `_BACKBONES` with random weights:
nothing in a folder runs code or fetches a file.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError, UnknownNameError, one_line
from mdistiller.models.backbone import backbone_hint
from mdistiller.models.own_input import find_input
from mdistiller.tasks.detection.adapter import DetectorAdapter, DetectorPass, Level, Targets
from mdistiller.types import Line

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList
    from transformers import PreTrainedConfig

PREFIX = "transformers/"
CLASSES = {"d_fine": "DFine", "rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2"}
"""Names of detectors, which are transformers' model types, and of their classes there."""
FOLDERS = ("weights", "config")
IMAGES = ("size", "mean", "std")
_BACKBONES = ("hgnet_v2", "resnet", "rt_detr_resnet")
_PER_CLASS = re.compile(r"(.*\.)?(class_embed\.\d+|enc_score_head|denoising_class_embed)\.\w+")
_COORDINATES = re.compile(r".*(bbox_embed\.\d+|enc_bbox_head|pre_bbox_head)")
QUERIES = ("queries.logits", "queries.boxes", "queries.sides", "queries.places")


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
        base = {"size": 640, "mean": [0.0] * 3, "std": [1.0] * 3, **base}
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
        own["backbone_config"] = backbone = _backbone(kind, own.get("backbone_config") or {})
        # As many levels as the backbone has.
        own.setdefault("encoder_in_channels", [backbone.hidden_sizes[i - 1] for i in backbone.out_indices])
        found: PreTrainedConfig = load_class(kind, "Config")(**own, num_labels=num_labels)
    except ConfigError:
        raise
    except Exception as error:  # of transformers' own validation, of several classes
        raise ConfigError(f"detector '{PREFIX}{kind}' does not take {values!r}: {one_line(error)}") from error
    return found


def _backbone(kind: str, values: Line) -> Any:
    name = values.get("model_type", "hgnet_v2" if kind == "d_fine" else "rt_detr_resnet")
    if name not in _BACKBONES:
        raise ConfigError(f"backbone_config.model_type: got {name!r}; allowed: {', '.join(_BACKBONES)}")
    from transformers import AutoConfig

    config_class = type(AutoConfig.for_model(name))
    # A saved config has both of these.
    levels = next((n for n in ("out_indices", "out_features") if values.get(n) is not None), None)
    default = {} if levels else {"out_indices": [2, 3, 4]}
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


class Detr(nn.Module):
    """A detector of transformers in torchvision's form: lists of images and targets, boxes in pixels.

    Args:
        detr: the model.
        images: `size`, the side of the square in pixels to which images are scaled, in training too; their
            `mean` and `std`.
    """

    detr: Any
    mean: Tensor
    std: Tensor

    def __init__(self, detr: Any, images: Line) -> None:
        super().__init__()
        self.detr, config = detr, detr.config
        self.size: int = images["size"]
        what = f"detector '{PREFIX}{config.model_type}'"
        if self.size < 32 or self.size % 32:
            raise ConfigError(f"{what}: size: got {self.size}; allowed: multiples of 32")
        places = sum((self.size // stride) ** 2 for stride in config.feat_strides)
        if config.num_queries > places:
            limit = f"allowed with a size of {self.size}: at most {places}"
            raise ConfigError(f"{what}: num_queries: got {config.num_queries}; {limit}")
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(images[name]).view(3, 1, 1), persistent=False)
        self.detector_adapter = DetrAdapter

    @property
    def coordinates(self) -> list[str]:
        """Paths of the modules whose outputs are coordinates."""
        return [path for path, _ in self.named_modules() if _COORDINATES.fullmatch(path)]

    def forward(self, images: list[Tensor], targets: Targets | None = None) -> Any:
        adapter = DetrAdapter(self)
        if self.training:
            assert targets is not None
            return adapter.train(images, targets)[0]
        out = adapter.run(adapter.prepare(images))
        boxes = [_corners(b, *i.shape[1:]) for b, i in zip(out.pred_boxes.float(), images, strict=True)]
        logits = out.logits.float()
        # The best pairs of a query and a class, as many as there are queries.
        scores, pairs = logits.sigmoid().flatten(1).topk(logits.shape[1])
        rows = zip(boxes, pairs // logits.shape[2], pairs % logits.shape[2], scores, strict=True)
        return [{"boxes": b[query], "labels": c + 1, "scores": s} for b, query, c, s in rows]

    @torch.no_grad()
    def select_classes(self, rows: Sequence[int | None]) -> None:
        """Gives the detector a new class for each of `rows`, which are old labels; None: random weights."""
        config = copy.deepcopy(self.detr.config)
        config.num_labels = len(rows) - 1
        new, old = type(self.detr)(config), self.detr.state_dict()
        for key, value in new.state_dict().items():
            if not _PER_CLASS.fullmatch(key):
                value.copy_(old[key])
                continue
            for label, row in enumerate(rows[1:]):
                if row is not None:
                    value[label] = old[key][row - 1]
            value[len(rows) - 1 :] = old[key][self.detr.config.num_labels :]  # that of no object
        self.detr = new


class DetrAdapter(DetectorAdapter):
    """Access to a detector of transformers: the maps of its encoder, and the predictions of its queries."""

    activation = None  # logits are of queries
    model: Detr

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.query_taps = QUERIES if self.model.detr.config.model_type == "d_fine" else QUERIES[:2]

    @property
    def levels(self) -> dict[str, Level]:
        config = self.model.detr.config
        return {f"stride{s}": Level(s, config.encoder_hidden_dim) for s in config.feat_strides}

    def prepare(self, images: list[Tensor]) -> "ImageList":
        from torchvision.models.detection.image_list import ImageList

        size = (self.model.size, self.model.size)
        squares = torch.stack([self._scaled(image, size) for image in images])
        return ImageList((squares - self.model.mean) / self.model.std, [size] * len(images))

    def _scaled(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        if torch.onnx.is_in_onnx_export():  # ONNX has no such operator
            with torch.autocast(image.device.type, enabled=False):
                rows, columns = (_weights(n, self.model.size, image) for n in image.shape[1:])
                return rows @ image @ columns.T
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]

    def run(self, images: "ImageList", labels: list[dict[str, Tensor]] | None = None) -> Any:
        """Runs the model on prepared images; returns its output."""
        return self.model.detr(images.tensors, labels=labels, return_dict=True)

    def features(self, images: "ImageList") -> dict[str, Tensor]:
        return self._run(images, None)[1]

    def _run(
        self, images: "ImageList", labels: list[dict[str, Tensor]] | None
    ) -> tuple[Any, dict[str, Tensor]]:
        """Runs the model; returns its output, and the levels with the predictions of its queries."""
        detr = self.model.detr
        decoder = detr.model.decoder
        before = decoder.training
        # Else D-FINE's has its last layer's predictions only. The layers keep their mode.
        decoder.training = True
        try:
            out = self.run(images, labels)
        finally:
            decoder.training = before
        count = detr.config.num_queries  # after those of denoising
        found = {
            "queries.logits": out.intermediate_logits[:, -detr.config.decoder_layers :, -count:],
            "queries.boxes": out.intermediate_reference_points[:, -detr.config.decoder_layers :, -count:],
        }
        if self.query_taps == QUERIES:
            found["queries.sides"] = out.intermediate_predicted_corners[:, :, -count:].unflatten(3, (4, -1))
            found["queries.places"] = self._places(out.initial_reference_points[:, :, -count:])
        return out, {**dict(zip(self.levels, out.encoder_last_hidden_state, strict=True)), **found}

    @torch.no_grad()
    def _places(self, boxes: Tensor) -> Tensor:
        """Returns the coordinate of each side that each bin stands for, [B, L, Q, 4, bins]."""
        from transformers.models.d_fine.modeling_d_fine import weighting_function

        decoder = self.model.detr.model.decoder
        scale = decoder.reg_scale.abs()
        distance = 0.5 * scale + weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
        away = boxes[..., 2:, None] / scale * distance
        return torch.cat([boxes[..., :2, None] - away, boxes[..., :2, None] + away], -2)

    def train(self, images: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], DetectorPass]:
        from torchvision.ops import box_convert

        prepared = self.prepare(images)
        objects, labels = [], []
        for image, target, (height, width) in zip(images, targets, prepared.image_sizes, strict=True):
            scale = target["boxes"].new_tensor([1 / image.shape[2], 1 / image.shape[1]]).repeat(2)
            part = target["boxes"] * scale
            labels.append(
                {"class_labels": target["labels"] - 1, "boxes": box_convert(part, "xyxy", "cxcywh")}
            )
            objects.append(part * part.new_tensor([width, height]).repeat(2))
        out, found = self._run(prepared, labels)
        losses: dict[str, Tensor] = {}
        for name, value in out.loss_dict.items():  # loss_bbox, loss_bbox_aux_0, loss_bbox_dn_0, …
            kind = "_".join(name.split("_")[:2])
            losses[kind] = losses.get(kind, 0) + value
        if not any(map(len, objects)):  # those of denoising are unused, and DDP waits for their gradients
            unused = [p for path, p in self.model.named_parameters() if "denoising" in path]
            losses["loss_bbox"] = losses["loss_bbox"] + sum(0.0 * p.sum() for p in unused)
        return losses, DetectorPass(
            images=prepared,
            features=found,
            strides={name: level.stride for name, level in self.levels.items()},
            logits=None,
            labels=None,
            objects=objects,
            anchors=[self._squares(found)] * len(images),
            per_position=(1,) * len(self.levels),
        )

    def _squares(self, features: dict[str, Tensor]) -> Tensor:
        """Returns a square around each cell, four strides wide, by which FGFI finds cells near objects."""
        found = []
        for name, (stride, _) in self.levels.items():
            x = features[name]
            rows, columns = ((torch.arange(n, device=x.device) + 0.5) * stride for n in x.shape[2:])
            centers = torch.cartesian_prod(rows, columns).flip(1)
            found.append(torch.cat([centers - 2 * stride, centers + 2 * stride], 1))
        return torch.cat(found)


def create_detr(kind: str, num_classes: int, **options: Any) -> Detr:
    """Builds a detector of transformers; `num_classes` counts the background, the others are as in `resolve`.

    Raises:
        ConfigError, UnknownNameError, CheckpointError, MissingPackageError: as `resolve`.
        CheckpointError: also for weights of other classes or of another architecture.
    """
    values = resolve(kind, options)
    config, model_class = build_config(kind, num_classes - 1, values), load_class(kind, "ForObjectDetection")
    if options.get("weights") is None:
        try:
            model = model_class(config)
        except Exception as error:  # of values that do not suit each other
            what = f"detector '{PREFIX}{kind}' does not take {options!r}"
            raise ConfigError(f"{what}: {one_line(error)}") from error
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # RT-DETR's start near 0, of which little is learned
                nn.init.ones_(module.weight)
        return Detr(model, values)
    folder = Path(options["weights"])
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=read_state(folder),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if wrong := [name for kind in report.values() for name in kind]:
        what = "belongs to another architecture than its config, or to other classes"
        raise CheckpointError(f"{folder} {what}: {wrong[0]}")
    return Detr(model, values)


def _corners(boxes: Tensor, height: Any, width: Any) -> Tensor:
    """Converts boxes of centers and sizes, fractions of an image, to corners in pixels."""
    from torchvision.ops import box_convert

    edges = zip(box_convert(boxes, "cxcywh", "xyxy").unbind(1), (width, height) * 2, strict=True)
    return torch.stack([edge * side for edge, side in edges], 1)


def _weights(length: Any, size: Any, like: Tensor) -> Tensor:
    """Returns the matrix [size, length] that scales a side bilinearly, with antialiasing."""
    scale = length / size if isinstance(length, int) else length.to(like) / size
    centers = (torch.arange(size, device=like.device).to(like) + 0.5) * scale
    distance = (torch.arange(length, device=like.device).to(like) + 0.5)[None] - centers[:, None]
    support = torch.clamp(torch.as_tensor(scale, device=like.device), min=1.0)
    weights = (1 - distance.abs() / support).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
