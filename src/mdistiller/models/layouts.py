"""Layouts of tapped features: the meaning of their axes, known from the model and never from a shape."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.models.own_input import OwnInput

AXES = {
    "map": "[B, C, H, W]",
    "channels_last": "[B, H, W, C]",
    "tokens": "[B, N, C]",
    "sequence": "[B, L, C]",
    "signal": "[B, C, L]",
    "vector": "[B, D]",
}
HINT = (
    "Give the layout behind the tap's name, as in 'PATH@tokens/16+1' (patches of 16 pixels, one prefix "
    "token); allowed: map, channels_last, tokens/PATCH+PREFIX, sequence, signal, vector"
)


@dataclass(frozen=True)
class Layout:
    """Meaning of the axes of a feature.

    Attributes:
        kind: `map` [B, C, H, W], `channels_last` [B, H, W, C], `tokens` [B, N, C] (the patches of an image in
            row order, behind the prefix tokens), `sequence` [B, L, C], `signal` [B, C, L] of 1-D
            convolutions, or `vector` [B, D].
        patch: height and width of a token's patch in pixels.
        prefix: number of tokens in front of the patches (class and register tokens).
        padded: patches at the border may be incomplete, so the grid rounds up instead of down.
        image_size: height and width of the images that the model sees, where it resizes its inputs.
    """

    kind: Literal["map", "channels_last", "tokens", "sequence", "signal", "vector"]
    patch: tuple[int, int] = (1, 1)
    prefix: int = 0
    padded: bool = False
    image_size: tuple[int, int] | None = None

    @property
    def is_spatial(self) -> bool:
        """Whether the feature is a map of an image, or patches of one."""
        return self.kind in ("map", "channels_last", "tokens")

    def grid(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Returns the number of rows and columns of patches in images of (height, width) pixels."""
        size = self.image_size or image_size
        extra = [side - 1 if self.padded else 0 for side in self.patch]
        rows, columns = ((s + e) // p for s, e, p in zip(size, extra, self.patch, strict=True))
        return rows, columns

    def as_map(self, feature: Tensor, image_size: Sequence[int]) -> Tensor:
        """Converts a feature to a map [B, C, H, W], without prefix tokens.

        Args:
            feature: a feature of this layout.
            image_size: height and width of the images in the batch, in pixels.

        Raises:
            ConfigError: a sequence, a signal or a vector; or a feature that does not have this layout.
        """
        if not self.is_spatial:
            raise ConfigError(f"a {self.kind} {AXES[self.kind]} is no map; got {list(feature.shape)}")
        self.check(feature)
        if self.kind == "map":
            return feature
        if self.kind == "channels_last":
            return feature.permute(0, 3, 1, 2)
        rows, columns = self.grid(image_size)
        if feature.shape[1] != self.prefix + rows * columns:
            pixels = "x".join(map(str, self.image_size or image_size))
            raise ConfigError(
                f"got {feature.shape[1]} tokens {list(feature.shape)}; images of {pixels} pixels have "
                f"{self.prefix} prefix tokens and {rows}x{columns} patches. {HINT}"
            )
        return feature[:, self.prefix :].transpose(1, 2).unflatten(2, (rows, columns))

    def mean(self, feature: Tensor) -> Tensor:
        """Averages a feature over its positions, without prefix tokens, to vectors [B, C]."""
        self.check(feature)
        if self.kind in ("map", "channels_last"):
            return self.as_map(feature, ()).mean((2, 3))
        if self.kind == "signal":
            return feature.mean(2)
        return feature if self.kind == "vector" else feature[:, self.prefix :].mean(1)

    def check(self, feature: Tensor) -> None:
        """Raises a ConfigError for a feature with another number of axes."""
        if feature.ndim != AXES[self.kind].count(",") + 1:
            raise ConfigError(
                f"got a feature {list(feature.shape)} of a tap with the layout {self.kind} "
                f"{AXES[self.kind]}. {HINT}"
            )


def image_size(inputs: object) -> tuple[int, int]:
    """Returns height and width of images, of their shape (C, H, W), or of the images in a mapping.

    Raises:
        ConfigError: no images.
    """
    if isinstance(inputs, tuple):
        return inputs[-2:]
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    sizes = [(x.shape[2], x.shape[3]) for x in values if isinstance(x, Tensor) and x.ndim == 4]
    if not sizes:
        raise ConfigError(
            "the grid of a tap's tokens follows from the size of the images [B, C, H, W]; got none"
        )
    return sizes[0]


MAP, CHANNELS_LAST, SEQUENCE, SIGNAL, VECTOR = (
    Layout(kind) for kind in ("map", "channels_last", "sequence", "signal", "vector")
)


def parse_layout(text: str) -> Layout:
    """Reads a layout as a tap setting has it after the `@`: its kind, or `tokens/16+1`, `tokens/16x8`.

    Raises:
        ConfigError: no such layout.
    """
    if text in AXES and text != "tokens":
        return Layout(text)  # type: ignore[arg-type]
    found = re.fullmatch(r"tokens/([1-9]\d*)(?:x([1-9]\d*))?(?:\+(\d+))?", text)
    if found is None:
        raise ConfigError(f"layout of a tap: got {text!r}. {HINT}")
    height, width, prefix = found.groups()
    return Layout("tokens", (int(height), int(width or height)), int(prefix or 0))


def layout_of(model: nn.Module, path: str) -> Layout:
    """Returns the layout of a feature of two or more axes after the batch's, by its module path.

    It follows from the innermost module around the tap whose kind is known: a model of timm, torchvision or
    transformers, or a module with convolutions and without layers that work on the last axis. Your own
    model declares it in its table `tap_points`, as `PATH@LAYOUT`.

    Args:
        model: the model.
        path: `PATH` for the module's output, `PATH:input` for its input, with `@LAYOUT` where it is given.

    Raises:
        ConfigError: the layout is unknown, or no layout is of the given name.
    """
    path, _, given = path.partition("@")
    names = path.removesuffix(":input").split(".")
    around = [model]
    for name in names:
        around.append(around[-1].get_submodule(name))
    found, image_size = parse_layout(given) if given else None, None
    for depth, module in reversed(list(enumerate(around))):
        rest = ".".join(names[depth:])
        found = found or _own(module, path, rest) or _library(module, rest) or _convolutional(module)
        if found is not None and isinstance(module, OwnInput) and module.own.image_size is not None:
            image_size = (module.own.image_size,) * 2
    if found is None:
        raise ConfigError(
            f"tap {path!r} of {type(model).__name__}: the meaning of its axes is unknown. {HINT}"
        )
    return found if image_size is None else replace(found, image_size=image_size)


def _own(module: nn.Module, path: str, rest: str) -> Layout | None:
    """Returns the layout in a module's own table of taps."""
    table = getattr(module, "tap_points", None)
    side = ":input" if path.endswith(":input") else ""
    for own in table.values() if isinstance(table, dict) else ():
        known, _, given = str(own).partition("@")
        if given and known == rest + side:
            return parse_layout(given)
    return None


_TWO = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.InstanceNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_ONE = (nn.Conv1d, nn.ConvTranspose1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)
_LAST_AXIS = (nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.Embedding, nn.RNNBase)


def _convolutional(module: nn.Module) -> Layout | None:
    """Returns the layout inside a convolutional module without layers that work on the last axis."""
    parts = list(module.modules())
    if any(isinstance(part, _LAST_AXIS) for part in parts):
        return None
    if any(isinstance(part, _TWO) for part in parts):
        return MAP
    return SIGNAL if any(isinstance(part, _ONE) for part in parts) else None


def _library(module: nn.Module, rest: str) -> Layout | None:
    library = type(module).__module__.partition(".")[0]
    known = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}.get(library)
    return None if known is None else known(module, rest)


# Models of timm that embed patches, keep maps, and do not say where they put the channels.
_EMBEDDING = {
    "PyramidVisionTransformerV2": MAP,
    "SwinTransformerV2Cr": MAP,
    "TinyVit": MAP,
    "VisionTransformerSAM": CHANNELS_LAST,
    "VOLO": CHANNELS_LAST,
}


def _timm(model: Any, rest: str) -> Layout | None:
    infos, embed = getattr(model, "feature_info", None), getattr(model, "patch_embed", None)
    if not isinstance(infos, list):
        return None
    name = type(model).__name__
    if hasattr(model, "num_prefix_tokens") and hasattr(embed, "feat_ratio"):
        if not re.fullmatch(r"blocks\.\d+|norm|norm_pre", rest):
            return None
        # The class token of CaiT joins the patches behind these blocks.
        prefix = 0 if name == "Cait" and rest != "norm" else model.num_prefix_tokens
        height, width = model.patch_embed.feat_ratio(as_scalar=False)
        return Layout("tokens", (height, width), prefix, padded=model.patch_embed.dynamic_img_pad)
    if rest not in [info.get("module") for info in infos]:
        return None
    if hasattr(model, "output_fmt"):
        return {"NCHW": MAP, "NHWC": CHANNELS_LAST}.get(model.output_fmt)
    return MAP if embed is None else _EMBEDDING.get(name)


def _torchvision(model: Any, rest: str) -> Layout | None:
    kind = type(model).__name__
    if kind == "VisionTransformer" and re.fullmatch(r"encoder(\.ln|\.dropout|\.layers(\.\w+)?)?", rest):
        return Layout("tokens", (model.patch_size, model.patch_size), 1)
    if kind == "SwinTransformer" and re.fullmatch(r"features(\.\d+)?(\.\d+)?|norm", rest):
        return CHANNELS_LAST
    return MAP if kind == "ConvNeXt" and re.fullmatch(r"features(\.\d+)?(\.\d+)?", rest) else None


# Class and distillation tokens; registers are counted by the config.
_PREFIX = {
    "vit": 1,
    "deit": 2,
    "beit": 1,
    "data2vec-vision": 1,
    "vit_msn": 1,
    "ijepa": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
}


def _transformers(model: Any, rest: str) -> Layout | None:
    config: Any = getattr(model, "config", None)
    kind, patch = getattr(config, "model_type", None), getattr(config, "patch_size", None)
    if kind in ("convnext", "convnextv2", "segformer"):  # maps, though their norms work on the last axis
        return MAP if re.search(r"(stages|block|layer_norm)\.\d+$", rest) else None
    if patch is None:
        return SEQUENCE if hasattr(config, "vocab_size") else None
    height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    if kind in ("swin", "swinv2"):
        block = re.search(r"layers\.(\d+)\.blocks\.\d+(?!.*attention)", rest)
        if block is None and not rest.endswith("layernorm"):
            return None
        scale = 2 ** (int(block[1]) if block else len(config.depths) - 1)  # stages end by merging 2x2 patches
        return Layout("tokens", (height * scale, width * scale), padded=True)
    if kind in _PREFIX and re.search(r"layers?\.\d+$|norm$|encoder$", rest):
        prefix = _PREFIX[kind] + getattr(config, "num_register_tokens", 0)
        return Layout("tokens", (height, width), prefix)
    return None
