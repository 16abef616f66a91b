"""SegFormer (Xie, Wang, Yu, Anandkumar, Alvarez, Luo: NeurIPS 2021) of the package transformers."""

from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import CheckpointError, MissingPackageError

if TYPE_CHECKING:
    from transformers import SegformerForSemanticSegmentation

# Table 6 of the paper: channels and blocks of the stages, channels of the head.
_NARROW, _WIDE = (32, 64, 160, 256), (64, 128, 320, 512)
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "b0": (_NARROW, (2, 2, 2, 2), 256),
    "b1": (_WIDE, (2, 2, 2, 2), 256),
    "b2": (_WIDE, (3, 4, 6, 3), 768),
    "b3": (_WIDE, (3, 4, 18, 3), 768),
    "b4": (_WIDE, (3, 8, 27, 3), 768),
    "b5": (_WIDE, (3, 6, 40, 3), 768),
}


class SegFormer(nn.Module):
    """A SegFormer whose call returns logits [B, C, H, W] at the images' size."""

    head_paths = ("model.decode_head",)

    def __init__(self, model: "SegformerForSemanticSegmentation", trained: list[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.trained = trained  # classes of the weights by which it was built; none: of an encoder alone
        self.tap_points = {f"stage{i}": f"model.segformer.stages.{i - 1}" for i in (1, 2, 3, 4)}
        self.tap_points |= {"logits": "model.decode_head", "embedding": "model.decode_head.classifier:input"}

    def forward(self, image: Tensor) -> Tensor:
        logits = self.model(pixel_values=image).logits
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)


def create_segformer(size: str, num_classes: int, *, weights: str | None = None) -> SegFormer:
    """Builds a SegFormer of a size, `b0` to `b5`.

    Args:
        size: name of the size.
        num_classes: number of classes.
        weights: folder or name of a checkpoint of transformers, of an encoder or of a whole model; a
            classifier of other classes is replaced. None: random weights.

    Raises:
        MissingPackageError: transformers is not installed.
        CheckpointError: the checkpoint cannot be loaded, or belongs to another size.
    """
    try:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except ImportError as error:
        raise MissingPackageError(f"model 'segformer_{size}'", "transformers", "transformers") from error
    channels, depths, width = SIZES[size]
    config = SegformerConfig(
        hidden_sizes=list(channels),
        depths=list(depths),
        decoder_hidden_size=width,
        num_labels=num_classes,  # type: ignore[call-arg]  # a field of the base class
    )
    if weights is None:
        return SegFormer(SegformerForSemanticSegmentation(config))
    try:
        names = cast(dict[int, str], SegformerConfig.from_pretrained(weights).id2label)
        load: Any = SegformerForSemanticSegmentation.from_pretrained
        model, report = load(weights, config=config, ignore_mismatched_sizes=True, output_loading_info=True)
        missing, wrong = report["missing_keys"], [key for key, *_ in report["mismatched_keys"]]
        encoder = [key for key in missing if not key.startswith("decode_head.")]
        if other := [*encoder, *(key for key in wrong if not key.startswith("decode_head.classifier."))]:
            raise ValueError(f"it belongs to another size, or to another architecture: {min(other)}")
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"weights: {weights!r} of 'segformer_{size}' cannot be loaded: {why}"
        ) from error
    return SegFormer(model, [] if missing else [names[i] for i in sorted(names)])
