"""The examples and the README run as written."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import processes
import pytest
import torch
from PIL import Image

import mdistiller
from mdistiller.cli.main import COMMANDS, run
from mdistiller.cli.train import TrainCommand
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
    assert len(blocks) == 2
    for block in blocks:
        exec(block, dict(given))


def commands():
    """Returns the README's commands, without comments."""
    return [
        line.partition("#")[0].replace("…", "").strip()
        for block in code("")
        for line in block.replace("\\\n", " ").splitlines()
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
        TrainCommand.parse(args or ["digits.student.resnet8"])
        return
    with pytest.raises(SystemExit):
        run([command, "--help"])
    known = capsys.readouterr().out
    for flag in (word for word in args if word.startswith("--")):
        assert f" {flag} " in known


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop():
    history, result = load_example("own_loop").main(epochs=3)
    assert set(history[0]) == {"task", "dkd"}
    assert history[-1]["task"] < 0.5 * history[0]["task"]
    assert 0.5 < result["student"] <= 1


def test_a_linear_probe_finds_what_features_tell_apart(tmp_path, capsys):
    """Images of ten grays, which features of any network tell apart, and images that are all the same."""
    about = {"name": "resnet8", "image_size": 16, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    student = mdistiller.create_model("resnet8", 10).eval()
    mdistiller.save_student(student, tmp_path / "run", classes=[*"0123456789"], **about)
    grays = {"grays": range(0, 250, 25), "same": [9] * 10}
    for data, values in grays.items():
        for split in ("train", "val"):
            for k, gray in enumerate(values):
                folder = tmp_path / data / split / str(k)
                folder.mkdir(parents=True)
                for i in range(4):
                    Image.new("RGB", (20, 20), (gray,) * 3).save(folder / f"{i}.png")
    for data, expected in (("grays", 100), ("same", 10)):
        argv = [str(tmp_path / "run"), "--data", str(tmp_path / data)]
        assert load_example("linear_probe").main(argv) == {tmp_path / "run": pytest.approx(expected)}
        assert capsys.readouterr().out == f"{tmp_path / 'run'}: {expected:.2f} %\n"


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
    assert mdistiller.methods.get_method("my_cosine").needs.teacher


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
        argv = ["train", tmp_path / f"{name}.json", "--out", tmp_path / name]
        argv += [word for file in value["plugins"] for word in ("--plugin", file)]
        process = processes.Forked(processes.mdistiller, *argv)
        _, err = process.communicate()
        assert process.returncode == 0, err


def test_a_pruned_student(tmp_path, capsys):
    few = ["--data.train-limit", "200", "--data.test-limit", "100", "--epochs", "1", "--device", "cpu"]
    runs = {name: str(tmp_path / name) for name in ("teacher", "alone", "pruned")}
    assert run(["train", "digits.teacher.resnet14", "--out", runs["teacher"], *few]) == 0
    assert run(["train", "digits.student.resnet8", "--out", runs["alone"], *few]) == 0
    # In a process of its own, as the file is a script and a plug-in.
    argv = (EXAMPLES / "pruned_student.py", runs["alone"], tmp_path / "pruned.pth", "0.5")
    process = processes.Forked(processes.script, *argv)
    said, err = process.communicate()
    assert process.returncode == 0, err
    before, after = (int(word) for word in re.findall(r"\d+", said.replace(",", "")))
    # Half of the channels between the 3x3 convolutions of three blocks.
    widths = ((16, 16), (16, 32), (32, 64))
    cut = sum(9 * (inputs + outputs) * outputs // 2 + outputs for inputs, outputs in widths)
    assert (before, after) == (78042, 78042 - cut)
    old = mdistiller.load_student(runs["alone"]).state_dict()
    new = torch.load(tmp_path / "pruned.pth")["model"]
    strength = old["layer3.0.conv1.weight"].abs().sum((1, 2, 3))
    kept = [i for i in range(64) if (strength > strength[i]).sum() < 32]
    assert torch.equal(new["layer3.0.conv1.weight"], old["layer3.0.conv1.weight"][kept])
    assert torch.equal(new["layer3.0.conv2.weight"], old["layer3.0.conv2.weight"][:, kept])
    assert torch.equal(new["layer3.0.bn1.running_var"], old["layer3.0.bn1.running_var"][kept])
    assert torch.equal(new["fc.weight"], old["fc.weight"])
    plugin = ["--plugin", str(EXAMPLES / "pruned_student.py")]
    given = ["--student.options", "base", "resnet8", "keep", "0.5", "--out", runs["pruned"]]
    given += ["--student.checkpoint", str(tmp_path / "pruned.pth"), "--teacher.checkpoint", runs["teacher"]]
    assert run(["train", "digits.dkd.resnet14_pruned_resnet", *plugin, *given, *few]) == 0
    trained = mdistiller.load_student(runs["pruned"])
    assert {k: v.shape for k, v in trained.state_dict().items()} == {k: v.shape for k, v in new.items()}
    capsys.readouterr()
    assert run(["compare", runs["alone"], runs["pruned"], *plugin, "--batch", "1", "--json"]) == 0
    rows = {row["label"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    alone, pruned = rows["resnet8 alone"], rows["DKD"]
    assert pruned["parameters"] == after
    assert pruned["macs"] < 0.65 * alone["macs"]
    assert pruned["bytes"] < 0.6 * alone["bytes"]


def test_a_causal_language_model(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.syspath_prepend(EXAMPLES)
    module = load_example("causal_lm")
    losses = module.main(steps=20)
    assert len(losses) == 10
    assert losses[-1] < 0.6 * losses[0]
    # The hidden states are those from which the model computes its logits, and a padded label is ignored.
    model, row = module.language_model(32, 1), module.samples()[0]
    batch = {name: torch.stack([value, value]) for name, value in row.items()}
    out = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert any((row["labels"] == -100).any() for row in module.samples())
