"""The zoo: against numbers recorded from the reference code base, and against its own promises."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mdistiller
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.models import (
    ModelConfig,
    create_model,
    list_models,
    load_weights,
    register_model,
    tap_points,
)
from mdistiller.settings import Settings

FACTS = json.loads(Path(__file__).with_name("reference_facts.json").read_text())
RECORDED = FACTS["models"] | FACTS["imagenet"]["models"]
TEACHERS = Path(__file__).parents[3] / "shared" / "teachers" / "cifar100"

NAMES = list_models()
# The deepest and widest ones cost seconds each; their family is covered by a smaller one.
LIGHT = [n for n in NAMES if n not in ("resnet110", "resnet32x4", "ResNet50", "wrn_28_4", "vgg16", "vgg19")]


def fill(model: nn.Module) -> None:
    """Gives every parameter and buffer numbers that follow from its name and shape alone."""
    for key, tensor in model.state_dict().items():
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        shape = tuple(tensor.shape)
        if not shape:
            continue  # num_batches_tracked
        if key.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif tensor.ndim == 1 and key.endswith("weight"):
            value = rng.uniform(0.5, 1.0, shape)
        elif tensor.ndim == 1:
            value = 0.1 * rng.standard_normal(shape)
        else:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensor.copy_(torch.from_numpy(value))


def images(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()


def digest(tensor: Tensor) -> list[float]:
    """Mean, mean of the absolute values, and mean under weights that tell positions apart."""
    flat = tensor.detach().double().flatten()
    weights = torch.linspace(-1, 1, flat.numel(), dtype=torch.float64)
    return [flat.mean().item(), flat.abs().mean().item(), (flat * weights).mean().item()]


def layout(model: nn.Module) -> str:
    """A hash of the state dict's keys and shapes, in order."""
    lines = [f"{key} {list(tensor.shape)}" for key, tensor in model.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tapped(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
    """The logits, each canonical tap's tensor, and how often its module ran."""
    features: dict[str, Tensor] = {}
    runs: dict[str, int] = {}
    handles = []

    def keep(name: str, value: Tensor) -> None:
        features[name] = value
        runs[name] = runs.get(name, 0) + 1

    for name, path in tap_points(model).items():
        module = model.get_submodule(path.removesuffix(":input"))
        if path.endswith(":input"):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: keep(name, out)))
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, features, runs


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_equals_the_reference(name: str) -> None:
    facts = RECORDED[name]
    num_classes, size = (1000, 224) if name in FACTS["imagenet"]["models"] else (100, 32)
    model = create_model(name, num_classes=num_classes).eval()
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    assert layout(model) == facts["layout"]

    fill(model)
    logits, features, _ = tapped(model, images(2, 3, size, size))
    expected = np.array(facts["logits"])
    np.testing.assert_allclose(logits[:, :5].numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    pooled_from = features.pop("last_map")  # our own name: what the head averages
    torch.testing.assert_close(pooled_from.mean((2, 3)), features["pooled"].flatten(1))
    if name == "MobileNetV1":  # the reference does not give its stem
        assert features.pop("stem").shape == (2, 32, 112, 112)
    if name != "MobileNetV2":  # the reference has no pre-activations there
        assert features.keys() == facts["features"].keys()
    for tap, fact in facts["features"].items():
        assert list(features[tap].shape) == fact["shape"], tap
        # Means may cancel, so their errors are measured against the mean absolute value.
        scale = fact["digest"][1]
        np.testing.assert_allclose(digest(features[tap]), fact["digest"], atol=1e-4 * scale, err_msg=tap)


@pytest.mark.parametrize("name", ["resnet32x4", "resnet56", "vgg13", "wrn_40_2"])
@torch.no_grad()
def test_trained_teachers_load(name: str) -> None:
    path = TEACHERS / f"{name}.pt"
    if not path.is_file():
        pytest.skip(f"no trained teachers at {TEACHERS}")
    model = create_model(name).eval()
    load_weights(model, path)
    assert all(t.dtype in (torch.float32, torch.int64) for t in model.state_dict().values())
    # A net with its trained statistics is sure of itself even on noise; a random one is not.
    assert model(images(2, 3, 32, 32)).std() > 1


@pytest.mark.parametrize("name", LIGHT)
def test_training_step(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=7)
    logits, features, runs = tapped(model, images(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert set(runs.values()) == {1}
    for tensor in features.values():
        assert tensor.shape[0] == 2
        assert tensor._version == 0  # nothing wrote into it afterwards
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    if name.startswith("vgg"):  # a bias before a batch norm has no effect
        silent = [key for key in silent if not key.startswith("block") or not key.endswith("bias")]
    assert silent == []
    tracked = {k: int(v) for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    assert tracked
    assert set(tracked.values()) == {1}


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_tap_points(name: str) -> None:
    model = create_model(name).eval()
    logits, features, _ = tapped(model, images(1, 3, 32, 32))
    stages = [n for n in tap_points(model) if n.startswith("stage") and n.count(".") == 0]
    assert stages == [f"stage{i}" for i in range(1, len(stages) + 1)]
    for stage in stages:
        assert features[f"{stage}.preact"].shape == features[stage].shape
    assert features["stem"].ndim == 4
    classifier = model.get_submodule(tap_points(model)["pooled"].removesuffix(":input"))
    torch.testing.assert_close(classifier(features["pooled"]), logits)


@pytest.mark.parametrize(
    "name", [n for n in LIGHT if n.startswith("resnet") or n in ("MobileNetV1", "ResNet18", "ShuffleV1")]
)
@torch.no_grad()
def test_preact_is_before_the_last_relu(name: str) -> None:
    _, features, _ = tapped(create_model(name).eval(), images(1, 3, 32, 32))
    for stage in ("stage1", "stage2", "stage3"):
        torch.testing.assert_close(features[f"{stage}.preact"].relu(), features[stage])


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    "name",
    ["resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV1", "MobileNetV2", "ShuffleV1", "ShuffleV2"],
)
@torch.no_grad()
def test_other_sizes(name: str, size: int) -> None:
    model = create_model(name, num_classes=3)
    assert model(images(2, 3, size, size)).shape == (2, 3)
    assert model.eval()(images(1, 3, size, size + 32)).shape == (1, 3)


@torch.no_grad()
def test_vgg_pools_once_more_at_64() -> None:
    model = create_model("vgg8").eval()
    assert tapped(model, images(1, 3, 64, 64))[1]["stage4"].shape[2:] == (4, 4)
    assert tapped(model, images(1, 3, 32, 32))[1]["stage4"].shape[2:] == (4, 4)


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_copies(name: str) -> None:
    model = create_model(name).eval()
    x = images(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert tap_points(other) == tap_points(model)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_known_without_memory(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=11)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 11)


def test_same_seed_same_weights() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(create_model("resnet8").state_dict()["conv1.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "MobileNetV2"])
def test_convolutions_start_with_fan_out_variance(name: str) -> None:
    torch.manual_seed(0)
    for module in create_model(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_wide_resnet_dropout() -> None:
    model = create_model("wrn_16_1", dropout=0.5)
    x = images(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_the_names_are_all_there() -> None:
    assert set(RECORDED) <= set(NAMES)
    assert {"wrn_28_2", "wrn_16_4", "wrn_28_4"} <= set(NAMES)
    assert sorted(NAMES) == NAMES


def test_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="nearest: resnet56"):
        create_model("resnet_56")


def test_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'width'.*options: dropout"):
        create_model("wrn_16_1", width=3)


def test_the_models_own_number_of_classes(registries) -> None:
    for name in NAMES:
        with torch.device("meta"):
            outputs = create_model(name)(torch.empty(2, 3, 32, 32)).shape[1]
        assert outputs == (1000 if name == "MobileNetV1" else 100)

    @register_model
    def no_default(num_classes: int) -> nn.Module:
        return nn.Linear(3, num_classes)

    with pytest.raises(ConfigError, match=r"'no_default'.*num_classes"):
        create_model("no_default")


def test_fewer_than_no_classes() -> None:
    with pytest.raises(ConfigError, match="num_classes"):
        create_model("resnet8", -1)


def test_register_model(registries) -> None:

    @register_model
    def linear_probe(num_classes: int = 100, size: int = 4) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, num_classes))

    assert "linear_probe" in list_models()
    model = create_model("linear_probe", 5, size=2)
    assert model(images(2, 3, 2, 2)).shape == (2, 5)
    assert tap_points(model) == {"pooled": "1:input"}
    register_model(linear_probe)  # the same again is fine

    def resnet8(num_classes: int = 100) -> nn.Module:
        return nn.Linear(1, num_classes)

    with pytest.raises(ConfigError, match=r"resnet8.*taken"):
        register_model(resnet8)


def test_register_model_under_a_name(registries) -> None:

    @mdistiller.register_model("tiny_probe")
    def build(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))

    assert "tiny_probe" in list_models()
    assert "build" not in list_models()
    assert create_model("tiny_probe", 5)(images(2, 3, 2, 2)).shape == (2, 5)
    assert build(4)[1].out_features == 4  # the function is given back
    for name in ("resnet8", "my net", "timm/x", ""):
        with pytest.raises(ConfigError, match=f"model name '{name}'"):
            register_model(name)(lambda num_classes: build(num_classes))


def test_model_config() -> None:
    config = ModelConfig(name="wrn_16_1", checkpoint="x.pt", options={"dropout": 0.1})
    assert config.checkpoint == Path("x.pt")
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert ModelConfig.model_validate("wrn_16_1") == ModelConfig(name="wrn_16_1")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"
    with pytest.raises(ValueError, match="extra"):
        ModelConfig(name="resnet8", depth=3)
    with pytest.raises(ValueError, match="num_classes is no option: a model has as many classes as the data"):
        ModelConfig(name="resnet8", options={"num_classes": 1000})


def test_a_plain_name_is_a_model_config() -> None:
    class Pair(Settings):
        student: ModelConfig
        teacher: ModelConfig | None = None

    pair = Pair(student="resnet8x4", teacher={"name": "resnet32x4"})
    assert pair.student == ModelConfig(name="resnet8x4")
    assert pair.replace(teacher="wrn_16_1").teacher == ModelConfig(name="wrn_16_1")
    with pytest.raises(ConfigError, match=r"student"):
        pair.replace(student=3)
