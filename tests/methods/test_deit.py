"""DeiT against the formula in numpy, and with students of timm that have a distillation token."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import deit_loss

CONTRACT = set()

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAME = "timm/deit_tiny_distilled_patch16_224"


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(3 * rng.normal(size=(6, 7))), torch.tensor(3 * rng.normal(size=(6, 7)))


def hard(s, t):
    return -np.mean([log_softmax(s[b])[np.argmax(t[b])] for b in range(len(s))])


def soft(s, t, temperature):
    p, q = softmax(t / temperature, axis=1), softmax(s / temperature, axis=1)
    return temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=1))


def test_values_are_the_formula_s(logits):
    s, t = (x.numpy() for x in logits)
    assert deit_loss(*logits).item() == pytest.approx(hard(s, t), rel=1e-12)
    for temperature in (1.0, 3.0):
        found = deit_loss(*logits, hard=False, temperature=temperature)
        assert found.item() == pytest.approx(soft(s, t, temperature), rel=1e-12)


@pytest.mark.parametrize("is_hard", [True, False])
def test_bad_input(is_hard):
    with pytest.raises(ConfigError, match=r"one shape \[B, C\].*\[4, 5\] and \[4, 6\]"):
        deit_loss(torch.randn(4, 5), torch.randn(4, 6), hard=is_hard)


# Students with a distillation token


@pytest.fixture
def student():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = mdistiller.create_model(NAME, 10, **SMALL).double()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head_dist.weight)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 9, 1, 7, 2])


class Teacher(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10] * 4


def heads(model, image):
    model = copy.deepcopy(model).train()
    model.set_distilled_training(True)
    with torch.no_grad():
        return [x.numpy() for x in model(image)]


@pytest.mark.parametrize(
    "settings", [{}, {"hard": False, "temperature": 2.0}, {"weight": 0.1, "task_weight": 0.9}]
)
def test_each_token_has_its_loss(student, batch, settings):
    image, label = batch
    own, distilled = heads(student, image)
    assert np.abs(own - distilled).max() > 0.1
    distiller = mdistiller.Distiller(student, Teacher(), "deit", label_smoothing=0.1, **settings)
    out = distiller.train()(image, label)
    log_p = log_softmax(own, axis=1)
    smooth = -np.mean(0.9 * log_p[np.arange(6), label] + 0.1 * log_p.mean(1))
    t = Teacher()(image).numpy()
    expected = soft(distilled, t, 2.0) if settings.get("hard") is False else hard(distilled, t)
    assert out.losses["task"].item() == pytest.approx(settings.get("task_weight", 0.5) * smooth, rel=1e-6)
    assert out.losses["deit"].item() == pytest.approx(settings.get("weight", 0.5) * expected, rel=1e-6)


def test_evaluation_averages_the_heads(student, batch):
    image, label = batch
    own, distilled = heads(student, image)
    distiller = mdistiller.Distiller(student, Teacher(), "deit").eval()
    loss, found = distiller.evaluate(image, label)
    average = (own + distilled) / 2
    np.testing.assert_allclose(found.detach().numpy(), average, atol=1e-12)
    expected = -np.mean(log_softmax(average, axis=1)[np.arange(6), label])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert distiller.student is student
    assert not student.distilled_training


def test_in_a_sum_the_class_token_still_learns_the_labels(student, batch):
    image, label = batch
    own, distilled = heads(student, image)
    out = mdistiller.Distiller(student, Teacher(), "deit+kd")(image, label)
    task = -np.mean(log_softmax(own, axis=1)[np.arange(6), label])
    assert out.losses["task"].item() == pytest.approx(task, rel=1e-6)
    kd = soft((own + distilled) / 2, Teacher()(image).numpy(), 4.0)
    assert out.losses["kd"].item() == pytest.approx(0.9 * kd, rel=1e-6)
    with pytest.raises(ConfigError, match="wraps methods that read only logits; 'deit' taps features"):
        mdistiller.Distiller(student, Teacher(), "lskd-deit")


def test_several_teachers_share_both_tokens(student, batch):
    image, label = batch
    own, distilled = heads(student, image)
    out = mdistiller.Distiller(student, [Teacher(), Teacher()], "deit")(image, label)
    task = -np.mean(log_softmax(own, axis=1)[np.arange(6), label])
    assert out.losses["task"].item() == pytest.approx(0.5 * task, rel=1e-6)
    assert out.losses["deit"].item() == pytest.approx(hard(distilled, Teacher()(image).numpy()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [("timm/levit_128s", {}), ("timm/repvit_m1", {}), ("timm/iformer_m_distilled", {"pretrained": False})],
)
def test_other_models_with_two_heads_have_their_taps_found(name, options):
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = mdistiller.create_model(name, 10, **options)
    method = mdistiller.Distiller(model, Teacher(), "deit").method
    assert [path.rpartition(".")[2] for path in method.student_taps] == ["head", "head_dist"]
    assert method.needs.task_tap == method.student_taps[0]


def test_a_student_without_the_token_learns_both_with_its_logits(batch):
    image, label = batch
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10)).double()
    out = mdistiller.Distiller(model, Teacher(), "deit")(image, label)
    s = model(image).detach().numpy()
    assert out.losses["deit"].item() == pytest.approx(0.5 * hard(s, Teacher()(image).numpy()), rel=1e-6)
    task = -np.mean(log_softmax(s, axis=1)[np.arange(6), label])
    assert out.losses["task"].item() == pytest.approx(0.5 * task, rel=1e-6)


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("deit")
    data = {"kind": "digits", "train_limit": 60, "test_limit": 40}
    small = {"epochs": 1, "batch_size": 20, "device": "cpu", "layout": "contiguous"}
    teacher = mdistiller.distill("resnet8", None, data, "none", out=folder / "teacher", **small)
    student = {"name": NAME, "options": SMALL}
    return mdistiller.distill(student, teacher.folder, data, "deit", out=folder / "student", **small)


def test_a_run_has_the_recipe_and_both_losses(run):
    assert run.config.recipe == f"digits.deit.resnet8_{NAME}"
    assert run.config.method.hard
    folder = mdistiller.get_recipe(f"folder.deit.resnet8_{NAME}")
    assert (folder.method.method_name, folder.student.name) == ("deit", NAME)


@pytest.mark.parametrize("format", ["safetensors", "torch-export", "onnx"])
def test_an_exported_student_averages_the_heads(run, format, tmp_path):
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    exported = mdistiller.load_export(run.export(format, out=tmp_path / "out", device="cpu", evaluate=False))
    torch.manual_seed(2)
    image = torch.randn(3, 3, 16, 16)
    own, distilled = heads(run.student, image)
    found = exported(image)
    np.testing.assert_allclose(found.numpy(), (own + distilled) / 2, atol=1e-5)


def test_both_classifiers_start_anew_for_other_classes(run, tmp_path):
    data = {"kind": "synthetic", "synthetic_samples": 40, "synthetic_classes": 4, "image_size": 16}
    small = {"epochs": 1, "batch_size": 20, "device": "cpu", "out": tmp_path / "run", "probe_epochs": 0}
    student = {"name": NAME, "options": SMALL, "checkpoint": run.folder}
    with pytest.warns(UserWarning, match="classifier"):
        again = mdistiller.distill(student, None, data, "none", **small)
    assert again.student.head.out_features == again.student.head_dist.out_features == 4
