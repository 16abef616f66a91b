"""Image files in class folders, such as ImageNet and Tiny-ImageNet."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import Splits
from mdistiller.data.encoded import IMAGE_SUFFIXES, EncodedSet, check_classes, make_splits, read_options, some
from mdistiller.data.registry import register_dataset
from mdistiller.data.shards import find_shards, load_shards, visible
from mdistiller.errors import DataError

_LAYOUT = (
    "expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or ROOT/test), or shards "
    "ROOT/train/*.tar and ROOT/val/*.tar"
)
_TINY_LAYOUT = (
    "expected ROOT[/tiny-imagenet-200]/train/WNID/images/*.JPEG and val/images/*.JPEG with "
    "val/val_annotations.txt, or val/WNID/*.JPEG"
)


@dataclass(frozen=True, kw_only=True)
class FileSet(EncodedSet):
    """Image files; `samples` are their paths."""

    def name(self, index: int) -> str:
        return str(self.samples[index])

    def file(self, index: int) -> Path:
        return self.samples[index]


@register_dataset("folder")
@register_dataset("tiny-imagenet")
def load_folder(config: DataConfig) -> Splits:
    """Reads class folders, tar shards, or Tiny-ImageNet; class ids follow the sorted folder names.

    Nothing there, another layout, classes that differ or lack images, or bad shards are a DataError.
    """
    tiny = config.kind == "tiny-imagenet"
    if not tiny and (shards := find_shards(config.root)) is not None:
        return load_shards(config, *shards)
    options = read_options(config, 64 if tiny else 224)
    train_folder, test_folder = _split_folders(config.root, tiny)
    train_files, test_files = scan(train_folder), scan(test_folder)
    check_classes(set(train_files), set(test_files), train_folder, test_folder)
    classes = tuple(sorted(train_files))
    train, test = (
        FileSet(
            samples=np.array([path for name in classes for path in files[name]], dtype=object),
            labels=torch.tensor([i for i, name in enumerate(classes) for _ in files[name]]),
            **options,
        )
        for files in (train_files, test_files)
    )
    return make_splits(train, test, classes, "Tiny-ImageNet" if tiny else f"images in {config.root}")


def scan(split: Path) -> dict[str, list[Path]]:
    """Lists the image files of one split by class name, sorted.

    The split has class folders (with images at any depth), or Tiny-ImageNet's `images/` with
    `val_annotations.txt`. Hidden files and files without an image suffix are ignored.
    """
    annotations = split / "val_annotations.txt"
    # A set sorted into class folders may still have the annotations.
    if annotations.is_file() and (split / "images").is_dir():
        return _scan_annotated(split / "images", annotations)
    folders = [entry for entry in visible(split) if entry.is_dir()]
    if not folders:
        raise DataError(f"{split} has no class folders; {_LAYOUT}")
    files = {folder.name: list(_images_below(folder)) for folder in folders}
    empty = [name for name, found in files.items() if not found]
    if empty:
        raise DataError(
            f"no image in {len(empty)} of {len(files)} class folders of {split}: {some(empty)}; "
            f"images end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return files


def _scan_annotated(images: Path, annotations: Path) -> dict[str, list[Path]]:
    files = defaultdict(list)
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{annotations} cannot be read: {error}") from error
    present = {path.name for path in visible(images)} if images.is_dir() else set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0].strip()
        if not wnid:
            raise DataError(f"{annotations}, line {number}: got {line!r}, need FILE<tab>CLASS…")
        if name not in present:
            raise DataError(f"{annotations}, line {number}: {images / name} is missing")
        files[wnid].append(images / name)
    if not files:
        raise DataError(f"{annotations} lists no image; {_TINY_LAYOUT}")
    return {wnid: sorted(found) for wnid, found in files.items()}


def _images_below(folder: Path) -> Iterable[Path]:
    def fail(error: OSError) -> None:
        raise error

    for base, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            target = Path(base, name).resolve()
            if Path(base).resolve().is_relative_to(target):
                raise DataError(f"{Path(base, name)} is a link to its own parent {target}")
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(base, name)


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
    found = [entry.name for entry in visible(root) if entry.is_dir()]
    problem = "no train/"
    if train.is_dir():
        problem = f"train/ but no {' or '.join(f.name + '/' for f in tests)}"
    elif any(next(iter(_images_below(root / name)), None) for name in found if name not in ("val", "test")):
        problem = "class folders but no train/: move them below train/ and keep some images for val/"
    raise DataError(f"{root} has {problem} (folders there: {some(found)}); {layout}")
