"""Adapters of torchvision's detectors and of backbones, and the adapter of a model."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import promote
from mdistiller.methods.features import to_map
from mdistiller.methods.tokens import last_patches
from mdistiller.models.layouts import Layout
from mdistiller.models.own_input import OwnInput
from mdistiller.taps import Taps, logits_if_any, probe, tap_layouts, without_storage
from mdistiller.tasks.detection.adapter import (
    Activation,
    DetectorAdapter,
    DetectorPass,
    Level,
    Targets,
    float32_coordinates,
    recorded,
)
from mdistiller.tasks.detection.levels import scale_between
from mdistiller.teacher import EvalMode
from mdistiller.types import IGNORED, DataInfo

if TYPE_CHECKING:
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
    from torchvision.models.detection.fcos import FCOSHead
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.models.detection.ssd import SSD, SSDHead

_BRANCHES = ("classification_head", "regression_head")
_SIDE = 512  # of the square image by which strides are measured


def adapter_of(model: nn.Module) -> DetectorAdapter:
    """Returns the adapter of a detector: its own `detector_adapter`, or that of its torchvision class.

    Raises:
        ConfigError: the model is neither a detector of torchvision, nor built like one, nor has an adapter.
    """
    if isinstance(model, OwnInput):
        return BackboneAdapter(model)
    own = getattr(model, "detector_adapter", None)
    if own is not None:
        if not (isinstance(own, type) and issubclass(own, DetectorAdapter)):
            raise ConfigError(
                f"{type(model).__name__}.detector_adapter: got {own!r}; allowed: a subclass of "
                "mdistiller.DetectorAdapter"
            )
        return own(model)
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.ssd import SSD

    if isinstance(model, GeneralizedRCNN):
        return ProposalAdapter(model)
    if isinstance(model, SSD):
        return SSDAdapter(model)
    modules = dict(model.named_modules())
    if {"transform", "backbone", "head.classification_head", "anchor_generator"} <= modules.keys():
        return DenseAdapter(model)
    raise ConfigError(
        f"{type(model).__name__} is no detector that can be distilled; allowed: torchvision's Faster, Mask "
        "and Keypoint R-CNN, RetinaNet, FCOS, SSD and SSDlite, subclasses of these, and a module with the "
        "attribute detector_adapter, a subclass of mdistiller.DetectorAdapter"
    )


class TorchvisionAdapter(DetectorAdapter):
    """Base class: torchvision's detectors have a `transform` of the images and a `backbone` with levels."""

    model: "GeneralizedRCNN | RetinaNet | FCOS | SSD"
    anchor_generator = "anchor_generator"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._levels = self._measure()

    @property
    def levels(self) -> dict[str, Level]:
        return self._levels

    def _measure(self) -> dict[str, Level]:
        height, width = reversed(getattr(self.model.transform, "fixed_size", None) or (_SIDE, _SIDE))
        found = _run_backbone(self.model.backbone, height, width)
        steps = getattr(self._generator, "steps", None) or [width / f.shape[3] for f in found.values()]
        pairs = zip(found.items(), steps, strict=True)
        return {name: Level(float(step), feature.shape[1]) for (name, feature), step in pairs}

    @property
    def strides(self) -> dict[str, float]:
        """Strides of the levels by name."""
        return {name: level.stride for name, level in self.levels.items()}

    @property
    def _generator(self) -> "AnchorGenerator | DefaultBoxGenerator":
        return self.model.get_submodule(self.anchor_generator)

    @property
    def _per_position(self) -> tuple[int, ...]:
        return tuple(self._generator.num_anchors_per_location())

    def prepare(self, images: list[Tensor]) -> "ImageList":
        from torchvision.models.detection.image_list import ImageList

        transform = self.model.transform
        ready = [transform.normalize(image) for image in images]
        if not getattr(transform, "_skip_resize", False):
            ready = [transform.resize(image)[0] for image in ready]
        sizes = [(image.shape[1], image.shape[2]) for image in ready]
        return ImageList(transform.batch_images(ready, transform.size_divisible), sizes)

    def features(self, images: "ImageList") -> dict[str, Tensor]:
        return _named(self.model.backbone(images.tensors))

    def anchors(self, images: "ImageList") -> list[Tensor]:
        levels = _run_backbone(self.model.backbone, *images.tensors.shape[2:]).values()
        return self._generator(images, [images.tensors.new_empty(1, 1, *x.shape[2:]) for x in levels])


class ProposalAdapter(TorchvisionAdapter):
    """Faster, Mask and Keypoint R-CNN: the box head classifies proposals that the student samples."""

    activation = "softmax"
    has_proposals = True
    anchor_generator = "rpn.anchor_generator"

    def train(self, images: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], DetectorPass]:
        pool, predictor = "roi_heads.box_roi_pool", "roi_heads.box_predictor"
        modules = ("transform", "backbone", self.anchor_generator, pool, predictor)
        with float32_coordinates(self.model), recorded(self.model, modules) as calls:
            losses: dict[str, Tensor] = self.model(images, targets)
        batch, objects = calls["transform"].result
        boxes = [target["boxes"] for target in objects]
        proposals = calls[pool].args[1]
        dtype = proposals[0].dtype
        # Sampling ends with proposals that are matched, so matching them again gives the same labels.
        _, matched = self.model.roi_heads.assign_targets_to_proposals(
            proposals, [b.to(dtype) for b in boxes], [target["labels"] for target in objects]
        )
        return losses, DetectorPass(
            batch,
            _named(calls["backbone"].result),
            self.strides,
            calls[predictor].result[0],
            torch.cat(matched),
            boxes,
            calls[self.anchor_generator].result,
            self._per_position,
            proposals,
        )

    def class_logits(self, features: dict[str, Tensor], images: "ImageList", student: DetectorPass) -> Tensor:
        assert student.proposals is not None
        heads = self.model.roi_heads
        scales = map(scale_between, images.image_sizes, student.images.image_sizes)
        pairs = zip(student.proposals, scales, strict=True)
        proposals = [boxes * boxes.new_tensor(scale).repeat(2) for boxes, scale in pairs]
        pooled = heads.box_roi_pool(features, proposals, images.image_sizes)
        logits: Tensor = heads.box_predictor(heads.box_head(pooled))[0]
        return logits


class DenseAdapter(TorchvisionAdapter):
    """RetinaNet and FCOS: every anchor or point has a sigmoid for each class, and a box."""

    activation: ClassVar[Activation | None] = "sigmoid"
    loss = "head.compute_loss"
    """Path of the method that gets the targets, the predictions, the anchors and their matches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.has_points = hasattr(self._head.regression_head, "bbox_ctrness")

    def train(self, images: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], DetectorPass]:
        modules = ("transform", "backbone")
        with ExitStack() as stack:
            stack.enter_context(float32_coordinates(self.model))
            calls = stack.enter_context(recorded(self.model, modules, [self.loss]))
            held = None if self.hold is None else stack.enter_context(held_maps(self._head, self.hold))
            losses: dict[str, Tensor] = self.model(images, targets)
        batch, objects = calls["transform"].result
        _, outputs, anchors, matches = calls[self.loss].args
        labels = torch.stack([_labels(m, o["labels"]) for m, o in zip(matches, objects, strict=True)])
        rows = self.sampled(outputs["cls_logits"], labels)
        logits, labels = outputs["cls_logits"].flatten(0, 1), labels.flatten()
        return losses, DetectorPass(
            batch,
            _named(calls["backbone"].result),
            self.strides,
            logits if rows is None else logits[rows],
            labels if rows is None else labels[rows],
            [target["boxes"] for target in objects],
            anchors,
            self._per_position,
            rows=rows,
            offsets=outputs["bbox_regression"],
            held=held,
        )

    def sampled(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Returns the rows that the detector's classification loss counts; None: all.

        Args:
            logits: [B, A, classes].
            labels: int64 [B, A].
        """
        return None

    def class_logits(self, features: dict[str, Tensor], images: "ImageList", student: DetectorPass) -> Tensor:
        logits = promote(self._head.classification_head(list(features.values())))
        self._check(logits, student)
        return logits.flatten(0, 1) if student.rows is None else logits.flatten(0, 1)[student.rows]

    def decode(self, student: DetectorPass) -> Tensor:
        assert student.offsets is not None
        return self._decode(student.offsets, student.anchors)

    def boxes(self, features: dict[str, Tensor], images: "ImageList", student: DetectorPass) -> Tensor:
        levels = list(features.values())
        found = self._head.regression_head(levels)
        offsets = promote(found[0] if isinstance(found, tuple) else found)  # FCOS: and centerness
        self._check(offsets, student)
        return self._decode(offsets, self._generator(images, levels))

    def cross(
        self, features: dict[str, Tensor], images: "ImageList", student: DetectorPass, hold: int
    ) -> tuple[Tensor, Tensor]:
        assert student.held is not None
        levels = list(features.values())
        with torch.no_grad(), held_maps(self._head, hold) as own:
            for branch in own:
                self._head.get_submodule(branch)(levels)
        found = {}
        for branch, maps in student.held.items():
            aligned = [align_scale(s, t) for s, t in zip(maps, own[branch], strict=True)]
            head = rest_of_head(self._head.get_submodule(branch), hold)
            # Detached: a gradient for the student, none for the teacher.
            weights = {name: value.detach() for name, value in head.state_dict(keep_vars=True).items()}
            result = torch.func.functional_call(head, weights, (aligned,))
            found[branch] = promote(result[0] if isinstance(result, tuple) else result)
            self._check(found[branch], student)
        boxes = self._decode(found["regression_head"], self._generator(images, levels))
        return found["classification_head"].flatten(0, 1), boxes

    @property
    def _head(self) -> "RetinaNetHead | FCOSHead | SSDHead":
        return self.model.head

    def _decode(self, offsets: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        coder = self.model.box_coder
        decode = getattr(coder, "decode_single", coder.decode)
        boxes: Tensor = decode(offsets.flatten(0, 1), torch.cat(list(anchors)))
        return boxes

    def _check(self, outputs: Tensor, student: DetectorPass) -> None:
        counts = [len(anchors) for anchors in student.anchors]
        if counts != [outputs.shape[1]] * len(outputs):
            raise ConfigError(
                f"student and teacher have {counts[0]} and {outputs.shape[1]} anchors in an image; they are "
                "compared anchor by anchor, so both need the same anchors and image sizes. Methods that "
                "compare levels, such as 'pkd', do not"
            )


class SSDAdapter(DenseAdapter):
    """SSD and SSDlite: a softmax over the classes at every anchor, trained on hard negatives."""

    activation = "softmax"
    loss = "compute_loss"

    def sampled(self, logits: Tensor, labels: Tensor) -> Tensor:
        foreground = labels > 0
        with torch.no_grad():
            flat, target = logits.flatten(0, 1), labels.flatten()
            losses = nn.functional.cross_entropy(flat, target, reduction="none").view_as(labels)
            ranks = losses.masked_fill(foreground, -torch.inf).sort(1, descending=True)[1].sort(1)[1]
            hard = ranks < self.model.neg_to_pos_ratio * foreground.sum(1, keepdim=True)
        rows = (foreground | hard).flatten().nonzero()[:, 0]
        # A batch without objects has no row; a mean over one is defined.
        return rows if len(rows) else ranks.flatten().argmin()[None]


def _run_backbone(backbone: nn.Module, height: int, width: int) -> dict[str, Tensor]:
    """Returns the levels of a black image: on the `meta` device where possible, without computing them."""
    first = next(backbone.parameters(), torch.empty(0))
    with torch.no_grad(), EvalMode(backbone.modules()):
        try:
            return _named(without_storage(backbone)(torch.zeros(1, 3, height, width, device="meta")))
        except Exception:  # it branches on values, or has tensors of its own on a device
            return _named(backbone(first.new_zeros(1, 3, height, width)))


def _named(features: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"0": features} if isinstance(features, Tensor) else dict(features)


def _labels(matches: Tensor, labels: Tensor) -> Tensor:
    """Returns the label of each anchor from its match: an object, -1 (background), or -2 (neither)."""
    if not len(labels):
        return torch.zeros_like(matches)
    found = torch.where(matches < 0, 0, labels[matches.clamp(min=0)])
    return found.masked_fill(matches == -2, IGNORED)


def _layers_of(branch: nn.Module) -> list[nn.Module]:
    """Lists the layers of a branch's `conv`, in the order in which they run."""
    return [module for module in branch.get_submodule("conv").modules() if not list(module.children())]


def _cut(layers: list[nn.Module], hold: int) -> int:
    """Returns the position of the activation behind a convolution."""
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    if not 1 <= hold <= len(places):
        raise ConfigError(f"method.hold: got {hold}; allowed in these detectors: 1 to {len(places)}")
    return places[hold - 1]


@contextmanager
def held_maps(head: nn.Module, hold: int) -> Iterator[dict[str, list[Tensor]]]:
    """Context that records each branch's maps, level after level, before the activation of a convolution.

    Raises:
        ConfigError: the branches have fewer convolutions.
    """
    maps: dict[str, list[Tensor]] = {name: [] for name in _BRANCHES}
    with ExitStack() as hooks:
        for name, found in maps.items():
            layers = _layers_of(head.get_submodule(name))
            # A copy, because the activation may work in place.
            keep = lambda module, args, found=found: found.append(args[0].clone())  # noqa: E731
            hooks.enter_context(layers[_cut(layers, hold)].register_forward_pre_hook(keep))
        yield maps


def rest_of_head(branch: nn.Module, hold: int) -> nn.Module:
    """Returns a branch that takes the maps of `held_maps`; it shares all weights."""
    layers = _layers_of(branch)
    rest = copy.copy(branch)
    rest._modules = dict(branch._modules)
    rest.conv = nn.Sequential(nn.ReLU(), *layers[_cut(layers, hold) + 1 :])
    return rest


def align_scale(student: Tensor, teacher: Tensor) -> Tensor:
    """Gives each channel of a map the mean and the deviation of the teacher's, over batch and positions.

    Raises:
        ConfigError: maps of different channels or sizes.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"the heads of student and teacher must have maps of one shape; got {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    (variance, mean), (their_variance, their_mean) = (
        torch.var_mean(x, dim=(0, 2, 3), keepdim=True) for x in (student, teacher)
    )
    scale = (their_variance + 1e-12).sqrt() / (variance + 1e-12).sqrt()
    return (student - mean) * scale + their_mean


class BackboneAdapter(DetectorAdapter):
    """Access to a backbone: its last patches, or the taps in `names`, are its levels.

    It sees the padded batch, scaled to a square of its own size, in whose pixels its strides are.

    Args:
        model: the backbone in an `OwnInput`, for images in [0, 1].

    Raises:
        ConfigError: the size of its images is not known.
    """

    activation = None
    model: OwnInput

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        size = self.model.own.image_size
        if size is None:
            raise ConfigError("teacher_input: a detector's teacher without boxes needs image_size")
        self.network, self.size = self.model.model, size

    @cached_property
    def _known(self) -> tuple[dict[str, Level], dict[str, Layout]]:
        data = DataInfo((3, self.size, self.size), logits_of=logits_if_any)
        found = probe(self.network, self.names or (last_patches(self.network),), data).features
        layouts = tap_layouts(self.network, found, data)
        shapes = {name: to_map(x, layouts[name], data.input_shape).shape for name, x in found.items()}
        return {name: Level(self.size / shape[3], shape[1]) for name, shape in shapes.items()}, layouts

    @property
    def levels(self) -> dict[str, Level]:
        return self._known[0]

    def train(self, images: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], DetectorPass]:
        raise self._lacks("boxes")

    def prepare(self, images: list[Tensor]) -> "ImageList":
        from torchvision.models.detection.image_list import ImageList

        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images]
        sizes = [(x.shape[1] * self.size / height, x.shape[2] * self.size / width) for x in images]
        return ImageList(self.model.adapt(torch.stack(padded)), sizes)

    def features(self, images: "ImageList") -> dict[str, Tensor]:
        taps = Taps(self.network, self.levels, logits_if_any)
        try:
            found = taps(images.tensors).features
        finally:
            taps.remove()
        return {name: to_map(x, self._known[1][name], images.tensors) for name, x in found.items()}
