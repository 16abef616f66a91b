"""Metadata in a student's file is data from elsewhere: each wrong value is one clean error."""

import json
import math

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mdistiller.tasks.detection.models import create_detector

EXTENSION = {"method": {"name": "simkd"}, "teacher": "resnet8", "teacher_options": {}, "image_size": 16}


@pytest.fixture
def changed(student_run, tmp_path, monkeypatch):
    """Writes the student into a file by itself, with other metadata."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("image.png")
    file = student_run / "student.safetensors"
    weights = load_file(file)
    with safe_open(file, "pt") as content:
        metadata = json.loads(content.metadata()["mdistiller"])

    def write(**changes):
        save_file(weights, "changed.safetensors", {"mdistiller": json.dumps(metadata | changes)})
        return "changed.safetensors"

    return write


@pytest.mark.parametrize(
    "changes",
    [
        {"task": 3},
        {"task": None},
        {"task": "none"},
        {"model": None},
        {"model": ""},
        {"model": "gone"},
        {"model": "x" * 5000},
        {"model": ["resnet8"]},
        {"model": "timm/../resnet18"},
        {"options": []},
        {"options": None},
        {"options": {"unknown": 1}},
        {"options": {"num_classes": 4}},
        {"options": {"name": "resnet14"}},
        {"classes": []},
        {"classes": "abcd"},
        {"classes": [0, 1, 2, 3]},
        {"classes": ["a", "b", "c"]},
        {"classes": ["a", "b", "c", "d", "e"]},
        {"classes": {"a": 0}},
        {"image_size": 0},
        {"image_size": -1},
        {"image_size": 10**9},
        {"image_size": 10**30},
        {"image_size": "16"},
        {"image_size": 16.5},
        {"image_size": None},
        {"mean": [0.5, 0.5]},
        {"mean": "0.5"},
        {"mean": [math.nan] * 3},
        {"std": [0.0, 0.0, 0.0]},
        {"std": [0.2, math.nan, 0.2]},
        {"std": [0.2, math.inf, 0.2]},
        {"std": [0.2, 0.2, "0.2"]},
        {"extension": 3},
        {"extension": EXTENSION | {"method": {"name": 3}}},
        {"extension": EXTENSION | {"teacher_options": []}},
        {"extension": EXTENSION | {"teacher": "gone"}},
        {"extension": EXTENSION | {"teacher_options": {"unknown": 1}}},
        {"extension": EXTENSION | {"image_size": 10**9}},
        {"extension": EXTENSION | {"teacher_image_size": "16"}},
        {"extension": EXTENSION | {"method": {"name": "simkd", "unknown": 1}}},
        {"extension": EXTENSION | {"method": {"name": "gone"}}},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
@pytest.mark.filterwarnings("ignore:accuracy of model.safetensors")
def test_a_wrong_value_is_one_error(cli, changed, changes):
    file = changed(**changes)
    for words in (
        ("predict", file, "image.png"),
        ("export", file, "--out", "out"),
        ("eval", file, *cli.DATA),
        ("train", "digits.kd.resnet8", *cli.FAST, "--teacher", file, "--out", "run"),
    ):
        done = cli(*words)
        # A name may be a plug-in's, which the user can give.
        code = 2 if done.err.startswith("mdistiller: unknown ") else 1
        assert (done.code, done.out) == (code, ""), (words[0], done.code, done.err)
        assert done.err.count("\n") == 1, (words[0], done.err)
        assert code == 2 or file in done.err, (words[0], done.err)
        assert len(done.err) < 700


DETECTOR = {"short_side": 64, "long_side": 96}


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": []},
        {"labels": None},
        {"labels": [1]},
        {"labels": [2, 1]},  # of a version in which labels could have gaps
        {"labels": [1], "classes": ["a"]},
        {"labels": [1, 2, 3], "classes": ["a", "b", "c"]},
        {"num_classes": 3.5},
        *(
            {"options": DETECTOR | options}
            for options in (
                {"image_mean": math.nan},
                {"image_mean": [0.5, 0.5]},
                {"image_std": [0.2, 0.2, "0.2"]},
                {"short_side": 0},
                {"short_side": []},
                {"short_side": "64"},
                {"long_side": None},
                {"score_thresh": 10**30},
                {"score_thresh": math.nan},
                {"nms_thresh": "a"},
                {"topk_candidates": -1},
                {"topk_candidates": 2.5},
                {"topk_candidates": True},
                {"frozen_stages": 2.5},
                {"frozen_stages": "a"},
                {"batch_norm": 1},
            )
        ),
    ],
    ids=lambda changes: json.dumps(changes)[:90],
)
def test_a_wrong_value_of_a_detector_is_one_error(cli, detector_file, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("image.png")
    weights, metadata = detector_file
    save_file(weights, "changed.safetensors", {"mdistiller": json.dumps(metadata | changes)})
    for words in (("predict", "changed.safetensors", "image.png"), ("export", "changed.safetensors")):
        done = cli(*words)
        assert done.code in (1, 2), (words[0], done.code, done.err)
        assert (done.out, done.err.count("\n")) == ("", 1), (words[0], done.err)


@pytest.fixture(scope="module")
def detector_file():
    """The weights and the metadata of a detector's file."""
    model = create_detector("fcos_resnet18", 3, **DETECTOR)
    metadata = {"task": "detection", "model": "fcos_resnet18", "options": DETECTOR}
    return model.state_dict(), metadata | {"classes": ["a", "b"], "labels": [1, 2], "num_classes": 3}
