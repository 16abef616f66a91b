"""Configuration of a segmentation run."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from mdistiller.data.dataset import IMAGENET_MEAN, IMAGENET_STD
from mdistiller.settings import Mean, Settings, Std
from mdistiller.tasks.segmentation.methods import default_config, get_method
from mdistiller.tasks.segmentation.segmenter import check_segmenter
from mdistiller.training.dense import DenseConfig, DenseDataConfig, Factors
from mdistiller.types import Metric


class SegmentationDataConfig(DenseDataConfig):
    """Images with a class for each pixel: mask files as in VOC or Cityscapes, or COCO-format JSON."""

    relative_paths = (*DenseDataConfig.relative_paths, "images", "masks")

    kind: Literal["voc", "cityscapes", "coco"] = "voc"
    """Layout. voc: image and mask files with lists of names, or of equal names in the folders images
    and masks (in train and val, or with val_fraction); cityscapes: leftImg8bit and gtFine; coco:
    objects in COCO-format JSON, drawn as masks."""
    root: Path = Path("data/voc")
    """Folder of the data set."""
    classes: tuple[str, ...] = ()
    """Names of the classes. voc: by their values in the masks, the first is 0; none: those in classes.txt
    (one a line), or VOC's. coco: categories or supercategories to tell apart, everything else is background;
    none: all categories."""
    ignore_index: int = Field(default=255, ge=0, le=255)
    """Value of mask pixels that are neither learned nor evaluated."""
    images: Path = Path("JPEGImages")
    """voc: folder of the images, relative to root."""
    masks: Path = Path("SegmentationClass")
    """voc: folder of the masks, relative to root."""
    train_split: str = "train"
    """voc: name of the list in ImageSets/Segmentation; cityscapes: name of the folder."""
    test_split: str = "val"
    """As train_split, of the test images."""
    mean: tuple[Mean, Mean, Mean] = IMAGENET_MEAN
    """Mean of red, green and blue, for images scaled to [0, 1]."""
    std: tuple[Std, Std, Std] = IMAGENET_STD
    """Standard deviation of red, green and blue."""

    @model_validator(mode="after")
    def _check_classes(self) -> SegmentationDataConfig:
        if self.kind == "cityscapes" and self.classes:
            raise ValueError("classes: Cityscapes has its own 19; allowed: none, or another kind")
        return self


class SegmentationAugmentConfig(Settings):
    """Size and random changes of the images, together with their masks."""

    crop: tuple[PositiveInt, PositiveInt] = (512, 512)
    """Height and width of training images in pixels; smaller images are padded, with ignored pixels."""
    scale: Factors = (0.5, 2.0)
    """Smallest and largest factor of the random scale of training images."""
    short_side: int | None = Field(default=None, ge=1)
    """Length in pixels to which the short side of each image is scaled first, also in evaluation; metrics are
    of the masks in their own size. None: images keep their size."""
    flip: bool = True
    """Mirror half of the images."""


class SegmentationConfig(DenseConfig):
    """A training run of a segmentation model."""

    metrics = ("mIoU", "pixel_accuracy", "mean_accuracy")
    hidden_flags = (*DenseConfig.hidden_flags, "compile")
    headline = Metric(
        "mIoU", "%", "Mean intersection over union", "test mIoU, the mean over classes", "test mIoU"
    )
    check_name: ClassVar = staticmethod(check_segmenter)
    teacher_images = "a teacher of segmentation sees the student's images"
    refused = {  # noqa: RUF012
        "compile": ("off", "a segmentation model runs without torch.compile"),
        "teacher_cache": (
            None,
            "got a folder; a segmentation teacher runs live, because its outputs for one random crop are "
            "classes x height x width numbers",
        ),
    }

    task: Literal["segmentation"] = "segmentation"
    data: SegmentationDataConfig = SegmentationDataConfig()
    augment: SegmentationAugmentConfig = SegmentationAugmentConfig()
    aux_weight: float = Field(default=0.4, ge=0)
    """Weight of the auxiliary classifier's cross-entropy, of a student that has one (option `aux`)."""
    teacher_cache: Path | None = None
    """Not for segmentation: a teacher's outputs for random crops take more room and time than its pass."""

    method_class: ClassVar = staticmethod(get_method)
    method_named: ClassVar = staticmethod(default_config)
