"""Layers of models in order: by hand for the zoo, by timm's numbers for the libraries."""

import pytest
from torch import nn

from mdistiller.errors import UnknownNameError
from mdistiller.models import create_model
from mdistiller.models.layers import classifier_paths, layer_numbers, parts, undecayed


def first_names(numbers):
    """For each layer, the modules two levels down that its parameters are in."""
    layers = {}
    for name, number in numbers.items():
        layers.setdefault(number, {})[".".join(name.split(".")[: 2 if name.startswith("layer") else 1])] = (
            None
        )
    return [list(layers[i]) for i in range(max(layers) + 1)]


def test_layers_of_a_resnet_of_the_zoo():
    assert first_names(layer_numbers(create_model("resnet20", 4))) == [
        ["conv1", "bn1"],
        *([f"layer{i}.{j}"] for i in (1, 2, 3) for j in (0, 1, 2)),
        ["fc"],
    ]


def test_a_stage_behind_its_convolutions_and_layers_behind_the_last_stage():
    """VGG taps ReLUs, WRN has a norm behind its last stage."""
    assert first_names(layer_numbers(create_model("vgg8", 4))) == [
        *([f"block{i}"] for i in range(5)),
        ["classifier"],
    ]
    wide = layer_numbers(create_model("wrn_16_1", 4))
    assert wide["conv1.weight"] == 0
    assert wide["bn1.weight"] == wide["block3.layer.1.conv2.weight"] == max(wide.values()) - 1
    assert wide["fc.bias"] == max(wide.values())


def test_torchvision_s_resnet_has_timm_s_layers():
    pytest.importorskip("timm")
    ours = layer_numbers(create_model("torchvision/resnet18", 4))
    assert ours == layer_numbers(create_model("timm/resnet18", 4))
    assert max(ours.values()) == 9


def test_a_model_without_stages_has_two_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    assert layer_numbers(model) == {"0.weight": 0, "0.bias": 0, "2.weight": 1, "2.bias": 1}


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("resnet8", ("fc",)),
        ("torchvision/vgg11", ("classifier.6",)),
        ("timm/convnext_atto", ("head.fc",)),
        ("timm/deit_tiny_distilled_patch16_224", ("head", "head_dist")),
    ],
)
def test_classifiers(name, paths):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    assert classifier_paths(create_model(name, 4)) == paths


def test_norms_biases_and_timm_s_list_have_no_decay():
    pytest.importorskip("timm")
    model = create_model("timm/vit_tiny_patch16_224", 4)
    names = undecayed(model)
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= names
    assert "head.weight" not in names
    assert undecayed(create_model("resnet8", 4)) >= {"bn1.weight", "bn1.bias", "fc.bias"}


def test_parts_are_all_behind_the_stage_before():
    model = create_model("resnet8x4", 4)
    modules, parameters = parts(model, ["stem", "stage2"])
    expected = [*model.conv1.parameters(), *model.bn1.parameters(), *model.layer2.parameters()]
    assert {id(p) for p in parameters} == {id(p) for p in expected}
    assert model not in modules
    assert {model.bn1, model.layer2, model.layer2[0].bn1} <= set(modules)
    assert not set(model.layer1.modules()) & set(modules)
    _, all_of_it = parts(model, ["stem", "stage1", "stage2", "stage3", "fc"])
    assert len(all_of_it) == len(list(model.parameters()))


def test_parts_by_module_path():
    model = create_model("vgg8", 4)
    assert {id(p) for p in parts(model, ["block1.0"])[1]} == {id(p) for p in model.block1[0].parameters()}
    stage = {id(p) for p in parts(model, ["stage1"])[1]}
    assert stage == {id(p) for p in model.block1.parameters()}
    with pytest.raises(UnknownNameError, match="stage9"):
        parts(model, ["stage9"])
