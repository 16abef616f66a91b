"""Detectors by name: backbones with their weights, what is frozen, what is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import mdistiller
from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError
from mdistiller.models import ModelConfig, create_model
from mdistiller.tasks.detection.adapters import adapter_of
from mdistiller.tasks.detection.models import BACKBONES, build_detector, create_detector, list_detectors


def frozen(module):
    return [name for name, p in module.named_parameters() if not p.requires_grad]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_levels_of_every_backbone(backbone):
    with torch.device("meta"):
        two, one = (create_detector(f"{a}_{backbone}", 4) for a in ("fasterrcnn", "retinanet"))
        for detector, names, strides in (
            (two, ("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64)),
            (one, ("0", "1", "2", "p6", "p7"), (8, 16, 32, 64, 128)),
        ):
            features = detector.backbone(torch.zeros(1, 3, 256, 128))
            levels = adapter_of(detector).levels
            assert tuple(features) == names == tuple(levels)
            assert [level.stride for level in levels.values()] == list(strides)
            assert [f.shape for f in features.values()] == [(1, 256, 256 // s, 128 // s) for s in strides]
        assert frozen(two) == frozen(one) == []


def test_names():
    names = list_detectors()
    assert len(names) == 4 * len(BACKBONES)
    with torch.device("meta"):
        for name in ("maskrcnn_resnet18", "fcos_mobilenet_v2"):
            assert adapter_of(create_detector(name, 4)).has_proposals == name.startswith("mask")


def test_evaluation_gives_boxes_in_the_images_pixels():
    torch.manual_seed(0)
    model = create_detector(
        "fasterrcnn_mobilenet_v2", 4, short_side=64, long_side=96, box_score_thresh=0.0
    ).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 200, 300)])
    assert len(found["boxes"])
    assert found["boxes"][:, 2].max() > 96  # beyond the scaled image's width
    assert found["boxes"].max() <= 300


def classifier(tmp_path, name="torchvision/mobilenet_v2", classes=7):
    torch.manual_seed(1)
    model = create_model(name, classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight)
    path = tmp_path / "student.safetensors"
    save_file(model.state_dict(), path)
    return model.eval(), path


@pytest.mark.parametrize("given", ["file", "run folder"])
@pytest.mark.parametrize("batch_norm", ["auto", "plain"])
def test_a_backbone_trained_as_a_classifier(tmp_path, batch_norm, given):
    model, path = classifier(tmp_path)
    path = path if given == "file" else tmp_path
    detector = create_detector("fasterrcnn_mobilenet_v2", 4, backbone_weights=path, batch_norm=batch_norm)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        body = detector.backbone.body.eval()(image)
        expected = model.features[:7](image)
    torch.testing.assert_close(body["1"], expected)
    kinds = {type(m) for m in detector.backbone.body.modules()}
    assert (FrozenBatchNorm2d in kinds) == (batch_norm == "auto")
    assert (nn.BatchNorm2d in kinds) == (batch_norm == "plain")
    if batch_norm == "auto":  # nothing about it changes in training
        before = {k: v.clone() for k, v in detector.backbone.body.state_dict().items()}
        detector.backbone.body.train()(image)
        assert all(torch.equal(v, before[k]) for k, v in detector.backbone.body.state_dict().items())


def test_frozen_stages(tmp_path):
    _, path = classifier(tmp_path, "torchvision/resnet18")
    detector = create_detector("fasterrcnn_resnet18", 4, backbone_weights=path)
    names = frozen(detector)
    assert names
    assert all(n.startswith(("backbone.body.conv1", "backbone.body.layer1")) for n in names)
    with torch.device("meta"):
        one = create_detector("fasterrcnn_resnet18", 4, frozen_stages=1)
        assert {n.split(".")[2] for n in frozen(one)} == {"conv1", "bn1"}
        mobile = create_detector("fasterrcnn_mobilenet_v2", 4, frozen_stages=2)
        assert {n.split(".")[2] for n in frozen(mobile)} == {"0", "1", "2", "3"}
        with pytest.raises(ConfigError, match="frozen_stages: got 6; allowed are 0 to 5"):
            create_detector("fasterrcnn_resnet18", 4, frozen_stages=6)


def test_a_detectors_checkpoint(tmp_path):
    """Trained with a frozen backbone; built again without the backbone's weights at hand."""
    _, path = classifier(tmp_path)
    options = {"backbone_weights": str(path)}
    trained = build_detector(ModelConfig(name="fasterrcnn_mobilenet_v2", options=options), 4)
    save_file(trained.state_dict(), tmp_path / "detector.safetensors")
    path.unlink()
    config = ModelConfig(
        name="fasterrcnn_mobilenet_v2", checkpoint=tmp_path / "detector.safetensors", options=options
    )
    again = build_detector(config, 4, short_side=100)
    assert again.transform.min_size == (100,)
    for key, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    with pytest.raises(CheckpointError):
        build_detector(config, 5)


def test_what_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="nearest: fasterrcnn_resnet101"):
        create_detector("fasterrcnn_resnet1001", 4)
    with pytest.raises(UnknownNameError, match="torchvision detector"):
        create_detector("torchvision/fasterrcnn", 4)
    with pytest.raises(ConfigError, match="batch_norm: got 'sync'"):
        create_detector("fasterrcnn_resnet18", 4, batch_norm="sync")
    with pytest.raises(UnknownNameError, match="nearest: box_score_thresh"):
        create_detector("fasterrcnn_resnet18", 4, box_score_treshold=0.1)
    with pytest.raises(ConfigError, match="does not take"):
        create_detector("fasterrcnn_resnet18", 4, box_roi_pool="none")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        create_detector("fasterrcnn_resnet18", 4, backbone_weights=tmp_path / "absent.pth")
    for name, message in (
        ("resnet8", "another architecture"),
        ("vgg8", r"another architecture .* Train a checkpoint of torchvision/resnet18 with --student.name"),
    ):
        save_file(create_model(name, 4).state_dict(), tmp_path / "zoo.safetensors")
        with pytest.raises(CheckpointError, match=message):
            create_detector("fasterrcnn_resnet18", 4, backbone_weights=tmp_path / "zoo.safetensors")


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34"])
@pytest.mark.parametrize("seed", range(3))
def test_every_side_of_a_new_fcos_box_can_be_learned(backbone, seed):
    """Share of the positions at which a side is above zero: behind a ReLU the others get no gradient."""
    torch.manual_seed(seed)
    model = create_detector(f"fcos_{backbone}", 4)
    head, images = model.head.regression_head, torch.rand(2, 3, 128, 160)
    shares = []
    with torch.no_grad():
        levels = list(model.backbone(images).values())
        for bias in (head.bbox_reg.bias.clone(), 0.0):
            head.bbox_reg.bias.copy_(torch.as_tensor(bias))
            shares.append((head(levels)[0] > 0).double().mean((0, 1)))
    assert shares[0].min() > 0.95
    assert shares[1].min() < 0.6  # torchvision's own start


def test_the_start_of_an_fcos_leaves_weights_alone(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = create_detector("fcos_mobilenet_v2", 4).to_empty(device="cpu")
    state = {key: torch.randn_like(value.float()) for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    built = build_detector(ModelConfig(name="fcos_mobilenet_v2", checkpoint=tmp_path / "weights.pt"), 4)
    key = "head.regression_head.bbox_reg.bias"
    assert torch.equal(built.state_dict()[key], state[key])
    own = create_detector("torchvision/fcos_resnet50_fpn", 4)
    assert torch.equal(own.state_dict()[key], torch.ones(4))


def test_torchvisions_own():
    with torch.device("meta"):
        model = create_detector("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", 5)
    assert adapter_of(model).has_proposals
    assert model.roi_heads.box_predictor.cls_score.out_features == 5


def test_a_run_by_the_top_level_names(squares, tmp_path):
    """From recipe to predictions, with the models by their names."""
    config = mdistiller.get_recipe("small.student.fasterrcnn_mobilenet_v2").replace(
        data={"root": squares, "workers": 0},
        augment={"short_sides": (64,), "long_side": 96},
        max_steps=1,
        batch_size=2,
        device="cpu",
        out=tmp_path / "run",
    )
    result = mdistiller.train(config)
    assert result.summary["step"] == 1
    student = mdistiller.load_student(result.path)
    assert {"boxes", "labels", "scores"} == student([torch.rand(3, 64, 80)])[0].keys()
