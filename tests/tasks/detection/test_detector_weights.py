"""Detectors from weights of other classes: outputs of the same names stay what they were."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_detectors import fcos, one_stage, ssd, two_stage, write_set

from mdistiller.errors import CheckpointError, ConfigError
from mdistiller.models import ModelConfig
from mdistiller.runs.checkpoint import save_student
from mdistiller.tasks.detection.config import DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.layouts import load_detection, load_split
from mdistiller.tasks.detection.models import create_detector
from mdistiller.tasks.detection.weights import build_for_data, select_classes
from mdistiller.training.distributed import World
from mdistiller.training.task import get_task


def outputs(model, seed=0):
    """Logits [N, classes] of the head on random features, and box offsets [N, classes, 4] or None."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if hasattr(model, "roi_heads"):
            logits, boxes = model.roi_heads.box_predictor(torch.rand(7, 32, generator=generator))
            return logits, boxes.reshape(7, -1, 4)
        channels = (8, 8, 16) if hasattr(model.head.classification_head, "module_list") else (32,)
        features = [torch.rand(1, count, 3, 5, generator=generator) for count in channels]
        return model.head.classification_head(features)[0], None


@pytest.mark.parametrize("make", [two_stage, one_stage, fcos, ssd])
def test_selected_classes_keep_their_outputs(make):
    model = make(classes=4)
    logits, boxes = outputs(model)
    select_classes(model, 4, [0, 3, None, 1, None])
    new, new_boxes = outputs(model)
    assert new.shape[1] == 5
    torch.testing.assert_close(new[:, [0, 1, 3]], logits[:, [0, 3, 1]])
    if boxes is not None:
        torch.testing.assert_close(new_boxes[:, [0, 1, 3]], boxes[:, [0, 3, 1]])
    elif make is ssd:
        assert new[:, [2, 4]].abs().max() < 0.5
    else:  # new classes start at a probability of a hundredth
        assert new[:, 2].sigmoid().mean().item() == pytest.approx(0.01, abs=0.005)
    model.eval()
    with torch.no_grad():
        assert model([torch.rand(3, 64, 80)])[0]["labels"].lt(5).all()


def test_masks_follow_the_classes():
    model = two_stage(masks=True, classes=4)
    features = torch.rand(2, 8, 6, 6)
    before = model.roi_heads.mask_predictor(features)
    select_classes(model, 4, [0, 2])
    torch.testing.assert_close(model.roi_heads.mask_predictor(features), before[:, [0, 2]])


@pytest.fixture
def data(tmp_path, monkeypatch):
    def create(name, num_classes, **options):
        return two_stage(1, classes=num_classes)

    monkeypatch.setattr("mdistiller.tasks.detection.models.create_detector", create)
    write_set(tmp_path, 2)
    write_set(tmp_path, 2, "instances_val.json", seed=1)
    return load_detection(DetectionDataConfig(root=tmp_path))  # red, green, blue


def stored(path, classes, **more):
    """Writes a detector of these classes; its weights are not those that `create` starts from."""
    model = two_stage(5, classes=len(classes) + 1)
    save_student(path, model, {"model": "small", "options": {}, "classes": classes, **more})
    return model


def test_a_checkpoint_of_other_classes(data, tmp_path):
    file = tmp_path / "other.safetensors"
    before, _ = outputs(stored(file, ["gray", "blue", "green", "pink"]))
    config = ModelConfig(name="small", checkpoint=file)
    with pytest.warns(UserWarning, match="has no class 'red': their outputs start from small weights"):
        model = build_for_data(config, data, new=True)
    after, _ = outputs(model)
    torch.testing.assert_close(after[:, [0, 2, 3]], before[:, [0, 3, 2]])
    assert after[:, 1].abs().max() < 0.5
    with pytest.raises(
        ConfigError, match=r"teacher\.checkpoint: .* has no class 'red' of the data; it has gray"
    ):
        build_for_data(config, data, new=False)


@pytest.mark.parametrize("count", [2, 4])
def test_more_or_fewer_names_than_outputs(data, tmp_path, count):
    file = tmp_path / "other.safetensors"
    about = {"model": "small", "options": {}, "classes": ["blue", "green", "red", "gray"][:count]}
    save_student(file, two_stage(5, classes=4), about)
    for new in (True, False):
        with pytest.raises(CheckpointError, match=f"{file.name} names {count} classes, and has outputs of 3"):
            build_for_data(ModelConfig(name="small", checkpoint=file), data, new=new)


def test_a_teacher_of_more_classes_and_of_another_order(data, tmp_path):
    for classes in (["gray", "blue", "red", "green"], ["green", "blue", "red"]):
        file = tmp_path / f"{len(classes)}.safetensors"
        before, _ = outputs(stored(file, classes))
        teacher = {"name": "fasterrcnn_resnet18", "checkpoint": file}
        config = DetectionConfig.model_validate(
            {"student": "fasterrcnn_resnet18", "method": "kd", "teacher": teacher}
        )
        with pytest.warns(UserWarning, match="its classes were put into the data's order, by their names"):
            model = get_task("detection").build_teacher(config, data)
        rows = [0, *(1 + classes.index(name) for name in ("red", "green", "blue"))]
        torch.testing.assert_close(outputs(model)[0], before[:, rows])


@pytest.mark.parametrize("count", [2, 4])
def test_a_keypoint_detector_s_classes_are_not_known_by_their_number(data, tmp_path, count):
    """torchvision's has one class, a person, and so has anyone's with one class."""
    file = tmp_path / "keypoints.pt"
    torch.save(two_stage(5, classes=count).state_dict(), file)
    config = ModelConfig(name="torchvision/keypointrcnn_resnet50_fpn", checkpoint=file)
    people = replace(data, train=replace(data.train, categories=((1, 4, "dog"), (2, 7, "person"))))
    with pytest.raises(
        ConfigError, match=f"no class 'dog', 'person' of the data; it has {count - 1} without"
    ):
        build_for_data(config, people, new=False)


def test_the_same_classes_and_weights_without_names(data, tmp_path):
    before, _ = outputs(stored(tmp_path / "same.safetensors", ["red", "green", "blue"]))
    same = ModelConfig(name="small", checkpoint=tmp_path / "same.safetensors")
    assert torch.equal(outputs(build_for_data(same, data, new=False))[0], before)
    # Weights of torchvision's own detectors have COCO's 90 names.
    coco = two_stage(6, classes=91)
    torch.save(coco.state_dict(), tmp_path / "coco.pt")
    config = ModelConfig(name="torchvision/fasterrcnn_resnet50_fpn", checkpoint=tmp_path / "coco.pt")
    animals = replace(data.train, categories=((1, 4, "dog"), (2, 7, "person"), (3, 9, "cat")))
    with pytest.warns(UserWarning, match="its classes were put into the data's order"):
        taught = build_for_data(config, replace(data, train=animals), new=False)
    torch.testing.assert_close(outputs(taught)[0], outputs(coco)[0][:, [0, 18, 1, 17]])
    for count in (4, 6):
        file = tmp_path / f"plain{count}.pt"
        model = two_stage(5, classes=count)
        torch.save(model.state_dict(), file)
        config = ModelConfig(name="small", checkpoint=file)
        if count == 4:
            assert torch.equal(outputs(build_for_data(config, data, new=False))[0], outputs(model)[0])
            continue
        with pytest.raises(ConfigError, match="it has 5 without names"):
            build_for_data(config, data, new=False)
        with pytest.warns(UserWarning, match="has no class 'red', 'green', 'blue'"):
            new = build_for_data(config, data, new=True)
        weights = new.state_dict()
        for key, value in model.state_dict().items():
            if "predictor" not in key:
                assert torch.equal(weights[key], value)


def test_an_evaluation_compares_the_names(tmp_path):
    """Boxes are told by their labels, so the same classes in another order would score near zero."""
    write_set(tmp_path, 2, "instances_val.json")
    task, file = get_task("detection"), tmp_path / "d.safetensors"
    config = task.Config.model_validate({"student": "fcos_resnet18", "data": {"root": tmp_path}})
    classes = list(load_split(config.data, "test").classes)
    options = {"short_side": 64, "long_side": 96}
    model = create_detector("fcos_resnet18", len(classes) + 1, **options)
    about = {"task": "detection", "model": "fcos_resnet18", "options": options}
    about |= {"num_classes": len(classes) + 1, "labels": list(range(1, len(classes) + 1))}
    given = ModelConfig(name="fcos_resnet18", checkpoint=file)
    save_student(file, model, about | {"classes": classes})
    assert task.evaluate(config, given, World(torch.device("cpu")))["images"] == 2
    with torch.no_grad():
        model.eval().head.classification_head.cls_logits.bias.fill_(0)
    save_student(file, model, about | {"classes": classes})
    with torch.no_grad():
        expected = task.evaluate(config, given, World(torch.device("cpu")), tmp_path / "a.json")
    select_classes(model, len(classes) + 1, [0, *range(len(classes), 0, -1)])
    save_student(file, model, about | {"classes": classes[::-1]})
    with pytest.warns(UserWarning, match="its classes were put into the data's order, by their names"):
        assert task.evaluate(config, given, World(torch.device("cpu")), tmp_path / "b.json") == expected
    found = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert found[0] == found[1] != []
    save_student(file, model, about | {"classes": classes})
    load_split(config.data, "test").files[0].write_bytes(b"no image")
    config = config.replace(data={"on_error": "skip"})
    with pytest.warns(UserWarning, match="left out 1 image that cannot be read"):
        assert task.evaluate(config, given, World(torch.device("cpu")))["images"] == 1
    save_student(file, model, about | {"classes": [*classes[:-1], "pink"]})
    with pytest.raises(ConfigError, match=f"only in the data: {classes[-1]}; only in the model: pink"):
        task.evaluate(config, given, World(torch.device("cpu")))
