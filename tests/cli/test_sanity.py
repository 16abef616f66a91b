"""Warnings about settings that work but hardly can be meant."""

import json
import warnings

import pytest

from mdistiller.cli.train import remark_on_teacher
from mdistiller.models import create_model
from mdistiller.runs.checkpoint import save_student
from mdistiller.types import Metric

RECIPE = "digits.kd.resnet8_resnet8"


def shown(cli, *argv):
    """The UserWarnings of a command that succeeds."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        done = cli(*argv)
    assert done.code == 0, done.err
    return [str(warning.message) for warning in found if warning.category is UserWarning], done


@pytest.fixture
def blind_teacher(tmp_path):
    """A teacher that always has the same answer, so that its accuracy is chance."""
    model = create_model("resnet8", 4)
    for parameter in model.parameters():
        parameter.data.zero_()
    path = tmp_path / "blind.safetensors"
    save_student(path, model, {"task": "classification", "model": "resnet8", "options": {}})
    return path


def test_a_teacher_that_guesses(cli, blind_teacher, teacher_run, tmp_path):
    argv = ("train", RECIPE, *cli.FAST, "--epochs", 2, "--teacher.checkpoint")
    found, _ = shown(cli, *argv, blind_teacher, "--out", tmp_path / "blind")
    expected = "its top-1 on the test images is 25.00 %, no better than chance (25.00 %)"
    assert [text for text in found if "chance" in text] == [text for text in found if expected in text]
    assert sum("chance" in text for text in found) == 1  # once a run, not an evaluation
    top1 = cli.metrics(teacher_run)[-1]["last"]["top1"]
    found, _ = shown(cli, *argv, teacher_run, "--out", tmp_path / "good")
    assert any("chance" in text for text in found) == (top1 <= 25)


def test_a_batch_larger_than_the_data(cli, tmp_path):
    argv = ("train", "digits.student.resnet8", *cli.DATA, "--epochs", 1)
    found, _ = shown(cli, *argv, "--batch-size", 65, "--out", tmp_path / "large")
    (text,) = [text for text in found if text.startswith("batch_size")]
    assert text.startswith("batch_size: got 65 for 64 training images; each epoch is one step")
    found, _ = shown(cli, *argv, "--batch-size", 64, "--out", tmp_path / "equal")
    assert not [text for text in found if text.startswith("batch_size")]


@pytest.mark.parametrize(
    ("teacher", "student", "is_worse"), [(50.0, 60.0, True), (60.0, 60.0, False), (70.0, 60.0, False)]
)
def test_a_teacher_worse_than_its_student(tmp_path, teacher, student, is_worse):
    lines = [
        {"kind": "eval", "step": 1, "top1": 99.0, "diagnostics": {"test": {"teacher_top1": 1.0}}},
        {"kind": "eval", "step": 2, "top1": student, "diagnostics": {"test": {"teacher_top1": teacher}}},
        {"kind": "summary", "step": 2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    remark = remark_on_teacher(tmp_path, Metric("top1", "%"))
    assert (remark is not None) == is_worse
    if is_worse:
        assert "the teacher scores 50.00 % on these images, below the student's 60.00 %" in remark
    del lines[1]["diagnostics"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert remark_on_teacher(tmp_path, Metric("top1", "%")) is None
