"""Layouts of taps, which follow from the model: grids, prefix tokens, the axis of the channels."""

import re

import pytest
import torch
import torchvision
from torch import nn

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.models import tap_points
from mdistiller.models.layouts import Layout, layout_of, parse_layout
from mdistiller.models.own_input import InputConfig, OwnInput


def patches(side, columns, channels, prefix=0):
    """Returns tokens [2, N, C] whose first two channels are the row and the column of their patch."""
    rows, cols = torch.meshgrid(torch.arange(side), torch.arange(columns), indexing="ij")
    tokens = torch.stack([rows, cols, *[torch.zeros_like(rows)] * (channels - 2)], -1).flatten(0, 1).float()
    return torch.cat([torch.full((prefix, channels), -7.0), tokens]).expand(2, -1, -1)


def features(model, names, size, where=None):
    with torch.no_grad():
        return mdistiller.taps.Taps(model.eval(), names, where)(torch.randn(2, 3, *size)).features


def check_map(model, path, size, where=None):
    """Converts a tap, and returns its layout and the shape of the map."""
    layout = layout_of(model, path)
    feature = features(model, [path], size, where)[path]
    found = layout.as_map(feature, size)
    torch.testing.assert_close(layout.mean(feature), found.mean((2, 3)))
    return layout, list(found.shape[1:])


def test_a_grid_follows_the_images():
    layout = Layout("tokens", (16, 16), prefix=1)
    assert layout.grid((256, 128)) == (16, 8)
    found = layout.as_map(patches(16, 8, 4, prefix=1), (256, 128))
    assert found.shape == (2, 4, 16, 8)
    assert torch.equal(found[0, 0, :, 0], torch.arange(16.0))
    assert torch.equal(found[0, 1, 0], torch.arange(8.0))


def test_registers_are_no_patches():
    layout = Layout("tokens", (16, 16), prefix=5)
    assert layout.as_map(patches(2, 2, 3, prefix=5), (32, 32)).shape == (2, 3, 2, 2)
    assert layout.mean(patches(2, 2, 3, prefix=5)).min() == 0  # the prefix is negative


def test_incomplete_patches_count_where_the_model_pads():
    assert Layout("tokens", (4, 4)).grid((30, 9)) == (7, 2)
    assert Layout("tokens", (4, 4), padded=True).grid((30, 9)) == (8, 3)


@pytest.mark.parametrize(
    ("kind", "shape", "axis"),
    [
        ("map", (2, 16, 8, 384), 1),
        ("channels_last", (2, 16, 8, 384), 3),
        ("channels_last", (2, 32, 32, 32), 3),
    ],
)
def test_channels_are_where_the_layout_says(kind, shape, axis):
    feature = torch.randn(shape)
    found = Layout(kind).as_map(feature, (64, 32))
    assert torch.equal(found, feature.movedim(axis, 1))
    torch.testing.assert_close(Layout(kind).mean(feature), found.mean((2, 3)))


@pytest.mark.parametrize(("kind", "mean"), [("sequence", (2, 23)), ("signal", (2, 16)), ("vector", None)])
def test_what_has_no_space_is_no_map(kind, mean):
    feature = torch.randn(2, 16, 23) if mean else torch.randn(2, 5)
    with pytest.raises(ConfigError, match=f"a {kind} .* is no map"):
        Layout(kind).as_map(feature, (32, 32))
    assert Layout(kind).mean(feature).shape == (mean or (2, 5))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(Layout("map"), (2, 4, 8)), (Layout("tokens", (8, 8)), (2, 17, 8)), (Layout("tokens"), (2, 4, 4, 8))],
)
def test_another_shape_than_the_layout_is_an_error(layout, shape):
    with pytest.raises(ConfigError, match="PATH@tokens/16"):
        layout.as_map(torch.zeros(shape), (32, 32))


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("map", Layout("map")),
        ("signal", Layout("signal")),
        ("tokens/16+1", Layout("tokens", (16, 16), 1)),
        ("tokens/16x8", Layout("tokens", (16, 8))),
    ],
)
def test_a_layout_is_written_behind_a_path(text, layout):
    assert parse_layout(text) == layout == layout_of(nn.Sequential(nn.GELU()), f"0@{text}")


@pytest.mark.parametrize("text", ["maps", "tokens", "tokens/0", "tokens/16+x", "tokens/16-1"])
def test_a_wrong_layout_is_an_error(text):
    with pytest.raises(ConfigError, match=r"layout of a tap: got .* allowed: map"):
        parse_layout(text)


TIMM = [
    ("vit_tiny_patch16_224", {"img_size": (64, 32)}, (64, 32), "tokens", 1, [192, 4, 2]),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (80, 48), "tokens", 1, [192, 5, 3]),
    (
        "vit_tiny_patch16_224",
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        (70, 40),
        "tokens",
        1,
        [192, 5, 3],
    ),
    ("vit_tiny_patch16_224", {"img_size": 32, "reg_tokens": 4}, (32, 32), "tokens", 5, [192, 2, 2]),
    ("deit_tiny_distilled_patch16_224", {"img_size": (64, 32)}, (64, 32), "tokens", 2, [192, 4, 2]),
    ("cait_xxs24_224", {"img_size": (64, 32)}, (64, 32), "tokens", 0, [192, 4, 2]),
    ("eva02_tiny_patch14_224", {"img_size": (56, 28)}, (56, 28), "tokens", 1, [192, 4, 2]),
    ("swin_tiny_patch4_window7_224", {"img_size": (64, 32)}, (64, 32), "channels_last", 0, [96, 16, 8]),
    ("convnext_atto", {}, (64, 32), "map", 0, [40, 16, 8]),
    ("resnet10t", {}, (64, 32), "map", 0, [64, 16, 8]),
]


@pytest.mark.parametrize(("name", "options", "size", "kind", "prefix", "shape"), TIMM)
def test_timm(name, options, size, kind, prefix, shape):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=2, **options)
    layout, found = check_map(model, tap_points(model)["stage1"], size)
    assert (layout.kind, layout.prefix, found) == (kind, prefix, shape)


def test_a_wrapped_model_keeps_its_layouts():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64)
    wrapped = nn.Sequential(model)
    assert layout_of(wrapped, "0.blocks.3") == Layout("tokens", (16, 16), 1)
    own = OwnInput(model, InputConfig(), InputConfig(image_size=64))
    layout = layout_of(own, "model.blocks.3")
    feature = features(own, ["blocks.3"], (24, 48))["blocks.3"]
    assert layout.as_map(feature, (24, 48)).shape == (2, 192, 4, 4)


def test_torchvision():
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=2)
    layout, shape = check_map(vit, "encoder.layers.encoder_layer_0", (32, 32))
    assert (layout, shape) == (Layout("tokens", (8, 8), 1), [16, 4, 4])
    swin = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 1], [4, 4], num_classes=2)
    assert check_map(swin, "features.3", (64, 32))[1] == [32, 8, 4]
    assert check_map(swin, "features.0.0", (64, 32))[1] == [
        16,
        16,
        8,
    ]  # the convolution before the permutation
    assert check_map(torchvision.models.convnext_tiny(num_classes=2), "features.3", (64, 32))[1] == [
        192,
        8,
        4,
    ]


TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = TEXT | {"image_size": 32, "patch_size": 8}
WIDE = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 1],
    "window_size": 4,
}
TRANSFORMERS = [
    ("ViT", "ForImageClassification", SMALL, r"layers?\.1$", (32, 32), 1, [16, 4, 4]),
    ("DeiT", "ForImageClassification", SMALL, r"layers?\.1$", (32, 32), 2, [16, 4, 4]),
    ("Dinov2", "Model", SMALL, r"layers?\.1$", (32, 16), 1, [16, 4, 2]),
    ("Dinov2WithRegisters", "Model", SMALL, r"layers?\.1$", (32, 16), 5, [16, 4, 2]),
    ("CLIPVision", "Model", SMALL, r"layers\.1$", (32, 32), 1, [16, 4, 4]),
    ("SiglipVision", "Model", SMALL, r"layers\.1$", (32, 32), 0, [16, 4, 4]),
    ("Swin", "Model", SWIN, r"layers\.1\.blocks\.0\.layernorm_after$", (32, 16), 0, [16, 8, 4]),
    ("Swin", "Model", SWIN, r"^layernorm$", (32, 16), 0, [16, 8, 4]),
    ("ConvNext", "Model", WIDE, r"stages\.1$", (64, 32), 0, [8, 8, 4]),
    (
        "ResNet",
        "Model",
        WIDE | {"embedding_size": 8, "layer_type": "basic"},
        r"stages\.1$",
        (32, 16),
        0,
        [8, 4, 2],
    ),
]


@pytest.mark.parametrize(("kind", "head", "options", "tap", "size", "prefix", "shape"), TRANSFORMERS)
def test_transformers(kind, head, options, tap, size, prefix, shape):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, kind + head)(config)
    (path,) = [name for name, _ in model.named_modules() if re.search(tap, name)]
    layout, found = check_map(model, path, size, where=lambda result: torch.zeros(2, 2))
    assert (layout.prefix, found) == (prefix, shape)


def test_both_halves_of_clip():
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=SMALL))
    assert layout_of(model, "vision_model.encoder.layers.0") == Layout("tokens", (8, 8), 1)
    assert layout_of(model, "text_model.encoder.layers.0") == Layout("sequence")


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Llama"])
def test_text_is_a_sequence(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} if kind == "DistilBert" else TEXT
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, **sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    assert layout_of(model, tap_points(model)["stage2"]) == Layout("sequence")


@pytest.mark.parametrize("name", ["resnet20", "vgg8", "ShuffleV2"])
def test_the_zoo_has_maps(name):
    model = mdistiller.create_model(name, num_classes=2)
    points = tap_points(model)
    maps = [tap for tap in points if tap != "pooled"]
    found = features(model, maps, (64, 32))
    for tap, feature in found.items():
        assert layout_of(model, points[tap]) == Layout("map")
        assert feature.shape[2] == 2 * feature.shape[3]


def test_one_dimensional_convolutions_are_a_signal():
    model = nn.Sequential(nn.Conv1d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    assert layout_of(model, "0") == layout_of(model, "1") == Layout("signal")


class Mixed(nn.Module):
    """Blocks whose axes nobody can tell from outside."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(self.norm(self.embed(x).flatten(2).mT)).mean(1)


def test_an_unknown_layout_is_an_error_that_says_how_to_give_it():
    with pytest.raises(ConfigError, match=r"tap 'act' of Mixed: .* unknown. Give .*'PATH@tokens/16\+1'"):
        layout_of(Mixed(), "act")
    assert layout_of(Mixed(), "embed") == Layout("map")
    assert layout_of(Mixed(), "act@tokens/4") == Layout("tokens", (4, 4))


def test_a_table_of_taps_tells_layouts():
    model = nn.Sequential(Mixed())
    model[0].tap_points = {"stage1": "act@tokens/4", "pooled": "act:input@sequence"}
    assert layout_of(model, "0.act") == Layout("tokens", (4, 4))
    assert layout_of(model, "0.act:input") == Layout("sequence")
