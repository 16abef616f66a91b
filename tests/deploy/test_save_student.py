"""Students from one's own training loop: saved, loaded, and taken by the commands."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

import mdistiller
from mdistiller.cli.main import run
from mdistiller.errors import ConfigError
from mdistiller.models import registry

ABOUT = {
    "name": "resnet8",
    "classes": ["ant", "bee", "cat"],
    "image_size": 16,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.3],
}


@pytest.fixture
def model():
    torch.manual_seed(3)
    return mdistiller.create_model("resnet8", 3)


@pytest.fixture
def folder(tmp_path):
    """Images whose brightness is their class."""
    for split in ("train", "val"):
        for i, name in enumerate(ABOUT["classes"]):
            (tmp_path / "root" / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 16), (80 * i, 90, 100)).save(tmp_path / "root" / split / name / "0.png")
    return tmp_path / "root"


def command(capsys, *argv):
    code = run([str(word) for word in argv])
    done = capsys.readouterr()
    return code, json.loads(done.out) if code == 0 else done.err


@pytest.mark.parametrize("path", ["mine.safetensors", "mine"])
def test_commands_take_the_file(tmp_path, capsys, model, folder, path):
    path = tmp_path / path
    state = torch.get_rng_state()
    file = mdistiller.save_student(model, path, **ABOUT)
    assert torch.equal(torch.get_rng_state(), state)
    assert file == (path if path.suffix else path / "student.safetensors")
    model.eval()
    image = torch.full((1, 3, 16, 16), 0.0)
    assert torch.equal(mdistiller.load_student(path)(image), model(image))
    # Images of one color, prepared by hand.
    pixels = torch.tensor([[80 * i, 90, 100] for i in range(3)])[:, :, None, None] / 255
    mean, std = (torch.tensor(ABOUT[key])[:, None, None] for key in ("mean", "std"))
    logits = model(((pixels - mean) / std).expand(3, 3, 16, 16)).detach()

    code, found = command(capsys, "eval", path, "--data.root", folder, "--device", "cpu", "--json")
    assert code == 0
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, torch.arange(3)).item(), 1e-4)
    images = [folder / "val" / name / "0.png" for name in ABOUT["classes"]]
    code, found = command(capsys, "predict", path, *images, "--json")
    assert code == 0
    for one, row in zip(found, logits.softmax(1), strict=True):
        expected = dict(zip(ABOUT["classes"], row.tolist(), strict=True))
        assert {c["name"]: c["probability"] for c in one["classes"]} == pytest.approx(expected, 1e-3)
    code, card = command(capsys, "export", path, "--out", tmp_path / "out", "--json")
    assert (code, card["classes"], card["accuracy"]) == (0, ABOUT["classes"], None)
    code, message = command(capsys, "report", path)
    assert (code, "a student by itself has no metrics" in message) == (1, True)


def test_the_report_takes_an_evaluated_file(tmp_path, capsys, model, folder):
    file = mdistiller.save_student(model, tmp_path / "mine.safetensors", **ABOUT)
    out = tmp_path / "evaluated"
    words = ("eval", file, "--data.root", folder, "--device", "cpu", "--json")
    code, found = command(capsys, *words, "--out", out)
    assert code == 0
    run_words = ("--data.image-size", 16, "--epochs", 1, "--batch-size", 3, "--no-diagnostics")
    trained = tmp_path / "trained"
    code, _ = command(
        capsys,
        *("train", "folder.student.resnet8", "--data.root", folder, *run_words, "--device", "cpu", "--json"),
        *("--out", trained),
    )
    assert code == 0
    page = tmp_path / "report.html"
    code, rows = command(capsys, "report", out, trained, "--out", page, "--json")
    assert code == 0
    mine, theirs = rows
    assert mine["label"] == "resnet8, evaluated"
    assert mine["last"]["mean"] == found["top1"]
    assert mine["student_parameters"] == sum(p.numel() for p in model.parameters())
    assert (mine["seconds"], mine["ms_per_step"], mine["over_baseline"]) == (None, None, None)
    assert theirs["ms_per_step"] > 0
    text = page.read_text()
    assert f"The student of {out} cannot run" not in text
    assert f"mdistiller train {trained}/config.json" in text
    assert f"mdistiller train {out}/config.json" not in text
    assert mdistiller.load_student(out)(torch.zeros(1, 3, 16, 16)).equal(
        mdistiller.load_student(file)(torch.zeros(1, 3, 16, 16))
    )
    code, message = command(capsys, *words, "--out", out)
    assert (code, "holds a run already" in message) == (2, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet20"}, "'resnet20' with options {} does not build this model: .*register_model"),
        ({"name": "my_own_net"}, "unknown model 'my_own_net'.*register_model"),
        ({"classes": ["a", "b"]}, "classes: got 2 names; the model has 3"),
        ({"classes": ["a", "b", "a"]}, "two or more different names"),
        ({"classes": "abc"}, "two or more different names"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0, 1, 1]}, "std"),
        ({"image_size": 0}, "image_size"),
        ({"options": {"num_classes": 3}}, "num_classes is no option"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(tmp_path, model, changes, words):
    with pytest.raises(ConfigError, match=words):
        mdistiller.save_student(model, tmp_path / "new" / "mine.safetensors", **(ABOUT | changes))
    assert list(tmp_path.iterdir()) == []


def test_a_torch_file_is_no_student(tmp_path, model):
    with pytest.raises(ConfigError, match=r"allowed: a \.safetensors file"):
        mdistiller.save_student(model, tmp_path / "mine.pth", **ABOUT)


def test_a_model_of_a_plugin(tmp_path, monkeypatch, model, registries):
    plugin = tmp_path / "nets.py"
    plugin.write_text(
        "from mdistiller import create_model, register_model\n"
        "@register_model\n"
        "def net_to_save(num_classes):\n"
        "    return create_model('resnet8', num_classes)\n"
    )
    from mdistiller.methods import load_plugin

    load_plugin(plugin)
    mdistiller.save_student(model, tmp_path / "mine", **(ABOUT | {"name": "net_to_save"}))
    del registry._MODELS["net_to_save"]
    with pytest.raises(ConfigError, match="unknown model 'net_to_save'"):
        mdistiller.load_student(tmp_path / "mine")
    import sys

    for name in [name for name in sys.modules if name.startswith("mdistiller_plugin_")]:
        monkeypatch.delitem(sys.modules, name)
    found = mdistiller.load_student(tmp_path / "mine", plugins=[plugin])
    assert all(value.equal(found.state_dict()[key]) for key, value in model.state_dict().items())
