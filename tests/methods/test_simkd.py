"""SimKD: its loss by loops, and the student that it makes."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import simkd_loss
from mdistiller.methods import SimKD, SimKDConfig
from mdistiller.models import create_model, load_weights
from mdistiller.runs.checkpoint import save_student
from mdistiller.taps import probe, tap
from mdistiller.types import DataInfo

CONTRACT = {"convolutional teacher"}

DATA = DataInfo((3, 32, 32))


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)


def test_value_is_the_formula_s(maps):
    student, teacher = (x.numpy() for x in maps)
    total = 0.0
    for b, c, h, w in np.ndindex(student.shape):
        total += (student[b, c, h, w] - teacher[b, c, 2 * h : 2 * h + 2, w].mean()) ** 2
    expected = total / student.size
    assert simkd_loss(*maps).item() == pytest.approx(expected, rel=1e-12)
    # Whichever is larger is averaged.
    assert simkd_loss(*maps[::-1]).item() == pytest.approx(expected, rel=1e-12)
    assert simkd_loss(maps[0], maps[0]).item() == 0


def test_bad_input(maps):
    with pytest.raises(ConfigError, match=r"one B and C; got \[2, 3, 2, 4\] and \[2, 2, 4, 4\]"):
        simkd_loss(maps[0], maps[1][:, :2])
    with pytest.raises(ConfigError, match="must be maps"):
        simkd_loss(maps[0].mean((2, 3)), maps[1].mean((2, 3)))
    model = create_model("resnet8", 10)
    with pytest.raises(ConfigError, match=r"factor must be at most 64.*got 65"):
        SimKD(SimKDConfig(factor=65), model, model, DATA).extend_student(create_model("resnet8", 10))
    with pytest.raises(ConfigError, match="no tap 'last_map'"):
        SimKD(SimKDConfig(), model, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)), DATA)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    student, teacher = create_model("resnet8x4", 10), create_model("vgg8", 10)
    reference = copy.deepcopy(student)
    method = SimKD(SimKDConfig(factor=4), student, teacher, DATA)
    return reference, teacher, method.extend_student(student), method


def test_the_student_is_backbone_projector_and_the_teacher_s_classifier(pair):
    reference, teacher, extended, method = pair
    assert list(method.parameters()) == []
    image = torch.randn(2, 3, 32, 32)
    extended.eval()
    with torch.no_grad():
        # The student's map is 8x8 and vgg8's 4x4.
        feature = F.adaptive_avg_pool2d(tap(reference.eval(), ["last_map"])(image).features["last_map"], 4)
        p = extended.projector
        assert [tuple(p[i].weight.shape) for i in (0, 3, 6)] == [
            (128, 256, 1, 1),
            (128, 128, 3, 3),
            (512, 128, 1, 1),
        ]
        for i in (0, 3, 6):
            feature = p[i + 1](F.conv2d(feature, p[i].weight, padding=i % 2)).clamp(min=0)
        expected = feature.mean((2, 3)) @ teacher.classifier.weight.T + teacher.classifier.bias
        logits, features = tap(extended, ["stage1", "last_map", "pooled"])(image)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(features["last_map"], feature)
    assert features["stage1"].shape == (2, 64, 32, 32)
    assert features["pooled"].shape == (2, 512)


def test_every_weight_has_a_use_and_the_classifier_is_a_frozen_copy(pair):
    _, teacher, extended, _ = pair
    frozen = [name for name, p in extended.named_parameters() if not p.requires_grad]
    assert frozen == ["classifier.weight", "classifier.bias"]
    assert torch.equal(extended.classifier.weight, teacher.classifier.weight)
    assert extended.classifier.weight.data_ptr() != teacher.classifier.weight.data_ptr()
    assert teacher.classifier.weight.requires_grad
    assert "student.layer1.0.conv1.weight" in extended.state_dict()
    assert not any(name.startswith("student.fc") for name in extended.state_dict())


@pytest.mark.parametrize("names", [("resnet8x4", "vgg8"), ("vgg8", "resnet8x4")])
def test_a_saved_student_is_loaded_without_the_teachers_weights(tmp_path, names):
    student, teacher = (create_model(name, 10) for name in names)
    extended = SimKD(SimKDConfig(), student, teacher, DATA).extend_student(student).eval()
    assert extended.size == ((4, 4) if names[0] == "resnet8x4" else None)
    file = tmp_path / "student.safetensors"
    save_student(file, extended, {})
    student, teacher = (create_model(name, 10) for name in names)
    again = SimKD(SimKDConfig(), student, teacher, DATA).extend_student(student).eval()
    load_weights(again, file)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(image), extended(image))


def test_the_distiller_trains_a_copy():
    student, teacher = create_model("resnet8", 10), create_model("resnet20", 10)
    distiller = mdistiller.Distiller(student, teacher, "simkd")
    losses = distiller(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))).losses
    assert losses["task"] == 0
    assert losses["simkd"] > 0
    assert distiller.student(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    # The given student is copied and does not change.
    assert distiller.student is not student
    assert student(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert probe(distiller.student, ["last_map"], (3, 32, 32)).features["last_map"].shape == (2, 64, 8, 8)


def test_a_sum_with_a_part_that_reads_the_classifier_is_refused():
    student, teacher = create_model("resnet8", 10), create_model("resnet20", 10)
    for name, reader in (("simkd+catkd", "catkd"), ("kd+sdd-dkd+simkd", "sdd_dkd")):
        with pytest.raises(ConfigError, match=f"'simkd' replaces the classifier .* '{reader}' reads"):
            mdistiller.Distiller(student, teacher, name)
