"""`mdistiller export` and `mdistiller predict`."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from processes import Forked, mdistiller

from mdistiller.data import DataConfig, load_data

FORMATS = ("safetensors", "torch-export", "onnx")
DATA = DataConfig(kind="synthetic", synthetic_classes=4, synthetic_samples=64, image_size=16)


@pytest.fixture(scope="module")
def exports(cli, student, tmp_path_factory):
    """An exported folder of each format, and what the command said."""
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for format in FORMATS:
        out = folder / format
        found[format] = out, cli("export", student[0], "--format", format, "--out", out, "--json")
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The test images of the run's data as files, and their labels."""
    folder, test = tmp_path_factory.mktemp("pictures"), load_data(DATA).test
    paths = [folder / f"{i}.png" for i in range(len(test))]
    for path, image in zip(paths, test.images, strict=True):
        Image.fromarray(image.numpy()).save(path)
    return paths, test.labels


@pytest.mark.parametrize("format", FORMATS)
def test_export_as_json(cli, student_run, exports, format):
    out, done = exports[format]
    assert done.code == 0, done.err
    found = done.json()
    assert found.pop("out") == str(out)
    assert found == json.loads((out / "card.json").read_text())
    last = [line for line in cli.metrics(student_run) if line["kind"] == "eval"][-1]
    assert found["accuracy"]["value"] == last["top1"]
    assert found["check"]["largest_difference"] <= 1e-4 * found["check"]["largest_output"]


def test_export_as_text(cli, student_run, tmp_path):
    run = shutil.copytree(student_run, tmp_path / "run")  # the exported folder lies in it
    done = cli("export", run)
    assert done.code == 0, done.err
    folder = run / "export" / "student-safetensors"
    first, second, measured, *_, times = done.out.splitlines()
    assert first == str(folder)
    assert second.startswith(
        "largest difference to the student's outputs 0.0e+00 on inputs 2x3x16x16, 1x3x16x16, 3x3x16x16 ("
    )
    top1 = [line for line in cli.metrics(run) if line["kind"] == "eval"][-1]["top1"]
    assert measured == (
        f"top1 of this file: {top1:.2f} % on 32 test images (the student {top1:.2f} %, difference +0.00; "
        "the same class for 100.00 %)"
    )
    assert times.startswith("milliseconds an image: ")
    assert (folder / "model.safetensors").is_file()
    again = cli("export", run)
    assert (again.code, again.out) == (2, "")
    assert f"out: {folder} is not an empty folder; choose another" in again.message


@pytest.mark.parametrize("format", FORMATS)
def test_predict_agrees_with_eval(cli, student_run, exports, pictures, format):
    paths, labels = pictures
    rows = cli("predict", exports[format][0], *paths, "--top", 1, "--json", "--device", "cpu").json()
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    assert all(len(row["classes"]) == 1 for row in rows)
    hits = sum(row["classes"][0]["name"] == f"class {y}" for row, y in zip(rows, labels, strict=True))
    figures = cli("eval", "resnet8", "--checkpoint", student_run, *cli.DATA, "--json").json()
    assert 100 * hits / len(paths) == pytest.approx(figures["top1"])


def test_predict_takes_a_run(cli, student_run, exports, pictures):
    paths = pictures[0][:3]
    expected = cli("predict", exports["safetensors"][0], *paths, "--json", "--device", "cpu").json()
    for source in (student_run, student_run / "student.safetensors"):
        rows = cli("predict", source, *paths, "--json", "--device", "cpu").json()
        for row, other in zip(rows, expected, strict=True):
            assert row["image"] == other["image"]
            for one, two in zip(row["classes"], other["classes"], strict=True):
                assert (one["name"], one["probability"]) == (two["name"], pytest.approx(two["probability"]))


def test_predict_as_text(cli, exports, pictures):
    (path, *_), _ = pictures
    (row,) = cli("predict", exports["onnx"][0], path, "--json").json()
    assert sum(c["probability"] for c in row["classes"]) == pytest.approx(1, abs=1e-5)  # 4 classes, top 5
    done = cli("predict", exports["onnx"][0], path, "--top", 3)
    expected = [f"  {100 * c['probability']:6.2f} %  {c['name']}" for c in row["classes"][:3]]
    assert done.out.splitlines() == [str(path), *expected]
    # Options may stand before the images.
    assert cli("predict", exports["onnx"][0], "--top", 3, path).out == done.out


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_an_image_that_cannot_be_read_fails_before_anything_is_printed(
    cli, exports, pictures, tmp_path, json_flag
):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0][0].read_bytes()[:60])
    for bad in (broken, tmp_path / "missing.png"):
        done = cli("predict", exports["safetensors"][0], *pictures[0][:2], bad, *json_flag)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith(f"mdistiller: image {bad} cannot be read: ")
        assert done.err.count("\n") == 1


def refused(cli, code, *argv):
    done = cli(*argv)
    assert (done.code, done.out) == (code, ""), done.err
    assert "Traceback" not in done.err
    return done.message


def test_bad_usage(cli, student_run, exports, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, picture = exports["safetensors"][0], pictures[0][0]
    assert "'onx'" in refused(cli, 2, "export", student_run, "--format", "onx")
    assert "no moving average" in refused(cli, 2, "export", student_run, "--ema")
    assert "no such run folder" in refused(cli, 1, "export", tmp_path / "none")
    assert "run" in refused(cli, 2, "export").lower()
    assert "at least one image" in refused(cli, 2, "predict", folder)
    assert "top: got 0" in refused(cli, 2, "predict", folder, picture, "--top", 0)
    assert "device: got 'gpu'" in refused(cli, 2, "predict", folder, picture, "--device", "gpu")
    (tmp_path / "empty").mkdir()
    assert "is no exported folder" in refused(cli, 1, "predict", tmp_path / "empty", picture)
    (tmp_path / "empty").rmdir()
    assert "no such run folder or student file" in refused(cli, 1, "predict", tmp_path / "none", picture)
    assert "nearest: export" in refused(cli, 2, "exprot", student_run)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refused(cli, 2, "export", student_run, "--format", "onnx", "--out", "here")
    install = "pip install onnx onnxruntime onnxscript"
    assert message == f"mdistiller: format onnx needs onnxruntime: {install}"
    assert list(tmp_path.iterdir()) == []


PLUGIN = """
from torch import nn
from mdistiller.models import register_model

@register_model
def my_net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_classes))
"""


def test_a_model_from_a_plugin(cli, pictures, tmp_path, forget_plugins):
    plugin, run = tmp_path / "mine.py", tmp_path / "run"
    plugin.write_text(PLUGIN)

    given = ("--plugin", plugin, *cli.DATA, "--batch-size", 32, "--epochs", 1, "--out", run)
    assert cli("train", "digits.student.my_net", *given).code == 0
    forget_plugins()
    message = refused(cli, 2, "export", run, "--format", "onnx")
    assert "unknown model 'my_net'" in message
    assert f"give --plugin {plugin}" in message
    # In a process of its own, whose stdout has nothing of torch's exporter in it, nor stderr a warning.
    process = Forked(mdistiller, "export", run, "--format", "onnx", "--json", "--plugin", plugin)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    (row,) = cli("predict", json.loads(out)["out"], pictures[0][0], "--json").json()
    assert len(row["classes"]) == 4  # a graph needs no plug-in
    weights = cli("export", run, "--plugin", plugin, "--json").json()["out"]
    forget_plugins()
    assert "unknown model 'my_net'" in refused(cli, 2, "predict", weights, pictures[0][0])
    (other,) = cli("predict", weights, pictures[0][0], "--json", "--plugin", plugin).json()
    for one, two in zip(row["classes"], other["classes"], strict=True):
        assert (one["name"], one["probability"]) == (two["name"], pytest.approx(two["probability"], rel=1e-4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(cli, exports, pictures):
    for format in FORMATS:
        message = refused(cli, 2, "predict", exports[format][0], pictures[0][0], "--device", "cuda")
        assert "device: got 'cuda', but 0 GPUs are visible here" in message
