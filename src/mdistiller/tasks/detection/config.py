"""One detection run, fully described."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import tyro
from pydantic import Field, field_validator, model_validator

from mdistiller.config import SELF, RunConfig
from mdistiller.methods import Method
from mdistiller.models import ModelConfig
from mdistiller.settings import Settings
from mdistiller.tasks.detection.methods import get_method


class DetectionDataConfig(Settings):
    """COCO-format JSON files and image folders."""

    kind: Annotated[Literal["coco"], tyro.conf.Suppress] = "coco"
    """Tells a detection run's config from a classification run's."""
    root: Path = Path("data/coco")
    """The folder that holds the data set."""
    train_annotations: Path | None = None
    """JSON file, relative to root. None: annotations/instances_train2017.json or instances_train.json."""
    test_annotations: Path | None = None
    """JSON file, relative to root. None: annotations/instances_val2017.json or instances_val.json."""
    train_images: Path | None = None
    """Folder, relative to root. None: train2017 or images."""
    test_images: Path | None = None
    """Folder, relative to root. None: val2017 or images."""
    masks: bool = False
    """Read masks, as Mask R-CNN needs, and evaluate them too."""
    keep_empty: bool = False
    """Train on images without an object too. They are always evaluated."""
    label_ids: Literal["contiguous", "category"] = "contiguous"
    """Labels are 1 … K in the order of the category ids, or the ids themselves, as in torchvision's COCO
    checkpoints (91 classes)."""
    train_limit: int | None = Field(default=None, ge=1)
    """Use at most this many training images, chosen by seed."""
    test_limit: int | None = Field(default=None, ge=1)
    """Use at most this many test images, chosen by seed."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed for the limits."""
    workers: int = Field(default=2, ge=0)
    """Processes that read images (0: none but the main one)."""
    on_error: Literal["raise", "skip"] = "raise"
    """Missing or unreadable image files: stop, or leave them out and warn how many."""


class DetectionAugmentConfig(Settings):
    """Size and random changes of the training images."""

    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """The short side is scaled to one of these lengths, by chance; in evaluation to the last one."""
    long_side: int = Field(default=1333, ge=1)
    """The long side is no longer than this; the short one is then shorter."""
    flip: bool = True
    """Mirror every other image, by chance."""

    @property
    def size(self) -> dict[str, int]:
        """Of the images in evaluation, as arguments of `create_detector`."""
        return {"short_side": self.short_sides[-1], "long_side": self.long_side}

    @field_validator("short_sides")
    @classmethod
    def _lengths(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("short_sides are lengths in pixels, at least one of them")
        return value


class DetectionConfig(RunConfig):
    """A detection run: `student` and `teacher` name detectors, and `method` is one for detectors."""

    metrics: ClassVar[tuple[str, ...]] = ("AP", "AP50", "AP75")

    task: Literal["detection"] = "detection"
    data: DetectionDataConfig = DetectionDataConfig()
    augment: DetectionAugmentConfig = DetectionAugmentConfig()

    eval_batch_size: int = Field(default=1, ge=1)
    """Images per evaluation batch and process. They are padded to one size, which changes predictions a
    little: compare at one size."""

    @classmethod
    def method_class(cls, name: str) -> type[Method]:
        """The class, for detectors, of a method's name."""
        return get_method(name)

    def absolute(self) -> Self:
        """The same with absolute paths, those of backbones among them."""

        def model(m: ModelConfig | None) -> ModelConfig | None:
            weights = None if m is None else m.options.get("backbone_weights")
            if m is None or weights is None or not Path(weights).exists():  # a name of pretrained ones
                return m
            absolute = str(Path(weights).absolute())
            return m.model_copy(update={"options": m.options | {"backbone_weights": absolute}})

        whole = super().absolute()
        return whole.model_copy(update={"student": model(whole.student), "teacher": model(whole.teacher)})

    @model_validator(mode="after")
    def _for_detectors(self) -> DetectionConfig:
        get_method(self.method.method_name)
        if self.optim.name == "dot" or self.optim.accumulate > 1:
            raise ValueError("optim: detectors take neither dot_delta nor accumulate")
        if self.teacher is not None and self.teacher.name == SELF:
            raise ValueError("teacher: a detector does not learn from its own average")
        return self
