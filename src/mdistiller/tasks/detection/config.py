"""Configuration of a detection run."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mdistiller.config import RunConfig
from mdistiller.settings import Settings
from mdistiller.tasks.detection.methods import default_config, get_method
from mdistiller.tasks.detection.models import check_detector
from mdistiller.training.dense import DenseConfig, DenseDataConfig, Factors
from mdistiller.types import Metric


class DetectionDataConfig(DenseDataConfig):
    """Images with objects: COCO-format JSON, YOLO's text files or VOC's XML files."""

    kind: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """Format of the data set. auto: the one whose files are under root. coco includes Roboflow's folders."""
    root: Path = Path("data/coco")
    """Folder of the data set."""
    masks: bool = False
    """Read masks, as Mask R-CNN needs, and evaluate them too."""
    keep_empty: bool = False
    """Train on images without an object too. They are always evaluated."""
    unlabeled: Path | None = None
    """Folder of further training images, at any depth, whose objects are not known: for methods that compare
    levels alone, and for any method with pseudo_score."""
    pseudo_score: float | None = Field(default=None, gt=0, lt=1)
    """Learn the teacher's boxes of this score or more as the objects of unlabeled images. None: the
    detector's own losses leave these images out."""

    @model_validator(mode="after")
    def _check_unlabeled(self) -> Self:
        if self.pseudo_score is not None and self.unlabeled is None:
            raise ValueError("pseudo_score: without unlabeled images; give --data.unlabeled DIR")
        if self.unlabeled is not None and self.masks:
            raise ValueError("unlabeled: images without masks cannot train a detector of masks")
        return self


class DetectionAugmentConfig(Settings):
    """Size and random changes of the training images."""

    short_sides: tuple[PositiveInt, ...] = Field(default=(640, 672, 704, 736, 768, 800), min_length=1)
    """Lengths of the short side in pixels: a random one in training, the last one in evaluation."""
    long_side: int = Field(default=1333, ge=1)
    """Limit of the long side in pixels; the short side shrinks with it."""
    flip: bool = True
    """Mirror half of the images."""
    scale_jitter: Factors | None = None
    """Lowest and highest factor of a random scale, such as 0.5 2. Training images are then squares of the
    last short side, cut from the scaled image or filled up with black; other short sides do not count."""

    @property
    def size(self) -> dict[str, int]:
        """Size of the images in evaluation, as arguments of `create_detector`."""
        return {"short_side": self.short_sides[-1], "long_side": self.long_side}


class DetectionConfig(DenseConfig):
    """A training run of a detector, with a method for detectors."""

    metrics = ("AP", "AP50", "AP75")
    headline = Metric(
        "AP", "%", "Average precision", "test AP (COCO's mean over overlaps of 0.5 to 0.95)", "test AP"
    )
    check_name: ClassVar = staticmethod(check_detector)
    teacher_images = "a detector normalizes and scales its images itself, by the options of its model"
    refused = {  # noqa: RUF012
        "probe_epochs": (0, "a detector has no classifier to train alone"),
        "gradient_checkpointing": (False, "a detector has no known blocks"),
        "compile": ("off", "a detector runs without torch.compile"),
    }
    hidden_flags = (*RunConfig.hidden_flags, "probe_epochs", "gradient_checkpointing", "compile")

    task: Literal["detection"] = "detection"
    data: DetectionDataConfig = DetectionDataConfig()
    augment: DetectionAugmentConfig = DetectionAugmentConfig()

    method_class: ClassVar = staticmethod(get_method)
    method_named: ClassVar = staticmethod(default_config)
