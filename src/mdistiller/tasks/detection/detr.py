"""Detectors of transformers that predict a set of boxes: D-FINE, RT-DETR, RT-DETRv2, DETR and YOLOS."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import CheckpointError, ConfigError, one_line
from mdistiller.tasks.detection.adapter import DetectorAdapter, DetectorPass, Level, Targets, recorded
from mdistiller.tasks.detection.detr_config import (
    MULTISCALE,
    PREFIX,
    build_config,
    load_class,
    read_state,
    resolve,
)
from mdistiller.types import Line

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

_PER_CLASS = re.compile(
    r"(.*\.)?(class_embed\.\d+|enc_score_head|denoising_class_embed|class_labels_classifier(\.layers\.2)?)\.\w+"
)
_COORDINATES = re.compile(r".*(bbox_embed\.\d+|enc_bbox_head|pre_bbox_head|bbox_predictor)")
QUERIES = ("queries.logits", "queries.boxes", "queries.sides", "queries.places")


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
        self.kind: str = config.model_type
        self.size: int = images["size"]
        if self.kind in MULTISCALE:
            what = f"detector '{PREFIX}{self.kind}'"
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
        if self.kind in MULTISCALE:  # the best pairs of a query and a class, as many as there are queries
            scores, pairs = logits.sigmoid().flatten(1).topk(logits.shape[1])
            queries, classes = pairs // logits.shape[2], pairs % logits.shape[2]
            boxes = [b[q] for b, q in zip(boxes, queries, strict=True)]
        else:  # the last class is that of no object
            scores, classes = logits.softmax(2)[:, :, :-1].max(2)
        rows = zip(boxes, classes, scores, strict=True)
        return [{"boxes": b, "labels": c + 1, "scores": s} for b, c, s in rows]

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
        self.query_taps = QUERIES if self.model.kind == "d_fine" else QUERIES[:2]

    @property
    def levels(self) -> dict[str, Level]:
        config = self.model.detr.config
        if self.model.kind in MULTISCALE:
            return {f"stride{s}": Level(s, config.encoder_hidden_dim) for s in config.feat_strides}
        if self.model.kind == "yolos":
            patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
            return {f"stride{patch}": Level(patch, config.hidden_size)}
        stride = getattr(config.backbone_config, "output_stride", None) or 32
        return {f"stride{stride}": Level(stride, config.d_model)}

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
        detr, kind = self.model.detr, self.model.kind
        if kind not in MULTISCALE:
            with recorded(detr, ["model.input_projection"] if kind == "detr" else []) as calls:
                out = self.run(images, labels)
            if kind == "detr":
                tokens, grid = out.encoder_last_hidden_state, calls["model.input_projection"].result.shape[2:]
            else:
                (stride,) = (level.stride for level in self.levels.values())
                grid = torch.Size(int(side // stride) for side in images.tensors.shape[2:])
                # After the class token, before those that detect.
                tokens = out.last_hidden_state[:, 1 : 1 + grid.numel()]
            maps = [tokens.transpose(1, 2).unflatten(2, grid)]
            logits = out.logits - out.logits.logsumexp(2, keepdim=True)
            logits = logits - torch.log1p(-logits.exp().clamp(max=1 - 1e-6))  # each class against all others
            queries = {"queries.logits": logits[:, None, :, :-1], "queries.boxes": out.pred_boxes[:, None]}
            return out, {**dict(zip(self.levels, maps, strict=True)), **queries}
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
        if kind == "d_fine":
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
        # Those of squares are weighted already.
        config, factors = self.model.detr.config, {"loss_bbox": 1.0, "loss_giou": 1.0}
        if self.model.kind not in MULTISCALE:
            factors = {"loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}
        losses: dict[str, Tensor] = {}
        for name, value in out.loss_dict.items():  # loss_bbox, loss_bbox_aux_0, loss_bbox_dn_0, …
            kind = "_".join(name.split("_")[:2])
            if kind != "cardinality_error":
                losses[kind] = losses.get(kind, 0) + factors.get(kind, 1.0) * value
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
        if kind == "detr":  # transformers freezes its backbone, which is random here
            model.model.backbone.requires_grad_(True)
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
