"""Image files in class folders, among them Tiny-ImageNet and ImageNet.

Training images that are decoded once (resident) get the test-time geometry: short side scaled, centre
cropped. Only streamed ones get a new random crop each time, as usual for ImageNet.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet, Splits, StreamSet
from mdistiller.data.labels import balanced_subset
from mdistiller.errors import ConfigError, DataError

_BILINEAR = InterpolationMode.BILINEAR
_CROP_SCALE, _CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_STRIP = 32  # times as long as wide

_LAYOUT = "expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or ROOT/test)"
_TINY_LAYOUT = (
    "expected ROOT[/tiny-imagenet-200]/train/WNID/images/*.JPEG and val/images/*.JPEG with "
    "val/val_annotations.txt, or val/WNID/*.JPEG"
)


@dataclass(frozen=True, kw_only=True)
class FileSet(StreamSet):
    """Image files, decoded when they are read.

    paths: one file a sample.
    image_size: side of the square result in pixels.
    resize: length to which the short side is scaled before the centre crop.
    random_crop: instead take a random crop of 8 % to 100 % of the area and scale that.
    """

    paths: tuple[Path, ...]
    image_size: int
    resize: int
    random_crop: bool = False

    def read(self, index: int, seed: int) -> Tensor:
        """One image, uint8 [S, S, 3]; with random_crop, `seed` fixes the crop."""
        image = read_image(self.paths[index])
        if not self.random_crop:
            return centre_crop(image, self.resize, self.image_size)
        # torchvision draws from torch's global generator; nobody else's numbers may change for that.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            box = RandomResizedCrop.get_params(image, list(_CROP_SCALE), list(_CROP_RATIO))
        return _to_tensor(TF.resized_crop(image, *box, [self.image_size, self.image_size], _BILINEAR))


def read_image(path: Path) -> Image.Image:
    """The image at `path` in RGB: grey is repeated, transparency dropped, 16-bit grey cut to 8.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    try:
        with Image.open(path) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
                raise ValueError("it has pixels that are not finite")
            if image.mode.startswith("I;16"):
                # PIL would clip to 255 and leave the image white.
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            # PIL warns when it drops the transparency of a palette directly.
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    # PIL's decoders raise anything: OSError, SyntaxError, ValueError, struct.error, DecompressionBombError.
    except Exception as error:
        raise DataError(f"image {path} cannot be read: {type(error).__name__}: {error}") from error


def centre_crop(image: Image.Image, resize: int, size: int) -> Tensor:
    """Scale the short side to `resize` (bilinear, antialiased), cut out the centre: uint8 [size, size, 3]."""
    longest = _STRIP * min(image.size)
    if max(image.size) > longest:  # scaled whole, a thin strip would take gigabytes
        image = TF.center_crop(image, [min(image.height, longest), min(image.width, longest)])
    return _to_tensor(TF.center_crop(TF.resize(image, [resize], _BILINEAR), [size, size]))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def load_folder(config: DataConfig) -> Splits:
    """Training and test images from class folders; class ids follow the sorted folder names.

    Raises:
        DataError: nothing there, another layout, classes that differ, a class without images, or an
            unreadable image unless `on_error` is skip.
    """
    tiny = config.kind == "tiny-imagenet"
    size = config.image_size or (64 if tiny else 224)
    resize = config.resize or size
    if resize < size:
        raise ConfigError(f"resize: got {resize}, need at least image_size {size}")
    train_folder, test_folder = _split_folders(config.root, tiny)
    train_files, test_files = scan(train_folder), scan(test_folder)
    classes = tuple(sorted(train_files))
    _check_same_classes(set(classes), set(test_files), train_folder, test_folder)

    splits = []
    for files, limit in ((train_files, config.train_limit), (test_files, config.test_limit)):
        paths = [path for name in classes for path in files[name]]
        labels = torch.tensor([i for i, name in enumerate(classes) for _ in files[name]])
        chosen = balanced_subset(labels, limit, config.seed)
        splits.append(([paths[i] for i in chosen.tolist()], labels[chosen]))
    (train_paths, train_labels), (test_paths, test_labels) = splits

    stream = config.memory == "stream" or (
        config.memory == "auto"
        and (len(train_paths) + len(test_paths)) * size * size * 3 > config.memory_limit_gb * 1e9
    )
    train = FileSet(
        paths=tuple(train_paths),
        labels=train_labels,
        image_size=size,
        resize=resize,
        random_crop=stream,
        on_error=config.on_error,
    )
    test = FileSet(
        paths=tuple(test_paths), labels=test_labels, image_size=size, resize=resize, on_error=config.on_error
    )
    prepare: Callable[[FileSet, int], ImageSet | FileSet] = _verified if stream else decode
    return Splits(
        train=prepare(train, config.workers),
        test=prepare(test, config.workers),
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=size,
        description="Tiny-ImageNet" if tiny else f"images in {config.root}",
    )


def scan(split: Path) -> dict[str, list[Path]]:
    """The image files of one split by class name, sorted.

    Reads class folders (images may lie in folders below them), or Tiny-ImageNet's `images/` with
    `val_annotations.txt`. Hidden files and files that are no images by their name are passed over.
    """
    annotations = split / "val_annotations.txt"
    # A set that was sorted into class folders may still have the list.
    if annotations.is_file() and (split / "images").is_dir():
        return _scan_annotated(split / "images", annotations)
    folders = [entry for entry in _entries(split) if entry.is_dir()]
    if not folders:
        raise DataError(f"{split} has no class folders; {_LAYOUT}")
    files = {folder.name: list(_images_below(folder)) for folder in folders}
    empty = [name for name, found in files.items() if not found]
    if empty:
        raise DataError(
            f"no image in {len(empty)} of {len(files)} class folders of {split}: {_some(empty)}; "
            f"images end in {', '.join(IMG_EXTENSIONS)}"
        )
    return files


def _scan_annotated(images: Path, annotations: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{annotations} cannot be read: {error}") from error
    present = {path.name for path in _entries(images)} if images.is_dir() else set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0].strip()
        if not wnid:
            raise DataError(f"{annotations}, line {number}: got {line!r}, need FILE<tab>CLASS…")
        if name not in present:
            raise DataError(f"{annotations}, line {number}: {images / name} is missing")
        files.setdefault(wnid, []).append(images / name)
    if not files:
        raise DataError(f"{annotations} lists no image; {_TINY_LAYOUT}")
    return {wnid: sorted(found) for wnid, found in files.items()}


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _images_below(folder: Path) -> Iterable[Path]:
    for base, folders, names in os.walk(folder, onerror=_fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            target = Path(base, name).resolve()
            if Path(base).resolve().is_relative_to(target):
                raise DataError(f"{Path(base, name)} is a link to {target}, in which it lies itself")
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS):
                yield Path(base, name)


def _fail(error: OSError) -> None:
    raise error


def _split_folders(root: Path, tiny: bool) -> tuple[Path, Path]:
    layout = _TINY_LAYOUT if tiny else _LAYOUT
    if not root.is_dir():
        raise DataError(f"{root} is no folder; {layout}")
    if tiny and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    train = root / "train"
    # Tiny-ImageNet's public test images have no labels.
    tests = [root / "val"] if tiny else [root / "val", root / "test"]
    test = next((folder for folder in tests if folder.is_dir()), None)
    if train.is_dir() and test is not None:
        return train, test
    found = [entry.name for entry in _entries(root) if entry.is_dir()]
    if train.is_dir():
        problem = f"{root} has train/ but no {' or '.join(f.name + '/' for f in tests)}"
    elif any(next(iter(_images_below(root / name)), None) for name in found if name not in ("val", "test")):
        problem = (
            f"{root} has class folders but no train/: move them below train/ and keep some images for val/"
        )
    else:
        problem = f"{root} has no train/"
    raise DataError(f"{problem} (folders there: {_some(found)}); {layout}")


def _check_same_classes(train: set[str], test: set[str], train_folder: Path, test_folder: Path) -> None:
    if train != test:
        parts = [
            f"only in {folder}: {_some(sorted(names))}"
            for folder, names in ((train_folder, train - test), (test_folder, test - train))
            if names
        ]
        raise DataError("training and test classes differ; " + "; ".join(parts))
    if len(train) < 2:
        raise DataError(f"got one class, {train.pop()!r}, in {train_folder}; need at least two")


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def decode(files: FileSet, workers: int) -> ImageSet:
    """Every image with the test-time geometry, read by `workers` threads.

    Raises:
        DataError: the first unreadable file; with on_error=skip only when no image is left.
    """
    images = torch.empty(len(files), files.image_size, files.image_size, 3, dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = centre_crop(read_image(files.paths[index]), files.resize, files.image_size)

    kept = _try_each(files, fill, workers)
    if len(kept) == len(files):
        return ImageSet(images=images, labels=files.labels)
    return ImageSet(images=images, labels=files.labels).select(kept)


def _verified(files: FileSet, workers: int) -> FileSet:
    """With on_error=skip, leave out files whose header or checksum is wrong.

    That is quick but cannot see a JPEG whose pixels are cut short: such an image is left out of its
    batch when it is read.
    """
    if files.on_error == "raise":
        return files

    def verify(index: int) -> None:
        try:
            with Image.open(files.paths[index]) as image:
                image.verify()
        except Exception as error:
            raise DataError(str(error)) from error

    kept = _try_each(files, verify, workers)
    return FileSet(
        paths=tuple(files.paths[i] for i in kept.tolist()),
        labels=files.labels[kept],
        image_size=files.image_size,
        resize=files.resize,
        random_crop=files.random_crop,
        on_error=files.on_error,
    )


def _try_each(files: FileSet, work: Callable[[int], None], workers: int) -> Tensor:
    """Positions (int64) for which `work` succeeded; failures raise or are counted in one warning."""

    def attempt(index: int) -> DataError | None:
        try:
            work(index)
        except DataError as error:
            if files.on_error == "raise":
                raise
            return error
        return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        errors = list(pool.map(attempt, range(len(files))))
    kept = torch.tensor([i for i, error in enumerate(errors) if error is None], dtype=torch.int64)
    if len(kept) < len(files):
        bad = [str(path) for path, error in zip(files.paths, errors, strict=True) if error is not None]
        message = f"{len(bad)} of {len(files)} images cannot be read: {_some(bad)}"
        if not len(kept):
            raise DataError(message)
        warnings.warn(f"left out: {message}", stacklevel=2)
    return kept
