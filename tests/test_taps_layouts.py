"""Methods read taps by their layouts: grids of the images, prefix tokens, sequences, sound."""

import pytest
import torch
from torch import nn

import mdistiller
from mdistiller import Distiller
from mdistiller.errors import ConfigError
from mdistiller.methods import get_method
from mdistiller.methods.features import FeatureMethod

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def vit(size, **options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=size, **options)


def test_a_vision_transformer_s_grid_is_that_of_its_images():
    distiller = Distiller(vit((256, 128)), vit((256, 128)), "fitnet", input_shape=(3, 256, 128))
    assert distiller.method.student_shapes == [(2, 192, 16, 8)]
    assert distiller(torch.randn(2, 3, 256, 128), torch.tensor([0, 1])).loss.isfinite()


def test_registers_are_no_patches():
    model = vit(32, reg_tokens=4)
    distiller = Distiller(model, vit(32), "fitnet", input_shape=(3, 32, 32))
    assert distiller.method.student_shapes == distiller.method.teacher_shapes == [(2, 192, 2, 2)]
    images = torch.randn(2, 3, 32, 32)
    tokens = mdistiller.tap(model, ["stage2"])(images).features["stage2"]
    method = Distiller(vit(32), model, "vkd", input_shape=(3, 32, 32)).method
    outputs = mdistiller.types.Outputs(torch.zeros(2, 4), {"stage2": tokens})
    torch.testing.assert_close(method.embeddings(outputs, outputs)[1][0], tokens[:, 5:].mean(1))


def test_the_grid_follows_each_batch():
    images = [torch.randn(2, 3, *size) for size in ((64, 32), (32, 64), (96, 32))]
    model = vit((64, 32), dynamic_img_size=True)
    method = Distiller(model, vit((64, 32)), "at", input_shape=(3, 64, 32)).method
    for batch in images:
        tokens = mdistiller.tap(model, method.student_taps)(batch)
        found, _ = method.read(tokens, tokens, batch)
        grid = [batch.shape[2] // 16, batch.shape[3] // 16]
        assert [list(x.shape[2:]) for x in found] == [grid] * len(found)
    with pytest.raises(ConfigError, match="grid of a tap's tokens follows from the size of the images"):
        method.read(tokens, tokens)


def test_a_swin_s_channels_are_the_last_axis():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, img_size=(64, 32))
    method = Distiller(
        model, mdistiller.create_model("resnet8", num_classes=4), "fitnet", input_shape=(3, 64, 32)
    ).method
    (tap,) = method.student_taps
    assert method.student_shapes == [(2, 192, 8, 4)], tap


def test_a_map_of_square_channels_stays_a_map():
    models = [mdistiller.create_model("resnet20", num_classes=4) for _ in range(2)]
    method = Distiller(*models, "fitnet", input_shape=(3, 64, 32)).method
    assert method.student_shapes == [(2, 32, 32, 16)]


TEXT = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "num_labels": 3,
}
WORDS = {"input_ids": torch.arange(1, 33).view(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
LABELS = torch.tensor([0, 1])


def bert(layers=2):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(num_hidden_layers=layers, **TEXT)
    )


FEATURES = [name for name in mdistiller.list_methods() if issubclass(get_method(name), FeatureMethod)]
FOR_SEQUENCES = [name for name in FEATURES if get_method(name).sequences]


def test_some_methods_take_sequences():
    assert len(FEATURES) >= 15
    assert len(FOR_SEQUENCES) >= 8


@pytest.mark.parametrize("method", FOR_SEQUENCES)
def test_methods_for_sequences_take_text(method):
    settings = {"negatives": 1} if "negatives" in get_method(method).Config.model_fields else {}
    distiller = Distiller(bert(), bert(4), method, input_shape=WORDS, labels=LABELS, **settings)
    out = distiller(WORDS, LABELS, torch.arange(2), 1.0)
    out.loss.backward()
    assert out.loss.isfinite()
    first = next(distiller.student.bert.encoder.layer[0].parameters())
    assert first.grad.abs().sum() > 0
    if method == "fitnet":
        assert distiller.method.student_shapes == [(2, 16, 16, 1)]


@pytest.mark.parametrize("method", sorted({*FEATURES} - {*FOR_SEQUENCES}))
def test_methods_for_maps_refuse_text(method):
    with pytest.raises(
        ConfigError, match=r"compares maps.*tap 'stage\d' is a sequence|has no tap 'last_map'"
    ):
        Distiller(bert(), bert(4), method, input_shape=WORDS, batch_size=2)


class Sound(nn.Module):
    """Convolutions over time."""

    def __init__(self, width):
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(1, width, 3), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.features(x).mean(2))


def test_convolutions_over_time_keep_their_channels():
    taps = {"student_taps": ("features",), "teacher_taps": ("features",)}
    sound = torch.randn(2, 1, 25)
    distiller = Distiller(Sound(8), Sound(16), "fitnet", input_shape=sound, **taps)
    assert (distiller.method.student_shapes, distiller.method.teacher_shapes) == (
        [(2, 8, 23, 1)],
        [(2, 16, 23, 1)],
    )
    assert distiller(sound, LABELS).loss.isfinite()
    outputs = mdistiller.tap(distiller.student, ["features"])(sound)
    found = Distiller(Sound(8), Sound(16), "pkt", input_shape=sound, **taps).method.embeddings(
        outputs, outputs
    )
    torch.testing.assert_close(found[0][0], outputs.features["features"].mean(2))
    with pytest.raises(ConfigError, match=r"compares maps .* tap 'features' is a signal \[B, C, L\]"):
        Distiller(Sound(8), Sound(16), "at", input_shape=sound, **taps)


class Patches(nn.Module):
    """A vision transformer of nobody's library."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.embed(x).flatten(2).mT).mean(1))


def test_a_layout_that_nobody_knows_is_asked_for():
    images = torch.randn(2, 3, 32, 16)
    with pytest.raises(ConfigError, match=r"tap 'block' of Patches.*'PATH@tokens/16\+1'"):
        Distiller(
            Patches(),
            Patches(),
            "at",
            input_shape=(3, 32, 16),
            student_taps=["block"],
            teacher_taps=["block"],
        )
    given = {"student_taps": ["block@tokens/8"], "teacher_taps": ["block@tokens/8"]}
    distiller = Distiller(Patches(), Patches(), "fitnet", input_shape=(3, 32, 16), **given)
    assert distiller.method.student_shapes == [(2, 8, 4, 2)]
    assert distiller(images, LABELS).loss.isfinite()
    tapped = mdistiller.tap(Patches(), ["block@tokens/8"])(images)
    assert tapped.features["block@tokens/8"].shape == (2, 8, 8)
    with pytest.raises(ConfigError, match="layout of a tap: got 'patches'"):
        mdistiller.tap(Patches(), ["block@patches"])
    given["student_taps"] = ["block@tokens/8+1"]
    with pytest.raises(ConfigError, match=r"got 8 tokens .* 1 prefix tokens and 4x2 patches"):
        Distiller(Patches(), Patches(), "fitnet", input_shape=(3, 32, 16), **given)


def test_a_model_s_own_table_may_tell_the_layout():
    models = Patches(), Patches()
    for model in models:
        model.tap_points = {"stage1": "block@tokens/8", "pooled": "head:input"}
    assert mdistiller.models.tap_points(models[0])["stage1"] == "block"
    method = Distiller(*models, "fitnet", input_shape=(3, 32, 16)).method
    assert method.student_shapes == [(2, 8, 4, 2)]
