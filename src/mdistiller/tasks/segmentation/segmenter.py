"""Segmentation models by name: torchvision's heads on dilated classifiers, and SegFormer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import CheckpointError, ConfigError, MissingPackageError, UnknownNameError
from mdistiller.models import ModelConfig, load_weights
from mdistiller.models.backbone import backbone_hint, create_backbone
from mdistiller.models.weights import read_metadata
from mdistiller.types import Line

if TYPE_CHECKING:
    from transformers import SegformerForSemanticSegmentation

# Table 6 of SegFormer's paper: channels and blocks of the stages, channels of the head.
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
    """SegFormer of transformers (Xie, Wang, Yu, Anandkumar, Alvarez, Luo: NeurIPS 2021).

    Its call returns logits [B, C, H, W] at the images' size.
    """

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


LOGITS = "logits"
"""Tap of the logits at the resolution of the model's head, [B, C, h, w]."""
EMBEDDING = "embedding"
"""Tap of the map that the head's last convolution classifies, [B, D, h, w]."""
AUX = "aux"
"""Tap of the auxiliary classifier's logits, of models that have it; only with gradients."""

CLASSIFIERS: tuple[str, ...] = ("classifier.4", "aux_classifier.4", "model.decode_head.classifier")
CLASSIFIERS += ("classifier.low_classifier", "classifier.high_classifier")
"""Module paths of the convolutions with an output for each class, some of which each model has."""

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
_MOBILENETS = ("mobilenet_v3_large", "mobilenet_v3_small")
BACKBONES = {"deeplabv3": _RESNETS + _MOBILENETS, "fcn": _RESNETS + _MOBILENETS, "lraspp": _MOBILENETS}
BACKBONES["segformer"] = tuple(SIZES)
STRIDES = (8, 16, 32)


class Segmenter(nn.Module):
    """A backbone with a head of torchvision; a call returns logits [B, C, H, W] at the images' size.

    Names of parameters are those of torchvision's models. `tap_points` maps the canonical names `stem`,
    `stage1` …, `logits`, `embedding`, `aux` to module paths.
    """

    head_paths = ("classifier",)

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        aux_classifier: nn.Module | None,
        taps: dict[str, str],
    ) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier
        self.aux_classifier = aux_classifier
        self.tap_points = taps | {LOGITS: "classifier"}
        if aux_classifier is not None:
            self.tap_points[AUX] = "aux_classifier"

    def forward(self, image: Tensor) -> Tensor:
        features = self.backbone(image)
        if self.aux_classifier is not None and torch.is_grad_enabled():
            self.aux_classifier(features["aux"])  # read as a tap
        logits = self.classifier(features.get("out", features))
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)


def list_segmenters() -> list[str]:
    """Lists the names of the segmentation models, sorted."""
    return sorted(f"{head}_{backbone}" for head, backbones in BACKBONES.items() for backbone in backbones)


def check_segmenter(name: str) -> None:
    """Checks the name of a segmentation model; raises UnknownNameError where there is none."""
    if name not in list_segmenters():
        raise UnknownNameError("segmentation model", name, list_segmenters())


def create_segmenter(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Builds a segmentation model.

    Args:
        name: `HEAD_BACKBONE`, such as `deeplabv3_resnet18`, `lraspp_mobilenet_v3_large`, `segformer_b0`.
        num_classes: number of classes, with a background class if there is one.
        options: of SegFormer `weights`, see `create_segformer`. Of other models `backbone_weights`, weights
            of the backbone as a classifier, see `create_backbone`; `aux`, true to add torchvision's auxiliary
            classifier (DeepLabV3 and FCN); `output_stride`, pixels of the image for one of a ResNet's last
            map: 8, as in torchvision, 16 or 32. None: the default.

    Raises:
        UnknownNameError: no such model or option.
        ConfigError: an invalid option, or transformers is not installed.
        CheckpointError: the weights are missing, damaged or of another architecture.
    """
    check_segmenter(name)
    head, _, backbone = name.partition("_")
    takes = ["backbone_weights"] + ["aux"] * (head in ("deeplabv3", "fcn"))
    takes = ["weights"] if head == "segformer" else takes + ["output_stride"] * (backbone in _RESNETS)
    options = {option: value for option, value in options.items() if value is not None}
    for option in options:
        if option not in takes:
            what = f"option of segmentation model {name!r}"
            raise UnknownNameError(what, option, takes, backbone_hint(option))
    if head == "segformer":
        return create_segformer(backbone, num_classes, **options)
    build = _resnet if backbone in _RESNETS else _mobilenet
    model = build(head, backbone, num_classes, **options)
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # a tap must keep its value
    return model


def build_segmenter(config: ModelConfig, num_classes: int, *, new_classifier: bool = False) -> nn.Module:
    """Builds the model of a config, with its checkpoint loaded if it names one; see `load_weights`."""
    options = resolve_options(config, trained=config.checkpoint is not None)
    model = create_segmenter(config.name, num_classes, **options)
    if config.checkpoint is not None:
        load_weights(model, config.checkpoint, config.name, new_classifier=new_classifier)
    return model


def resolve_options(config: ModelConfig, *, trained: bool) -> Line:
    """Returns a model's options: the config's before its checkpoint's.

    `trained`: the model is built for a checkpoint with every weight.
    """
    metadata = {} if config.checkpoint is None else read_metadata(config.checkpoint)
    stored = metadata.get("options") if metadata.get("model") == config.name else None
    options = (dict(stored) if isinstance(stored, dict) else {}) | config.options
    if trained:
        for name in ("backbone_weights", "weights"):
            options.pop(name, None)
    return options


def _resnet(
    head: str,
    name: str,
    num_classes: int,
    backbone_weights: str | Path | None = None,
    aux: bool = False,
    output_stride: int = 8,
) -> Segmenter:
    from torchvision.models._utils import IntermediateLayerGetter

    if output_stride not in STRIDES:
        raise ConfigError(f"output_stride: got {output_stride!r}; allowed: {', '.join(map(str, STRIDES))}")
    classifier = create_backbone(name, backbone_weights)
    for layer, previous, dilation in {8: ((3, 1, 2), (4, 2, 4)), 16: ((4, 1, 2),), 32: ()}[output_stride]:
        _dilate(classifier.get_submodule(f"layer{layer}"), previous, dilation)
    width: int = classifier.fc.in_features  # type: ignore[union-attr, assignment]
    body = IntermediateLayerGetter(classifier, {"layer4": "out"} | ({"layer3": "aux"} if aux else {}))
    taps = {"stem": "backbone.relu"} | {f"stage{i}": f"backbone.layer{i}" for i in (1, 2, 3, 4)}
    return _with_head(head, body, width, width // 2 if aux else 0, num_classes, taps)


def _dilate(layer: nn.Module, previous: int, dilation: int) -> None:
    """Replaces the stride of a stage by dilation: that of the stage before in its first block."""
    for i, block in enumerate(layer.children()):
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation if i else previous,) * 2


def _mobilenet(
    head: str, name: str, num_classes: int, backbone_weights: str | Path | None = None, aux: bool = False
) -> Segmenter:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.mobilenetv3 import InvertedResidual

    features = create_backbone(name, backbone_weights, dilated=True).get_submodule("features")
    blocks: list[InvertedResidual] = list(features.children())
    # As in torchvision: the first block of each resolution, and the last one.
    starts = [i for i, block in enumerate(blocks) if getattr(block, "_is_cn", False)]
    low = [0, *starts, len(blocks) - 1][-4]
    outputs = {str(len(blocks) - 1): "high" if head == "lraspp" else "out"}
    outputs |= {str(low): "low"} if head == "lraspp" else {str(low): "aux"} if aux else {}
    body = IntermediateLayerGetter(features, outputs)
    ends = [*(i - 1 for i in starts), len(blocks) - 1]
    taps = {"stem": "backbone.0"} | {f"stage{n}": f"backbone.{end}" for n, end in enumerate(ends, 1)}
    first, last = blocks[low].out_channels, blocks[-1].out_channels
    return _with_head(head, body, last, first if aux or head == "lraspp" else 0, num_classes, taps)


def _with_head(
    head: str, body: nn.Module, width: int, side: int, num_classes: int, taps: dict[str, str]
) -> Segmenter:
    """Adds a head for maps of `width` channels; `side` are those of the second input, 0: there is none."""
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead
    from torchvision.models.segmentation.lraspp import LRASPPHead

    if head == "lraspp":
        classifier = LRASPPHead(side, width, num_classes, 128)
        return Segmenter(body, classifier, None, taps | {EMBEDDING: "classifier.high_classifier:input"})
    classifier = (DeepLabHead if head == "deeplabv3" else FCNHead)(width, num_classes)
    aux = FCNHead(side, num_classes) if side else None
    return Segmenter(body, classifier, aux, taps | {EMBEDDING: "classifier.4:input"})
