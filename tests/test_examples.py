"""The examples and the README run as written."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import processes
import pytest
import torch

import mdistiller
from mdistiller.cli.main import COMMANDS, run
from mdistiller.cli.train import parse
from mdistiller.runs.folder import read_metrics

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()


def code(language):
    """Returns the README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_python_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    given = {
        "mdistiller": mdistiller,
        "student": mdistiller.create_model("resnet8", 10),
        "teacher": mdistiller.create_model("resnet8", 10),
        "images": images,
        "labels": labels,
        "loader": [(images, labels)] * 2,
        "epochs": 1,
    }
    blocks = code("python")
    assert len(blocks) == 4
    for block in blocks:
        exec(block, dict(given))


def commands():
    """Returns the README's commands, without comments."""
    return [
        line.partition("#")[0].replace("…", "").strip()
        for block in code("")
        for line in block.splitlines()
        if "mdistiller " in line
    ]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    if "--teacher " in line:
        teacher, images = mdistiller.create_model("resnet8", 2), {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        about = {"name": "resnet8", "classes": ("cat", "dog"), "image_size": 32, **images}
        mdistiller.save_student(teacher, "runs/teacher", **about)
    command, *args = shlex.split(line[line.index("mdistiller ") :])[1:]
    assert command in COMMANDS
    if command == "train":
        parse(args or ["digits.student.resnet8"])
        return
    with pytest.raises(SystemExit):
        run([command, "--help"])
    known = capsys.readouterr().out
    for flag in (word for word in args if word.startswith("--")):
        assert f" {flag} " in known


def test_own_loop():
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    history, result = module.main(epochs=4)
    assert set(history[0]) == {"task", "dkd"}
    assert history[-1]["task"] < 0.5 * history[0]["task"]
    assert 0.5 < result["student"] <= 1


def test_my_method_as_a_plugin(tmp_path, capsys):
    teacher = tmp_path / "teacher"
    few = ["--data.train-limit", "200", "--data.test-limit", "100"]
    assert run(["train", "digits.teacher.resnet20", "--out", str(teacher), "--epochs", "1", *few]) == 0
    out = tmp_path / "run"
    plugin = ["--plugin", str(EXAMPLES / "my_method.py")]
    flags = ["--teacher.checkpoint", str(teacher), "--method.weight", "2", "--epochs", "2", "--out", str(out)]
    capsys.readouterr()
    assert run(["train", "digits.my_cosine.resnet20_resnet8", *plugin, *flags, *few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 8
    stored = json.loads((out / "config.json").read_text())
    assert stored["method"] == {"name": "my_cosine", "task_weight": 1.0, "weight": 2.0}
    assert stored["plugins"] == [str(EXAMPLES / "my_method.py")]
    assert "cosine" in read_metrics(out)[0]
    assert run(["list", "methods", *plugin, "--json"]) == 0
    assert "my_cosine" in {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert mdistiller.methods.get_method("my_cosine").needs_teacher


def test_my_model_as_student_and_as_teacher(tmp_path, capsys):
    plugin = ["--plugin", str(EXAMPLES / "my_model.py")]
    few = [
        "--data.kind",
        "synthetic",
        "--data.synthetic-samples",
        "32",
        "--max-steps",
        "2",
        "--device",
        "cpu",
    ]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    wide = ["--student.options", "width", "32", "--out", str(teacher)]
    assert run(["train", "digits.teacher.my_cnn", *plugin, *few, *wide]) == 0
    # ReviewKD reads every stage, before and after its last ReLU, and `pooled`, of both.
    given = ["--teacher.checkpoint", str(teacher), "--teacher.options", "width", "32", "--out", str(student)]
    assert run(["train", "digits.reviewkd.my_cnn_my_cnn", *plugin, *few, *given]) == 0
    assert "reviewkd" in read_metrics(student)[0]
    capsys.readouterr()
    assert run(["list", "models", *plugin, "--json"]) == 0
    rows = {row["name"]: row["parameters"] for row in json.loads(capsys.readouterr().out)}
    # Three convolutions without bias, their batch norms, and a classifier of 100 classes.
    assert rows["my_cnn"] == 9 * (3 * 16 + 16 * 16 + 16 * 32) + 2 * (16 + 16 + 32) + 33 * 100


def test_the_taps_of_my_model():
    mdistiller.methods.load_plugin(EXAMPLES / "my_model.py")
    model = mdistiller.create_model("my_cnn", num_classes=3).eval()
    names = tuple(model.tap_points)
    for size in (20, 33):
        image = torch.randn(2, 3, size, size)
        logits, features = mdistiller.tap(model, names)(image)
        assert torch.equal(logits, model.classifier(features["pooled"]))
        assert torch.equal(features["stage2.preact"].relu(), features["stage2"])
        assert torch.equal(features["last_map"].mean((2, 3)), features["pooled"])


def test_a_config_with_a_plugin_repeats(tmp_path):
    # In a process that has not loaded the plug-in, config.json alone has to be enough.
    config = {
        "data": {"kind": "synthetic", "synthetic_samples": 32, "image_size": 16},
        "student": {"name": "resnet8"},
        "teacher": {"name": "resnet8", "checkpoint": str(tmp_path / "teacher")},
        "method": {"name": "my_cosine"},
        "plugins": [str(EXAMPLES / "my_method.py")],
        "max_steps": 1,
        "device": "cpu",
    }
    teacher = config | {"teacher": None, "method": {"name": "none"}, "plugins": []}
    for name, value in (("teacher", teacher), ("student", config)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        process = processes.Forked(
            processes.mdistiller, "train", tmp_path / f"{name}.json", "--out", tmp_path / name
        )
        _, err = process.communicate()
        assert process.returncode == 0, err
