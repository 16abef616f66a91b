"""Canonical taps of models of transformers, of quantizable models and of models without a head."""

import pytest
import torch
import torchvision

import mdistiller
from mdistiller.models import tap_points
from mdistiller.models.layouts import layout_of

transformers = pytest.importorskip("transformers")

WIDE = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}
TOKENS = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = {
    "ViT": TOKENS | {"image_size": 32, "patch_size": 8},
    "ConvNext": WIDE,
    "ResNet": WIDE | {"embedding_size": 8, "layer_type": "basic"},
    "Segformer": WIDE | {"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16},
}
STAGES = {"ViT": [4, 4, 4], "ConvNext": [8, 4, 2, 1], "ResNet": [8, 4, 2, 1], "Segformer": [8, 4, 2, 1]}


def build(kind, head="ForImageClassification", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=5, **SMALL[kind], **options)
    return getattr(transformers, f"{kind}{head}")(config).eval()


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_stages_and_pooled(kind):
    model = build(kind)
    image = torch.randn(2, 3, 32, 32)
    logits, features = mdistiller.tap(model, tap_points(model))(image)
    torch.testing.assert_close(logits, model(image).logits)
    stages = {n: f for n, f in features.items() if n.startswith("stage") and "." not in n}
    assert list(stages) == [f"stage{i + 1}" for i in range(len(STAGES[kind]))]
    layouts = [layout_of(model, tap_points(model)[name]) for name in stages]
    maps = [layout.as_map(f, (32, 32)) for layout, f in zip(layouts, stages.values(), strict=True)]
    sides = [found.shape[2] for found in maps]
    assert sides == STAGES[kind]
    # Independent of the table: the library's own hidden states, the first of which are the embeddings.
    hidden = model(image, output_hidden_states=True).hidden_states
    hidden = hidden if kind == "Segformer" else hidden[1:]
    for own, tapped in zip(hidden, stages.values(), strict=True):
        own = own if own.shape == tapped.shape else own.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tapped, own)
    head = model.classifier[1] if kind == "ResNet" else model.classifier
    torch.testing.assert_close(head(features["pooled"]), logits)


@torch.no_grad()
def test_a_residual_network_has_all():
    model = build("ResNet")
    _, features = mdistiller.tap(model, tap_points(model))(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features["last_map"].mean((2, 3)), features["pooled"])
    assert features["stem"].shape == (2, 8, 8, 8)
    for stage in ("stage1", "stage4"):
        assert torch.equal(features[f"{stage}.preact"].relu(), features[stage])


def test_a_segmentation_model_has_stages_and_no_classifier():
    points = tap_points(build("Segformer", "ForSemanticSegmentation"))
    assert list(points) == ["stage1", "stage2", "stage3", "stage4"]
    assert not any("decode_head" in path for path in points.values())


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
@torch.no_grad()
def test_text(kind):
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    sizes = sizes if kind == "DistilBert" else TOKENS | {"num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(num_labels=5, vocab_size=50, **sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    words = {
        "input_ids": torch.arange(1, 15).view(2, 7),
        "attention_mask": torch.ones(2, 7, dtype=torch.int64),
    }
    logits, features = mdistiller.tap(model, tap_points(model))(words)
    assert list(features) == ["stage1", "stage2", "pooled"]
    torch.testing.assert_close(
        features["stage2"], model(**words, output_hidden_states=True).hidden_states[-1]
    )
    torch.testing.assert_close(model.classifier(features["pooled"]), logits)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
@torch.no_grad()
def test_a_quantizable_model_has_the_taps_of_its_plain_form(name):
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, num_classes=3).eval()
    build = getattr(torchvision.models.quantization, name)
    model = build(quantize=False, num_classes=3).eval()
    model.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    names = tap_points(model)
    # The blocks of a quantizable ResNet add and rectify in one operation.
    assert list(names) == [n for n in tap_points(plain) if not n.endswith(".preact")]
    expected = mdistiller.tap(plain, names)(image)
    torch.testing.assert_close(mdistiller.tap(model, names)(image), expected)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
@torch.no_grad()
def test_a_timm_model_without_head_returns_pooled(name):
    timm = pytest.importorskip("timm")
    options = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, num_classes=0, **options).eval()
    logits, features = mdistiller.tap(model, tap_points(model))(torch.randn(1, 3, 32, 32))
    assert torch.equal(features["pooled"], logits)
    assert features["pooled"].shape == (1, model.head_hidden_size)
    if "last_map" in features:
        torch.testing.assert_close(features["last_map"].mean((2, 3)), features["pooled"])
