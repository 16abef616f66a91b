"""SimKD: Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022)."""

import copy

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, Method, MethodConfig, Needs, Scalar, promote
from mdistiller.methods.features import (
    check_channels,
    classifier,
    last_map,
    pool_to,
    pool_to_smaller,
    smaller_size,
)
from mdistiller.methods.registry import register_method
from mdistiller.models.external import tap_points
from mdistiller.taps import Taps
from mdistiller.types import Batch, DataInfo, Outputs


def simkd_loss(
    student_feature: Float[Tensor, "b c hs ws"], teacher_feature: Float[Tensor, "b c ht wt"]
) -> Scalar:
    r"""Computes the mean squared difference of two maps, the larger one averaged to the smaller size.

    $$\frac{1}{BCHW} \sum_b \| f^T_b - P(f^S)_b \|_2^2$$

    Raises:
        ConfigError: not two maps with the same B and C; the student's is projected to the teacher's channels.

    Source: Chen et al., CVPR 2022, the feature alignment loss; equals the authors' code.
    """
    check_channels(student_feature, teacher_feature)
    student, teacher = promote(student_feature), promote(teacher_feature)
    return F.mse_loss(*pool_to_smaller(student, teacher))


class ReusedClassifier(nn.Module):
    """Student of SimKD: the backbone of a student, a projector of three convolutions, a frozen classifier.

    The backbone is a copy of the given student without its classifier; the student does not change. The
    weights of the classifier are random until they are copied or loaded. Taps are those of the student,
    except that `last_map` and `pooled` are the projected features.

    Args:
        student: model with the tap `last_map`.
        feature_dim: channels of the teacher, to which the projector maps.
        num_classes: classes of the classifier.
        factor: the projector's inner convolutions have feature_dim // factor channels.
        size: (H, W) to which the student's map is averaged before the projector; None keeps its size.

    Raises:
        ConfigError: a factor above feature_dim, or a student without the tap or a linear classifier.
    """

    def __init__(
        self,
        student: nn.Module,
        feature_dim: int,
        num_classes: int,
        *,
        factor: int = 2,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        width = feature_dim // factor
        if width < 1:
            raise ConfigError(f"factor must be at most {feature_dim}, the teacher's channels; got {factor}")
        channels = classifier(student).in_features
        paths = tap_points(student)
        self.size = size
        backbone = copy.deepcopy(student)
        # Tapped before the classifier is replaced, as tap names are looked up in the whole model.
        self.student = backbone
        self._taps = Taps(backbone, ["last_map"])
        backbone.set_submodule(paths["pooled"].removesuffix(":input"), nn.Identity())
        self.projector = nn.Sequential(
            *_convolution(channels, width, 1),
            *_convolution(width, width, 3),
            *_convolution(width, feature_dim, 1),
        )
        self.classifier = nn.Linear(feature_dim, num_classes).requires_grad_(False)
        inner = {name: f"student.{path}" for name, path in paths.items()}
        self.tap_points = inner | {"last_map": "projector", "pooled": "classifier:input"}

    def forward(self, image: Tensor) -> Tensor:
        feature = self._taps(image).features["last_map"]
        if self.size is not None:
            feature = pool_to(feature, self.size)
        return self.classifier(self.projector(feature).mean((2, 3)))


def _convolution(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class SimKDConfig(MethodConfig):
    """Hyperparameters of SimKD; the defaults are the authors'."""

    task_weight: float = Field(default=0.0, ge=0)
    """Weight of the task loss, which SimKD does not need."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the feature loss."""
    factor: int = Field(default=2, ge=1)
    """Divisor of the teacher's width for the projector's inner width; larger for a smaller student."""


@register_method("simkd")
class SimKD(Method[SimKDConfig]):
    """Matches the teacher's last feature map through a projector, and reuses the teacher's classifier.

    A `ReusedClassifier` with a copy of the student is trained, evaluated and saved.
    """

    Config = SimKDConfig
    needs = Needs(one_class=False)
    card = Card(
        "Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022",
        "The deployed student may include the teacher's classifier and a projector",
        example=Example(("last_map",), ("last_map",), 188_316),
    )
    student_taps = teacher_taps = ("last_map",)

    def __init__(self, config: SimKDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        own = last_map(student, data)[1:]
        size = smaller_size(own, last_map(teacher, data)[1:])
        self.size = None if size == own else size
        # In a tuple the layer is no submodule of the method.
        self._classifier = (classifier(teacher),)
        classes = classifier(student).out_features, self._classifier[0].out_features
        if classes[0] != classes[1]:
            raise ConfigError(
                "method 'simkd' gives the student the teacher's classifier, so both need the same classes; "
                f"got a student of {classes[0]} and a teacher of {classes[1]}"
            )

    def extend_student(self, student: nn.Module) -> nn.Module:
        layer = self._classifier[0]
        model = ReusedClassifier(
            student, layer.in_features, layer.out_features, factor=self.config.factor, size=self.size
        )
        model.classifier = copy.deepcopy(layer).to(model.classifier.weight.dtype).requires_grad_(False)
        return model

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        loss = simkd_loss(student.features["last_map"], teacher.features["last_map"])
        return {"simkd": self.config.weight * loss}
