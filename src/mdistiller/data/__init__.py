"""Data sets, loaders and augmentation."""

from mdistiller.data.augment import Augment
from mdistiller.data.config import AugmentConfig, DataConfig
from mdistiller.data.dataset import ImageSet, Splits, StreamSet
from mdistiller.data.load import load_data
from mdistiller.data.loader import make_loader

__all__ = [
    "Augment",
    "AugmentConfig",
    "DataConfig",
    "ImageSet",
    "Splits",
    "StreamSet",
    "load_data",
    "make_loader",
]
