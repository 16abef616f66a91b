"""Teachers without logits of the data's classes, for methods that read features alone."""

import copy

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_runs import SETTINGS, VIT

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.errors import CheckpointError, ConfigError
from mdistiller.methods import get_method, list_methods
from mdistiller.methods.compose import build_method, reads_logits
from mdistiller.models import load_weights
from mdistiller.types import Batch, DataInfo, Outputs

FEATURES = [name for name in list_methods() if get_method(name).needs.teacher and not reads_logits(name)]


def headless():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)


class Several(torch.nn.Module):
    """Returns tokens and an embedding, as the vision models of transformers do."""

    def __init__(self):
        super().__init__()
        self.vit = headless()

    def forward(self, image):
        tokens = self.vit.forward_features(image)
        return {"last_hidden_state": tokens, "pooler_output": self.vit.forward_head(tokens)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


def data(folder):
    return {"kind": "folder", "root": folder, "image_size": 32, "workers": 0}


@pytest.mark.parametrize("name", FEATURES)
def test_methods_that_declare_it_read_neither_logits_nor_a_classifier(name):
    student, teacher = mdistiller.create_model("resnet8", 4), mdistiller.create_model("resnet20", 4)
    labels = torch.arange(16) % 4
    info = DataInfo((3, 32, 32), labels, 8)
    torch.manual_seed(1)
    method = build_method(mdistiller.methods.method_config(name), student, teacher, info)
    image = torch.randn(8 * method.needs.views, 3, 32, 32)
    passes = [
        mdistiller.tap(model.eval(), taps)(image)
        for model, taps in ((student, method.student_taps), (teacher, method.teacher_taps))
    ]
    index = torch.arange(len(image)) % 8
    batch = Batch(image, labels[index], index)
    found = []
    for logits in (passes[1].logits, torch.empty(0)):
        torch.manual_seed(2)
        same = copy.deepcopy(method)  # memories change
        found.append(same(passes[0], Outputs(logits, passes[1].features), batch, torch.ones(())))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_the_methods_that_read_features_alone():
    assert {"fitnet", "crd", "at", "reviewkd"} <= {*FEATURES}
    assert not {"kd", "dkd", "binary_kd", "simkd", "lskd", "mlkd"} & {*FEATURES}
    assert reads_logits("fitnet+kd")
    assert not reads_logits("fitnet+at")


@pytest.mark.parametrize("teacher", [headless, Several])
def test_a_distiller_takes_it(teacher):
    student = mdistiller.create_model("resnet8", 4)
    taps = {"teacher_taps": ("vit.blocks.2",), "student_taps": ("stage3",)} if teacher is Several else {}
    distiller = mdistiller.Distiller(student, teacher(), "fitnet", **taps)
    out = distiller(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert out.losses["fitnet"] > 0
    assert out.loss == out.losses["task"] + out.losses["fitnet"]


def test_a_distiller_refuses_it_for_a_method_of_logits():
    with pytest.raises(ConfigError, match=r"method 'kd' reads the teacher's logits.*crd, .*fitnet"):
        mdistiller.Distiller(mdistiller.create_model("resnet8", 48), headless(), "kd")


@pytest.mark.parametrize("teacher", [headless, Several])
@pytest.mark.parametrize("method", ["fitnet", "at+fitnet", "dkd"])
def test_distill_takes_it_for_features_and_refuses_it_for_logits(tmp_path, folder, teacher, method):
    student = mdistiller.create_model("resnet8", 2)
    fields = {}
    if teacher is Several:
        taps = {"teacher_taps": ("vit.blocks.2",), "student_taps": ("stage3",)}
        names = method.split("+")
        fields = {"method": dict.fromkeys(names, taps) if len(names) > 1 else taps}

    def run():
        chosen = {"name": method, **fields.get("method", {})} if method != "dkd" else method
        return mdistiller.distill(student, teacher(), data(folder), chosen, out=tmp_path / "run", **SETTINGS)

    if method == "dkd":
        with pytest.raises(ConfigError, match=r"no logits of the data's 2 classes.*features alone"):
            run()
        return
    diagnostics = run().metrics[-2]["diagnostics"]["test"]
    assert "p_t" in diagnostics
    assert "teacher_p_t" not in diagnostics


def test_the_command_takes_weights_without_a_classifier_and_with_another_one(tmp_path, folder, capsys):
    flags = ["--data.root", str(folder), "--data.image-size", "32", "--data.workers", "0"]
    flags += ["--epochs", "1", "--max-steps", "2", "--batch-size", "8", "--device", "cpu", "--no-diagnostics"]
    options = [word for pair in VIT.items() for word in map(str, pair)]
    for count in (0, 7):
        file = tmp_path / f"{count}.safetensors"
        save_file(timm.create_model("vit_tiny_patch16_224", num_classes=count, **VIT).state_dict(), file)
        words = ["--teacher", "timm/vit_tiny_patch16_224", "--teacher.options", *options]
        words += ["--teacher.checkpoint", str(file), *flags, "--precision", "float32"]
        out = tmp_path / f"run{count}"
        weight = ["--method.weight", "1"]
        assert command(["train", "folder.fitnet.resnet8", *words, *weight, "--out", str(out)]) == 0
        assert (out / "student.safetensors").is_file()
        assert command(["train", "folder.kd.resnet8", *words, "--out", str(tmp_path / "kd")]) == 1
        assert "features alone" in capsys.readouterr().err


def test_pretrained_weights_of_other_classes_serve_methods_of_features(tmp_path, folder, monkeypatch):
    """timm's default weights of 1,000 classes, as far as the task can see them."""
    original = timm.create_model

    def create(name, pretrained=False, **options):
        model = original(name, **options)
        model.pretrained_cfg["num_classes"] = 1000
        return model

    monkeypatch.setattr(timm, "create_model", create)
    teacher = {"name": "timm/vit_tiny_patch16_224", "options": {**VIT, "pretrained": True}, "image_size": 32}
    settings = {**SETTINGS, "out": tmp_path / "run"}
    run = mdistiller.distill("resnet8", teacher, data(folder), {"name": "fitnet", "weight": 1.0}, **settings)
    assert run.summary["step"] == 2
    with pytest.raises(ConfigError, match=r"pretrained on 1000 classes.*features alone"):
        mdistiller.distill("resnet8", teacher, data(folder), "kd", **settings)


@pytest.mark.parametrize("teacher", [headless, Several])
def test_the_cache_holds_features_of_a_teacher_without_logits(tmp_path, folder, teacher):
    tap = "pooled" if teacher is headless else "vit.head"
    settings = {**SETTINGS, "teacher_cache": tmp_path / "cache", "teacher_cache_taps": (tap,)}
    settings["augment"] = {"crop": "padded", "padding": 1}
    method = {"name": "crd", "teacher_taps": (tap,), "student_taps": ("pooled",)}
    states, files = [], []
    for name in ("1", "2"):
        run = mdistiller.distill("resnet8", teacher(), data(folder), method, out=tmp_path / name, **settings)
        states.append(run.student.state_dict())
        files.append({file.name: file.read_bytes() for file in (tmp_path / "cache").glob("*.rows")})
    assert all(value.equal(states[1][key]) for key, value in states[0].items())
    assert len(files[0]) == (2 if teacher is headless else 1)  # timm's embedding is stored, too
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "name", ["resnet8", "timm/resnet10t", "torchvision/mobilenet_v3_small", "torchvision/vit_b_32"]
)
def test_a_model_without_a_classifier_returns_its_input(tmp_path, name):
    options = {"image_size": 32} if "vit" in name else {}
    torch.manual_seed(0)
    whole = mdistiller.create_model(name, 5, **options).eval()
    bare = mdistiller.create_model(name, 0, **options).eval()
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    load_weights(bare, tmp_path / "whole.safetensors")
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = mdistiller.tap(whole, ["pooled"])(image).features["pooled"]
        found, features = mdistiller.tap(bare, ["pooled"])(image)
    assert found.ndim == 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(features["pooled"], expected)

    save_file(bare.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="has no classifier"):
        load_weights(whole, tmp_path / "bare.safetensors")
    with pytest.warns(UserWarning, match="no classifier: a new one"):
        load_weights(whole, tmp_path / "bare.safetensors", new_classifier=True)


def test_a_model_that_nobody_knows_stays_whole():
    from mdistiller.models.registry import given_models

    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Linear(6, 4))
    with given_models({"given/Sequential": module}):
        model = mdistiller.create_model("given/Sequential", 0)
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, 4)
