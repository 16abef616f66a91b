"""Fields of the configs of detection and segmentation."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from mdistiller.config import RunConfig
from mdistiller.data.cores import Workers
from mdistiller.settings import Settings

_WEIGHTS = ("backbone_weights", "weights")  # options of models, names or files


class DenseDataConfig(Settings):
    """Part of a data set of images with objects or masks."""

    relative_paths: ClassVar[tuple[str, ...]] = (
        "train_annotations",
        "test_annotations",
        "train_images",
        "test_images",
    )

    train_limit: int | None = Field(default=None, ge=1)
    """Use at most this many training images, chosen by seed."""
    test_limit: int | None = Field(default=None, ge=1)
    """Use at most this many test images, chosen by seed."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed for the limits."""
    workers: Workers = "auto"
    """Processes that read images. 0: the main process reads them. `auto`: one for each core that the process
    may use, at most 16."""
    on_error: Literal["raise", "skip"] = "raise"
    """Missing or unreadable image files: stop, or leave them out and warn."""


class DenseConfig(RunConfig):
    """A run of a task with images of several sizes."""

    teacher_images: ClassVar[str]
    """Reason for which a teacher's images have no fields of their own."""

    def absolute(self) -> Self:
        whole = super().absolute()
        update = {}
        for field in ("student", "teacher"):
            model = getattr(whole, field)
            options = {} if model is None else model.options
            # Others are names of pretrained weights.
            files = {n: Path(options[n]) for n in _WEIGHTS if n in options and Path(options[n]).exists()}
            if files:
                found = {name: str(path.absolute()) for name, path in files.items()}
                update[field] = model.model_copy(update={"options": options | found})
        return whole.model_copy(update=update)

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        self.method_class(self.method.method_name)
        if self.teacher is not None and self.teacher.own_fields:
            raise ValueError(f"teacher.{self.teacher.own_fields[0]}: {self.teacher_images}; allowed: None")
        return self
