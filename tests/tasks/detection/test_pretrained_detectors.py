"""Torchvision's detectors with their pretrained weights, on data of other classes than COCO's."""

import warnings
from dataclasses import replace

import pytest
import torch
from tiny_detectors import write_set
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.models._api import WeightsEnum
from torchvision.ops import FrozenBatchNorm2d

import mdistiller
from mdistiller.deploy.student import load_student
from mdistiller.errors import ConfigError, UnknownNameError
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import save_student
from mdistiller.tasks.detection.config import DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.layouts import load_detection
from mdistiller.tasks.detection.models import build_detector, create_detector, resolve_options
from mdistiller.tasks.detection.weights import build_for_data

TWO_STAGE, ONE_STAGE = "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"
CAT, DOG = 17, 18  # COCO's labels
WEIGHTS = {"weights": "DEFAULT"}


@pytest.fixture(scope="module")
def states():
    """Random weights in the layout of torchvision's files: the norms that it freezes have no counters."""
    found = {}
    for name in (TWO_STAGE, ONE_STAGE):
        torch.manual_seed(3)
        model = get_model(name, weights=None, weights_backbone=None, num_classes=91)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 2)
        state = model.state_dict()
        if name == TWO_STAGE:
            state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        found[name] = {key: value.clone() for key, value in state.items()}
    return found


@pytest.fixture(autouse=True)
def downloads(states, monkeypatch):
    """Torchvision's files, as if they were downloaded; those of a backbone are not there."""
    asked = []

    def read(weights, *args, **kwargs):
        asked.append(weights)
        (name,) = (name for name in states if get_model_weights(name) is type(weights))
        return {key: value.clone() for key, value in states[name].items()}

    monkeypatch.setattr(WeightsEnum, "get_state_dict", read)
    return asked


@pytest.fixture
def data(tmp_path):
    def rename(content):
        for category, name in zip(content["categories"], ("cat", "dog", "widget"), strict=True):
            category["name"] = name

    write_set(tmp_path, 4, change=rename)
    write_set(tmp_path, 2, "instances_val.json", seed=1, change=rename)
    return load_detection(DetectionDataConfig(root=tmp_path))


def outputs(model):
    """Logits [N, classes] and, of a box head, offsets [N, classes, 4], on fixed inputs."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        features = model.backbone(torch.rand(1, 3, 64, 128, generator=generator))
        if not hasattr(model, "roi_heads"):
            return model.head.classification_head(list(features.values()))[0], None
        pooled = features["0"].reshape(2, 1024)
        logits, boxes = model.roi_heads.box_predictor(pooled)
        return logits, boxes.reshape(2, -1, 4)


def frozen(model):
    return {name for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)}


@pytest.mark.parametrize("short", [TWO_STAGE, ONE_STAGE])
def test_a_student_keeps_the_outputs_of_the_classes_that_it_knows(short, data):
    config = ModelConfig(name=f"torchvision/{short}", options=WEIGHTS)
    with pytest.warns(UserWarning, match=r"COCO_V1 has no class 'widget': their outputs start from small"):
        model = build_for_data(config, data, new=True)
    logits, boxes = outputs(model)
    expected, expected_boxes = outputs(get_model(short, weights="DEFAULT"))
    assert logits.shape[1] == 4
    torch.testing.assert_close(logits[:, :3], expected[:, [0, CAT, DOG]])
    assert logits[:, 3].abs().max() < 2
    if boxes is not None:
        torch.testing.assert_close(boxes[:, :3], expected_boxes[:, [0, CAT, DOG]])
        assert frozen(model)
    images = [torch.rand(3, 64, 80)]
    with torch.no_grad():
        assert model(images)[0]["labels"].lt(4).all()
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([3])}]
    assert all(loss.isfinite() for loss in model.train()(images * 2, targets * 2).values())


@pytest.mark.parametrize("short", [TWO_STAGE, ONE_STAGE])
@pytest.mark.parametrize("option", [WEIGHTS, {"pretrained": True}, {"weights": "COCO_V1"}])
def test_a_teachers_classes_are_those_of_the_data(short, option, data):
    config = ModelConfig(name=f"torchvision/{short}", options=option)
    with pytest.raises(ConfigError, match=r"teacher\.options: .*COCO_V1 has no class 'widget' of the data"):
        build_for_data(config, data, new=False)
    known = replace(data.train, categories=((1, 4, "dog"), (2, 7, "person"), (3, 9, "cat")))
    with pytest.warns(UserWarning, match="its classes were put into the data's order"):
        model = build_for_data(config, replace(data, train=known), new=False)
    expected, _ = outputs(get_model(short, weights="DEFAULT"))
    torch.testing.assert_close(outputs(model)[0], expected[:, [0, DOG, 1, CAT]])


def test_a_file_of_ssdlite(data, states, tmp_path):
    """Torchvision's file, and one of this package with other classes."""
    name = f"torchvision/{ONE_STAGE}"
    torch.save(states[ONE_STAGE], tmp_path / "coco.pth")
    expected, _ = outputs(get_model(ONE_STAGE, weights="DEFAULT"))
    with pytest.warns(UserWarning, match="has no class 'widget'"):
        model = build_for_data(ModelConfig(name=name, checkpoint=tmp_path / "coco.pth"), data, new=True)
    torch.testing.assert_close(outputs(model)[0][:, :3], expected[:, [0, CAT, DOG]])
    file = tmp_path / "own.safetensors"
    save_student(file, model, {"model": name, "options": {}, "classes": ["cat", "dog", "widget"]})
    known = replace(data.train, categories=((1, 2, "widget"), (2, 7, "cat")))
    fewer = replace(data, train=known)
    with pytest.warns(UserWarning, match="its classes were put into the data's order"):
        taught = build_for_data(ModelConfig(name=name, checkpoint=file), fewer, new=False)
    torch.testing.assert_close(outputs(taught)[0], outputs(model)[0][:, [0, 3, 1]])


def test_num_classes_of_the_weights():
    with pytest.raises(ConfigError, match="expected value 91 but got 5"):
        create_detector(f"torchvision/{TWO_STAGE}", 5, weights="DEFAULT")
    with pytest.raises(ConfigError, match="does not take"):
        create_detector(f"torchvision/{TWO_STAGE}", 91, weights="NONE_SUCH")


@pytest.mark.parametrize("given", ["torchvision's file", "with prefixes", "plain norms"])
def test_norms_are_frozen_as_in_the_file(given, states, tmp_path):
    state = states[TWO_STAGE]
    if given == "with prefixes":
        state = {f"model.{key}": value for key, value in state.items()}
    if given == "plain norms":
        model = create_detector(f"torchvision/{TWO_STAGE}", 91)
        state = model.state_dict()
    torch.save(state, tmp_path / "file.pth")
    config = ModelConfig(name=f"torchvision/{TWO_STAGE}", checkpoint=tmp_path / "file.pth", options=WEIGHTS)
    model = build_detector(config, 91)
    expected = get_model(TWO_STAGE, weights="DEFAULT")
    assert frozen(model) == (set() if given == "plain norms" else frozen(expected))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train().backbone(torch.rand(2, 3, 64, 64))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert bool(changed) == (given == "plain norms")
    if given != "plain norms":
        torch.testing.assert_close(outputs(model)[0], outputs(expected)[0])


def test_weights_whose_norms_have_no_epsilon(tmp_path, monkeypatch):
    """Torchvision sets it to 0 for some; a file of weights cannot say so."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "normal_"):  # every weight is read from the file
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    torch.manual_seed(0)
    made = get_model("retinanet_resnet50_fpn", weights=None, weights_backbone=None, num_classes=91)
    state = {key: torch.randn(value.shape) * 0.02 for key, value in made.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for key in [key for key in state if key.endswith("running_var")]:
        state[key].uniform_(1e-5, 1e-4)  # so small that an epsilon counts
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    image = torch.rand(1, 3, 64, 64)

    def levels(model):
        with torch.no_grad():
            return model.eval().backbone.body(image)["0"]

    expected = get_model("retinanet_resnet50_fpn", weights="COCO_V1")
    assert {m.eps for m in expected.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.0}
    name, file = "torchvision/retinanet_resnet50_fpn", tmp_path / "retinanet_resnet50_fpn_coco-eeacb38b.pth"
    model = create_detector(name, 91, weights="COCO_V1")
    torch.testing.assert_close(levels(model), levels(expected))
    torch.save(state, file)
    torch.save(state, tmp_path / "other.pth")
    torch.save(model.state_dict(), tmp_path / "run.pth")
    own, theirs, other = (
        levels(build_detector(ModelConfig(name=name, checkpoint=path), 91))
        for path in (tmp_path / "run.pth", file, tmp_path / "other.pth")
    )
    torch.testing.assert_close(own, levels(expected))
    torch.testing.assert_close(theirs, levels(expected))
    assert (other - levels(expected)).abs().max() > 0.01 * levels(expected).abs().max()


def test_options_for_a_checkpoint_need_no_network():
    def stored(name, **options):
        return resolve_options(ModelConfig(name=f"torchvision/{name}", options=options), trained=True)

    size = {"min_size": 64}
    for given in (WEIGHTS, {"weights_backbone": "DEFAULT"}, {"pretrained": True}):
        assert stored(TWO_STAGE, trainable_backbone_layers=2, **given, **size) == size
    assert stored(TWO_STAGE, trainable_backbone_layers=2) == {"trainable_backbone_layers": 2}
    assert stored(ONE_STAGE, weights="DEFAULT", weights_backbone="DEFAULT") == {}
    assert stored(ONE_STAGE, weights_backbone="DEFAULT") == {}


def test_ssdlite_refuses_weights_of_its_backbone_alone():
    """With those weights torchvision builds twice the channels in the last stages."""
    with pytest.raises(ConfigError, match=r"weights_backbone of detector .*; give weights DEFAULT"):
        create_detector(f"torchvision/{ONE_STAGE}", 4, weights_backbone="DEFAULT")


@pytest.mark.parametrize("short", [TWO_STAGE, ONE_STAGE, "fcos_resnet50_fpn"])
@pytest.mark.parametrize("option", ["nms_tresh", "pretrained_backbone"])
def test_an_option_that_torchvision_would_ignore(short, option):
    with pytest.raises(UnknownNameError, match=f"option of model 'torchvision/{short}' '{option}'; nearest"):
        create_detector(f"torchvision/{short}", 4, **{option: True})


def test_a_run_from_pretrained_weights_and_its_student(data, tmp_path, downloads):
    config = DetectionConfig.model_validate(
        {
            "data": {"root": str(tmp_path), "workers": 0},
            "student": {"name": f"torchvision/{TWO_STAGE}", "options": {**WEIGHTS, "min_size": 64}},
            "optim": {"lr": 0.001},
            "max_steps": 1,
            "batch_size": 2,
            "device": "cpu",
            "out": str(tmp_path / "run"),
        }
    )
    with pytest.warns(UserWarning, match="has no class 'widget'"):
        mdistiller.train(config)
    assert len(downloads) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = load_student(tmp_path / "run")
    assert len(downloads) == 1  # its own weights are enough
    assert frozen(student)
    assert student.transform.min_size == (64,)
    assert student.roi_heads.box_predictor.cls_score.out_features == 4
    taught = ModelConfig(name=config.student.name, checkpoint=tmp_path / "run")
    again = build_for_data(taught, data, new=False)
    assert frozen(again) == frozen(student)
    torch.testing.assert_close(outputs(again)[0], outputs(student)[0])
