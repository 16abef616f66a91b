"""Training on images of several classes: loss, metrics against scikit-learn, runs, predictions, exports."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, log_loss
from small_runs import folder_settings, run_card

import mdistiller
from mdistiller.cli.eval import EvalCommand
from mdistiller.cli.predict import PredictCommand
from mdistiller.data import DataConfig
from mdistiller.data.dataset import IMAGENET_MEAN, IMAGENET_STD
from mdistiller.data.given import read_given
from mdistiller.deploy.export import export_student
from mdistiller.errors import CheckpointError, ConfigError, TrainingError
from mdistiller.losses import binary_cross_entropy
from mdistiller.models import ModelConfig, create_model
from mdistiller.recipes import get_recipe, list_recipes
from mdistiller.report import write_report
from mdistiller.runs.checkpoint import save_student
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.multilabel import evaluate as evaluation
from mdistiller.tasks.multilabel.config import MultiLabelConfig
from mdistiller.tasks.multilabel.evaluate import average_precision, evaluate, metrics_of
from mdistiller.training.distributed import World
from mdistiller.training.launch import train
from mdistiller.training.task import get_task
from mdistiller.types import Batch, Outputs

MEAN, STD = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
CPU = World(torch.device("cpu"))


def labels_and_logits(seed, unknown=False):
    rng = np.random.default_rng(seed)
    labels = (rng.random((53, 5)) < [0.5, 0.2, 0.05, 0.9, 0.0]).astype(np.float32)  # none of the last class
    labels[0, 2] = 1
    logits = (rng.normal(size=labels.shape) + 2 * labels - 1).astype(np.float32).round(1)  # with ties
    if unknown:
        labels[rng.random(labels.shape) < 0.3] = -100
        labels[0] = [1, 1, 1, 1, -100]
    return labels, logits


# Loss and metrics


@pytest.mark.parametrize("unknown", [False, True])
def test_the_task_loss_as_scikit_learn(unknown):
    labels, logits = labels_and_logits(0, unknown)
    known = labels != -100
    found = binary_cross_entropy(Outputs(torch.tensor(logits), {}), Batch(None, torch.tensor(labels), None))
    assert found.item() == pytest.approx(log_loss(labels[known], expit(logits[known])), rel=1e-5)


def test_no_label_of_a_batch_is_known():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = binary_cross_entropy(Outputs(logits, {}), Batch(None, torch.full((3, 4), -100.0), None))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_as_scikit_learn(seed, unknown):
    labels, logits = labels_and_logits(seed, unknown)
    found = metrics_of(torch.tensor(logits), torch.tensor(labels))
    precisions, scores = [], []
    for z, y in zip(logits.T[:4], labels.T[:4], strict=True):
        z, y = z[y != -100], y[y != -100]
        precisions.append(100 * average_precision_score(y, z))
        scores.append(100 * f1_score(y, z > 0))
    assert found["by_class"][:4] == pytest.approx(precisions)
    assert np.isnan(found["by_class"][4])
    assert found["mAP"] == pytest.approx(np.mean(precisions))
    assert found["macro_f1"] == pytest.approx(np.mean(scores))


def test_no_positive_image_at_all():
    assert np.isnan(average_precision(np.zeros(0), np.zeros(0, dtype=bool)))
    found = metrics_of(torch.randn(4, 2), torch.zeros(4, 2))
    assert (found["mAP"], found["macro_f1"]) == (0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_have_no_precision(bad):
    logits, labels = torch.tensor([[bad], [2.0], [1.0]]), torch.tensor([[1.0], [1.0], [0.0]])
    with pytest.raises(TrainingError, match="1 of 3 scores are not finite"):
        metrics_of(logits, labels)


def test_processes_collect_all_images(monkeypatch):
    class Two(World):
        def gather(self, value):
            return [value, [[], []], [[x + 1 for x in part] for part in value]]

    class Known(torch.nn.Module):
        def forward(self, image):
            return image

    batches = [Batch(torch.full((2, 3), float(i)), torch.zeros(2, 3), None) for i in range(2)]
    monkeypatch.setattr(evaluation, "metrics_of", lambda *pair: pair)
    logits, labels = evaluate(Known(), batches, Two(torch.device("cpu")))
    assert logits[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert labels[:, 0].tolist() == [0] * 4 + [1] * 4


# Runs


@pytest.mark.parametrize("form", ["integers", "booleans", "items"])
def test_labels_from_python(tmp_path, form):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    labels = rng.integers(0, 2, (12, 3))
    labels[0] = (1, 0, 1)
    split = (images, labels.astype(bool) if form == "booleans" else labels)
    if form == "items":
        split = [(Image.fromarray(image), label.tolist()) for image, label in zip(*split, strict=True)]
    data = {"train": split, "test": split, "classes": ["red", "green", "blue"]}
    quick = {"epochs": 1, "batch_size": 4, "device": "cpu", "out": tmp_path / "run"}
    run = mdistiller.distill("resnet8", None, data, "none", task="multilabel", **quick)
    model = mdistiller.load_student(run.folder)
    name, reader = read_given(split, split, data["classes"])
    found = reader(DataConfig(kind=name))
    assert found.classes == ("red", "green", "blue")
    np.testing.assert_array_equal(found.train.labels.numpy(), labels)
    whole = model((torch.tensor(images).permute(0, 3, 1, 2) / 255 - MEAN) / STD).detach().numpy()
    precisions = [100 * average_precision_score(labels[:, i], whole[:, i]) for i in range(3)]
    assert run.metrics[-1]["last"]["mAP"] == pytest.approx(np.mean(precisions), abs=1e-3)
    with pytest.raises(ConfigError, match="task='multilabel'"):
        mdistiller.distill("resnet8", None, data, "none", **quick | {"out": tmp_path / "other"})
    student = mdistiller.distill(
        "resnet8", run, data, task="multilabel", **quick | {"out": tmp_path / "student"}
    )
    assert student.config.method.method_name == "binary_kd"


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([[0, 2]] * 4, [[0, 1]] * 4, r"float32 \[4, 2\]; allowed: .* 1, 0 or -100"),
        ([[0, 1]] * 4, [[0, 1, 1]] * 4, r"labels of train are \[4, 2\], of test \[4, 3\]"),
        ([[0, 1]] * 3 + [[1]], [[0, 1]] * 4, r"label of train\[3\] is \[1\]"),
        ([[0, 1]] * 4, [0, 1, 1, 0], r"of test \[4\]"),
        ([0, 1, 1, 0], [0, 1, 1, 0], "its images have one class each"),
    ],
)
def test_labels_that_do_not_fit_are_errors(tmp_path, train, test, message):
    image = torch.zeros(3, 8, 8)
    data = tuple([(image, label) for label in labels] for labels in (train, test))
    with pytest.raises(ConfigError, match=message):
        mdistiller.distill("resnet8", None, data, "none", task="multilabel", out=tmp_path / "run")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images whose red, green and blue halves say which of three classes they have."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 16)):
        with (root / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "labels"))
            for i in range(count):
                has = rng.random(3) < 0.5
                pixels = rng.integers(0, 60, (16, 16, 3)) + 180 * has
                Image.fromarray(pixels.astype(np.uint8)).save(root / f"{split}{i}.png")
                names = [name for name, own in zip(("red", "green", "blue"), has, strict=True) if own]
                writer.writerow((f"{split}{i}.png", ";".join(names)))
    return root


def config(root, **changes):
    return MultiLabelConfig(**(folder_settings(root) | changes))


def test_a_teacher_s_outputs_follow_the_names(root, tmp_path):
    task, file = get_task("multilabel"), tmp_path / "t.safetensors"
    model = create_model("resnet8", 3).eval()
    about = {"model": "resnet8", "options": {}, "image_size": 16}
    given = config(root, method="binary_kd", teacher={"name": "resnet8", "checkpoint": file})
    data = task.load_data(given)
    assert tuple(data.classes) == ("blue", "green", "red")
    save_student(file, model, about | {"classes": ["red", "green", "blue"]})
    with pytest.warns(UserWarning, match="its classes were put into the data's order"):
        teacher = task.build_teacher(given, data).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(teacher(images), model(images)[:, [2, 1, 0]])
    save_student(file, model, about | {"classes": ["red", "green", "black"]})
    with pytest.raises(CheckpointError, match="only in the data: blue; only in the model: black"):
        task.build_teacher(given, data)


@pytest.fixture(scope="module")
def teacher(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train(config(root, epochs=12, eval_every=12, out=out))
    return out


def test_a_teacher_learns(teacher, capsys):
    lines = read_metrics(teacher)
    last = lines[-1]["last"]
    assert last.keys() == {"mAP", "macro_f1", "loss", "epoch"}
    assert last["mAP"] > 80
    assert lines[-2]["classes"].keys() == {"red", "green", "blue"}
    EvalCommand.parse([str(teacher), "--json"]).execute()
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("mAP", "macro_f1", "loss")} == {
        name: last[name] for name in ("mAP", "macro_f1", "loss")
    }
    EvalCommand.parse([str(teacher)]).execute()
    assert f"mAP {last['mAP']:.2f} %  macro F1 {last['macro_f1']:.2f} %" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the loss fitnet is:UserWarning")
@pytest.mark.parametrize("method", ["binary_kd", "fitnet", "binary_kd+fitnet"])
@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_students(root, teacher, tmp_path, method, mixup):
    c = config(root, teacher=ModelConfig(name="resnet8", checkpoint=teacher), out=tmp_path / "run")
    c = c.replace(method=method, augment={"mixup_alpha": mixup})
    train(c)
    lines = [line for line in read_metrics(c.out) if line["kind"] == "train"]
    names = {name for name in lines[0] if name in ("binary_kd", "fitnet", "task")}
    assert names == {"task", *method.split("+")}
    assert all(np.isfinite([line[name] for name in names]).all() for line in lines)


@pytest.mark.parametrize("method", ["binary_kd", "fitnet"])
def test_several_teachers_with_a_loss_each(root, teacher, tmp_path, method):
    given = ModelConfig(name="resnet8", checkpoint=teacher)
    c = config(root, teacher=given, more_teachers=(given,), ensemble="losses", max_steps=2)
    train(c.replace(method=method, out=tmp_path / "two"))
    train(c.replace(method=method, more_teachers=(), ensemble="logits", out=tmp_path / "one"))
    first = [
        next(line for line in read_metrics(tmp_path / run) if line["kind"] == "train")
        for run in ("two", "one")
    ]
    assert first[0]["task"] == first[1]["task"]
    if method == "binary_kd":
        assert first[0][method] == pytest.approx(first[1][method])


def test_images_without_labels(root, teacher, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for path in root.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "unlabeled").mkdir()
    for i in range(9):
        (folder / "unlabeled" / f"{i}.png").symlink_to(root / f"val{i}.png")
    c = config(folder, teacher=ModelConfig(name="resnet8", checkpoint=teacher), method="binary_kd")
    train(c.replace(out=tmp_path / "run"))
    steps = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert len(steps) == 12  # of 41 images
    with pytest.raises(ConfigError, match="augment: mixup and CutMix blend labels, and some are unknown"):
        train(c.replace(out=tmp_path / "mixed", augment={"mixup_alpha": 1.0}))


def test_predictions_and_exports(root, teacher, tmp_path, capsys):
    PredictCommand.parse([str(teacher), str(root / "val0.png"), "--json"]).execute()
    found = json.loads(capsys.readouterr().out)
    from mdistiller.deploy.predict import load_predictor

    predictor = load_predictor(teacher, "cpu")
    image = predictor.prepare(Image.open(root / "val0.png").convert("RGB"))
    scores = dict(zip(predictor.card.classes, predictor(image[None])[0].sigmoid().tolist(), strict=True))
    (given,) = found if isinstance(found, list) else [found]
    assert {each["name"]: each["probability"] for each in given["classes"]} == pytest.approx(scores)
    _, card = export_student(teacher, "torch-export", out=tmp_path / "export")
    assert card.task == "multilabel"
    again = mdistiller.load_export(tmp_path / "export")
    torch.testing.assert_close(again(image[None]), predictor(image[None]), atol=1e-4, rtol=1e-4)
    assert "whose sigmoid is the probability" in (tmp_path / "export" / "README.md").read_text()
    _, printed, path = run_card(tmp_path / "export", tmp_path, (40, 40))
    (scores,) = again.predict([path])
    assert printed == f"{[n for n in card.classes if dict(scores)[n] > 0.5]}\n"


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "dkd"},
            "method 'dkd' is for images of one class each; allowed for several are 'binary_kd'",
        ),
        ({"method": "binary_kd+kd"}, r"method 'binary_kd\+kd' is for images of one class each"),
        ({"label_smoothing": 0.1}, r"label_smoothing: got 0.1; allowed in task multilabel is 0.0"),
        ({"class_weights": "balanced"}, "class_weights: got 'balanced'"),
        ({"diagnostics": True}, "diagnostics: got True"),
    ],
)
def test_settings_for_one_class(root, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(root).replace(**changes)


def test_labels_of_the_other_kind(root, tmp_path):
    with pytest.raises(ConfigError, match="data: its images have one class each"):
        train(config(root, data=DataConfig(kind="digits"), out=tmp_path / "a"))
    values = config(root).model_dump() | {"task": "classification", "out": tmp_path / "b"}
    values["data"]["multi_label"] = True
    with pytest.raises(ConfigError, match=r"several classes each; allowed are the recipes multilabel.METHOD"):
        train(ClassificationConfig.model_validate(values))


def test_recipes():
    recipe = get_recipe("multilabel.binary_kd.resnet14_resnet8")
    assert (recipe.task, recipe.method.method_name, recipe.data.multi_label) == (
        "multilabel",
        "binary_kd",
        True,
    )
    assert get_recipe("multilabel.student.resnet8").teacher is None
    with pytest.raises(ConfigError, match="'dkd' is for images of one class each"):
        get_recipe("multilabel.dkd.resnet14_resnet8")
    methods = {name.split(".")[1] for name in list_recipes() if name.startswith("multilabel.")}
    assert {"binary_kd", "fitnet", "teacher", "student"} <= methods
    assert not methods & {"kd", "dkd"}


def test_fine_tuning():
    recipe = get_recipe("multilabel.finetune.resnet8")
    other = get_recipe("folder.finetune.resnet8")
    assert (recipe.optim, recipe.augment, recipe.epochs) == (other.optim, other.augment, other.epochs)
    assert (recipe.task, recipe.data.multi_label) == ("multilabel", True)


def test_own_loop():
    student, teacher = create_model("resnet8", 3), create_model("resnet14", 3)
    image, target = torch.randn(4, 3, 16, 16), torch.tensor([[1, 1, 0], [0, 0, 0], [-100, 1, 1], [1, 1, 1.0]])
    distiller = mdistiller.Distiller(student, teacher, "binary_kd", multi_label=True, input_shape=(3, 16, 16))
    out = distiller(image, target)
    known = target != -100
    expected = log_loss(target[known].numpy(), expit(out.logits.detach()[known].numpy()))
    assert out.losses["task"].item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match="multi_label: method 'dkd' is for images of one class each"):
        mdistiller.Distiller(student, teacher, "dkd", multi_label=True)
    with pytest.raises(ConfigError, match=r"Several classes at once need Distiller\(..., multi_label=True\)"):
        mdistiller.Distiller(student, teacher, "kd")(image, target.clamp(min=0))


def test_the_report_has_average_precisions_of_classes(root, teacher, tmp_path):
    taught = ModelConfig(name="resnet8", checkpoint=teacher)
    train(config(root, out=tmp_path / "alone"))
    train(config(root, teacher=taught, out=tmp_path / "taught", seed=1).replace(method="binary_kd"))
    folders = [tmp_path / "alone", tmp_path / "taught"]
    text = write_report(folders, tmp_path / "page.html", images=100, device="cpu").read_text(encoding="utf-8")
    table = re.search(r'id="class-gains">.*?<tbody>(.*?)</tbody>', text, re.S)[1]
    cells = [re.findall(r'data-value="([^"]*)"', line) for line in table.split("<tr>")[1:]]
    lines = {name: float(gain) for name, gain, _ in cells}
    expected = {}
    for folder in folders:
        found = read_metrics(folder)[-2]["classes"]
        for name, value in found.items():
            expected[name] = value - expected.get(name, 0)
    assert lines.keys() == expected.keys()
    for name, value in expected.items():
        assert lines[name] == pytest.approx(value, abs=1e-2)
    assert "Average precision of each class" in text
    for absent in ("features", "missing"):
        assert f'<section aria-labelledby="{absent}">' not in text
    assert '<section aria-labelledby="correlation">' in text
