"""A detector of one's own, in one file: each cell of two maps gives a class and a box around its center.

    mdistiller train small.teacher.my_detector --plugin examples/my_detector.py --data.root DIR
    mdistiller train small.fitnet.my_detector --plugin examples/my_detector.py --data.root DIR \
        --teacher RUN_OF_ANY_DETECTOR

In training mode the detector takes images and targets and returns its losses; in evaluation mode it takes
images and returns `boxes`, `labels` and `scores`. The adapter says where distillation finds what it reads.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from mdistiller import DetectorAdapter, DetectorPass, Level, register_detector

STRIDES = {"fine": 8, "coarse": 16}


def block(inputs, outputs):
    """A 3x3 convolution that halves the image."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.ReLU())


class MyDetector(nn.Module):
    """Two maps of strides 8 and 16, with one 1x1 convolution for classes and one for boxes."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.stem = nn.Sequential(block(3, width), block(width, width), block(width, width))
        self.deep = block(width, width)
        self.classes, self.sides = nn.Conv2d(width, num_classes - 1, 1), nn.Conv2d(width, 4, 1)
        nn.init.constant_(self.classes.bias, -3.0)  # few cells have an object
        self.width = width
        self.detector_adapter = MyAdapter

    def features(self, tensors):
        """Images [B, 3, H, W] to the two maps."""
        fine = self.stem(tensors)
        return {"fine": fine, "coarse": self.deep(fine)}

    def heads(self, maps):
        """The maps to logits [B, cells, classes] and distances [B, cells, 4] to the sides of a box."""
        logits = [self.classes(x).flatten(2).transpose(1, 2) for x in maps.values()]
        sides = [
            stride * F.softplus(self.sides(x)).flatten(2).transpose(1, 2)
            for x, stride in zip(maps.values(), STRIDES.values(), strict=True)
        ]
        return torch.cat(logits, 1), torch.cat(sides, 1)

    def centers(self, maps):
        """Centers of the cells in pixels, [cells, 2]."""
        found = []
        for x, stride in zip(maps.values(), STRIDES.values(), strict=True):
            rows, columns = (torch.arange(n, device=x.device) * stride + stride / 2 for n in x.shape[2:])
            found.append(torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).flatten(0, 1))
        return torch.cat(found)

    def assign(self, centers, target):
        """Each cell's object, the smallest around its center, or -1."""
        boxes = target["boxes"]
        if not len(boxes):
            return torch.full((len(centers),), -1, device=centers.device)
        inside = (centers[:, None] > boxes[:, :2]) & (centers[:, None] < boxes[:, 2:])
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        smallest = torch.where(inside.all(2), areas, torch.inf).min(1)
        return torch.where(smallest.values.isfinite(), smallest.indices, -1)

    def losses(self, logits, boxes, matches, targets):
        """Focal loss of the classes, and one minus the generalized overlap of the boxes."""
        wanted, pairs = torch.zeros_like(logits), []
        for i, (match, target) in enumerate(zip(matches, targets, strict=True)):
            cells = (match >= 0).nonzero()[:, 0]
            wanted[i, cells, target["labels"][match[cells]] - 1] = 1.0
            pairs.append((boxes[i, cells], target["boxes"][match[cells]]))
        mine, theirs = (torch.cat(part) for part in zip(*pairs, strict=True))
        count = max(1, len(mine))
        focal = sigmoid_focal_loss(logits, wanted, reduction="sum")
        return {
            "classes": focal / count,
            "boxes": generalized_box_iou_loss(mine, theirs, reduction="sum") / count,
        }

    def forward(self, images, targets=None):
        if self.training:
            return MyAdapter(self).train(images, targets)[0]
        maps = self.features(MyAdapter(self).prepare(images).tensors)
        logits, sides = self.heads(maps)
        boxes = corners(self.centers(maps), sides)
        found = []
        for scores, places, image in zip(logits.sigmoid(), boxes, images, strict=True):
            best, classes = scores.max(1)
            places = clip_boxes_to_image(places, image.shape[1:])
            keep = batched_nms(places, best, classes, 0.5)[:100]
            found.append({"boxes": places[keep], "labels": classes[keep] + 1, "scores": best[keep]})
        return found


def corners(centers, sides):
    """Centers [cells, 2] and distances [B, cells, 4] to boxes x1, y1, x2, y2."""
    return torch.cat([centers - sides[..., :2], centers + sides[..., 2:]], -1)


class MyAdapter(DetectorAdapter):
    """Where distillation finds what it reads."""

    activation = "sigmoid"

    @property
    def levels(self):
        return {name: Level(stride, self.model.width) for name, stride in STRIDES.items()}

    def prepare(self, images):
        """Pads the images to one size, a multiple of 16."""
        # Not -(-side // 16): ONNX rounds a negative quotient up.
        height, width = ((max(i.shape[d] for i in images) + 15) // 16 * 16 for d in (1, 2))
        tensors = torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])
        return ImageList(tensors - 0.5, [(i.shape[1], i.shape[2]) for i in images])

    def features(self, images):
        return self.model.features(images.tensors)

    def train(self, images, targets):
        prepared = self.prepare(images)
        maps = self.features(prepared)
        logits, sides = self.model.heads(maps)
        centers = self.model.centers(maps)
        boxes = corners(centers, sides)
        matches = [self.model.assign(centers, target) for target in targets]
        labels = [
            torch.where(m < 0, 0, torch.cat([t["labels"], t["labels"].new_zeros(1)])[m])
            for m, t in zip(matches, targets, strict=True)
        ]
        return self.model.losses(logits, boxes, matches, targets), DetectorPass(
            images=prepared,
            features=maps,
            strides=STRIDES,
            logits=logits.flatten(0, 1),
            labels=torch.cat(labels),
            objects=[target["boxes"] for target in targets],
            anchors=[self.squares(maps)] * len(images),
            per_position=(1, 1),
            offsets=sides,
        )

    def squares(self, maps):
        """A square around each cell, four strides wide: by these, methods find the cells near objects."""
        sizes = [
            torch.full((x[0, 0].numel(), 1), 2.0 * s)
            for x, s in zip(maps.values(), STRIDES.values(), strict=True)
        ]
        centers = self.model.centers(maps)
        half = torch.cat(sizes).to(centers)
        return torch.cat([centers - half, centers + half], 1)

    def anchors(self, images):
        return [self.squares(self.features(images))] * len(images.tensors)

    def class_logits(self, features, images, student):
        return self.model.heads(features)[0].flatten(0, 1)

    def decode(self, student):
        centers = (student.anchors[0][:, :2] + student.anchors[0][:, 2:]) / 2
        return corners(centers, student.offsets).flatten(0, 1)

    def boxes(self, features, images, student):
        return corners(self.model.centers(features), self.model.heads(features)[1]).flatten(0, 1)


@register_detector  # or @register_detector("another_name")
def my_detector(num_classes, width=16):
    """The detector, with maps of `width` channels."""
    return MyDetector(num_classes, width)
