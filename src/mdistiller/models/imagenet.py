"""Models for large images that torchvision lacks, with the state dicts of megvii-research/mdistiller."""

from torch import Tensor, nn

from mdistiller.models.cifar.common import activated, conv, global_pool
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table

# Output channels and stride of the thirteen separable convolutions.
_SEPARABLE = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


@register_model("MobileNetV1")
class MobileNet(nn.Module):
    """MobileNet (Howard et al., arXiv 1704.04861) at full width; total stride 32.

    The stem is a full convolution, every other layer a depthwise and a pointwise convolution. The four
    stages end at strides 4, 8, 16 and 32. Weights start with PyTorch's defaults, as in the published runs.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        width = 32
        self.model = nn.Sequential(nn.Sequential(*activated(conv(3, width, stride=2))))
        for outputs, stride in _SEPARABLE:
            depthwise = activated(conv(width, width, stride=stride, groups=width))
            self.model.append(nn.Sequential(*depthwise, *activated(conv(width, outputs, 1))))
            width = outputs
        self.fc = nn.Linear(width, num_classes)
        stages = ["model.3", "model.5", "model.11", "model.13"]
        preacts = [f"{stage}.4" for stage in stages]
        self.tap_points = tap_table(
            stages, stem="model.0", preacts=preacts, last_map="model.13", classifier="fc"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(global_pool(self.model(x)))
