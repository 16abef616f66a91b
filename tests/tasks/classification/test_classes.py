"""Class weights, images without a class, and metrics by class, against numpy and scikit-learn."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score
from small_runs import folder_settings

from mdistiller.cli.eval import EvalCommand
from mdistiller.data import AugmentConfig, DataConfig
from mdistiller.errors import ConfigError
from mdistiller.losses import cross_entropy
from mdistiller.methods import DKDConfig, KDConfig
from mdistiller.models import ModelConfig
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.tasks.classification.task import ClassificationTask
from mdistiller.training.distributed import World
from mdistiller.training.launch import train
from mdistiller.types import Batch, Outputs

CPU = World(torch.device("cpu"))
NO_CLASS = torch.tensor([-100])
CLASSES = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


# The task loss

LABEL = torch.tensor([0, 3, -100, 1, 1, -100, 4])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0], dtype=torch.float64)


def soft(label, smoothing=0.0):
    rows = np.zeros((len(label), CLASSES))
    for row, value in zip(rows, label.tolist(), strict=True):
        if value >= 0:
            row[value] = 1
            row[:] = (1 - smoothing) * row + smoothing / CLASSES
    return rows


def loss_of(loss, logits, label):
    return loss(Outputs(logits, {}), Batch(logits, label, label))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("as_rows", [False, True])
def test_cross_entropy_by_its_formula(smoothing, weights, as_rows):
    logits = random(7, CLASSES)
    label = torch.tensor(soft(LABEL)) if as_rows else LABEL
    found = loss_of(cross_entropy(smoothing, weights=weights, has_unlabeled=True), logits, label)
    w = np.ones(CLASSES) if weights is None else weights.numpy()
    expected = -(w * soft(LABEL, smoothing) * log_softmax(logits.numpy(), 1)).sum() / 5
    assert found.item() == pytest.approx(expected)


def test_blends_count_by_their_parts_with_a_class():
    logits = random(2, CLASSES)
    rows = torch.tensor([[0.3, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0.0]], dtype=torch.float64)
    found = loss_of(cross_entropy(has_unlabeled=True), logits, rows)
    expected = -(rows.numpy() * log_softmax(logits.numpy(), 1)).sum() / 1.3
    assert found.item() == pytest.approx(expected)


def test_no_image_of_a_batch_has_a_class():
    logits = random(3, CLASSES).requires_grad_()
    loss = loss_of(cross_entropy(has_unlabeled=True), logits, NO_CLASS.expand(3))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_a_class_for_each_image_nothing_changes(smoothing):
    logits, label = random(7, CLASSES).float(), LABEL.clamp(min=0)
    plain = loss_of(cross_entropy(smoothing), logits, label)
    assert torch.equal(plain, torch.nn.functional.cross_entropy(logits, label, label_smoothing=smoothing))
    torch.testing.assert_close(loss_of(cross_entropy(smoothing, has_unlabeled=True), logits, label), plain)


def test_weights_follow_the_module():
    loss = cross_entropy(weights=WEIGHTS)
    assert dict(loss.named_buffers()).keys() == {"weights"}
    assert not loss.state_dict()


# Metrics


class Known(torch.nn.Module):
    def forward(self, image):
        return image[:, :, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_metrics_as_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 3, 4], size=61, p=[0.6, 0.3, 0.05, 0.05])  # none of class 2
    logits = rng.normal(size=(61, CLASSES)) + 1.5 * np.eye(CLASSES)[label]
    image, target = torch.tensor(logits, dtype=torch.float32)[:, :, None, None], torch.tensor(label)
    batches = [Batch(image[i : i + 7], target[i : i + 7], target[i : i + 7]) for i in range(0, 61, 7)]
    found = evaluate(Known(), batches, CPU)
    predicted, present = logits.argmax(1), np.unique(label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a predicted class without an image
        assert found["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(label, predicted))
    macro = f1_score(label, predicted, labels=present, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(100 * macro)
    recall = recall_score(label, predicted, labels=present, average=None)
    assert np.array(found["by_class"])[present] == pytest.approx(100 * recall)
    assert np.isnan(found["by_class"][2])
    assert found["top1"] == pytest.approx(100 * (predicted == label).mean())


def test_a_process_without_a_batch_has_zeros():
    class Other(World):
        def sum(self, tensor):
            return tensor + torch.tensor([1, 2, 3.0, 2, 1, 0, 1, 1, 0, 2], dtype=torch.float64)

    found = evaluate(Known(), [], Other(torch.device("cpu")), num_classes=2)
    assert found["by_class"] == [100, 0]
    assert found["macro_f1"] == pytest.approx((0 + 0) / 2 + 100 * 2 * 1 / (1 + 0) / 2)


# Runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images whose color is their class, 12 and 4 of two classes, and 10 without one."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    parts = [("train/red", 12), ("train/blue", 4), ("val/red", 6), ("val/blue", 2), ("unlabeled", 10)]
    for folder, count in parts:
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
            red = folder.endswith("red") or (folder == "unlabeled" and i % 2)
            pixels[:, :, 0 if red else 2] += 150
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return root


def config(root, **changes):
    return ClassificationConfig(**(folder_settings(root) | changes))


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    summary = train(config(photos, class_weights="balanced", epochs=6, out=out)).summary
    assert summary["last"]["balanced_accuracy"] > 60
    return out


def test_a_run_without_a_teacher_leaves_them_out(photos, teacher):
    lines = read_metrics(teacher)
    assert ClassificationTask().load_data(config(photos)).train.labels.bincount().tolist() == [4, 12]
    evaluation = next(line for line in lines if line["kind"] == "eval")
    assert evaluation["classes"].keys() == {"blue", "red"}
    mean = np.mean(list(evaluation["classes"].values()))
    assert evaluation["balanced_accuracy"] == pytest.approx(mean)
    summary = next(line for line in lines if line["kind"] == "summary")
    assert summary["last"].keys() == {"top1", "top5", "loss", "balanced_accuracy", "macro_f1", "epoch"}


def test_eval_shows_the_classes(teacher, capsys):
    EvalCommand.parse([str(teacher), "--json"]).execute()
    found = json.loads(capsys.readouterr().out)
    last = next(line for line in read_metrics(teacher) if line["kind"] == "summary")["last"]
    assert {name: found[name] for name in last if name != "epoch"} == {
        name: value for name, value in last.items() if name != "epoch"
    }
    assert found["classes"].keys() == {"blue", "red"}
    EvalCommand.parse([str(teacher)]).execute()
    text = capsys.readouterr().out
    assert f"mean over the classes: accuracy {found['balanced_accuracy']:.2f} %" in text
    assert "lowest accuracies: " in text


def run(config):
    train(config)
    return read_metrics(config.out)


def test_many_classes_are_not_listed(tmp_path):
    data = DataConfig(kind="synthetic", synthetic_classes=21, synthetic_samples=42, image_size=8)
    lines = run(config(tmp_path, data=data, out=tmp_path / "run", epochs=1, diagnostics=False))
    assert "classes" not in next(line for line in lines if line["kind"] == "eval")


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_dkd_with_some_images_without_a_class(photos, teacher, tmp_path, mix):
    c = config(
        photos,
        teacher=ModelConfig(name="resnet8", checkpoint=teacher),
        method=DKDConfig(warmup=0),
        augment=AugmentConfig(crop="padded", padding=1, mixup_alpha=mix),
        out=tmp_path / "run",
    )
    assert (ClassificationTask().load_data(c).train.labels == -100).sum() == 10
    lines = run(c)
    losses = [line["dkd"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 8  # of 26 images
    assert all(np.isfinite(losses))
    assert all(0 <= line["top1"] <= 100 for line in lines if line["kind"] == "train")
    diagnostics = next(line for line in lines if line["kind"] == "eval")["diagnostics"]
    assert all(np.isfinite(list(diagnostics["train"].values())))


def test_distillation_alone(photos, teacher, tmp_path):
    """No training image has a class, and the task loss has no weight."""
    root = tmp_path / "set"
    root.mkdir()
    for name in ("unlabeled", "val"):
        (root / name).symlink_to(photos / name)
    c = config(
        root,
        teacher=ModelConfig(name="resnet8", checkpoint=teacher),
        method=KDConfig(task_weight=0.0, weight=1.0),
        epochs=30,
        eval_every=15,
        out=tmp_path / "run",
    )
    lines = run(c)
    assert {line["task"] for line in lines if line["kind"] == "train"} == {0.0}
    ends = [line["diagnostics"]["test"]["agreement"] for line in lines if line["kind"] == "eval"]
    assert ends[-1] > 85
    assert "train" not in next(line for line in lines if line["kind"] == "eval")["diagnostics"]
    weighted = config(
        root,
        teacher=c.teacher,
        method=KDConfig(weight=1.0),
        epochs=30,
        eval_every=15,
        out=tmp_path / "weighted",
    )
    assert run(weighted)[-1]["last"] == lines[-1]["last"]  # no label, so no task loss
    with pytest.raises(ConfigError, match="'dkd' reads the labels, and no training image has a class"):
        train(config(root, teacher=c.teacher, method=DKDConfig(), out=tmp_path / "dkd"))
