"""A backbone without boxes, such as a foundation model, as the teacher of a detector."""

from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.features import to_map
from mdistiller.methods.tokens import last_patches
from mdistiller.models.layouts import Layout
from mdistiller.models.own_input import OwnInput
from mdistiller.taps import Taps, logits_if_any, probe, tap_layouts
from mdistiller.tasks.detection.adapter import DetectorAdapter, DetectorPass, Level, Targets
from mdistiller.types import DataInfo

if TYPE_CHECKING:
    from torchvision.models.detection.image_list import ImageList


class BackboneAdapter(DetectorAdapter):
    """Access to a backbone: its last patches, or the taps in `names`, are its levels.

    It sees the padded batch, scaled to a square of its own size, in whose pixels its strides are.

    Args:
        model: the backbone in an `OwnInput`, for images in [0, 1].

    Raises:
        ConfigError: the size of its images is not known.
    """

    activation = None
    model: OwnInput

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        size = self.model.own.image_size
        if size is None:
            raise ConfigError("teacher_input: a detector's teacher without boxes needs image_size")
        self.network, self.size = self.model.model, size

    @cached_property
    def _known(self) -> tuple[dict[str, Level], dict[str, Layout]]:
        data = DataInfo((3, self.size, self.size), logits_of=logits_if_any)
        found = probe(self.network, self.names or (last_patches(self.network),), data).features
        layouts = tap_layouts(self.network, found, data)
        shapes = {name: to_map(x, layouts[name], data.input_shape).shape for name, x in found.items()}
        return {name: Level(self.size / shape[3], shape[1]) for name, shape in shapes.items()}, layouts

    @property
    def levels(self) -> dict[str, Level]:
        return self._known[0]

    def train(self, images: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], DetectorPass]:
        raise self._lacks("boxes")

    def prepare(self, images: list[Tensor]) -> "ImageList":
        from torchvision.models.detection.image_list import ImageList

        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images]
        sizes = [(x.shape[1] * self.size / height, x.shape[2] * self.size / width) for x in images]
        return ImageList(self.model.adapt(torch.stack(padded)), sizes)

    def features(self, images: "ImageList") -> dict[str, Tensor]:
        taps = Taps(self.network, self.levels, logits_if_any)
        try:
            found = taps(images.tensors).features
        finally:
            taps.remove()
        return {name: to_map(x, self._known[1][name], images.tensors) for name, x in found.items()}
