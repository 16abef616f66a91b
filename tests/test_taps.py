"""Taps: names, features, what they leave alone, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mdistiller
from mdistiller.errors import ConfigError, TapError, UnknownNameError
from mdistiller.taps import TappedModel, probe


class Small(nn.Module):
    def __init__(self, inplace=False, function=False):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.unused = nn.Linear(1, 1)
        self.pair = Pair()
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x)
        x = F.relu(x, inplace=True) if self.function else self.relu(x)
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
    assert tapped.taps._recorder.features == {}
    assert isinstance(model(image), torch.Tensor)
    assert tapped.taps._recorder.features == {}
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


def test_a_change_in_place_by_a_function_is_refused(image):
    with pytest.raises(TapError, match=r"'conv' was changed in place.*inplace=False"):
        mdistiller.tap(Small(function=True), ["conv"])(image)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_that_works_in_place_leaves_the_feature(image, compiled):
    model, plain = Small(inplace=True), Small()
    plain.load_state_dict(model.state_dict())
    tapped = mdistiller.tap(model, ["conv", "relu:input", "relu"])
    logits, features = (torch.compile(tapped, fullgraph=True, backend="aot_eager") if compiled else tapped)(
        image
    )
    expected = mdistiller.tap(plain, ["conv", "relu:input", "relu"])(image)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(features, expected.features)
    assert features["conv"].min() < 0 <= features["relu"].min()
    (logits.sum() + sum(f.square().sum() for f in features.values())).backward()
    (expected.logits.sum() + sum(f.square().sum() for f in expected.features.values())).backward()
    torch.testing.assert_close(model.conv.weight.grad, plain.conv.weight.grad)
    assert model.relu.inplace
    tapped.untap()
    assert not model.relu._forward_pre_hooks
    assert probe(model, ["relu:input"], (3, 8, 8)).features["relu:input"].shape == (2, 4, 8, 8)


def test_unknown_names_list_the_nearest():
    model = mdistiller.create_model("resnet8x4")
    with pytest.raises(UnknownNameError, match=r"unknown tap 'stgae1'; nearest: stage1"):
        mdistiller.tap(model, ["stgae1"])
    with pytest.raises(
        UnknownNameError, match=r"layer1.*Module paths: conv1, bn1, relu, layer1, layer1\.0, layer2"
    ):
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
    with pytest.raises(TapError, match=r"returns tuple .*; expected logits"):
        mdistiller.tap(Pair(), [])(image)


def test_an_error_in_the_model_leaves_no_trace(image):
    tapped = mdistiller.tap(Small(), ["conv"])
    with pytest.raises(RuntimeError):
        tapped(image[:, :2])
    assert not tapped.taps._recorder.active


def test_compiles_whole(image):
    tapped = mdistiller.tap(Small(), ["conv", "fc:input"])
    expected = tapped(image)
    logits, features = torch.compile(tapped, fullgraph=True, backend="aot_eager")(image)
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


class Gives(nn.Module):
    """A model that wraps its logits [B, 4]; `x` is another tensor."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x[:, :1, :2, :2].flatten(1), x)


def attributes(**values):
    return type("ModelOutput", (), values)()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits, x: logits,
        lambda logits, x: attributes(logits=logits, features=x),
        lambda logits, x: {"features": x, "logits": logits},
        lambda logits, x: {"aux": x, "out": logits},  # torchvision's segmentation models
        lambda logits, x: (logits,),
        lambda logits, x: (x.mean(), logits, {"features": x}),  # a loss, logits, and features by name
        lambda logits, x: {"loss": x.mean(), "scores": logits},
    ],
)
def test_logits_are_found(image, wrap):
    torch.testing.assert_close(TappedModel(Gives(wrap), [])(image).logits, image[:, 0, :2, :2].flatten(1))


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda logits, x: {"out": x, "mine": logits}, "mine"),
        (lambda logits, x: attributes(logits=x, mine=logits), "mine"),
        (lambda logits, x: (x, logits), 1),
        (lambda logits, x: {"a": {"b": logits}}, lambda result: result["a"]["b"]),
        (lambda logits, x: x, lambda result: result[:, 0, :2, :2].flatten(1)),
        (lambda logits, x: logits, "mine"),  # the other model of a pair
    ],
)
def test_logits_are_given(image, wrap, where):
    expected = image[:, 0, :2, :2].flatten(1)
    torch.testing.assert_close(TappedModel(Gives(wrap), [], where)(image).logits, expected)
    student, teacher = Gives(wrap), Gives(wrap)
    distiller = mdistiller.Distiller(student, teacher, "kd", logits_of=where)
    torch.testing.assert_close(distiller(image, torch.tensor([0, 1])).logits, expected)


@pytest.mark.parametrize(
    ("wrap", "where", "message"),
    [
        (lambda logits, x: (x, logits), None, r"tuple \(0: \[2, 3, 8, 8\], 1: \[2, 4\]\); expected logits"),
        (
            lambda logits, x: {"loss": x.sum()},
            None,
            r"dict \('loss': \[\]\); expected .* 'logits'; or name them",
        ),
        (lambda logits, x: {"a": x}, "b", r"dict \('a': .*\), without a tensor at logits_of='b'; expected"),
        (lambda logits, x: (x,), 3, r"tuple .*, without a tensor at logits_of=3; expected"),
        (lambda logits, x: None, None, "NoneType; expected logits"),
    ],
)
def test_logits_that_are_not_found(image, wrap, where, message):
    with pytest.raises(TapError, match=f"the model returns {message}") as caught:
        TappedModel(Gives(wrap), [], where)(image)
    assert "\n" not in str(caught.value)


class Named(nn.Module):
    """A model in the style of transformers, called by the names of its inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, *, pixel_values, bias=0.0):
        return {"logits": self.fc(pixel_values.mean((2, 3))) + bias, "loss": None}


def test_each_model_gets_the_entries_that_it_takes(image):
    batch = {"pixel_values": torch.randn(2, 4, 8, 8), "interpolate": True}
    named = Named()
    torch.testing.assert_close(
        mdistiller.tap(named, [])(batch).logits, named(pixel_values=batch["pixel_values"])["logits"]
    )
    tapped = mdistiller.tap(Small(), [])  # its argument is `x`
    torch.testing.assert_close(tapped({"pixel_values": image}).logits, tapped(image).logits)
    with pytest.raises(ConfigError, match=r"Small takes \['x'\], and the batch has \['a', 'b'\]: rename"):
        tapped({"a": image, "b": image})


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mapping_of_inputs(compiled):
    model = Named()
    tapped = mdistiller.tap(model, ["fc", "pooled"])
    inputs = {"pixel_values": torch.randn(2, 4, 8, 8), "bias": torch.ones(5)}
    logits, features = (torch.compile(tapped, fullgraph=True, backend="aot_eager") if compiled else tapped)(
        inputs
    )
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
