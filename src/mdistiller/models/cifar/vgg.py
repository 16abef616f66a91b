"""VGG with batch norm (Simonyan and Zisserman, ICLR 2015) and one linear layer as classifier."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from mdistiller.models.cifar.common import activated, global_pool, init_classifier, init_convolutions
from mdistiller.models.registry import register_model
from mdistiller.models.tap_table import tap_table


def _block(inputs: int, outputs: int, convolutions: int) -> nn.Sequential:
    """Builds 3x3 convolutions, each with batch norm and, except the last, ReLU."""
    layers: list[nn.Module] = []
    for i in range(convolutions):
        layers += activated(nn.Conv2d(outputs if i else inputs, outputs, 3, padding=1))
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """VGG with five blocks of 64 to 512 channels and max pooling between them.

    The first block is the stem, the others are the four stages. The last two are separated by a pooling
    only for images of height 64 (Tiny-ImageNet). `convolutions` is their number in each block.
    """

    def __init__(self, convolutions: Sequence[int], num_classes: int) -> None:
        super().__init__()
        widths = (3, 64, 128, 256, 512, 512)
        blocks = [_block(i, o, n) for (i, o), n in zip(pairwise(widths), convolutions, strict=True)]
        # A block and its ReLU follow each other, so that the order of the modules is that of the stages.
        self.block0, self.relu0 = blocks[0], nn.ReLU()
        self.block1, self.relu1 = blocks[1], nn.ReLU()
        self.block2, self.relu2 = blocks[2], nn.ReLU()
        self.block3, self.relu3 = blocks[3], nn.ReLU()
        self.block4, self.relu4 = blocks[4], nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(512, num_classes)
        init_convolutions(self)
        init_classifier(self.classifier)
        stages, preacts = ["relu1", "relu2", "relu3", "relu4"], ["block1", "block2", "block3", "block4"]
        self.tap_points = tap_table(
            stages, stem="relu0", preacts=preacts, last_map="relu4", classifier="classifier"
        )

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        x = self.pool(self.relu0(self.block0(x)))
        x = self.pool(self.relu1(self.block1(x)))
        x = self.pool(self.relu2(self.block2(x)))
        x = self.relu3(self.block3(x))
        if height == 64:
            x = self.pool(x)
        x = self.relu4(self.block4(x))
        return self.classifier(global_pool(x))


def _register(name: str, convolutions: Sequence[int]) -> None:
    @register_model(name)
    def build(num_classes: int = 100) -> VGG:
        return VGG(convolutions, num_classes)


_register("vgg8", (1, 1, 1, 1, 1))
_register("vgg11", (1, 1, 2, 2, 2))
_register("vgg13", (2, 2, 2, 2, 2))
_register("vgg16", (2, 2, 3, 3, 3))
_register("vgg19", (2, 2, 4, 4, 4))
