"""FitNets (Romero, Ballas, Kahou, Chassang, Gatta, Bengio: ICLR 2015, arXiv 1412.6550)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, promote
from mdistiller.methods.features import FeatureConfig, FeatureMethod, TapPair, Weight, stages
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def regressor(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], relu: bool) -> nn.Sequential:
    """Builds layers that map a student's feature [B, C, H, W] to the shape of a teacher's.

    The convolution changes the size: by its stride if the size halves or doubles, else by a kernel that is
    just large enough (as in the paper; 1x1 for equal sizes). A smaller map that is not half the size is
    resized first.

    Raises:
        ConfigError: a shape is not [B, C, H, W].
    """
    if len(student_shape) != 4 or len(teacher_shape) != 4:
        raise ConfigError(
            "fitnet needs feature maps [B, C, H, W] (or tokens) on both sides; "
            f"got {list(student_shape)} and {list(teacher_shape)}"
        )
    (_, c_s, h_s, w_s), (_, c_t, h_t, w_t) = student_shape, teacher_shape
    resize: list[nn.Module] = []
    convolution: nn.Module
    if (h_s, w_s) == (2 * h_t, 2 * w_t):
        convolution = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    elif (2 * h_s, 2 * w_s) == (h_t, w_t):
        convolution = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    elif h_s >= h_t and w_s >= w_t:
        convolution = nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t))
    else:
        resize = [nn.Upsample((h_t, w_t), mode="bilinear")]
        convolution = nn.Conv2d(c_s, c_t, 1)
    return nn.Sequential(*resize, convolution, nn.BatchNorm2d(c_t), *([nn.ReLU()] if relu else []))


class FitNetConfig(FeatureConfig):
    """Hyperparameters of FitNet; the defaults are the usual ones for CIFAR-100."""

    weight: Weight = 100.0
    """Weight of the hint loss."""
    relu: bool = True
    """End the regressor with a ReLU; for hints without negative values."""


@register_method("fitnet")
class FitNet(FeatureMethod[FitNetConfig]):
    """Regresses the teacher's hint layer from a layer of the student, with the mean squared error."""

    Config = FitNetConfig
    sequences = True
    card = Card(
        "Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015",
        "The first feature method to try: one hint between maps or tokens of any two models",
        example=Example(("stage2",), ("stage2",), 16_768),
    )

    def __init__(self, config: FitNetConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        shapes = zip(self.student_shapes, self.teacher_shapes, strict=True)
        self.regressors = nn.ModuleList(regressor(s, t, config.relu) for s, t in shapes)

    def default_taps(self, student: nn.Module, teacher: nn.Module) -> TapPair:
        """Returns the second stages; for a model with more stages, the stage at the same relative depth."""
        both = stages(student), stages(teacher)
        count = min(map(len, both))
        first, second = ((names[min(2, count) * len(names) // count - 1],) for names in both)
        return first, second

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        hints = zip(self.regressors, *self.read(student, teacher, batch.image), strict=True)
        loss = torch.stack([F.mse_loss(promote(regress(s)), promote(t)) for regress, s, t in hints]).sum()
        return {"fitnet": self.weight * loss}
