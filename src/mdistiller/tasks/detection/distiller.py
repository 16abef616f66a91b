"""Distillation of detectors: the student's pass as methods read it, and a frozen detector as the teacher."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mdistiller.distiller import AnyMethod, Distiller, StudentPass
from mdistiller.errors import ConfigError
from mdistiller.methods import Method, MethodConfig
from mdistiller.tasks.detection.adapter import DetectorAdapter, DetectorPass, Targets, float32_coordinates
from mdistiller.tasks.detection.adapters import BackboneAdapter, adapter_of
from mdistiller.tasks.detection.coco import DetectionBatch
from mdistiller.tasks.detection.levels import OBJECTS, OVERLAP, resample, scale_between
from mdistiller.tasks.detection.methods import (
    build_method,
    check_unlabeled,
    default_config,
    held_layer,
    reads_logits,
    tap_pairs,
)
from mdistiller.teacher import EvalMode, Teacher
from mdistiller.types import AnyBatch, Batch, DataInfo, LogitsOf, Outputs

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList

BOXES = "boxes"
"""Name of a tap of student and teacher: the boxes of all anchors, [B · A, 4], in the student's pixels."""
CROSS = ("cross_logits", "cross_boxes")
"""Names of taps of a teacher: its predictions from the maps that the student holds, with gradients."""


def outputs_of(adapter: DetectorAdapter, result: DetectorPass, taps: Iterable[str]) -> Outputs:
    """Returns the outputs of a pass for a method: logits, tapped levels, and what follows from them."""
    taps = tuple(taps)
    known = result.features
    if any(name.endswith(OVERLAP) for name in taps):
        known = known | overlaps(result)
    if any(name.endswith(OBJECTS) for name in taps):
        known = known | object_masks(result)
    if BOXES in taps:
        known = known | {BOXES: adapter.decode(result)}
    logits = result.images.tensors.new_empty(0) if result.logits is None else result.logits
    return Outputs(logits, {name: known[name] for name in taps})


def overlaps(student: DetectorPass) -> dict[str, Tensor]:
    """Computes `NAME.overlap` [B, 1, h, w] of each level NAME: the best fit of the anchors to an object.

    The fit of an anchor to an object is their intersection over union, divided by the best one that any
    anchor of any level has with that object. It is 0 in an image without objects.
    """
    from torchvision.ops import box_iou

    grids = [student.features[name].shape[2:] for name in student.strides]
    fits = [anchors.new_zeros(len(anchors)) for anchors in student.anchors]
    for i, (boxes, anchors) in enumerate(zip(student.objects, student.anchors, strict=True)):
        if len(boxes):
            iou = box_iou(boxes.to(anchors.dtype), anchors)
            best = iou.amax(1, keepdim=True).clamp(min=torch.finfo(iou.dtype).tiny)
            fits[i] = (iou / best).amax(0)
    counts = [h * w * each for (h, w), each in zip(grids, student.per_position, strict=True)]
    parts = torch.stack(fits).split(counts, 1)
    return {
        f"{name}{OVERLAP}": part.unflatten(1, (h, w, -1)).amax(3)[:, None]
        for name, part, (h, w) in zip(student.strides, parts, grids, strict=True)
    }


def object_masks(student: DetectorPass) -> dict[str, Tensor]:
    """Computes `NAME.objects` [B, 1, h, w] of each level NAME: 1 / (height · width) of an object, in cells.

    An object covers the cells that its box touches. Where several overlap, the smallest one counts.
    """
    masks = {}
    for name, stride in student.strides.items():
        h, w = student.features[name].shape[2:]
        found = []
        for boxes in student.objects:
            first, last = (boxes[:, :2] / stride).floor(), (boxes[:, 2:] / stride).ceil()
            columns, rows = (torch.arange(n, device=boxes.device)[None] for n in (w, h))
            wide = (columns >= first[:, :1]) & (columns <= last[:, :1])
            high = (rows >= first[:, 1:]) & (rows <= last[:, 1:])
            inverse = 1 / (last + 1 - first).prod(1)
            covered = (high[:, :, None] & wide[:, None]) * inverse[:, None, None]
            found.append(covered.amax(0) if len(boxes) else boxes.new_zeros(h, w))
        masks[f"{name}{OBJECTS}"] = torch.stack(found)[:, None].to(student.features[name].dtype)
    return masks


class DetectionTeacher(Teacher):
    """A detector that runs on the student's proposals; its levels are sampled on the student's grids.

    It normalizes the images itself. Detectors of this package take them in the student's size; others scale
    them as in evaluation. The proposals are then scaled to the teacher's image.

    Args:
        model: the detector.
        taps: its levels, each with the student's level whose grid it gets; and `boxes`.
        logits: whether logits are computed; otherwise they are empty.
        hold: number of the convolution of the head after which the student's maps continue, for `CROSS`.
    """

    needs_student = True

    def __init__(
        self, model: nn.Module, taps: Mapping[str, str], *, logits: bool, hold: int | None = None
    ) -> None:
        super().__init__(model)
        self.adapter = adapter_of(model)
        self.taps, self.logits, self.hold = taps, logits, hold
        self.adapter.names = tuple(taps)

    def forward(self, batch: AnyBatch, context: object = None) -> Outputs:
        """Computes the teacher's outputs for a training pass of the student, its `context`.

        Raises:
            ConfigError: detectors without proposals that have different anchors, where these are compared.
        """
        assert isinstance(context, DetectorPass)
        student = context
        with EvalMode(self.model.modules()), float32_coordinates(self.model):
            # Not `inference_mode`: the outputs enter autograd.
            with torch.no_grad():
                own = self.adapter.prepare(batch.image)
                levels = self.adapter.features(own)
                found = own.tensors.new_empty(0)
                if self.logits:
                    found = self.adapter.class_logits(levels, own, student)
                boxes = self.adapter.boxes(levels, own, student) if BOXES in self.taps else None
                features = self._tapped(levels, own, student)
            if boxes is not None:
                features[BOXES] = _scaled(boxes, own, student.images)
            if self.hold is not None:
                cross_logits, cross_boxes = self.adapter.cross(levels, own, student, self.hold)
                features |= zip(CROSS, (cross_logits, _scaled(cross_boxes, own, student.images)), strict=True)
        return Outputs(found, features)

    def _tapped(
        self, levels: dict[str, Tensor], own: "ImageList", student: DetectorPass
    ) -> dict[str, Tensor]:
        features = {name: levels[name] for name in self.taps if name in levels}
        for name, on in self.taps.items():
            if name in self.adapter.levels:
                grid = student.features[on].shape[2:], student.strides[on], student.images
                features[name] = resample(levels[name], self.adapter.levels[name].stride, own, *grid)
        return features


def _scaled(boxes: Tensor, images: "ImageList", to: "ImageList") -> Tensor:
    """Scales boxes at all anchors, [B · A, 4], from pixels of one detector's images to those of another's."""
    scales = list(map(scale_between, to.image_sizes, images.image_sizes))
    factors = boxes.new_tensor(scales).repeat(1, 2)
    return (boxes.unflatten(0, (len(scales), -1)) * factors[:, None]).flatten(0, 1)


class DetectionDistiller(Distiller):
    """Distillation of detectors in one's own training loop.

    It works as `mdistiller.Distiller`, on images and targets in torchvision's form. Example::

        distiller = DetectionDistiller(student, teacher, "dkd+reviewkd")
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)
        for images, targets in loader:
            out = distiller(images, targets)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    Args:
        student: a detector of torchvision, or one with an adapter of its own (see `DetectorAdapter`).
        teacher: another one of the same classes; None for method "none". For methods that compare levels, it
            may be a detector of another kind.
        method: a method's name, with its defaults for detectors, its config, or a built `Method`.
        teacher_input: mean, standard deviation and size of the images of a teacher without boxes, such as a
            foundation model, for methods that compare levels; of several teachers, a list.
        pseudo_score: learn the teacher's boxes of this score or more as the objects of unlabeled images,
            whose targets have no `boxes`. None: the detector's own losses leave these images out.
        total_steps, teacher_weights, teacher_dropout, settings: as in `Distiller`.

    Raises:
        UnknownNameError: no such method.
        ConfigError: an unknown or wrong setting; detectors that do not suit the method or each other, or that
            share trainable parameters; on a call, different classes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None,
        method: AnyMethod | Sequence[AnyMethod] = "dkd",
        *,
        pseudo_score: float | None = None,
        total_steps: int | None = None,
        teacher_input: object = None,
        teacher_weights: Sequence[float] | None = None,
        teacher_dropout: float = 0.0,
        **settings: object,
    ) -> None:
        if settings:  # here, as some are named like arguments of `Distiller` that a detector does not read
            if not isinstance(method, str | Mapping | MethodConfig | Method):
                raise ConfigError(
                    "settings by name go with one method; allowed: fields in each of the methods"
                )
            method = self._configure(method, settings)
        super().__init__(
            *(student, teacher, method),
            total_steps=total_steps,
            student_input=None if teacher_input is None else {"mean": (0, 0, 0), "std": (1, 1, 1)},
            teacher_input=teacher_input,
            teacher_weights=teacher_weights,
            teacher_dropout=teacher_dropout,
        )
        self.pseudo_score = pseudo_score
        if pseudo_score is not None and len(found := self._detectors()) != 1:
            raise ConfigError(f"pseudo_score: got a method with {len(found)} teachers with boxes; allowed: 1")

    def _default_config(self, name: str) -> MethodConfig:
        return default_config(name)

    def _build_method(
        self, config: MethodConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> Method:
        return build_method(config, student, teacher)

    def _tap_student(self, taps: tuple[str, ...], logits_of: LogitsOf) -> None:
        self.adapter = adapter_of(self.student)
        self.adapter.hold = held_layer(self.method)

    def _freeze(self, teacher: nn.Module, method: Method, logits_of: LogitsOf) -> Teacher:
        return freeze(teacher, method)

    def _prepare(
        self, inputs: list[Tensor], target: Targets, index: Tensor | None
    ) -> tuple[DetectionBatch, torch.device]:
        """Takes images, float [3, H, W] in [0, 1] each, and their targets in torchvision's form.

        A target has `boxes` [N, 4] (x1, y1, x2, y2 in pixels), `labels` int64 [N], and for Mask R-CNN `masks`
        uint8 [N, H, W].
        """
        if not self.student.training:
            raise ConfigError("a detector has losses in training mode only: call train() first")
        device = inputs[0].device
        if index is None:
            index = torch.arange(len(inputs), device=device)
        return DetectionBatch(inputs, target, index), device

    def _run_student(self, batch: DetectionBatch) -> StudentPass:
        images, targets = batch.image, list(batch.target)
        unlabeled = [i for i, target in enumerate(targets) if "boxes" not in target]
        for i, target in zip(unlabeled, self._pseudo([images[i] for i in unlabeled]), strict=True):
            targets[i] = target
        losses, result = self.adapter.train(images, targets)
        if unlabeled and self.pseudo_score is None:
            check_unlabeled(self.method)
            # With a factor of 0, so that DDP finds a gradient for every parameter.
            losses = {name: 0.0 * value for name, value in losses.items()}
            labeled = [i for i in range(len(targets)) if i not in unlabeled]
            if labeled:
                own, _ = self.adapter.train([images[i] for i in labeled], [targets[i] for i in labeled])
                losses = {name: losses[name] + value for name, value in own.items()}
        outputs = outputs_of(self.adapter, result, self.method.student_taps)
        labels = outputs.logits.new_empty(0) if result.labels is None else result.labels
        return StudentPass(outputs, Batch(result.images.tensors, labels, batch.index), losses, result)

    def _detectors(self) -> list[nn.Module]:
        members = () if self.asked is None else self.asked.members
        teachers = [member for member in members if isinstance(member, DetectionTeacher)]
        return [t.model for t in teachers if not isinstance(t.adapter, BackboneAdapter)]

    @torch.no_grad()
    def _pseudo(self, images: list[Tensor]) -> Targets:
        """Returns the teacher's boxes from `pseudo_score` on, none without one, as targets."""
        from torchvision.ops import clip_boxes_to_image

        if self.pseudo_score is None or not images:
            return [
                {"boxes": x.new_zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64, device=x.device)}
                for x in images
            ]
        (teacher,), targets = self._detectors(), []
        with EvalMode(teacher.modules()), float32_coordinates(teacher):
            for image, found in zip(images, teacher(images), strict=True):
                boxes = clip_boxes_to_image(found["boxes"].float(), image.shape[1:])
                kept = (found["scores"] >= self.pseudo_score) & (found["labels"] > 0)
                kept &= (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)  # pixels, as of other objects
                targets.append({"boxes": boxes[kept], "labels": found["labels"][kept]})
        return targets


def freeze(teacher: nn.Module, method: Method) -> DetectionTeacher:
    """Returns a detector as the teacher of a method."""
    return DetectionTeacher(teacher, tap_pairs(method), logits=reads_logits(method), hold=held_layer(method))
