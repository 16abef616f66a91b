"""Configuration of data sets and augmentation."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mdistiller.data.cores import Workers
from mdistiller.data.registry import get_reader
from mdistiller.settings import Means, Settings, Side, Stds, check_channels


class DataConfig(Settings):
    """A data set, the part of it that is used, and its way to the device."""

    labeled: ClassVar[bool] = True
    """Whether a run has labels. Without them, kind folder is all images below root, or of a list of paths,
    and a tenth is held out, at most 5,000 images, unless there is a validation split."""

    kind: str = "cifar100"
    """Name of the data set: cifar100, cifar10, tiny-imagenet, folder, hf, digits, synthetic, or a registered
    one.
    `folder` is any set of class folders, ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, or of lists,
    ROOT/train.csv and ROOT/val.csv, with the columns path and label. `digits` (part of scikit-learn) and
    `synthetic` (computed) need no files. `hf` is a folder of Hugging Face `datasets`: that of `save_to_disk`,
    Parquet files, or WebDataset's tar shards."""
    root: Path = Path("data")
    """Folder of the data set; for kind folder also a single list, FILE.csv."""
    unlabeled: Path | None = None
    """Folder of further training images, at any depth, without a class, for the distillation loss alone."""
    image_column: str | None = None
    """Column of the images of kind hf. None: the only one that has images."""
    label_column: str | None = None
    """Column of the class ids or names of kind hf. None: the one that is called label, labels or class, or
    the only one with class names."""
    val_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of each class of the training images to evaluate on instead of training on them, chosen by
    seed. A set without a validation split needs it, unless its test split may serve. None: no cut."""
    eval_split: Literal["validation", "test"] = "validation"
    """Split that is evaluated on. `validation`: that of val_fraction, or the first of val, valid, validation,
    dev and test that is there. `test`: the test split, for an evaluation after training."""
    download: bool = True
    """Download CIFAR if it is not below root."""
    image_size: Side | None = None
    """Side of the square images in pixels. None: 32 for CIFAR and synthetic, 64 for Tiny-ImageNet,
    224 for folders, but the files' own for equal squares that are smaller, 16 for digits."""
    resize: int | None = Field(default=None, ge=1)
    """Image files only: length in pixels to which the short side is scaled before the center crop of
    image_size (256 with image_size 224 is the usual ImageNet protocol). None: image_size."""
    mean: Means | None = None
    """Mean of each channel, subtracted from images scaled to [0, 1]. None: the data set's own, ImageNet's for
    image files. A pretrained model needs those of its own training. Three numbers, or None: images are RGB.
    Any other count is the number of the images' channels, in image files or .npy arrays."""
    std: Stds | None = None
    """Standard deviation of each channel, the divisor after mean is subtracted. None: as `mean`."""
    train_limit: int | None = Field(default=None, ge=1)
    """Largest number of training images, balanced over the classes and chosen by seed. None: all."""
    test_limit: int | None = Field(default=None, ge=1)
    """Largest number of test images, balanced over the classes and chosen by seed. None: all."""
    label_noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of the training labels to replace by another class, uniformly. Test labels never change."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of val_fraction, the limits, the label noise, the split of digits and the synthetic images. The
    training seed does not affect them."""
    memory: Literal["auto", "resident", "stream"] = "auto"
    """`resident`: decode once to squares of image_size on the device. `stream`: read, decode and crop them in
    worker processes. `auto`: resident for files that are squares of image_size already and fit, otherwise
    stream. Sets of arrays, such as CIFAR, are resident where they fit."""
    memory_limit_gb: float | None = Field(default=None, ge=0.0)
    """Largest size of the decoded images for memory=auto, in 1e9 bytes. None: half of the free memory."""
    workers: Workers = "auto"
    """Processes that decode a streamed set (0: the main one), or threads that decode a resident one. `auto`:
    one for each core that the process may use, at most 16."""
    multi_label: bool = False
    """Read lists with several classes of each image; the recipes multilabel.… do."""
    on_error: Literal["raise", "skip"] = "raise"
    """Treatment of unreadable image files: raise an error, or leave them out with a warning."""
    synthetic_classes: int = Field(default=10, ge=2)
    """Number of classes of kind synthetic."""
    synthetic_samples: int = Field(default=256, ge=1)
    """Number of training images of kind synthetic; it has half as many test images."""

    @property
    def channels(self) -> int:
        """Number of the images' channels."""
        return len(self.mean or "RGB")

    _check_channels = model_validator(mode="after")(check_channels)

    @property
    def is_own(self) -> bool:
        """Whether the set is encoded images of one's own in `root`, scaled and cropped on reading."""
        return self.kind in ("folder", "hf")

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, value: str) -> str:
        get_reader(value)
        return value


PolicyName = Literal["autoaugment", "randaugment", "trivialaugment", "fixmatch"]


class AugmentConfig(Settings):
    """Random changes of the training images, made on the device batch by batch."""

    flip: bool = True
    """Mirror each image with probability 1/2. Turn it off if left and right matter, as for digits."""
    crop: Literal["auto", "padded", "resized"] = "auto"
    """`padded`: pad and crop at random. `resized`: crop a part of the area (`scale`), aspect 3:4 to 4:3,
    and scale it to image_size; image files are cropped before they are scaled. `auto`: resized for image
    files, padded for sets of arrays such as CIFAR."""
    padding: int | None = Field(default=4, ge=0)
    """Black pixels on each side for padded crops. 0: no crops. None: an eighth of the image height."""
    policy: PolicyName | Literal["none"] = "none"
    """Policy after crop and flip, drawn for each image, with torchvision's changes: AutoAugment for CIFAR-10,
    RandAugment (two changes, strength 9 of 30) or TrivialAugment (wide). `fixmatch`: two of 14 changes, each
    of a strength drawn for the image, then a gray box of up to half the side."""
    strong_policy: PolicyName | Literal["none"] = "fixmatch"
    """Policy of the strong view, for methods that compare a weak and a strong view of each image. `fixmatch`
    is that of the authors of MLKD, LSKD and CRLD."""
    mixup_alpha: float = Field(default=0.0, ge=0.0)
    """Mixup: blend each image and label with another's, with weight ~ Beta(alpha, alpha). 0: off."""
    cutmix_alpha: float = Field(default=0.0, ge=0.0)
    """CutMix: paste a box of another image, with area ~ Beta(alpha, alpha). 0: off. With mixup on as well,
    each batch gets one of the two at random."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a `resized` crop, as fractions of the image's."""
    color_jitter: float = Field(default=0.0, ge=0.0, le=1.0)
    """Multiply brightness, contrast and saturation of each image by factors from 1 - color_jitter to
    1 + color_jitter. RGB only. 0: off."""
    erase: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability of setting a box of 2 % to 33 % of an image to the mean color (random erasing). 0: off."""
    rotation: float = Field(default=0.0, ge=0.0, le=180.0)
    """Turn each image by an angle of up to so many degrees, to either side, after crop, flip and policy;
    nearest pixels, black outside. 0: off."""
    vertical_flip: bool = False
    """Mirror top and bottom of each image with probability 1/2, for images without an up and a down."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of crops, flips and all other changes of single images, which follow from it, the epoch and the
    image. None: the run's seed, or 0 with a teacher cache, so that runs of other seeds find their images."""

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("scale: allowed are two rising fractions of the area, above 0 and at most 1")
        return value
