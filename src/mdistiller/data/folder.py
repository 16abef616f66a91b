"""Image files in class folders, such as ImageNet and Tiny-ImageNet, or in lists."""

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import Splits
from mdistiller.data.encoded import (
    ENDINGS,
    IMAGE_SUFFIXES,
    EncodedSet,
    check_classes,
    empty_set,
    make_splits,
    some,
)
from mdistiller.data.layout import (
    ADVICE,
    TEST,
    TRAIN,
    UNLABELED,
    VALIDATION,
    evaluation_split,
    subfolder,
    visible,
)
from mdistiller.data.lists import (
    find_list,
    is_list,
    read_list,
    read_multi_label_list,
    read_paths,
    sort_classes,
)
from mdistiller.data.registry import register_dataset
from mdistiller.errors import DataError
from mdistiller.types import IGNORED

_LAYOUT = (
    "expected ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or valid, validation, test), ROOT/train.csv "
    "and ROOT/val.csv with the columns path and label; tar shards: --data.kind hf"
)
_TINY_LAYOUT = (
    "expected ROOT[/tiny-imagenet-200]/train/WNID/images/*.JPEG and val/images/*.JPEG with "
    "val/val_annotations.txt, or val/WNID/*.JPEG"
)


@register_dataset("folder")
@register_dataset("tiny-imagenet")
def load_folder(config: DataConfig) -> Splits:
    """Reads class folders, lists, or Tiny-ImageNet; class ids follow the sorted class names.

    Where `load_data` cuts the images to evaluate on from the training images, the test set may be empty.
    Images without a class have the label -100. If no training image has a class, those of the test images
    count. Nothing there, another layout, or classes of the test images alone are a DataError.
    """
    tiny = config.kind == "tiny-imagenet"
    empty = empty_set(config, 64 if tiny else 224)
    if not config.labeled:
        return _load_images(config, empty)
    train_from, test_from = _find_splits(config, tiny)
    if config.multi_label:
        return _load_multi_label(config, train_from, test_from, empty)
    others: Counter[str] = Counter()
    train_files = {} if train_from is None else _scan(train_from, config, others)
    test_files = {} if test_from is None else _scan(test_from, config, others, is_test=True)
    if others and not tiny:  # which has lists of boxes beside its images
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        warnings.warn(
            f"left out: {others.total()} files in class folders ({found}); images end in {ENDINGS}",
            stacklevel=4,
        )
    outside = config.root if config.kind == "folder" and config.root.is_dir() else None
    if outside is not None and outside != train_from and (folder := subfolder(outside, UNLABELED)):
        train_files.setdefault("", []).extend(images_below(folder, config.channels))
    # In a folder of class folders alone, that of images without a class is among them.
    inside = [name for name in train_files if outside == train_from and name.lower() in UNLABELED]
    unlabeled, left_out = (
        [path for name in ("", *inside) for path in files.pop(name, ())]
        for files in (train_files, test_files)
    )
    known = train_files or test_files
    if not known:
        raise DataError(
            f"no image in {train_from or config.root} has a class, and there is none to evaluate on"
        )
    check_classes(set(known), set(test_files), train_from or test_from, test_from)
    is_list_of = is_list(train_from or test_from or config.root)
    classes = sort_classes(known) if is_list_of else tuple(sorted(known))
    train = _file_set(classes, train_files, unlabeled, empty)
    test = _file_set(classes, test_files, left_out, empty)
    return make_splits(train, test, classes, "Tiny-ImageNet" if tiny else f"images in {config.root}")


def _load_images(config: DataConfig, empty: EncodedSet) -> Splits:
    """Reads images without labels: of train/ and val/ if both are there, else all below root, or a list."""
    root, channels = config.root, config.channels
    if not is_list(root) and not root.is_dir():
        raise DataError(f"data.root: {root} is neither a folder nor a list of paths")
    splits = [None if is_list(root) else subfolder(root, names) for names in (TRAIN, VALIDATION, TEST)]
    test_from = None
    if splits[0] is not None:
        test_from = evaluation_split(config, splits[1], splits[2])
    train_from = splits[0] if test_from is not None else None

    def read(source: Path) -> EncodedSet:
        listed = read_paths(source, config.on_error) if is_list(source) else images_below(source, channels)
        files = list(listed)
        return empty.of(files, torch.full((len(files),), IGNORED))

    train = read(train_from or root)
    if not len(train):
        raise DataError(f"{train_from or root} has no images, which end in {ENDINGS}")
    test = empty if test_from is None else read(test_from)
    return make_splits(train, test, (), f"images in {root}")


def _load_multi_label(
    config: DataConfig, train_from: Path | None, test_from: Path | None, empty: EncodedSet
) -> Splits:
    if train_from is None or not all(is_list(split) for split in (train_from, test_from) if split):
        raise DataError(
            f"{config.root} has no lists; images of several classes need ROOT/train.csv and ROOT/val.csv"
        )
    files, classes, labels = read_multi_label_list(train_from, config.on_error)
    folder = subfolder(config.root, UNLABELED) if config.root.is_dir() else None
    unlabeled = [] if folder is None else list(images_below(folder, config.channels))
    unknown = torch.full((len(unlabeled), len(classes)), float(IGNORED))
    train = empty.of(files + unlabeled, torch.cat([labels, unknown]))
    test = train.select(torch.arange(0))
    if test_from is not None:
        files, _, labels = read_multi_label_list(test_from, config.on_error, classes)
        test = empty.of(files, labels)
    return make_splits(train, test, classes, f"images in {config.root}")


def _file_set(
    classes: tuple[str, ...], files: dict[str, list[Path]], unlabeled: list[Path], empty: EncodedSet
) -> EncodedSet:
    samples = [path for name in classes for path in files.get(name, ())] + unlabeled
    labels = [i for i, name in enumerate(classes) for _ in files.get(name, ())] + [IGNORED] * len(unlabeled)
    return empty.of(samples, torch.tensor(labels, dtype=torch.int64))


def _scan(
    split: Path, config: DataConfig, others: Counter[str], *, is_test: bool = False
) -> dict[str, list[Path]]:
    """Lists the image files of one split, or of its list, by class name, sorted.

    The split has class folders (with images at any depth), or Tiny-ImageNet's `images/` with
    `val_annotations.txt`. Hidden files and files without an image suffix are left out; `others` counts
    the latter. In a split to test on
    (`is_test`), class folders may be empty, but not all of them.
    """
    if is_list(split):
        return read_list(split, config.on_error)
    annotations = split / "val_annotations.txt"
    # A set sorted into class folders may still have the annotations.
    if annotations.is_file() and (split / "images").is_dir():
        return _scan_annotated(split / "images", annotations)
    folders = [entry for entry in visible(split) if entry.is_dir()]
    if not folders:
        raise DataError(f"{split} has no class folders; {_LAYOUT}")
    files = {folder.name: list(images_below(folder, config.channels, others)) for folder in folders}
    empty = [name for name, found in files.items() if not found]
    if empty and not (is_test and len(empty) < len(files)):
        raise DataError(
            f"no image in {len(empty)} of {len(files)} class folders of {split}: {some(empty)}; "
            f"images end in {ENDINGS}"
        )
    return {name: found for name, found in files.items() if found}


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


def images_below(folder: Path, channels: int = 3, others: Counter[str] | None = None) -> Iterable[Path]:
    """Yields the image files in a folder, at any depth, sorted; counts `others` by suffix.

    Images of other `channels` than three may be arrays too. A link to its own parent is a DataError.
    """
    suffixes = IMAGE_SUFFIXES if channels == 3 else (*IMAGE_SUFFIXES, ".npy")

    def fail(error: OSError) -> None:
        raise error

    for base, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            target = Path(base, name).resolve()
            if Path(base).resolve().is_relative_to(target):
                raise DataError(f"{Path(base, name)} is a link to its own parent {target}")
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name.lower().endswith(suffixes):
                yield Path(base, name)
            elif others is not None:
                others[Path(name).suffix.lower() or "without a suffix"] += 1


def _find_splits(config: DataConfig, tiny: bool) -> tuple[Path | None, Path | None]:
    """Finds the folders, or lists, of the images for training and evaluation.

    None in place of the first: all training images are without a class; of the second: a split to cut.
    """
    root, layout = config.root, _TINY_LAYOUT if tiny else _LAYOUT
    if not tiny and is_list(root):
        if config.val_fraction is None:
            raise DataError(f"{root} is a list without a validation split: {ADVICE}")
        return root, evaluation_split(config, None, None)
    if not root.is_dir():
        kind = "not a folder" if tiny else "neither a folder nor a list"
        raise DataError(f"data.root: {root} is {kind}; {layout}")
    if tiny and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    # Tiny-ImageNet's public test images have no labels.
    names = {"train": TRAIN, "validation": ("val",) if tiny else VALIDATION, "test": () if tiny else TEST}
    splits = {split: subfolder(root, names[split]) for split in names}
    train = splits["train"]
    if not tiny and (train is None or not any(entry.is_dir() for entry in visible(train))):
        lists = {split: find_list(root, names[split]) for split in names}
        if lists["train"] is not None:
            splits, train = lists, lists["train"]
    found = [entry.name for entry in visible(root) if entry.is_dir()]
    others = [name for name in found if name.lower() not in names["validation"] + names["test"]]
    classes_only = train is None and any(
        path for name in others for path in images_below(root / name, config.channels)
    )
    if classes_only and others == found and config.val_fraction is not None and not tiny:
        train = root
    is_unlabeled = others and not tiny and all(name.lower() in UNLABELED for name in others)
    if train is not None or is_unlabeled:
        test = evaluation_split(config, splits["validation"], splits["test"])
        if test is not None or (train is not None and config.val_fraction is not None):
            return train, test
    problem = "no train/"
    if train is not None:
        name = train.name + "/" * train.is_dir()
        problem = f"{name} but no {' or '.join(names['validation'] + names['test'])}: {ADVICE}"
    elif classes_only:
        problem = f"class folders but no train/: {ADVICE}, or move them below train/ and val/"
    raise DataError(f"{root} has {problem} (folders there: {some(found)}); {layout}")
