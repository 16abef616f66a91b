"""Linear probes: what a student's frozen features are worth on data that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.datasets import STL10

from mdistiller.analysis.features import Collected, collect
from mdistiller.data import DataConfig, ImageSet, StreamSet, load_data, make_loader
from mdistiller.data.dataset import resize_images
from mdistiller.errors import DataError
from mdistiller.types import Batch

# The paper's Table 13 for wrn_40_2 → wrn_16_2, taken down from memory.
PUBLISHED = {
    ("STL-10", "KD"): 70.9,
    ("STL-10", "DKD"): 72.9,
    ("Tiny-ImageNet", "KD"): 33.9,
    ("Tiny-ImageNet", "DKD"): 37.1,
}


class Dataset(NamedTuple):
    """A data set to probe on."""

    name: str
    train: ImageSet | StreamSet
    test: ImageSet | StreamSet


def open_dataset(folder: Path, image_size: int) -> Dataset:
    """A folder's images at a size in pixels: STL-10, Tiny-ImageNet, or any class folders in train/ and val/.

    Raises:
        DataError: none of these.
    """
    if (folder / STL10.base_folder).is_dir():
        return Dataset("STL-10", _stl10(folder, "train", image_size), _stl10(folder, "test", image_size))
    tiny = (folder / "tiny-imagenet-200").is_dir() or (folder / "wnids.txt").exists()
    kind, name = ("tiny-imagenet", "Tiny-ImageNet") if tiny else ("folder", folder.resolve().name)
    config = DataConfig.model_validate(
        {"kind": kind, "root": folder, "image_size": image_size, "memory": "resident"}
    )
    splits = load_data(config)
    return Dataset(name, splits.train, splits.test)


def _stl10(folder: Path, split: str, image_size: int) -> ImageSet:
    try:
        read = STL10(str(folder), split=split)
    except RuntimeError as error:
        raise DataError(f"{folder}: {error}") from error
    images = torch.from_numpy(read.data).permute(0, 2, 3, 1).contiguous()
    return ImageSet(images=resize_images(images, image_size), labels=torch.from_numpy(read.labels).long())


def probe(model: nn.Module, data: Dataset, prepare: Callable[[Batch], Batch], device: torch.device) -> float:
    """Test accuracy in percent of a logistic regression on the model's pooled features.

    The features are standardised by the training images; the L2 penalty is scikit-learn's C = 0.1, the same
    for every model, so nothing is chosen on the test images.

    Args:
        model: has the tap `pooled`, on `device`.
        data: images to fit and to test on.
        prepare: normalises them as the model is used to.
        device: where the model runs.
    """
    seen: list[Collected] = []
    for images in (data.train, data.test):
        loader = make_loader(images, 500, device=device, shuffle=False)
        seen.append(collect(model, loader.epoch(0), prepare))
    train, test = seen
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    fitted.fit(train.features.numpy(), train.label.numpy())
    return 100 * float(fitted.score(test.features.numpy(), test.label.numpy()))
