"""Metadata in a student's file is data from elsewhere: each wrong value is one clean error."""

import json
import math

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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
        {"model": ["resnet8"]},
        {"model": "timm/../resnet18"},
        {"options": []},
        {"options": None},
        {"options": {"unknown": 1}},
        {"options": {"num_classes": 4}},
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
