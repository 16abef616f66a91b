"""Targets of a Distiller in one's own loop, and a teacher whose outputs are no numbers."""

import copy

import pytest
import torch
from torch import nn

from mdistiller import Distiller
from mdistiller.errors import ConfigError, TrainingError


def build(method="kd", teacher=None, **settings):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    return Distiller(student, teacher or copy.deepcopy(student), method, input_shape=(3, 8, 8), **settings)


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 4, 2])


@pytest.mark.parametrize("inputs", [IMAGES, {"input": IMAGES}])
def test_no_target_is_needed_where_no_loss_reads_it(inputs):
    out = build(task_weight=0.0)(inputs)
    expected = build(task_weight=0.0)(IMAGES, LABELS)
    assert "task" not in out.losses
    assert torch.equal(out.losses["kd"], expected.losses["kd"])
    out.loss.backward()


@pytest.mark.parametrize("settings", [{}, {"method": "dkd", "task_weight": 0.0, "warmup": 0.0}])
def test_a_target_is_needed_where_a_loss_reads_it(settings):
    with pytest.raises(ConfigError, match="target: got none"):
        build(**settings)(IMAGES)


def test_a_task_loss_is_not_asked_without_labels():
    def task_loss(outputs, batch):
        raise AssertionError

    assert build(task_weight=0.0, task_loss=task_loss)(IMAGES).loss.isfinite()
    assert build(task_weight=0.0, multi_label=True, method="pkt", student_taps=("0",), teacher_taps=("0",))(
        IMAGES
    ).loss.isfinite()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_batch_without_any_class_has_no_task_loss(label_smoothing):
    distiller = build(label_smoothing=label_smoothing)
    out = distiller(IMAGES, torch.full((4,), -100))
    assert out.losses["task"] == 0
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in distiller.student.parameters())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            LABELS.int(),
            r"got int32 \[4\]; allowed .* int64 \[4\], classes 0 … 4 .*target.flatten\(\).long\(\)",
        ),
        (LABELS[:, None], r"got int64 \[4, 1\]; .*target.flatten"),
        (nn.functional.one_hot(LABELS, 5), r"got int64 \[4, 5\]; .*target.argmax\(1\)"),
        (LABELS + 1, "got the class 5; allowed for logits"),
        (LABELS - 1, "got the class -1; allowed for logits"),
        (LABELS[:3], r"got int64 \[3\]; allowed"),
        (torch.full((4, 3), 1 / 3), r"got float32 \[4, 3\]; allowed .* float \[4, 5\], probabilities"),
    ],
)
def test_a_wrong_target_is_named_on_every_call(target, message):
    distiller = build()
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"target: {message}"):
            distiller(IMAGES, target)
        distiller(IMAGES, LABELS)


def test_an_image_without_a_class_needs_a_method_that_may_lack_one():
    target = torch.tensor([0, -100, 4, 2])
    assert build()(IMAGES, target).loss.isfinite()
    with pytest.raises(ConfigError, match=r"target: got -100, .* 'dkd' reads labels; allowed: .*labels=…"):
        build("dkd", warmup=0.0)(IMAGES, target)
    assert build("dkd", warmup=0.0, labels=target)(IMAGES, target, torch.arange(4)).loss.isfinite()


class Broken(nn.Module):
    """A teacher with a value in its logits, from its second call on."""

    def __init__(self, value, start=0):
        super().__init__()
        self.value, self.calls, self.start = value, 0, start

    def forward(self, x):
        logits = x.new_zeros(len(x), 5)
        self.calls += 1
        if self.calls > self.start:
            logits[0, 0] = self.value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("start", [0, 2])
def test_a_teacher_s_values_are_named_as_the_teacher_s(value, start):
    distiller = build(teacher=Broken(value, start))
    for _ in range(start):
        distiller(IMAGES, LABELS)
    with pytest.raises(TrainingError, match=r"the teacher's outputs are NaN or infinite \(logits\)"):
        distiller(IMAGES, LABELS)


def test_a_student_s_values_are_not_blamed_on_the_teacher():
    distiller = build()
    with torch.no_grad():
        distiller.student[0].bias.fill_(float("nan"))
    assert distiller(IMAGES, LABELS).loss.isnan()


def test_classes_without_a_part_are_allowed():
    assert build(teacher=Broken(-float("inf")))(IMAGES, LABELS).loss.isfinite()
