"""Images with a class for each pixel: mask files as in VOC and Cityscapes, and COCO-format objects."""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from mdistiller.data.decoder import plain
from mdistiller.data.folder import images_below
from mdistiller.errors import ConfigError, DataError, UnknownNameError
from mdistiller.tasks.detection.coco import DetectionSet, decode_mask, has_mask
from mdistiller.tasks.detection.config import DetectionDataConfig
from mdistiller.tasks.detection.layouts import load_split as load_objects
from mdistiller.tasks.detection.listing import SPLITS, find_folder, read_names, read_sized
from mdistiller.tasks.segmentation.config import SegmentationDataConfig
from mdistiller.training.dense import DenseDataConfig, DenseSplits, Split, check_apart, check_fraction

IGNORE = 255
"""Value of a mask's pixel without a class."""
BACKGROUND = "background"
VOC_CLASSES = (
    *(BACKGROUND, "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle"),
    "bicycle",
)
# Cityscapes' ids of its 19 evaluated classes, in their order; masks of all ids are named …_labelIds.png.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """Images with masks; `classes` are names by class id, `on_error` the reaction to an unreadable image."""

    classes: tuple[str, ...]
    on_error: Literal["raise", "skip"] = "raise"

    @property
    def num_classes(self) -> int:
        return len(self.classes)


@dataclass(frozen=True, kw_only=True)
class MaskFiles(_Masks):
    """Image files with mask files; `table` maps the 256 values of a mask to class ids, -1 for no class."""

    images: list[Path]
    masks: list[Path]
    table: tuple[int, ...]
    advice: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def files(self) -> list[Path]:
        return [*self.images, *self.masks]

    @property
    def labels(self) -> Iterator[object]:
        return iter([self.table])

    def read(self, index: int) -> tuple[Image.Image, Mask]:
        """Reads an RGB image and its mask [H, W] of class ids; 255 marks pixels without a class.

        Raises:
            DataError: a file cannot be read, a mask has another size or a value that is no class.
        """
        path = self.masks[index]
        values = _read_mask(path)
        image = read_sized(self.images[index], values.shape[::-1])
        if values.shape != image.size[::-1]:
            raise DataError(
                f"mask {path} has {values.shape[1]} x {values.shape[0]} pixels; its image has "
                f"{image.width} x {image.height}"
            )
        ids = np.array(self.table, np.int16)[values]
        if np.min(ids) < 0:
            wrong = int(np.min(values[ids < 0]))
            known = [value for value, i in enumerate(self.table) if 0 <= i < IGNORE]
            given = (
                f"0 to {len(known) - 1}" if known == list(range(len(known))) else ", ".join(map(str, known))
            )
            skipped = [value for value, i in enumerate(self.table) if i == IGNORE]
            raise DataError(
                f"mask {path}: a pixel has the value {wrong}; allowed are the classes {given}, and "
                f"{', '.join(map(str, skipped[:3]))} for ignored pixels: {self.advice}"
            )
        return image, ids.astype(np.uint8)

    def select(self, indices: list[int]) -> Self:
        """Returns the images at some indices."""
        images, masks = ([paths[i] for i in indices] for paths in (self.images, self.masks))
        return replace(self, images=images, masks=masks)


@dataclass(frozen=True, kw_only=True)
class ObjectMasks(_Masks):
    """Objects of COCO-format JSON, drawn as masks.

    Pixels without an object of a class, and those of other categories, are background. Where objects of two
    classes meet, and where only a crowd is, a pixel is ignored.
    """

    objects: DetectionSet
    ids: dict[int, int]  # class id of each label; background without an entry
    crowds: dict[int, list[Any]]  # segmentations by image id

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def images(self) -> list[Path]:
        return self.objects.files

    @property
    def files(self) -> list[Path]:
        return self.images

    @property
    def labels(self) -> Iterator[object]:
        return chain(self.objects.labels, [self.ids, self.crowds])

    def read(self, index: int) -> tuple[Image.Image, Mask]:
        image, target = self.objects.read(index)
        record = self.objects.images[index]
        mask = np.zeros(record.size, np.uint8)
        for shape, label in zip(target["masks"].numpy(), target["labels"].tolist(), strict=True):
            if found := self.ids.get(label, 0):
                inside = shape.astype(bool)
                clash = inside & (mask != 0) & (mask != found)
                mask[inside] = found
                mask[clash] = IGNORE
        for segmentation in self.crowds.get(record.id, ()):
            crowd = decode_mask(segmentation, record.size, record.path).bool().numpy()
            mask[crowd & (mask == 0)] = IGNORE
        return Image.fromarray(image.permute(1, 2, 0).numpy()), mask


SegmentationSet = MaskFiles | ObjectMasks


def load_segmentation(config: SegmentationDataConfig) -> DenseSplits[SegmentationSet]:
    """Reads both splits.

    Raises:
        DataError: as `load_split`; the splits differ in their classes or share an image.
        ConfigError: as `load_split`; val_fraction for a set with test images.
    """
    train, test = load_split(config, "train"), load_split(config, "test")
    check_fraction(config, [*train.images, *test.images], lambda own: load_split(own, "test").images)
    if train.classes != test.classes:
        raise DataError(f"{config.root}: the classes of training and test images differ")
    check_apart(config.root, train.images, test.images)
    _check_masks(config, "training", train, 2)
    _check_masks(config, "test", test, 1)
    line = f"{config.root.name}: {len(train):,} training images, {len(test):,} test images, "
    return DenseSplits(train=train, test=test, description=f"{line}{len(train.classes)} classes")


def _check_masks(config: SegmentationDataConfig, which: str, images: SegmentationSet, least: int) -> None:
    """Raises a DataError where the masks have pixels of fewer than `least` classes."""
    seen: set[int] = set()
    for i in range(len(images)):
        with suppress(DataError):  # a loader raises it, or leaves the image out
            seen |= {*np.unique(images.read(i)[1]).tolist()} - {IGNORE}
        if len(seen) >= least:
            return
    has = f"{images.classes[seen.pop()]} alone" if seen else "no class"
    raise DataError(
        f"{config.root}: pixels in the masks of the {which} images have {has}; of their values "
        f"{config.ignore_index} is ignored: --data.ignore-index names another one"
    )


def load_split(config: SegmentationDataConfig, split: Split) -> SegmentationSet:
    """Reads one split.

    Raises:
        DataError: it is missing or unreadable, or an image has no mask.
        UnknownNameError: a class that COCO-format data lacks.
        ConfigError: more classes than masks can tell apart.
    """
    found: SegmentationSet
    if config.kind == "coco":
        found = _objects(config, split)
    else:
        files = _present((_voc if config.kind == "voc" else _cityscapes)(config, config.source(split)))
        found = files.select(config.choose([0] * len(files), split))
    if not 2 <= len(found.classes) <= IGNORE:
        raise ConfigError(f"data: got {len(found.classes)} classes; allowed are 2 to {IGNORE}")
    if twice := next((name for name in found.classes if found.classes.count(name) > 1), None):
        raise ConfigError(f"data: two classes have the name {twice!r}; allowed are names that differ")
    return found


def _voc(config: SegmentationDataConfig, split: Split) -> MaskFiles:
    folder = config.root / "ImageSets" / "Segmentation"
    images, masks = (_listed if folder.is_dir() else _paired)(config, split)
    classes = config.classes or tuple(read_names(config.root, ["classes.txt"]) or VOC_CLASSES)
    table = [*range(len(classes)), *[-1] * (256 - len(classes))]
    table[config.ignore_index] = IGNORE
    advice = (
        f"name the classes in {config.root / 'classes.txt'}, one a line from value 0 on, or another ignored "
        "value with --data.ignore-index"
    )
    skip = config.on_error
    return MaskFiles(
        images=images, masks=masks, classes=classes, table=tuple(table), advice=advice, on_error=skip
    )


def _listed(config: SegmentationDataConfig, split: Split) -> tuple[list[Path], list[Path]]:
    """Returns images and masks of VOC's list of a split."""
    folder = config.root / "ImageSets" / "Segmentation"
    name = config.train_split if split == "train" else config.test_split
    try:
        names = (folder / f"{name}.txt").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        have = sorted(path.stem for path in folder.glob("*.txt"))
        lists = (
            f"it has {', '.join(have)}: name one with --data.{split}-split" if have else "no list is there"
        )
        raise DataError(f"{folder} has no readable {name}.txt with names of images; {lists}") from error
    if not names:
        raise DataError(f"{folder / name}.txt names no image")
    photographs = config.root / config.images
    images = [next(filter(Path.is_file, _named(photographs, n)), photographs / f"{n}.jpg") for n in names]
    return images, [config.root / config.masks / f"{n}.png" for n in names]


def _paired(config: SegmentationDataConfig, split: Split) -> tuple[list[Path], list[Path]]:
    """Returns images and masks of two folders, or of a split's folders in them, by the names of the files."""
    folders = []
    for given, usual in ((config.images, "images"), (config.masks, "masks")):
        is_given = (config.root / given).is_dir()
        folders.append(config.root / given if is_given else find_folder(config.root, usual))
    names = [config.train_split if split == "train" else config.test_split, *SPLITS[split]]
    inner = next((n for n in names if all((folder / n).is_dir() for folder in folders)), None)
    if inner is None and (config.val_fraction is None or not all(map(Path.is_dir, folders))):
        raise DataError(
            f"{config.root} has no lists in ImageSets/Segmentation, and images and masks have no folder "
            f"{', '.join(dict.fromkeys(names))} for {split}; --data.val-fraction 0.2 splits them"
        )
    photographs, masks = (folder / (inner or "") for folder in folders)
    images = sorted(images_below(photographs))
    known = {_name(path, masks): path for path in sorted(images_below(masks))}
    if not images:
        raise DataError(f"{photographs} has no images")
    named = {n.removesuffix("_L"): path for n, path in known.items()} | known  # CamVid's masks end in _L
    names = [_name(path, photographs) for path in images]
    return images, [named.get(name, masks / f"{name}.png") for name in names]


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _named(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]


def _cityscapes(config: SegmentationDataConfig, split: Split) -> MaskFiles:
    name = config.train_split if split == "train" else config.test_split
    folder, end = config.root / "leftImg8bit" / name, "_leftImg8bit.png"
    images = sorted(folder.glob(f"*/*{end}"))
    if not images:
        raise DataError(
            f"{folder} has no image CITY/*{end}; allowed: Cityscapes' folders, or --data.kind voc"
        )
    places = [config.root / "gtFine" / name / p.parent.name / p.name.removesuffix(end) for p in images]
    trained = places[0].with_name(f"{places[0].name}_gtFine_labelTrainIds.png").is_file()
    kind = "labelTrainIds" if trained else "labelIds"
    # Of all ids, those that are not evaluated are ignored.
    table = [-1 if trained else IGNORE] * 256
    for i, value in enumerate(range(19) if trained else _CITYSCAPES_IDS):
        table[value] = i
    table[config.ignore_index] = IGNORE
    return MaskFiles(
        images=images,
        masks=[place.with_name(f"{place.name}_gtFine_{kind}.png") for place in places],
        classes=CITYSCAPES_CLASSES,
        table=tuple(table),
        advice="make the masks with Cityscapes' own scripts",
        on_error=config.on_error,
    )


def _present(files: MaskFiles) -> MaskFiles:
    """Checks that the files are there, and leaves out images without one if `on_error` says so."""
    pairs = list(zip(files.images, files.masks, strict=True))
    kept = [i for i, pair in enumerate(pairs) if all(map(Path.is_file, pair))]
    if len(kept) == len(pairs):
        return files
    unmasked = [mask.name for image, mask in pairs if image.is_file() and not mask.is_file()]
    missing = [image.name for image, _ in pairs if not image.is_file()]
    parts = [
        (unmasked, f"have no mask in {files.masks[0].parent}, where these are missing"),
        (missing, f"are not in {files.images[0].parent}"),
    ]
    counts = [f"{len(n)} of {len(pairs)} images {text}: {', '.join(n[:5])}" for n, text in parts if n]
    message = "; ".join(counts)
    if files.on_error == "raise" or not kept:
        raise DataError(f"{message}. --data.on-error skip leaves them out")
    warnings.warn(f"left out: {message}", stacklevel=4)
    return files.select(kept)


def _read_mask(path: Path) -> Mask:
    try:
        with Image.open(plain(path)) as image:
            image.load()
            mode, values = image.mode, np.array(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"mask {path} cannot be read: {error}") from error
    if mode not in ("P", "L"):
        raise DataError(
            f"mask {path} has the mode {mode}; allowed are palette (P) and 8-bit gray (L), whose values are "
            "class ids"
        )
    return values


def _objects(config: SegmentationDataConfig, split: Split) -> ObjectMasks:
    shared = {name: getattr(config, name) for name in DenseDataConfig.model_fields}
    objects = load_objects(DetectionDataConfig(**shared, masks=True, keep_empty=True), split)
    masked = [image for image in objects.images if image.segmentations is not None]
    if not masked:
        raise DataError(f"{config.root}: no {split} image has a mask for every object")
    if len(masked) < len(objects):
        count = len(objects) - len(masked)
        warnings.warn(
            f"{config.root}: left out {count} {split} images with objects without a mask", stacklevel=4
        )
        objects = replace(objects, images=tuple(masked))
    above = {c["id"]: c.get("supercategory") for c in objects.ground_truth["categories"]}
    names = {label: (name, above.get(category)) for label, category, name in objects.categories}
    chosen = config.classes or tuple(name for name, _ in names.values())
    known = {name for pair in names.values() for name in pair if name}
    for name in chosen:
        if name not in known:
            raise UnknownNameError("category or supercategory", name, known)
    ids = {}
    for label, (name, upper) in names.items():
        found = name if name in chosen else upper
        if found in chosen:
            ids[label] = chosen.index(found) + 1
    crowds: dict[int, list[Any]] = {}
    for a in objects.ground_truth["annotations"]:
        if a.get("iscrowd") and has_mask(a):
            crowds.setdefault(a["image_id"], []).append(a["segmentation"])
    return ObjectMasks(
        classes=(BACKGROUND, *chosen), on_error=config.on_error, objects=objects, ids=ids, crowds=crowds
    )


def palette(count: int) -> npt.NDArray[np.uint8]:
    """Returns a color for each class id, [count, 3], of VOC's palette: the bits of the id, mixed."""
    ids = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):  # every third bit of the id belongs to one channel
        for channel in range(3):
            colors[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors
