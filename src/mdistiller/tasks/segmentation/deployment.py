"""Exported segmentation models: graphs from images to logits, and masks of images."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from mdistiller.tasks.segmentation.data import SegmentationSet, load_split, palette
from mdistiller.tasks.segmentation.evaluate import classify, evaluate_segmenter
from mdistiller.tasks.segmentation.loader import SegmentationLoader, normalize, scaled, to_tensor
from mdistiller.training.dense import DenseDeployment, DenseSplits
from mdistiller.training.deployment import Model, ModelInput, ModuleOf, normalize_code


class Share(NamedTuple):
    """A class and its share of an image's pixels, in [0, 1]."""

    name: str
    share: float


class SegmenterDeployment(DenseDeployment):
    """Graphs from normalized images of any size, float32 [B, 3, H, W], to logits [B, classes, H, W]."""

    outputs = ("logits",)
    hub_task = "image-segmentation"
    predictions = "classes"
    axes = {0: "batch", 2: "height", 3: "width"}  # noqa: RUF012
    checked = ((2, 3, 128, 192), (1, 3, 96, 128), (3, 3, 160, 96))
    load_split, measure = staticmethod(load_split), staticmethod(evaluate_segmenter)
    loader, module = SegmentationLoader, ModuleOf

    def describe(self, fields: ModelInput) -> dict[str, str]:
        assert fields.mean is not None
        assert fields.std is not None
        size = "any size" if fields.resize is None else f"short side scaled to {fields.resize}"
        return {
            "input": f"RGB, {size}, float32 [B, 3, H, W]",
            "normalization": f"scaled to [0, 1], less mean {list(fields.mean)}, over std {list(fields.std)}",
            "output": f"logits [B, {len(fields.classes)}, H, W]; the class of a pixel has the largest one",
        }

    def graph_code(self, fields: ModelInput) -> tuple[str, str]:
        scale = ""
        if fields.resize is not None:
            scale = f"""\
scale = {fields.resize} / min(image.size)
size = [max(1, round(side * scale)) for side in image.size]
image = image.resize(size, Image.Resampling.BILINEAR)
"""
        show = """\
mask = logits[0].argmax(0)
for index in np.unique(mask):
    print(classes[index], f"{(mask == index).mean():.1%}")"""
        return scale + normalize_code(fields), show

    def prepare(self, fields: ModelInput, image: Image.Image) -> Tensor:
        assert fields.mean is not None
        assert fields.std is not None
        return normalize(to_tensor(scaled(image, fields.resize)), fields.mean, fields.std)

    def predict(self, model: Model, fields: ModelInput, images: list[Tensor], top: int) -> list[list[Share]]:
        masks = [classify(model(image[None])[0], tuple(image.shape[1:]))[0] for image in images]
        return [_shares(mask, fields.classes, top) for mask in masks]

    def draw(
        self, model: Model, fields: ModelInput, image: Image.Image, top: int, min_score: float
    ) -> tuple[Image.Image, list[Share]]:
        logits = model(self.prepare(fields, image)[None])[0]
        mask = classify(logits, (image.height, image.width))[0]
        drawn = Image.fromarray(mask.byte().cpu().numpy(), mode="L")
        drawn.putpalette(palette(256).flatten().tolist())
        return drawn, [found for found in _shares(mask, fields.classes, top) if found[1] >= min_score]

    def example(
        self, fields: ModelInput, count: int, data: DenseSplits[SegmentationSet] | None
    ) -> Tensor | None:
        if data is None:
            return None
        return self.prepare(fields, data.test.read(0)[0]).expand(count, -1, -1, -1).contiguous()

    def format_prediction(self, prediction: Share) -> str:
        return f"{100 * prediction.share:6.2f} %  {prediction.name}"


def _shares(mask: Tensor, classes: Sequence[str], top: int) -> list[Share]:
    """Returns the classes with the largest shares of a mask's pixels, at most `top`, each with a pixel."""
    shares = (mask.flatten().bincount(minlength=len(classes)) / mask.numel()).tolist()
    order = sorted(range(len(classes)), key=lambda i: -shares[i])
    return [Share(classes[i], shares[i]) for i in order[:top] if shares[i] > 0]
