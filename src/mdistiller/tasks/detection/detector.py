"""What a torchvision detector shows of itself in one pass, and a frozen one as a teacher of another."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, roi_align

from mdistiller.errors import ConfigError, TapError
from mdistiller.methods.base import promote
from mdistiller.taps import add_prefix, strip_prefix
from mdistiller.types import Outputs

OVERLAP = ".overlap"
"""Behind a level's name: the tap that says how well the anchors there fit an object."""


def is_two_stage(model: nn.Module) -> bool:
    """Whether a detector has proposals and a box head (torchvision's GeneralizedRCNN, or a child of it).

    Raises:
        ConfigError: it is neither that nor of the make of torchvision's RetinaNet and FCOS.
    """
    if isinstance(model, GeneralizedRCNN):
        return True
    modules = dict(model.named_modules())
    if all(
        part in modules for part in ("transform", "backbone", "head.classification_head", "anchor_generator")
    ):
        return False
    raise ConfigError(
        f"{type(model).__name__} is no detector that can be distilled; allowed: torchvision's "
        "GeneralizedRCNN (Faster and Mask R-CNN), RetinaNet and FCOS, and children of these"
    )


def _levels(features: Any) -> dict[str, Tensor]:
    return {"0": features} if isinstance(features, Tensor) else dict(features)


class Pyramid(nn.Module):
    """A detector's backbone as a model of images [B, 3, H, W] whose levels are taps, by their names.

    It is what methods look at when they are built. Its call gives no logits, but zeros [B, 2].
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        is_two_stage(detector)
        self.backbone = detector.get_submodule("backbone")
        bare = copy.deepcopy(self.backbone).to("meta").eval()
        with torch.no_grad():
            self.names = tuple(_levels(bare(torch.zeros(1, 3, 64, 64, device="meta"))))
        self.levels = nn.ModuleDict({name: nn.Identity() for name in self.names})
        self.tap_points = {name: f"levels.{name}" for name in self.names}

    def forward(self, image: Tensor) -> Tensor:
        """Images to zeros; the levels pass by."""
        for name, feature in _levels(self.backbone(image)).items():
            self.levels[name](feature)
        return image.new_zeros(len(image), 2)


class Seen(NamedTuple):
    """One training pass of a detector, in the geometry of its own images.

    images: the padded batch [B, 3, H, W], and each image's (height, width) in it.
    features: the levels by name, [B, C, h, w] each.
    anchors: per image [anchors, 4].
    logits: two-stage: [proposals of the batch, classes]; one-stage: [B, anchors, classes].
    labels: int64, one for each sampled proposal; empty for one-stage detectors.
    proposals: per image the sampled proposals [P, 4]; None for one-stage detectors.
    boxes: per image the objects' boxes [N, 4].
    """

    images: ImageList
    features: dict[str, Tensor]
    anchors: list[Tensor]
    logits: Tensor
    labels: Tensor
    proposals: list[Tensor] | None
    boxes: list[Tensor]


class _Notes:
    """What modules took and gave in the pass under way; idle otherwise, so that it keeps no tensor alive."""

    def __init__(self) -> None:
        self.active = False
        self.taken: dict[str, Any] = {}
        self.given: dict[str, Any] = {}

    def start(self, active: bool) -> None:
        self.active, self.taken, self.given = active, {}, {}


class _Hook:
    """A forward hook as an object: closures would break `deepcopy` and `pickle` of the detector."""

    def __init__(self, notes: _Notes, place: str) -> None:
        self.notes, self.place = notes, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.notes.active:
            self.notes.taken[self.place], self.notes.given[self.place] = args, output


class _Float32:
    """A forward hook that gives half-precision outputs as float32, in tensors, dicts, lists and tuples."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.convert(output)

    def convert(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return promote(value)
        if isinstance(value, dict):
            return type(value)((key, self.convert(part)) for key, part in value.items())
        return type(value)(map(self.convert, value)) if isinstance(value, list | tuple) else value


_COORDINATES = ("backbone", "rpn.head", "head", "roi_heads.box_predictor", "roi_heads.mask_predictor")


def keep_coordinates(model: nn.Module) -> None:
    """Let a detector compute with coordinates in float32 under autocast; without it nothing changes.

    torchvision takes anchors and boxes in the type of the features and of the predicted offsets: in
    bfloat16 a coordinate of 1,000 would be one of 1,000 ± 4.
    """
    modules = dict(model.named_modules())
    for place in _COORDINATES:
        if place in modules:
            hooks = modules[place]._forward_hooks
            if not any(isinstance(hook, _Float32) for hook in hooks.values()):
                modules[place].register_forward_hook(_Float32(), prepend=True)


class TappedDetector(nn.Module):
    """A detector whose training pass gives its losses and what else it `Seen`; its state dict is its own.

    Args:
        model: a torchvision detector; see `is_two_stage`.
    """

    _TWO_STAGE = ("transform", "backbone", "rpn.anchor_generator", "roi_heads.box_roi_pool")
    _ONE_STAGE = ("transform", "backbone", "anchor_generator", "head")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.two_stage = is_two_stage(model)
        self.places = (*self._TWO_STAGE, "roi_heads.box_predictor") if self.two_stage else self._ONE_STAGE
        self.model = model
        keep_coordinates(model)
        self._notes = _Notes()
        for place in self.places:
            model.get_submodule(place).register_forward_hook(_Hook(self._notes, place))
        self.register_state_dict_post_hook(strip_prefix)
        self.register_load_state_dict_pre_hook(add_prefix)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Seen]:
        """The detector's own losses by torchvision's names, and what it saw. In training mode alone."""
        self._notes.start(True)
        try:
            losses: dict[str, Tensor] = self.model(images, targets)
            missing = [place for place in self.places if place not in self._notes.given]
            if missing:
                raise TapError(f"the detector's module {missing[0]!r} did not run in this pass")
            seen = self._seen()
        finally:
            self._notes.start(False)
        return losses, seen

    def _seen(self) -> Seen:
        taken, given = self._notes.taken, self._notes.given
        images, targets = given["transform"]
        boxes = [target["boxes"] for target in targets]
        features = _levels(given["backbone"])
        if not self.two_stage:
            logits = given["head"]["cls_logits"]
            labels = logits.new_empty(0, dtype=torch.int64)
            return Seen(images, features, given["anchor_generator"], logits, labels, None, boxes)
        proposals: list[Tensor] = taken["roi_heads.box_roi_pool"][1]
        heads = self.model.roi_heads
        # Sampling ends with proposals that are matched, so matching them again gives the labels they had.
        _, labels = heads.assign_targets_to_proposals(  # type: ignore[operator, union-attr]
            proposals, [b.to(proposals[0].dtype) for b in boxes], [target["labels"] for target in targets]
        )
        logits = given["roi_heads.box_predictor"][0]
        anchors = given["rpn.anchor_generator"]
        return Seen(images, features, anchors, logits, torch.cat(labels), proposals, boxes)


def outputs_of(seen: Seen, taps: Iterable[str]) -> Outputs:
    """What a method gets of the student: its logits and the tapped levels or overlaps.

    The logits are [proposals of the batch, classes] or [B · anchors, classes].
    """
    taps = tuple(taps)
    features = {name: seen.features[name] for name in taps if not name.endswith(OVERLAP)}
    if len(features) < len(taps):
        features |= {name: value for name, value in overlaps(seen).items() if name in taps}
    return Outputs(seen.logits.flatten(0, -2), features)


def overlaps(seen: Seen) -> dict[str, Tensor]:
    """For each level NAME, `NAME.overlap` [B, 1, h, w]: the best fit of the anchors there to an object.

    The fit of an anchor to an object is their intersection over union, divided by the best one that any
    anchor of any level has with that object; 0 everywhere in an image without objects.
    """
    grids = [feature.shape[2:] for feature in seen.features.values()]
    count = len(seen.anchors[0])
    each = count // sum(h * w for h, w in grids)  # anchors at a position, where every level has as many
    fits = []
    for boxes, anchors in zip(seen.boxes, seen.anchors, strict=True):
        iou = box_iou(boxes.to(anchors.dtype), anchors)
        best = iou.amax(1, keepdim=True) if len(boxes) else iou.new_zeros(0, 1)
        fit = iou / best.clamp(min=torch.finfo(iou.dtype).tiny)
        fits.append(fit.amax(0) if len(boxes) else anchors.new_zeros(count))
    parts = torch.stack(fits).split([h * w * each for h, w in grids], 1)
    return {
        f"{name}{OVERLAP}": part.unflatten(1, (h, w, each)).amax(3)[:, None]
        for name, part, (h, w) in zip(seen.features, parts, grids, strict=True)
    }


class DetectionTeacher(nn.Module):
    """A frozen detector: eval mode for good, no gradient, no part of any checkpoint.

    It normalises the images its own way. Detectors of this package take them in the size that the student
    gets; others scale them as they do in evaluation. Whatever the size, its levels are brought into the
    geometry of the student's, and its box head runs on the student's proposals, scaled to its image.
    No weight or buffer of it changes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.two_stage = is_two_stage(model)
        self.model = model
        keep_coordinates(model)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: list[Tensor], seen: Seen, taps: Iterable[str], *, logits: bool) -> Outputs:
        """The teacher's outputs for the student's pass: the levels `taps`, and, if asked for, logits.

        Args:
            images: the batch's images as they were given to the student.
            seen: the student's pass.
            taps: names of the teacher's levels.
            logits: whether they are wanted; else they are empty.
        """
        own = self._prepare(images)
        levels = _levels(self.model.get_submodule("backbone")(own.tensors))
        same = own.image_sizes == seen.images.image_sizes and own.tensors.shape == seen.images.tensors.shape
        taps = tuple(taps)
        features = {name: levels[name] for name in taps}
        if not same:
            grids = dict(zip(levels, seen.features.values(), strict=True))
            features = {
                name: _aligned(feature, own, seen.images, grids[name].shape[2:])
                for name, feature in features.items()
            }
        result = seen.logits.new_empty(0)
        if logits:
            result = (
                self._box_logits(levels, own, seen) if self.two_stage else self._dense_logits(levels, seen)
            )
        return Outputs(result, features)

    def _prepare(self, images: list[Tensor]) -> ImageList:
        transform: Any = self.model.transform
        ready = [transform.normalize(image) for image in images]
        if not getattr(transform, "_skip_resize", False):
            ready = [transform.resize(image)[0] for image in ready]
        sizes = [(image.shape[1], image.shape[2]) for image in ready]
        return ImageList(transform.batch_images(ready, transform.size_divisible), sizes)

    def _box_logits(self, levels: dict[str, Tensor], own: ImageList, seen: Seen) -> Tensor:
        assert seen.proposals is not None
        heads: Any = self.model.roi_heads
        proposals = [
            boxes * boxes.new_tensor(_scale(to, size)).repeat(2)
            for boxes, to, size in zip(seen.proposals, own.image_sizes, seen.images.image_sizes, strict=True)
        ]
        pooled = heads.box_roi_pool(levels, proposals, own.image_sizes)
        logits: Tensor = heads.box_predictor(heads.box_head(pooled))[0]
        return logits

    def _dense_logits(self, levels: dict[str, Tensor], seen: Seen) -> Tensor:
        classify: Any = self.model.get_submodule("head.classification_head")
        logits = promote(classify(list(levels.values())))
        if logits.shape[:2] != seen.logits.shape[:2]:
            raise ConfigError(
                f"student and teacher have {seen.logits.shape[1]} and {logits.shape[1]} anchors in an image; "
                "logits are compared anchor by anchor, so both need the same anchors and image sizes"
            )
        return logits.flatten(0, 1)


def _scale(to: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Factors of x and y from an image of (height, width) `size` to the same image of size `to`."""
    return to[1] / size[1], to[0] / size[0]


def _aligned(feature: Tensor, own: ImageList, student: ImageList, grid: torch.Size) -> Tensor:
    """A level [B, C, h, w] of the teacher's images sampled where the student's grid lies, [B, C, *grid]."""
    height, width = student.tensors.shape[2:]
    canvases = [
        feature.new_tensor([[0.0, 0.0, width * x, height * y]], dtype=torch.float32)
        for x, y in map(_scale, own.image_sizes, student.image_sizes)
    ]
    # Strides are powers of two; a level's size alone would not say so where padding was rounded up.
    stride = 2 ** round(math.log2(own.tensors.shape[3] / feature.shape[3]))
    size = (grid[0], grid[1])
    return roi_align(feature.float(), canvases, size, 1 / stride, sampling_ratio=2, aligned=True)
