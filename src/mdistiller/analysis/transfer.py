"""Linear probes: accuracy of a student's frozen features on other data."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from mdistiller.data import DataConfig, ImageSet, StreamSet, load_data, make_loader
from mdistiller.data.dataset import resize_images
from mdistiller.errors import DataError
from mdistiller.report.features import collect
from mdistiller.types import Batch


class Dataset(NamedTuple):
    """Data set for a probe."""

    name: str
    train: ImageSet | StreamSet
    test: ImageSet | StreamSet


def open_dataset(folder: Path, image_size: int) -> Dataset:
    """Opens STL-10, Tiny-ImageNet, or any class folders in train/ and val/, scaled to a size in pixels.

    Raises:
        DataError: the folder holds none of these.
    """
    if (folder / "stl10_binary").is_dir():
        return Dataset("STL-10", _stl10(folder, "train", image_size), _stl10(folder, "test", image_size))
    tiny = (folder / "tiny-imagenet-200").is_dir() or (folder / "wnids.txt").exists()
    kind, name = ("tiny-imagenet", "Tiny-ImageNet") if tiny else ("folder", folder.resolve().name)
    fields = {"kind": kind, "root": folder, "image_size": image_size, "memory": "resident"}
    splits = load_data(DataConfig.model_validate(fields))
    return Dataset(name, splits.train, splits.test)


def _stl10(folder: Path, split: str, image_size: int) -> ImageSet:
    from torchvision.datasets import STL10

    try:
        read = STL10(str(folder), split=split)
    except RuntimeError as error:
        raise DataError(f"{folder}: {error}") from error
    images = torch.from_numpy(read.data).permute(0, 2, 3, 1).contiguous()
    return ImageSet(images=resize_images(images, image_size), labels=torch.from_numpy(read.labels).long())


def probe(model: nn.Module, data: Dataset, prepare: Callable[[Batch], Batch], device: torch.device) -> float:
    """Computes the test accuracy in percent of a logistic regression on the model's pooled features.

    The features are standardised by the training images. The L2 penalty is scikit-learn's C = 0.1 for every
    model, so nothing is chosen on the test images. `prepare` normalises images as in the model's training.
    """
    loaders = (make_loader(images, 500, device=device, shuffle=False) for images in (data.train, data.test))
    train, test = (collect(model, loader.epoch(0), prepare) for loader in loaders)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    regression.fit(train.features.numpy(), train.label.numpy())
    return 100 * float(regression.score(test.features.numpy(), test.label.numpy()))
