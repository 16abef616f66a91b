"""A model of one's own, in one file: a small network for color images of any size.

    mdistiller train digits.teacher.my_cnn --plugin examples/my_model.py --student.options width 32
    mdistiller train digits.kd.my_cnn_resnet8 --plugin examples/my_model.py --teacher.checkpoint RUN \
        --teacher.options width 32

The name goes into a recipe's; arguments other than `num_classes`, which comes from the data, become
`--student.options` and `--teacher.options`.
"""

from torch import nn

from mdistiller import register_model


def block(inputs, outputs):
    """A 3x3 convolution that halves the image, with batch norm; the ReLU is left to the network."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


class MyCNN(nn.Module):
    """Three blocks, the mean over space, a linear classifier."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.block0, self.block1, self.block2 = block(3, width), block(width, width), block(width, 2 * width)
        # Not in place: that would overwrite the features before the ReLU.
        self.relu0, self.relu1, self.relu2 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.classifier = nn.Linear(2 * width, num_classes)
        # The names by which methods read features, and where these are: a module, whose output is meant, or
        # with `:input` what it is given. A model may lack any of them; a method that needs it says so.
        self.tap_points = {
            "stem": "relu0",
            "stage1.preact": "block1",  # before the stage's last ReLU
            "stage1": "relu1",
            "stage2.preact": "block2",
            "stage2": "relu2",
            "last_map": "relu2",  # [B, D, H, W], whose mean over space is `pooled`
            "pooled": "classifier:input",  # [B, D]
        }

    def forward(self, image):
        """[B, 3, H, W] to logits [B, classes]."""
        x = self.relu0(self.block0(image))
        x = self.relu1(self.block1(x))
        x = self.relu2(self.block2(x))
        return self.classifier(x.mean((2, 3)))


@register_model  # or @register_model("another_name")
def my_cnn(num_classes, width=16):
    """The network, `width` channels wide at first."""
    return MyCNN(num_classes, width)
