"""Training pass of a torchvision detector with its features, and a frozen detector as a teacher."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mdistiller.distiller import EvalMode
from mdistiller.errors import ConfigError, TapError
from mdistiller.methods.base import promote
from mdistiller.taps import add_prefix, strip_prefix
from mdistiller.types import Outputs

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

OVERLAP = ".overlap"
"""Suffix of a level's name; the tap of how well the anchors of the level fit an object."""


def is_two_stage(model: nn.Module) -> bool:
    """Whether a detector has proposals and a box head (torchvision's GeneralizedRCNN or a subclass).

    Raises:
        ConfigError: the model is neither that nor built like torchvision's RetinaNet and FCOS.
    """
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

    if isinstance(model, GeneralizedRCNN):
        return True
    modules = dict(model.named_modules())
    if {"transform", "backbone", "head.classification_head", "anchor_generator"} <= modules.keys():
        return False
    raise ConfigError(
        f"{type(model).__name__} is no detector that can be distilled; allowed: torchvision's "
        "GeneralizedRCNN (Faster and Mask R-CNN), RetinaNet and FCOS, and subclasses of these"
    )


def _levels(features: Any) -> dict[str, Tensor]:
    return {"0": features} if isinstance(features, Tensor) else dict(features)


class Pyramid(nn.Module):
    """A detector's backbone as a model of images [B, 3, H, W], with its levels as taps.

    Methods are built for it. A call returns zeros [B, 2] in place of logits.
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
        for name, feature in _levels(self.backbone(image)).items():
            self.levels[name](feature)
        return image.new_zeros(len(image), 2)


class DetectorPass(NamedTuple):
    """Intermediate results of a detector's training pass, in pixels of its own images.

    images: the padded batch [B, 3, H, W], and each image's (height, width) in it.
    features: the levels by name, [B, C, h, w] each.
    anchors: per image [anchors, 4].
    logits: [proposals of the batch, classes], or of one-stage detectors [B, anchors, classes].
    labels: int64, one for each sampled proposal; empty for one-stage detectors.
    proposals: per image the sampled proposals [P, 4]; None for one-stage detectors.
    boxes: per image the objects' boxes [N, 4].
    """

    images: "ImageList"
    features: dict[str, Tensor]
    anchors: list[Tensor]
    logits: Tensor
    labels: Tensor
    proposals: list[Tensor] | None
    boxes: list[Tensor]


_COORDINATES = ("backbone", "rpn.head", "head", "roi_heads.box_predictor", "roi_heads.mask_predictor")
_TWO_STAGE = ("rpn.anchor_generator", "roi_heads.box_roi_pool", "roi_heads.box_predictor")
_ONE_STAGE = ("anchor_generator", "head")


@contextmanager
def float32_coordinates(model: nn.Module) -> Iterator[None]:
    """Context in which a detector computes coordinates in float32 under autocast.

    torchvision computes anchors and boxes in the dtype of the features and the predicted offsets; in bfloat16
    a coordinate of 1,000 has an error of up to 4. Without autocast nothing changes.
    """
    with ExitStack() as hooks:
        for path in _COORDINATES:
            with suppress(AttributeError):  # no detector has all of these modules
                module = model.get_submodule(path)
                hooks.enter_context(module.register_forward_hook(lambda m, args, out: _promote_all(out)))
        yield


def _promote_all(value: Any) -> Any:
    if isinstance(value, Tensor):
        return promote(value)
    if isinstance(value, dict):
        return type(value)((key, _promote_all(part)) for key, part in value.items())
    return type(value)(map(_promote_all, value)) if isinstance(value, list | tuple) else value


@contextmanager
def _recorded(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Context that records the arguments and the output of modules, by module path."""
    calls: dict[str, tuple[Any, Any]] = {}
    with ExitStack() as hooks:
        for path in paths:
            record = lambda m, args, out, path=path: calls.update({path: (args, out)})  # noqa: E731
            hooks.enter_context(model.get_submodule(path).register_forward_hook(record))
        yield calls


class TappedDetector(nn.Module):
    """A detector whose call returns its losses and a `DetectorPass`; its state dict is the detector's own.

    Hooks are on the detector, which suits `is_two_stage`, during a call only.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.two_stage = is_two_stage(model)
        self.paths = ("transform", "backbone", *(_TWO_STAGE if self.two_stage else _ONE_STAGE))
        self.model = model
        self.register_state_dict_post_hook(strip_prefix)
        self.register_load_state_dict_pre_hook(add_prefix)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], DetectorPass]:
        """Computes the detector's own losses by torchvision's names; only in training mode.

        Raises:
            TapError: a module of the detector did not run.
        """
        with float32_coordinates(self.model), _recorded(self.model, self.paths) as calls:
            losses: dict[str, Tensor] = self.model(images, targets)
        for path in self.paths:
            if path not in calls:
                raise TapError(f"the detector's module {path!r} did not run in this pass")
        (batch, objects), levels, anchors, *_, head = (calls[path][1] for path in self.paths)
        boxes = [target["boxes"] for target in objects]
        proposals: list[Tensor] | None = None
        if self.two_stage:
            logits, proposals = head[0], calls["roi_heads.box_roi_pool"][0][1]
            dtype = proposals[0].dtype
            # Sampling ends with proposals that are matched, so matching them again gives the same labels.
            _, matched = self.model.roi_heads.assign_targets_to_proposals(  # type: ignore[operator, union-attr]
                proposals, [b.to(dtype) for b in boxes], [target["labels"] for target in objects]
            )
            labels = torch.cat(matched)
        else:
            logits = head["cls_logits"]
            labels = logits.new_empty(0, dtype=torch.int64)
        return losses, DetectorPass(batch, _levels(levels), anchors, logits, labels, proposals, boxes)


def outputs_of(student: DetectorPass, taps: Iterable[str]) -> Outputs:
    """Returns the student's outputs for a method: logits, and the tapped levels or overlaps.

    The logits are [proposals of the batch, classes] or [B · anchors, classes].
    """
    taps = tuple(taps)
    known = student.features
    if any(name.endswith(OVERLAP) for name in taps):
        known = known | overlaps(student)
    return Outputs(student.logits.flatten(0, -2), {name: known[name] for name in taps})


def overlaps(student: DetectorPass) -> dict[str, Tensor]:
    """Computes `NAME.overlap` [B, 1, h, w] of each level NAME: the best fit of the anchors to an object.

    The fit of an anchor to an object is their intersection over union, divided by the best one that any
    anchor of any level has with that object. It is 0 in an image without objects.
    """
    from torchvision.ops import box_iou

    grids = [feature.shape[2:] for feature in student.features.values()]
    count = len(student.anchors[0])
    each = count // sum(h * w for h, w in grids)  # anchors at a position, the same for every level
    fits = [anchors.new_zeros(count) for anchors in student.anchors]
    for i, (boxes, anchors) in enumerate(zip(student.boxes, student.anchors, strict=True)):
        if len(boxes):
            iou = box_iou(boxes.to(anchors.dtype), anchors)
            best = iou.amax(1, keepdim=True).clamp(min=torch.finfo(iou.dtype).tiny)
            fits[i] = (iou / best).amax(0)
    parts = torch.stack(fits).split([h * w * each for h, w in grids], 1)
    return {
        f"{name}{OVERLAP}": part.unflatten(1, (h, w, each)).amax(3)[:, None]
        for name, part, (h, w) in zip(student.features, parts, grids, strict=True)
    }


class DetectionTeacher(nn.Module):
    """A detector that runs in evaluation mode without gradients, on the student's proposals.

    The detector is not changed: its mode is put back after each pass, and its parameters keep
    `requires_grad`. It normalises the images itself. Detectors of this package take them in the student's
    size; others scale them as in evaluation. The proposals are then scaled to the teacher's image, and its
    levels are sampled on the student's grid.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.two_stage = is_two_stage(model)
        self.model = model
        self.training = False

    def train(self, mode: bool = True) -> Self:
        return self  # the teacher stays in evaluation mode, and the model keeps its own mode

    def forward(
        self, images: list[Tensor], student: DetectorPass, taps: Iterable[str], *, logits: bool
    ) -> Outputs:
        """Computes the teacher's outputs for a training pass of the student, detached.

        The images are those that the student got, the taps names of the teacher's levels. Without `logits`,
        the logits are empty.

        Raises:
            ConfigError: one-stage detectors with different numbers of anchors; different numbers of levels,
                where the teacher scales the images.
        """
        # Not `inference_mode`: the outputs enter autograd.
        with torch.no_grad(), EvalMode(self.model.modules()), float32_coordinates(self.model):
            own = self._prepare(images)
            levels = _levels(self.model.get_submodule("backbone")(own.tensors))
            features = {name: levels[name] for name in taps}
            to = student.images
            if (own.image_sizes, own.tensors.shape) != (to.image_sizes, to.tensors.shape):
                if len(levels) != len(student.features):
                    raise ConfigError(
                        f"teacher: got {len(levels)} feature levels ({', '.join(levels)}); allowed, where the"
                        f" teacher scales the images: {len(student.features)}, as the student has"
                    )
                grids = dict(zip(levels, student.features.values(), strict=True))
                features = {n: _aligned(f, own, to, grids[n].shape[2:]) for n, f in features.items()}
            if not logits:
                return Outputs(student.logits.new_empty(0), features)
            compute = self._box_logits if self.two_stage else self._dense_logits
            return Outputs(compute(levels, own, student), features)

    def _prepare(self, images: list[Tensor]) -> "ImageList":
        from torchvision.models.detection.image_list import ImageList

        transform: Any = self.model.transform
        ready = [transform.normalize(image) for image in images]
        if not getattr(transform, "_skip_resize", False):
            ready = [transform.resize(image)[0] for image in ready]
        sizes = [(image.shape[1], image.shape[2]) for image in ready]
        return ImageList(transform.batch_images(ready, transform.size_divisible), sizes)

    def _box_logits(self, levels: dict[str, Tensor], own: "ImageList", student: DetectorPass) -> Tensor:
        assert student.proposals is not None
        heads: Any = self.model.roi_heads
        scales = map(_scale, own.image_sizes, student.images.image_sizes)
        pairs = zip(student.proposals, scales, strict=True)
        proposals = [boxes * boxes.new_tensor(scale).repeat(2) for boxes, scale in pairs]
        pooled = heads.box_roi_pool(levels, proposals, own.image_sizes)
        logits: Tensor = heads.box_predictor(heads.box_head(pooled))[0]
        return logits

    def _dense_logits(self, levels: dict[str, Tensor], own: "ImageList", student: DetectorPass) -> Tensor:
        classify: Any = self.model.get_submodule("head.classification_head")
        logits = promote(classify(list(levels.values())))
        if logits.shape[:2] != student.logits.shape[:2]:
            counts = f"{student.logits.shape[1]} and {logits.shape[1]} anchors in an image"
            why = "logits are compared anchor by anchor, so both need the same anchors and image sizes"
            raise ConfigError(f"student and teacher have {counts}; {why}")
        return logits.flatten(0, 1)


def _scale(to: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Returns the factors of x and y from an image of (height, width) `size` to one of size `to`."""
    return to[1] / size[1], to[0] / size[0]


def _aligned(feature: Tensor, own: "ImageList", student: "ImageList", grid: torch.Size) -> Tensor:
    """Samples a level [B, C, h, w] of the teacher's images on the student's grid: [B, C, *grid]."""
    from torchvision.ops import roi_align

    height, width = student.tensors.shape[2:]
    canvases = [
        feature.new_tensor([[0.0, 0.0, width * x, height * y]], dtype=torch.float32)
        for x, y in map(_scale, own.image_sizes, student.image_sizes)
    ]
    # Strides are powers of two; padding may round a level's size up.
    stride = 2 ** round(math.log2(own.tensors.shape[3] / feature.shape[3]))
    return roi_align(feature.float(), canvases, (*grid,), 1 / stride, sampling_ratio=2, aligned=True)
