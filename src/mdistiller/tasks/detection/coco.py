"""Images with objects, read from COCO-format JSON, and their batches."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdistiller.data.decoder import read_image
from mdistiller.errors import DataError, MissingPackageError
from mdistiller.seeding import derive_seed
from mdistiller.tasks.detection.config import DetectionAugmentConfig, DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.listing import Content, read_sized
from mdistiller.training.dense import DenseLoader, Split
from mdistiller.training.distributed import World
from mdistiller.types import Line

Target = dict[str, Tensor]
"""Objects of an image: `boxes` [N, 4], `labels` [N] and perhaps `masks` [N, H, W]."""
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]


@dataclass(frozen=True, kw_only=True)
class ObjectImage:
    """Image file and its objects.

    id: the image's id in the JSON.
    size: (height, width) in pixels.
    boxes: float [N, 4], x1, y1, x2, y2 in pixels, within the image, each with an area.
    labels: int64 [N], from 1 (0 is the background).
    segmentations: N polygons or RLEs as in the JSON; None without masks, or where one is missing.
    is_labeled: whether the objects are known. If not, the size may be any, and there are no boxes.
    """

    path: Path
    id: int
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    segmentations: tuple[Any, ...] | None = None
    is_labeled: bool = True


@dataclass(frozen=True, kw_only=True)
class DetectionSet:
    """Images with objects.

    categories: (label, category id, name) of each category, by label.
    ground_truth: the JSON's content for an evaluator, restricted to `images`.
    masks: whether `read` returns masks, for images with a mask for every object.
    on_error: reaction of a loader to an unreadable file: raise, or leave it out and warn.
    """

    images: tuple[ObjectImage, ...]
    categories: tuple[tuple[int, int, str], ...]
    ground_truth: Content = field(repr=False)
    masks: bool = False
    on_error: Literal["raise", "skip"] = "raise"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories, by label."""
        return tuple(name for _, _, name in self.categories)

    @property
    def num_classes(self) -> int:
        """Number of classes of a detector for this set, with the background."""
        return len(self.categories) + 1

    @property
    def files(self) -> list[Path]:
        """Files of the images."""
        return [image.path for image in self.images]

    @property
    def labels(self) -> Iterator[object]:
        """Objects of each image as plain values."""
        for image in self.images:
            yield image.size, image.boxes.tolist(), image.labels.tolist(), image.segmentations

    def read(self, index: int) -> tuple[Tensor, Target]:
        """Reads an image, uint8 [3, H, W], with `boxes` [N, 4], `labels` [N] and perhaps `masks` [N, H, W].

        Boxes, masks and image are `tv_tensors`, which torchvision's v2 transforms change together.

        Raises:
            DataError: the file cannot be read, or its size is not the JSON's.
        """
        from torchvision import tv_tensors

        record = self.images[index]
        picture = read_sized(record.path, record.size[::-1]) if record.is_labeled else read_image(record.path)
        if not record.is_labeled:
            record = replace(record, size=picture.size[::-1])
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        (h, w), (height, width) = image.shape[1:], record.size
        if (h, w) != (height, width):
            size = f"{w} x {h} pixels; its annotations have {width} x {height}"
            raise DataError(f"image {record.path} is {size}")
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(record.boxes, format="XYXY", canvas_size=record.size),
            "labels": record.labels,
        }
        if record.segmentations is not None:
            masks = [decode_mask(s, record.size, record.path) for s in record.segmentations]
            stacked = torch.stack(masks) if masks else torch.zeros(0, *record.size, dtype=torch.uint8)
            target["masks"] = tv_tensors.Mask(stacked)
        return tv_tensors.Image(image), target


def coco_tools() -> ModuleType:
    """Imports and returns the package pycocotools; raises MissingPackageError where it is not installed."""
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as error:
        raise MissingPackageError("a detector's AP or a mask", "pycocotools", "detection") from error
    return pycocotools


def coco_classes() -> tuple[Any, Any]:
    """Returns the classes COCO and COCOeval: faster-coco-eval's where it is installed, or pycocotools'."""
    tools = coco_tools()
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        return tools.coco.COCO, tools.cocoeval.COCOeval
    return COCO, COCOeval_faster


def decode_mask(segmentation: Any, size: tuple[int, int], path: Path) -> Tensor:
    """Decodes a list of polygons or an RLE (compressed or not) to uint8 [H, W] of 0 and 1.

    Raises:
        DataError: it is damaged, or of another size than the image at `path`.
    """
    tools, rle = coco_tools().mask, segmentation
    try:
        if isinstance(rle, list):
            rle = tools.merge(tools.frPyObjects(rle, *size))
        elif isinstance(counts := rle["counts"], list):
            if sum(counts) != math.prod(size) or min(counts) < 0:  # pycocotools would read beyond them
                raise ValueError(f"runs of {sum(counts)} pixels; the image has {math.prod(size)}")
            rle = tools.frPyObjects(rle, *size)
        if list(rle["size"]) != list(size):
            height, width = rle["size"]
            raise ValueError(
                f"{height} x {width} pixels; the image has {size[0]} x {size[1]} (height x width)"
            )
        return torch.from_numpy(tools.decode(rle))
    except (TypeError, ValueError) as error:
        raise DataError(f"a mask of image {path} cannot be decoded: {error}") from error


def train_transform(augment: DetectionAugmentConfig) -> Transform:
    """Returns a transform that scales to a random short side, within the long side, and mirrors half.

    With `scale_jitter` it scales an image to fit a square of the last short side, times a random factor
    between these two, and cuts this square from it or fills it up with black (Ghiasi et al., CVPR 2021).
    Objects that are less than a pixel wide, high or large afterwards are left out.
    """
    from torchvision.transforms import v2

    flips = [v2.RandomHorizontalFlip()] if augment.flip else []
    scales: list[v2.Transform] = [v2.RandomShortestSize(list(augment.short_sides), augment.long_side)]
    if augment.scale_jitter is not None:
        side = (augment.short_sides[-1], augment.short_sides[-1])
        scales = [v2.ScaleJitter(side, augment.scale_jitter), v2.RandomCrop(side, pad_if_needed=True)]
    return v2.Compose([*scales, *flips, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


def make_set(
    content: Content, images: Path, source: Path, config: DetectionDataConfig, split: Split
) -> DetectionSet:
    """Makes a split's set of the lists of a COCO-format JSON.

    Crowds (`iscrowd` 1) are not among the objects to learn. Boxes without an area inside their image are left
    out of the ground truth too. Warnings count those boxes, and all images that are left out: training images
    with an object without a mask where the config has `masks`, and with `on_error="skip"` those without a
    file.

    Args:
        content: the lists.
        images: folder of the image files.
        source: file or folder that messages name.
        config: what is read; training images without an object to learn are kept with `keep_empty` only.
        split: `train` or `test`.

    Raises:
        DataError: an unknown image or category; an image file is missing; no image is left.
    """
    if config.masks:
        coco_tools()
    categories = _categories(content["categories"], source)
    label_of = {category: label for label, category, _ in categories}
    entries = {entry["id"]: entry for entry in content["images"]}
    if len(entries) < len(content["images"]):
        raise DataError(f"{source}: two images have one id")
    ids = list(entries)
    chosen = [ids[i] for i in config.choose(_rarest(content, ids), split)]
    objects: dict[int, list[Line]] = {image: [] for image in chosen}
    for number, annotation in enumerate(content["annotations"]):
        where = f"{source}: annotation {annotation.get('id', number)}"
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in entries:
            raise DataError(f"{where} is of image {image}, which is not in the list")
        if category not in label_of:
            known = ", ".join(f"{c} {name}" for _, c, name in categories[:12])
            more = ", …" if len(categories) > 12 else ""
            what = f"category {category}, which is not in the list of categories ({known}{more})"
            raise DataError(f"{where} has {what}")
        if image in objects:
            objects[image].append(_checked(annotation, where))
    records, left_out = [], Counter[str]()
    for entry in _present(images, [entries[image] for image in chosen], config.on_error):
        path, size = images / entry["file_name"], (entry["height"], entry["width"])
        found = [o for o in objects[entry["id"]] if not o.get("iscrowd")]
        boxes = _boxes(found, size)
        sound = (boxes[:, 2:] > boxes[:, :2]).all(1)
        learnable = list(compress(found, sound.tolist()))
        left_out["boxes without an area in their image"] += len(found) - len(learnable)
        counted = {id(o) for o in learnable}
        objects[entry["id"]] = [o for o in objects[entry["id"]] if o.get("iscrowd") or id(o) in counted]
        masked = config.masks and all(map(has_mask, learnable))
        if config.masks and not masked and split == "train":
            left_out["images with objects without a mask"] += 1
        elif learnable or config.keep_empty or split == "test":
            labels = torch.tensor([label_of[o["category_id"]] for o in learnable], dtype=torch.int64)
            shapes = tuple(_polygons(o.get("segmentation")) for o in learnable) if masked else None
            record = ObjectImage(
                path=path, id=entry["id"], size=size, boxes=boxes[sound], labels=labels, segmentations=shapes
            )
            records.append(record)
    for what, count in left_out.items():
        if count:
            warnings.warn(f"{source}: left out {count} {what}", stacklevel=2)
    if not records:
        raise DataError(f"{source}: no image with an object to learn is left")
    truth: Content = {
        "images": [entries[record.id] for record in records],
        "annotations": [o for record in records for o in objects[record.id]],
        "categories": content["categories"],
    }
    return DetectionSet(
        images=tuple(records),
        categories=categories,
        ground_truth=truth,
        masks=config.masks,
        on_error=config.on_error,
    )


_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}


def parse_coco(path: Path) -> Content:
    """Reads the three lists of a COCO-format file; raises DataError where fields are missing or wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    for name, fields in _FIELDS.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f'{path} is no COCO-format file: it has no list "{name}"')
        for number, entry in enumerate(entries):
            for key, kind in fields.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise DataError(f"{path}: {name}[{number}].{key}: got {value!r}")
    return content


def _categories(entries: list[Line], path: Path) -> tuple[tuple[int, int, str], ...]:
    ids = sorted(entry["id"] for entry in entries)
    if not ids or len(set(ids)) < len(ids):
        raise DataError(f"{path}: " + ("two categories have one id" if ids else "it has no categories"))
    names = {entry["id"]: entry["name"] for entry in entries}
    return tuple((label, i, names[i]) for label, i in enumerate(ids, 1))


def _rarest(content: Content, ids: list[int]) -> list[int]:
    """Returns the rarest category of each image, and -1 for an image without an object."""
    counts = Counter(a["category_id"] for a in content["annotations"])
    ordered = sorted(content["annotations"], key=lambda a: -counts[a["category_id"]])
    rarest = {a["image_id"]: a["category_id"] for a in ordered}  # of an image the last one stays
    return [rarest.get(image, -1) for image in ids]


def _checked(annotation: Line, where: str) -> Line:
    """Returns an annotation with `iscrowd`, and with the area of its box if it has no `area`."""
    box = annotation["bbox"]
    numbers = [v for v in box if isinstance(v, int | float) and math.isfinite(v)]
    if len(box) != 4 or len(numbers) != 4:
        raise DataError(f"{where}: bbox: got {box!r}, need four finite numbers x, y, width, height")
    given = {key: value for key, value in annotation.items() if value is not None}
    return {"iscrowd": 0, "area": max(box[2], 0) * max(box[3], 0), **given}


def _boxes(objects: list[Line], size: tuple[int, int]) -> Tensor:
    """Returns boxes [N, 4] as x1, y1, x2, y2, clipped to the image."""
    boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return torch.minimum(corners.clamp(min=0), torch.tensor([*size[::-1], *size[::-1]]))


def has_mask(annotation: Line) -> bool:
    """Whether an annotation has a polygon of three points or more, or an RLE."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return {"counts", "size"} <= segmentation.keys()
    return bool(_polygons(segmentation))


def _polygons(segmentation: Any) -> Any:
    """Returns an RLE unchanged, or the polygons of three points or more; others would decode as boxes."""
    if isinstance(segmentation, dict):
        return segmentation
    given = segmentation if isinstance(segmentation, list) else []
    return [p for p in given if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]


def _present(folder: Path, entries: list[Line], on_error: str) -> list[Line]:
    """Returns the entries with a file."""
    is_file = [(folder / entry["file_name"]).is_file() for entry in entries]
    if not all(is_file):
        missing = [entry["file_name"] for entry, found in zip(entries, is_file, strict=True) if not found]
        message = f"{len(missing)} of {len(entries)} images are not in {folder}: {', '.join(missing[:5])}"
        if on_error == "raise" or not any(is_file):
            raise DataError(message)
        warnings.warn(f"left out: {message}", stacklevel=3)
    return list(compress(entries, is_file))


class DetectionBatch(NamedTuple):
    """A batch of images with objects.

    image: B images, float [3, H, W] in [0, 1], each of its own size.
    target: B dicts: `boxes` float [N, 4] (x1, y1, x2, y2 in pixels), `labels` int64 [N] from 1, and for
        masks `masks` uint8 [N, H, W]. Empty for an image whose objects are not known.
    index: int64 [B], each image's position in its set.
    """

    image: list[Tensor]
    target: list[Target]
    index: Tensor  # type: ignore[assignment]  # the field's name; tuple.index is not missed

    def split(self, count: int, num_views: int = 1) -> "list[DetectionBatch]":
        """Splits the batch into at most `count` parts; detection methods have one view."""
        size = math.ceil(len(self.image) / count)
        parts = [slice(i, i + size) for i in range(0, len(self.image), size)]
        return [DetectionBatch(self.image[p], self.target[p], self.index[p]) for p in parts]


def _read(
    position: int, seed: int, *, images: DetectionSet, transform: Transform | None
) -> tuple[Tensor, Target]:
    image, target = images.read(position)
    if transform is not None:
        # torchvision draws from torch's global generator, which others use too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, position))
            image, target = transform(image, target)
    if not images.images[position].is_labeled:
        target = {}
    return image.as_subclass(Tensor), {key: value.as_subclass(Tensor) for key, value in target.items()}


class DetectionLoader(DenseLoader[tuple[Tensor, Target]]):
    """Batches of a detection set; see `DenseLoader`."""

    def __init__(
        self, images: DetectionSet, config: DetectionConfig, world: World, *, training: bool
    ) -> None:
        transform = train_transform(config.augment) if training else None
        read = partial(_read, images=images, transform=transform)
        super().__init__(images, config, world, read, training=training)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[DetectionBatch]:
        """Yields an epoch from batch `first`; raises DataError for unreadable images, as `on_error` says."""
        for samples, position, _ in self._parts(epoch, first):
            yield DetectionBatch(
                [self._to_device(image).float() / 255 for image, _ in samples],
                [{key: self._to_device(value) for key, value in target.items()} for _, target in samples],
                self._to_device(position),
            )
