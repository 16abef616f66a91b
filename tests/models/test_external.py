"""Models of timm and torchvision, and their canonical taps."""

from __future__ import annotations

import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError
from mdistiller.models import create_model, tap_points

# name -> the height of each stage for 64x64 input
STAGES = {
    "torchvision/resnet18": [16, 8, 4, 2],
    "torchvision/resnet50": [16, 8, 4, 2],
    "torchvision/vgg11_bn": [32, 16, 8, 4],
    "torchvision/mobilenet_v2": [32, 16, 8, 4, 2],
    "torchvision/mobilenet_v3_small": [16, 8, 4, 2],
    "torchvision/efficientnet_b0": [32, 16, 8, 4, 2],
    "torchvision/convnext_tiny": [16, 8, 4, 2],
    "torchvision/regnet_y_400mf": [16, 8, 4, 2],
    "torchvision/densenet121": [16, 8, 4, 2],
    "torchvision/swin_t": [16, 8, 4, 2],
    "torchvision/shufflenet_v2_x0_5": [8, 4, 2],
    "torchvision/mnasnet0_5": [16, 8, 4, 2],
    "timm/resnet18": [16, 8, 4, 2],
    "timm/resnet50": [16, 8, 4, 2],
    "timm/mobilenetv3_small_050": [16, 8, 4, 2],
    "timm/efficientnet_b0": [32, 16, 8, 4, 2],
    "timm/densenet121": [16, 8, 4, 2],
    "timm/convnext_atto": [16, 8, 4, 2],
}
NO_STEM = ("timm/efficientnet_b0", "timm/convnext_atto")
RESIDUAL = ("torchvision/resnet18", "torchvision/resnet50", "timm/resnet18", "timm/resnet50")


def needs(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")


def tapped(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits and each tap's tensor; fails if a tensor was written to after it was read."""
    features: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    handles = []

    def keep(name: str, value: Tensor) -> None:
        features[name] = value
        versions[name] = value._version

    for name, path in tap_points(model).items():
        module = model.get_submodule(path.removesuffix(":input"))
        if path.endswith(":input"):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: keep(name, out)))
    logits = model(x)
    for handle in handles:
        handle.remove()
    assert features.keys() == tap_points(model).keys()
    assert {name: value._version for name, value in features.items()} == versions
    return logits, features


def on_meta(name: str, num_classes: int | None, **options: object) -> nn.Module:
    """Without memory, where the model can be built so."""
    if "regnet" in name:
        return create_model(name, num_classes, **options).to("meta")
    with torch.device("meta"):
        return create_model(name, num_classes, **options)


@pytest.mark.parametrize("name", STAGES)
def test_stages(name: str) -> None:
    needs(name)
    model = on_meta(name, 5)
    logits, features = tapped(model, torch.empty(2, 3, 64, 64, device="meta"))
    assert logits.shape == (2, 5)
    stages = {n: f for n, f in features.items() if n.startswith("stage") and not n.endswith(".preact")}
    assert list(stages) == [f"stage{i + 1}" for i in range(len(STAGES[name]))]
    # Swin is channels-last: its height is the second dimension.
    assert [f.shape[1 if "swin" in name else 2] for f in stages.values()] == STAGES[name]
    assert ("stem" in features) == (name not in NO_STEM)
    assert features["pooled"].ndim == 2
    assert ("stage1.preact" in features) == (name in RESIDUAL or "vgg" in name)


@pytest.mark.parametrize("name", ["torchvision/vgg11_bn", *RESIDUAL])
@torch.no_grad()
def test_preact_is_before_the_last_relu(name: str) -> None:
    needs(name)
    torch.manual_seed(0)
    # timm starts each residual branch at zero, which would leave nothing negative to see.
    options = {"zero_init_last": False} if name.startswith("timm/") else {}
    _, features = tapped(create_model(name, 3, **options).eval(), torch.randn(1, 3, 32, 32))
    for stage in ("stage1", "stage2", "stage3", "stage4"):
        assert features[f"{stage}.preact"].min() < 0
        assert torch.equal(features[f"{stage}.preact"].relu(), features[stage])


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/regnet_y_400mf", "timm/resnet18"])
@torch.no_grad()
def test_pooled_is_the_mean_of_the_last_map(name: str) -> None:
    needs(name)
    _, features = tapped(create_model(name, 3).eval(), torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(features["last_map"].mean((2, 3)), features["pooled"])


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("timm/resnet18", 1000),
        ("timm/resnetv2_50x1_bit.goog_in21k", 21843),
        ("torchvision/resnet18", 1000),
        ("torchvision/googlenet", 1000),
    ],
)
def test_the_library_has_its_own_number_of_classes(name: str, classes: int) -> None:
    needs(name)
    model = on_meta(name, None).eval()
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, classes)
    assert on_meta(name, 5).eval()(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 5)


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "timm/mobilenetv3_small_050", "timm/resnet18"])
def test_training_step(name: str) -> None:
    needs(name)
    torch.manual_seed(0)
    model = create_model(name, 4)
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    logits, features = tapped(model, torch.randn(2, 3, 64, 64))
    (logits.square().sum() + sum(f.square().mean() for f in features.values())).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_out_of_place_activations_change_no_number() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model("mobilenet_v2", weights=None, num_classes=3).eval()
    ours = create_model("torchvision/mobilenet_v2", 3).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


def test_torchvision_vit_takes_options() -> None:
    model = on_meta("torchvision/vit_b_16", 5, image_size=32)
    logits, features = tapped(model, torch.empty(2, 3, 32, 32, device="meta"))
    assert logits.shape == (2, 5)
    assert list(features) == [*(f"stage{i}" for i in range(1, 13)), "pooled"]
    assert features["stage1"].shape == (2, 5, 768)


def test_timm_vit_takes_options() -> None:
    pytest.importorskip("timm")
    model = create_model("timm/vit_tiny_patch16_224", 5, img_size=32, patch_size=8, depth=3)
    logits, features = tapped(model, torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    assert list(features) == ["stage1", "stage2", "stage3", "pooled"]
    assert features["stage1"].shape == (2, 17, 192)
    assert features["pooled"].shape == (2, 192)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_auxiliary_classifiers_are_left_out(name: str, size: int) -> None:
    model = on_meta(f"torchvision/{name}", 5).train()
    logits = model(torch.empty(2, 3, size, size, device="meta"))
    assert isinstance(logits, Tensor)
    assert tap_points(model) == {"pooled": "fc:input"}


@pytest.mark.parametrize("name", ["hrnet_w18_small", "crossvit_tiny_240", "twins_pcpvt_small"])
def test_paths_that_do_not_exist_or_return_lists_are_left_out(name: str) -> None:
    pytest.importorskip("timm")
    model = on_meta(f"timm/{name}", 5)
    assert set(tap_points(model)) <= {"last_map", "pooled"}


def test_a_classifier_that_is_no_linear_layer() -> None:
    assert tap_points(on_meta("torchvision/squeezenet1_0", 5)) == {}


def test_other_modules_have_pooled_only() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert tap_points(model) == {"pooled": "3:input"}
    assert tap_points(nn.ReLU()) == {}


def test_own_table_comes_first() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.tap_points = {"stem": "0"}
    assert tap_points(model) == {"stem": "0"}
    model.tap_points = ["stem"]
    assert tap_points(model) == {"pooled": "0:input"}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("torchvision/resnet_18", "resnet18"),
        ("timm/resnet_18", "resnet18"),
        ("torchvision/fcn_resnet50", "resnet50"),
    ],
)
def test_unknown_names(name: str, nearest: str) -> None:
    needs(name)
    with pytest.raises(UnknownNameError, match=f"nearest: .*{nearest}"):
        create_model(name)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_unknown_option_is_named(name: str) -> None:
    needs(name)
    with pytest.raises(ConfigError, match="color"):
        create_model(name, 3, color="red")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("timm/resnet10t", {"checkpoint_path": "w.pth"}, "size mismatch for fc.weight"),
        ("timm/resnet10t", {"checkpoint_path": "gone.pth"}, "gone.pth"),
        ("timm/vit_tiny_patch16_224", {"num_heads": 5}, "divisible"),
        ("torchvision/vit_b_16", {"image_size": 33}, "indivisible"),
        ("torchvision/densenet121", {"growth_rate": -32}, ""),
    ],
)
def test_an_option_that_fails_is_one_sentence(
    name: str, options: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(name)
    monkeypatch.chdir(tmp_path)
    if options.get("checkpoint_path") == "w.pth":
        torch.save(create_model(name, 7).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=f"'{name}' does not take .*{said}") as caught:
        create_model(name, 3, **options)
    assert "\n" not in str(caught.value)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"^model 'timm/resnet18' needs timm: pip install timm$"):
        create_model("timm/resnet18")


@pytest.mark.parametrize("options", [{"weights": "DEFAULT"}, {"pretrained": True}])
def test_pretrained_weights_with_other_classes(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = torchvision.models.get_model("mobilenet_v3_small", weights=None).state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda self, **_: published)
    model = create_model("torchvision/mobilenet_v3_small", 7, **options)
    state = model.state_dict()
    assert torch.equal(state["features.0.0.weight"], published["features.0.0.weight"])
    assert state["classifier.3.weight"].shape == (7, 1024)
    full = create_model("torchvision/mobilenet_v3_small", 1000, **options)
    assert torch.equal(full.state_dict()["classifier.3.weight"], published["classifier.3.weight"])
    own = create_model("torchvision/mobilenet_v3_small", **options)
    assert torch.equal(own.state_dict()["classifier.3.weight"], published["classifier.3.weight"])


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", no_network)
    for options in ({"weights": "DEFAULT"}, {"weights": "IMAGENET1K_V1"}, {"pretrained": True}):
        with pytest.raises(CheckpointError, match="no network") as caught:
            create_model("torchvision/resnet18", 7, **options)
        message = str(caught.value)
        url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
        assert f"save {url} in {torch.hub.get_dir()}/checkpoints, or give " in message
        assert "--teacher.checkpoint FILE" in message


def test_unknown_weights() -> None:
    with pytest.raises(ConfigError, match="NOT_THERE"):
        create_model("torchvision/resnet18", 7, weights="NOT_THERE")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny", "resnet18"])
def test_an_option_that_torchvision_would_ignore(name):
    with pytest.raises(ConfigError, match="drop_out"):
        create_model(f"torchvision/{name}", 4, drop_out=0.1)
    create_model("torchvision/mobilenet_v3_small", 4, dropout=0.1, reduced_tail=True)
