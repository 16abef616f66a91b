"""SRRL: Knowledge Distillation via Softmax Regression Representation Learning (Yang et al., ICLR 2021)."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, Method, MethodConfig, Scalar, exact, promote
from mdistiller.methods.features import classifier, probe_as, vector_as_map
from mdistiller.methods.registry import register_method
from mdistiller.models.external import tap_points
from mdistiller.types import Batch, DataInfo, Outputs


def srrl_parts(
    student_embedding: Tensor, teacher_embedding: Tensor, classifier_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the feature matching and the softmax regression loss, scalars without weights."""
    s, t, w = (list(x.shape) for x in (student_embedding, teacher_embedding, classifier_weight))
    if s != t or len(s) != 2 or w[1:] != t[1:]:
        raise ConfigError(
            f"student and teacher embeddings must have one shape [B, D] and the classifier's weight [C, D]; "
            f"got {s}, {t} and {w}"
        )
    with exact(student_embedding):
        difference = promote(student_embedding) - promote(teacher_embedding)
        # The bias of the linear classifier drops out of the difference of logits.
        return difference.square().mean(), F.linear(difference, promote(classifier_weight)).square().mean()


def srrl_loss(
    student_embedding: Float[Tensor, "b d"],
    teacher_embedding: Float[Tensor, "b d"],
    classifier_weight: Float[Tensor, "c d"],
    *,
    feature_weight: float = 1.0,
    regression_weight: float = 1.0,
) -> Scalar:
    r"""Computes the squared differences of two embeddings and of their logits from one classifier.

    $$\frac{\alpha}{BD} \sum_b \| h^T_b - h^S_b \|^2 + \frac{\beta}{BC} \sum_b \| W h^T_b - W h^S_b \|^2$$

    with the input $h^T$ and the weight W of the teacher's classifier, whose bias has no influence, and the
    student's embedding $h^S$, mapped to the teacher's width by a connector.

    Raises:
        ConfigError: shapes that do not fit together.

    Source: Yang et al., ICLR 2021, the softmax regression loss as a squared error of logits; equals the
    authors' code.
    """
    feature, regression = srrl_parts(student_embedding, teacher_embedding, classifier_weight)
    return feature_weight * feature + regression_weight * regression


class SRRLConfig(MethodConfig):
    """Hyperparameters of SRRL; the defaults are the authors'."""

    feature_weight: float = Field(default=1.0, ge=0)
    """Weight α of the feature matching loss."""
    regression_weight: float = Field(default=1.0, ge=0)
    """Weight β of the softmax regression loss."""


@register_method("srrl")
class SRRL(Method[SRRLConfig]):
    """Matches the teacher's last feature, also through the teacher's classifier."""

    Config = SRRLConfig
    card = Card(
        "Yang et al.: Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021",
        "Embeddings that the teacher's classifier can read; map sizes may differ",
        example=Example(("last_map",), ("pooled",), 66_048),
    )
    teacher_taps = ("pooled",)

    def __init__(self, config: SRRLConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        # As in the authors' code, the connector comes before the pooling if the student has a map.
        self.tap = "last_map" if "last_map" in tap_points(student) else "pooled"
        self.student_taps = (self.tap,)
        layer = classifier(teacher)
        # In a tuple the layer is no submodule of the method.
        self._classifier = (layer,)
        probe_as(teacher, "pooled", "vector", data)
        kind: Literal["map", "vector"] = "vector" if self.tap == "pooled" else "map"
        channels = probe_as(student, self.tap, kind, data).features[self.tap].shape[1]
        convolution = nn.Conv2d(channels, layer.in_features, 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.connector = nn.Sequential(convolution, nn.BatchNorm2d(layer.in_features), nn.ReLU())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        embedding = promote(self.connector(vector_as_map(student.features[self.tap]))).mean((2, 3))
        weight = promote(self._classifier[0].weight.detach())
        matching, regression = srrl_parts(embedding, teacher.features["pooled"], weight)
        return {
            "srrl_feature": c.feature_weight * matching,
            "srrl_regression": c.regression_weight * regression,
        }
