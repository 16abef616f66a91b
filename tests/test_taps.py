"""Taps: names, features, what they leave alone, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mdistiller
from mdistiller.errors import ConfigError, TapError, UnknownNameError
from mdistiller.taps import TappedModel, probe


class Small(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.unused = nn.Linear(1, 1)
        self.pair = Pair()
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x, _ = self.pair(x)
        return self.fc(x.mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.fixture
def image():
    return torch.randn(2, 3, 8, 8)


def test_features_are_what_the_modules_gave(image):
    model = Small()
    tapped = mdistiller.tap(model, ["conv", "fc:input", "relu"])
    logits, features = tapped(image)
    assert list(features) == ["conv", "fc:input", "relu"]
    torch.testing.assert_close(features["conv"], model.conv(image))
    torch.testing.assert_close(features["relu"], model.conv(image).relu())
    torch.testing.assert_close(features["fc:input"], model.conv(image).relu().mean((2, 3)))
    torch.testing.assert_close(logits, model(image))


def test_canonical_names_on_the_zoo(image):
    tapped = mdistiller.tap(mdistiller.create_model("resnet8x4"), ["stage1", "stage3.preact", "pooled"])
    features = tapped(torch.randn(2, 3, 32, 32)).features
    assert features["stage1"].shape == (2, 64, 32, 32)
    assert features["stage3.preact"].shape == (2, 256, 8, 8)
    assert features["pooled"].shape == (2, 256)
    assert features["stage3.preact"].min() < 0 <= features["stage1"].min()


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV2"])
def test_state_dict_is_the_model_s_own(name):
    model = mdistiller.create_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tapped = mdistiller.tap(model, ["stage1", "pooled"])
    assert list(tapped.state_dict()) == list(before)
    nested = nn.ModuleDict({"student": tapped})
    assert list(nested.state_dict()) == [f"student.{k}" for k in before]

    other = mdistiller.tap(mdistiller.create_model(name), ["stage1"])
    other.load_state_dict(tapped.state_dict())
    nn.ModuleDict({"student": other}).load_state_dict(nested.state_dict())
    for key, value in other.model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_gradients_flow_through_features(image):
    model = Small()
    mdistiller.tap(model, ["conv"])(image).features["conv"].sum().backward()
    assert model.conv.weight.grad is not None
    assert model.fc.weight.grad is None


def test_nothing_is_kept_between_passes_and_plain_calls_are_plain(image):
    model = Small()
    tapped = mdistiller.tap(model, ["conv"])
    tapped(image)
    assert tapped._recorder.features == {}
    assert isinstance(model(image), torch.Tensor)
    assert tapped._recorder.features == {}
    assert tapped.untap() is model
    assert not model.conv._forward_hooks


def test_two_wraps_do_not_mix(image):
    model = Small()
    first, second = mdistiller.tap(model, ["conv"]), mdistiller.tap(model, ["relu"])
    assert list(first(image).features) == ["conv"]
    assert list(second(image).features) == ["relu"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(image, how):
    tapped = mdistiller.tap(Small(), ["conv"])
    twin = how(tapped)
    nn.init.zeros_(twin.model.conv.weight)
    nn.init.zeros_(twin.model.conv.bias)
    assert twin(image).features["conv"].abs().sum() == 0
    assert tapped(image).features["conv"].abs().sum() > 0


def test_a_change_in_place_is_refused(image):
    with pytest.raises(TapError, match=r"'conv' was changed in place.*inplace=False"):
        mdistiller.tap(Small(inplace=True), ["conv"])(image)
    mdistiller.tap(Small(inplace=True), ["relu"])(image)
    with pytest.raises(TapError, match="in place"):
        probe(Small(inplace=True), ["relu:input"], (3, 8, 8))


def test_unknown_names_list_the_nearest():
    model = mdistiller.create_model("resnet8x4")
    with pytest.raises(UnknownNameError, match=r"unknown tap 'stgae1'; nearest: stage1"):
        mdistiller.tap(model, ["stgae1"])
    with pytest.raises(UnknownNameError, match="layer1"):
        mdistiller.tap(model, ["layer_1"])
    with pytest.raises(UnknownNameError):
        mdistiller.tap(model, ["layer1:output"])


def test_other_misuse(image):
    with pytest.raises(TapError, match="'unused' was not reached"):
        mdistiller.tap(Small(), ["unused"])(image)
    with pytest.raises(TapError, match="a tuple, not a tensor"):
        mdistiller.tap(Small(), ["pair"])(image)
    with pytest.raises(ConfigError, match="tapped already"):
        mdistiller.tap(mdistiller.tap(Small(), []), [])
    with pytest.raises(TapError, match="returns tuple; expected logits"):
        mdistiller.tap(Pair(), [])(image)


def test_an_error_in_the_model_leaves_no_trace(image):
    tapped = mdistiller.tap(Small(), ["conv"])
    with pytest.raises(RuntimeError):
        tapped(image[:, :2])
    assert not tapped._recorder.active


def test_compiles_whole(image):
    tapped = mdistiller.tap(Small(), ["conv", "fc:input"])
    expected = tapped(image)
    logits, features = torch.compile(tapped, fullgraph=True)(image)
    torch.testing.assert_close(logits, expected.logits)
    for name, value in expected.features.items():
        torch.testing.assert_close(features[name], value)


def test_probe_gives_shapes_and_changes_nothing():
    model = mdistiller.create_model("wrn_16_1").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    logits, features = probe(model, ["stage1", "stage2.preact", "pooled"], (3, 32, 32))
    assert logits.shape == (2, 100)
    assert logits.is_meta
    assert {k: tuple(v.shape[1:]) for k, v in features.items()} == {
        "stage1": (16, 32, 32),
        "stage2.preact": (32, 16, 16),
        "pooled": (64,),
    }
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "wrap", [lambda logits: type("ModelOutput", (), {"logits": logits})(), lambda logits: {"logits": logits}]
)
def test_tapped_model_accepts_a_wrapped_output(image, wrap):
    class Wrapped(nn.Module):
        def forward(self, x):
            return wrap(x.flatten(1))

    assert TappedModel(Wrapped(), [])(image).logits.shape == (2, 192)


def test_a_mapping_without_logits_is_refused(image):
    class Loss(nn.Module):
        def forward(self, x):
            return {"loss": x.sum()}

    with pytest.raises(TapError, match=r"returns dict; expected logits.*a key 'logits'"):
        mdistiller.tap(Loss(), [])(image)


class Named(nn.Module):
    """A model in the style of transformers, called by the names of its inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, *, pixel_values, bias=0.0):
        return {"logits": self.fc(pixel_values.mean((2, 3))) + bias, "loss": None}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mapping_of_inputs(compiled):
    model = Named()
    tapped = mdistiller.tap(model, ["fc", "pooled"])
    inputs = {"pixel_values": torch.randn(2, 4, 8, 8), "bias": torch.ones(5)}
    logits, features = (torch.compile(tapped, fullgraph=True) if compiled else tapped)(inputs)
    torch.testing.assert_close(features["pooled"], inputs["pixel_values"].mean((2, 3)))
    torch.testing.assert_close(logits, features["fc"] + 1)
    torch.testing.assert_close(logits, model(**inputs)["logits"])


def test_a_tapped_model_stays_what_it_was(image):
    model = Small()
    model.conv.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    expected = model(image)
    mdistiller.tap(model, ["conv", "fc:input"])(image)
    assert type(model) is Small
    assert "forward" not in vars(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(image), expected)
