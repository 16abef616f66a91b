"""A feature method in one file: a linear map from a student's feature to a teacher's, for any two models.

    mdistiller train folder.my_hint.timm/vit_tiny_patch16_224_torchvision/resnet18 \
        --plugin examples/my_feature_method.py --method.teacher-tap stage12 --method.student-tap stage4 …

Tap names are canonical (`stem`, `stage1` …, `stageN.preact`, `last_map`, `pooled`) or module paths.
`probe` returns the shapes for the adapter. The adapter is an ordinary submodule, so it is trained, moved,
saved and resumed with the student.
"""

from torch import nn

from mdistiller import Method, MethodConfig, register_method
from mdistiller.methods import Card
from mdistiller.taps import probe


class MyHintConfig(MethodConfig):
    """Hyperparameters of the method."""

    weight: float = 1.0
    """Weight of the feature loss."""
    student_tap: str = "pooled"
    """Tap of the student."""
    teacher_tap: str = "pooled"
    """Tap of the teacher."""


@register_method("my_hint")
class MyHint(Method):
    """Computes the mean squared error between the adapted feature and the teacher's, pooled over space."""

    Config = MyHintConfig
    card = Card("an example, after FitNets (Romero et al., ICLR 2015)", year=2026)

    def __init__(self, config, student, teacher, data):
        super().__init__(config, student, teacher, data)
        self.student_taps = (config.student_tap,)
        self.teacher_taps = (config.teacher_tap,)
        s = probe(student, self.student_taps, data.input_shape).features[config.student_tap]
        t = probe(teacher, self.teacher_taps, data.input_shape).features[config.teacher_tap]
        self.adapter = nn.Linear(pool(s).shape[1], pool(t).shape[1])

    def forward(self, student, teacher, batch, progress):
        """Returns `{"hint": …}`."""
        s = pool(student.features[self.config.student_tap]).float()
        t = pool(teacher.features[self.config.teacher_tap]).float()
        loss = (self.adapter(s) - t).square().mean()
        return {"hint": self.config.weight * loss}


def pool(feature):
    """Averages maps [B, C, H, W] or tokens [B, N, C] to [B, C]."""
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature
