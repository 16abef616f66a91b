"""Training images whose objects are not known: for levels alone, or with the teacher's boxes."""

import shutil

import pytest
import torch
from tiny_detectors import batch, fcos, one_stage, two_stage, write_set

from mdistiller.errors import ConfigError, DataError
from mdistiller.models import create_model
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.detection.config import DetectionConfig, DetectionDataConfig
from mdistiller.tasks.detection.distiller import DetectionDistiller
from mdistiller.tasks.detection.layouts import load_detection
from mdistiller.training.launch import train


def values(losses):
    return {name: value.item() for name, value in losses.items()}


def call(images, targets, method="pkd", **options):
    teacher = None if method == "none" else one_stage(seed=1)
    return DetectionDistiller(one_stage(), teacher, method, **options).train()(images, targets)


def test_the_detectors_losses_leave_them_out_and_levels_do_not():
    images, (objects, empty) = batch()
    out = call(images, [objects, {}])
    labeled = call(images[:1], [objects], "none")
    assert values(out.task) == pytest.approx(values(labeled.task))
    assert out.losses["pkd"] == call(images, [objects, empty]).losses["pkd"] > 0
    assert out.loss.item() == pytest.approx(labeled.loss.item() + out.losses["pkd"].item())


@pytest.mark.parametrize("make", [one_stage, fcos, two_stage])
def test_a_batch_without_any_label_trains_on_levels_alone(make):
    distiller = DetectionDistiller(make(), make(seed=1), "pkd+fitnet").train()
    out = distiller(batch()[0], [{}, {}])
    assert set(values(out.task).values()) == {0.0}
    assert out.losses["fitnet"] > 0
    out.loss.backward()
    assert [name for name, p in distiller.named_parameters() if p.grad is None] == []


def test_pseudo_boxes_are_the_teachers_from_a_score_on():
    images, (objects, _) = batch()
    teacher = one_stage(seed=1).eval()
    with torch.no_grad():
        found = teacher(images[1:])[0]
    score = found["scores"].sort(descending=True).values[4].item()
    kept = found["scores"] >= score
    expected = {"boxes": found["boxes"][kept], "labels": found["labels"][kept]}
    assert len(expected["boxes"]) == 5
    for method in ("pkd", "bckd"):
        out = call(images, [objects, {}], method, pseudo_score=score)
        assert values(out.losses) == values(call(images, [objects, expected], method).losses)
    assert values(out.task) != values(call(images, [objects, {}]).task)
    assert not teacher.training


def test_boxes_below_a_pixel_are_none(monkeypatch):
    distiller = DetectionDistiller(one_stage(), one_stage(seed=1), "pkd", pseudo_score=0.5).train()
    boxes = torch.tensor(
        [[-5.0, 2.0, 30.0, 20.0], [3.0, 3.0, 3.5, 9.0], [1.0, 1.0, 9.0, 9.0], [0.0, 0, 9, 9]]
    )
    found = {
        "boxes": boxes,
        "scores": torch.tensor([0.5, 0.9, 0.4, 0.9]),
        "labels": torch.tensor([2, 1, 1, 0]),
    }
    monkeypatch.setattr(distiller.teacher, "forward", lambda images: [found])
    (target,) = distiller._pseudo([torch.rand(3, 64, 64)])
    assert target["boxes"].tolist() == [[0.0, 2.0, 30.0, 20.0]]
    assert target["labels"].tolist() == [2]


@pytest.mark.parametrize("method", ["fgd", "fgfi", "bckd", "pkd+fgd", "none"])
def test_other_methods_need_pseudo_boxes(method):
    with pytest.raises(
        ConfigError, match=f"'{method[-4:].strip('+')}' does not compare levels alone.*pseudo"
    ):
        call(batch()[0], [{}, {}], method)


def test_pseudo_boxes_need_one_teacher():
    with pytest.raises(
        ConfigError, match="pseudo_score: got a method with 0 teachers with boxes; allowed: 1"
    ):
        call(*batch(), "none", pseudo_score=0.5)
    with pytest.raises(ConfigError, match="with 2 teachers"):
        DetectionDistiller(one_stage(), [one_stage(1), one_stage(2)], ["pkd", "cwd"], pseudo_score=0.5)
    backbone, images = create_model("resnet8", 4), {"mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 64}
    options = {"teacher_input": images, "student_taps": ("0",), "teacher_taps": ("stage3",)}
    with pytest.raises(ConfigError, match="with 0 teachers with boxes"):
        DetectionDistiller(one_stage(), backbone, "fitnet", pseudo_score=0.5, **options)


# A run


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Eight labeled images, of which two are in the folder of unlabeled ones too, and four more."""

    def tiny(name, num_classes, *, short_side, long_side, **options):
        seed, width = int(torch.randint(1000, ())), 16 if name == "wide" else 8
        return one_stage(seed, width=width, classes=num_classes)

    monkeypatch.setattr("mdistiller.tasks.detection.models.create_detector", tiny)
    write_set(tmp_path, 8)
    write_set(tmp_path, 4, "instances_val.json", seed=1)
    write_set(tmp_path / "more", 4, "unlabeled.json", seed=2)
    (tmp_path / "more" / "deep").mkdir()
    (tmp_path / "more" / "images").rename(tmp_path / "more" / "deep" / "images")
    for i in range(2):
        (tmp_path / "more" / f"link{i}.png").symlink_to(tmp_path / "images" / f"instances_tr{i}.png")
    return tmp_path


def config(root, out, data=(), **changes):
    settings = {
        "data": {"root": str(root), "workers": 0, "unlabeled": str(root / "more"), **dict(data)},
        "augment": {"short_sides": [64], "long_side": 96},
        "student": {"name": "small"},
        "epochs": 1,
        "batch_size": 2,
        "log_every": 1,
        "device": "cpu",
        "out": str(out),
    }
    return DetectionConfig.model_validate(settings | changes)


def test_runs(root, tmp_path):
    teacher = tmp_path / "teacher"
    alone = {"unlabeled": None}
    train(config(root, teacher, alone, student={"name": "wide"}, method={"name": "none"}))
    taught = {"teacher": {"name": "wide", "checkpoint": str(teacher)}}
    for name, method, data in (
        ("levels", {"name": "fitnet", "weight": "auto"}, {}),
        ("boxes", {"name": "bckd"}, {"pseudo_score": 0.2}),
    ):
        train(config(root, tmp_path / name, data, method=method, batch_size=1, **taught))
        steps = [line for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        assert len(steps) == 12  # of eight images with labels and four without
        without = [line for line in steps if line["classification"] == 0]
        assert len(without) == (4 if name == "levels" else 0)
        assert all(line[method["name"]] > 0 for line in steps)
    with pytest.raises(ConfigError, match="'binary_kd' does not compare levels alone"):
        train(config(root, tmp_path / "x", method={"name": "binary_kd"}, **taught))


def test_the_folder(root):
    data = DetectionDataConfig(root=root, unlabeled=root / "more")
    splits = load_detection(data)
    assert ": 8 training images with 16 objects, 4 unlabeled, 4 test images" in splits.description
    assert [image.is_labeled for image in splits.train.images] == [True] * 8 + [False] * 4
    image, target = splits.train.read(9)
    assert (image.shape, target["boxes"].shape) == ((3, 64, 80), (0, 4))
    shutil.copy(root / "images" / "instances_va0.png", root / "more")
    load_detection(data)  # a copy is another file
    with pytest.raises(DataError, match="4 of 4 test images are training images too"):
        load_detection(data.replace(unlabeled=root / "images"))
    for folder in (root / "none", root / "instances_val.json"):
        with pytest.raises(DataError, match=r"data.unlabeled: .* has no further images; they end in .jpg"):
            load_detection(data.replace(unlabeled=folder))
    with pytest.raises(ConfigError, match="pseudo_score: without unlabeled images"):
        DetectionDataConfig().replace(pseudo_score=0.5)
    with pytest.raises(ConfigError, match="images without masks"):
        data.replace(masks=True)
