"""Data sets, loaders and augmentation."""

from mdistiller.data import cifar, folder, hf, synthetic  # noqa: F401  (registers their data sets)
from mdistiller.data.augment import Augment
from mdistiller.data.config import AugmentConfig, DataConfig
from mdistiller.data.dataset import ImageSet, Splits, StreamSet
from mdistiller.data.load import load_data
from mdistiller.data.loader import make_loader
from mdistiller.data.registry import list_datasets, register_dataset

__all__ = [
    "Augment",
    "AugmentConfig",
    "DataConfig",
    "ImageSet",
    "Splits",
    "StreamSet",
    "list_datasets",
    "load_data",
    "make_loader",
    "register_dataset",
]
