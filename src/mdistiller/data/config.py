"""What to read and how to augment it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mdistiller.settings import Settings

Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, le=1)]


class DataConfig(Settings):
    """A data set: where it is, how much of it is used, and how it reaches the device."""

    kind: Literal["cifar100", "cifar10", "tiny-imagenet", "folder", "digits", "synthetic"] = "cifar100"
    """What is read. `folder` is any set of class folders, ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, or
    of tar shards, ROOT/train/*.tar and ROOT/val/*.tar, with KEY.jpg and its class id in KEY.cls.
    `digits` comes with scikit-learn and `synthetic` is computed: both need no files."""
    root: Path = Path("data")
    """The folder that holds the data set."""
    download: bool = True
    """Fetch CIFAR over the network when it is not below root."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the square images in pixels. None: 32 for CIFAR and synthetic, 64 for Tiny-ImageNet,
    224 for folders, 16 for digits."""
    resize: int | None = Field(default=None, ge=1)
    """Image files only: length in pixels to which the short side is scaled before the centre crop of
    image_size (256 with image_size 224 is the usual ImageNet protocol). None: image_size."""
    mean: tuple[Mean, Mean, Mean] | None = None
    """Mean of red, green and blue in images scaled to [0, 1]; it is subtracted. None: the data set's own,
    ImageNet's for image files. A pretrained model wants those of its own training."""
    std: tuple[Std, Std, Std] | None = None
    """Standard deviation of red, green and blue, by which the difference is divided. None: as `mean`."""
    train_limit: int | None = Field(default=None, ge=1)
    """Use at most this many training images, as many of each class as possible, chosen by seed."""
    test_limit: int | None = Field(default=None, ge=1)
    """Use at most this many test images, as many of each class as possible, chosen by seed."""
    label_noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of the training labels replaced by another class, all others equally likely. Test labels
    are never changed."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed for the limits, the label noise, the split of digits and the synthetic images. The training
    seed has no influence on them."""
    memory: Literal["auto", "resident", "stream"] = "auto"
    """`resident`: decoded once into one uint8 tensor that lives on the device. `stream`: read by worker
    processes batch by batch. `auto`: resident when that takes at most memory_limit_gb."""
    memory_limit_gb: float = Field(default=8.0, ge=0.0)
    """Largest decoded size, training and test images together, for memory=auto, in 1e9 bytes."""
    workers: int = Field(default=2, ge=0)
    """Processes that read a streamed set (0: none but the main one), threads that decode a resident one."""
    on_error: Literal["raise", "skip"] = "raise"
    """Unreadable image files: stop, or leave them out and warn how many."""
    synthetic_classes: int = Field(default=10, ge=2)
    """Number of classes of kind synthetic."""
    synthetic_samples: int = Field(default=256, ge=1)
    """Number of training images of kind synthetic; it has half as many test images."""


PolicyName = Literal["autoaugment", "randaugment", "trivialaugment"]


class AugmentConfig(Settings):
    """Random changes to the training images, made on the device a batch at a time."""

    flip: bool = True
    """Mirror every other image, by chance. Turn it off where left and right matter, as for digits."""
    crop: Literal["auto", "padded", "resized"] = "auto"
    """`padded`: pad and crop back at random. `resized`: crop 8 % to 100 % of the area, 3:4 to 4:3, and scale
    it back; a streamed folder from the whole image file, all others from the square that they hold. `auto`:
    resized for a streamed folder, padded for all others."""
    padding: int | None = Field(default=4, ge=0)
    """Black pixels on each side for padded crops. 0: no crops. None: an eighth of the image's height."""
    policy: PolicyName | Literal["none"] = "none"
    """A learned or random policy on top, after crop and flip, drawn for each image: AutoAugment for CIFAR-10,
    RandAugment (two changes, strength 9 of 30), TrivialAugment (wide), with torchvision's changes."""
    strong_policy: PolicyName | Literal["none"] = "randaugment"
    """The same for the strong view, where a method asks for a weak and a strong view of each image."""
    mixup_alpha: float = Field(default=0.0, ge=0.0)
    """Mixup: blend each image and label with another's, with weight ~ Beta(alpha, alpha). 0: off."""
    cutmix_alpha: float = Field(default=0.0, ge=0.0)
    """CutMix: paste a box of another image, whose area is ~ Beta(alpha, alpha). 0: off. With mixup on as
    well, each batch gets one of the two, by chance."""
