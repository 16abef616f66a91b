"""Configuration of a run on images with several classes each."""

from typing import ClassVar, Literal

from pydantic import field_validator

from mdistiller.data import DataConfig
from mdistiller.errors import ConfigError
from mdistiller.methods import Method
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.types import Line, Metric


class MultiLabelConfig(ClassificationConfig):
    """A training run of a classifier of images with several classes each."""

    metrics: ClassVar[tuple[str, ...]] = ("mAP", "macro_f1", "loss")
    headline = Metric("mAP", "%", "Mean average precision", "test mAP, the mean over classes", "test mAP")
    # What is about one class an image.
    fixed: ClassVar[Line] = {
        "label_smoothing": 0.0,
        "class_weights": "none",
        "diagnostics": False,
    }

    task: Literal["multilabel"] = "multilabel"  # type: ignore[assignment]
    data: DataConfig = DataConfig(kind="folder", multi_label=True)
    diagnostics: bool = False
    """Not for images of several classes."""

    @field_validator("data")
    @classmethod
    def _read_several(cls, value: DataConfig) -> DataConfig:
        return value.replace(multi_label=True)

    @classmethod
    def method_class(cls, name: str) -> type[Method]:
        """Finds the class of a method that suits images of several classes.

        Raises:
            UnknownNameError: no such method.
            ConfigError: a method for images of one class each.
        """
        method = super().method_class(name)
        find = super().method_class
        if any(find(part).needs.one_class for part in name.split("+")):
            raise ConfigError(
                f"method {name!r} is for images of one class each; allowed for several are 'binary_kd', "
                "methods of features, such as 'fitnet', and their sums"
            )
        return method
