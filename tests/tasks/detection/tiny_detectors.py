"""Tiny detectors, and tiny images with objects on disk."""

import json
import sys
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from mdistiller.methods import load_plugin
from mdistiller.tasks.detection import models
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.coco import DetectionBatch, DetectionLoader
from mdistiller.tasks.detection.config import DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.distiller import DetectionTeacher
from mdistiller.tasks.detection.layouts import load_split
from mdistiller.training.distributed import World

CPU = World(torch.device("cpu"))
CLASSES = 4  # with the background
LEVELS = ("0", "1", "pool")


@contextmanager
def plugged_in(file):
    """Context in which the detectors of a plug-in are registered."""
    before = dict(models._DETECTORS)
    load_plugin(file)
    yield
    models._DETECTORS.clear()
    models._DETECTORS.update(before)
    for name in [name for name in sys.modules if name.startswith(f"mdistiller_plugin_{file.stem}")]:
        del sys.modules[name]


class Body(nn.Module):
    """Two stages, of strides 8 and 16, or of twice the stem's stride and four times it."""

    def __init__(self, width, stem=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stem, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())


def pyramid(width, channels, stem=4):
    return BackboneWithFPN(Body(width, stem), {"one": "0", "two": "1"}, [width, width], channels)


def two_stage(seed=0, width=8, channels=8, masks=False, keypoints=0, classes=CLASSES, stem=4, **options):
    """A Faster, Mask or Keypoint R-CNN of about 20,000 weights."""
    torch.manual_seed(seed)
    names = list(LEVELS[:2])
    more = {}
    if masks:
        more = {
            "mask_roi_pool": MultiScaleRoIAlign(names, 6, 1),
            "mask_head": MaskRCNNHeads(channels, (8,), 1),
            "mask_predictor": MaskRCNNPredictor(8, 8, classes),
        }
    if keypoints:
        more = {
            "keypoint_roi_pool": MultiScaleRoIAlign(names, 6, 1),
            "keypoint_head": KeypointRCNNHeads(channels, (8,)),
            "keypoint_predictor": KeypointRCNNPredictor(8, keypoints),
        }
    options = {"min_size": 64, "max_size": 128, "_skip_resize": True} | options
    return (MaskRCNN if masks else KeypointRCNN if keypoints else FasterRCNN)(
        pyramid(width, channels, stem),
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3),
        rpn_pre_nms_top_n_train=60,
        rpn_post_nms_top_n_train=40,
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_test=20,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=24,
        box_roi_pool=MultiScaleRoIAlign(names, 3, 1),
        box_head=TwoMLPHead(channels * 9, 32),
        box_predictor=FastRCNNPredictor(32, classes),
        **more,
        **options,
    )


def one_stage(seed=0, width=8, channels=32, kind=RetinaNet, classes=CLASSES):
    torch.manual_seed(seed)
    sizes = ((16,), (32,), (64,))
    ratios = ((0.5, 1.0, 2.0),) if kind is RetinaNet else ((1.0,),)
    model = kind(
        pyramid(width, channels),
        classes,
        min_size=64,
        max_size=128,
        _skip_resize=True,
        anchor_generator=AnchorGenerator(sizes, ratios * 3),
    )
    with torch.no_grad():  # as after some training: the prior of 0.01 hides what is tested here
        model.head.classification_head.cls_logits.bias.fill_(-1.0)
    return model


class ThreeLevels(nn.Module):
    """Levels of strides 8, 16 and 32, each with its own channels."""

    def __init__(self, width):
        super().__init__()
        self.body, self.out_channels = Body(width), [width, width, 2 * width]
        self.three = nn.Conv2d(width, 2 * width, 3, 2, 1)

    def forward(self, x):
        one = self.body.one(self.body.stem(x))
        two = self.body.two(one)
        return {"0": one, "1": two, "2": self.three(two)}


def ssd(seed=0, width=8, classes=CLASSES, size=64):
    """An SSD whose default boxes suit images of 64 pixels."""
    torch.manual_seed(seed)
    boxes = DefaultBoxGenerator([[2], [2, 3], [2]], scales=[0.2, 0.4, 0.6, 0.9])
    return SSD(ThreeLevels(width), boxes, (size, size), classes)


def group_norm(model):
    """Batch norm's statistics are those of a process: without it two processes can be compared with one."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return model


def fcos(seed=0, **options):
    return one_stage(seed, kind=FCOS, **options)


def batch(masks=False, seed=0):
    """Two images of different sizes, the second without an object."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 80, generator=generator), torch.rand(3, 72, 64, generator=generator)]
    targets = [
        {
            "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 20.0, 74.0, 60.0]]),
            "labels": torch.tensor([1, 3]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if masks:
        for image, target in zip(images, targets, strict=True):
            target["masks"] = torch.zeros(len(target["boxes"]), *image.shape[1:], dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
    return images, targets


def write_set(folder, count=6, name="instances_train.json", seed=0, change=None):
    """Squares of one of three colors on gray, each color a category; masks as polygons and both RLEs."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    colors = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]
    images, annotations = [], []
    for i in range(count):
        height, width = (64, 80) if i % 2 else (80, 64)
        pixels = np.full((height, width, 3), 128, np.uint8)
        for _ in range(2):
            kind, side = int(generator.integers(3)), int(generator.integers(16, 40))
            x, y = (int(generator.integers(0, limit - side)) for limit in (width, height))
            pixels[y : y + side, x : x + side] = colors[kind]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * i,
                    "category_id": (2, 5, 9)[kind],
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
                }
            )
        file = f"{name[:12]}{i}.png"
        Image.fromarray(pixels).save(folder / "images" / file)
        images.append({"id": 10 * i, "file_name": file, "width": width, "height": height})
    categories = [{"id": k, "name": n} for k, n in ((2, "red"), (5, "green"), (9, "blue"))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    if change is not None:
        change(content)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def loader(images, size, *, training=False, workers=0, seed=0, world=CPU, drop_last=False, **augment):
    """Batches of `size` images in each process."""
    config = DetectionConfig(
        student="fasterrcnn_resnet18",
        method="none",
        data={"workers": workers},
        augment=augment,
        seed=seed,
        drop_last=drop_last,
        batch_size=size * world.size,
        eval_batch_size=size,
    )
    return DetectionLoader(images, config, world, training=training)


def training_pass(model, masks=False):
    """A detector's losses on `batch`, and what methods read of its pass."""
    return adapter_of(model.train()).train(*batch(masks))


def taught(model, images, seen, taps, **options):
    """The outputs of a detector as the teacher of a student's pass."""
    index = torch.arange(len(images))
    return DetectionTeacher(model, taps, **options)(DetectionBatch(images, [], index), seen)


def read_coco(annotations, images, *, limit=None, keep_unmasked=False, **options):
    """The images of a COCO-format file, those of training unless unmasked ones are kept."""
    split = "test" if keep_unmasked else "train"
    own = {f"{split}_annotations": annotations, f"{split}_images": images, f"{split}_limit": limit}
    options = {"keep_empty": True, **options}
    return load_split(DetectionDataConfig(kind="coco", root=images, **own, **options), split)
