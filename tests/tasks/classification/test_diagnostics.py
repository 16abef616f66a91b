"""What an evaluation says of student and teacher, against numpy and scikit-learn."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score

import mdistiller
from mdistiller.config import SELF
from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.data.loader import PlainBatches
from mdistiller.methods import DKDConfig
from mdistiller.models import ModelConfig
from mdistiller.runs.folder import read_metrics
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.diagnostics import Diagnostics
from mdistiller.tasks.classification.evaluate import ClassificationEvaluator, evaluate
from mdistiller.training.distributed import World
from mdistiller.training.launch import train

CPU = World(torch.device("cpu"))
OF_MODEL = ("p_t", "gap", "top1", "ece")


def evaluator(teacher, **changes):
    config = ClassificationConfig(
        data=DataConfig(kind="synthetic", synthetic_samples=60, synthetic_classes=4, image_size=16),
        augment=AugmentConfig(padding=2),
        student=ModelConfig(name="resnet8"),
        device="cpu",
        eval_batch_size=7,  # no divisor of the test images
        **changes,
    )
    splits = load_data(config.data)
    return ClassificationEvaluator(config, splits, evaluate, teacher, CPU), splits


def model(seed, name="resnet8"):
    torch.manual_seed(seed)
    made = mdistiller.create_model(name, 4).eval()
    with torch.no_grad():
        made.fc.weight.mul_(8)  # confident enough to fill several bins
    return made


def logits_on(model, images, splits):
    x = images.images.permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(splits.mean)[:, None, None]) / torch.tensor(splits.std)[:, None, None]
    with torch.no_grad():
        return model(x).double().numpy()


def numpy_figures(z, y):
    p = np.exp(log_softmax(z, axis=1))
    n = np.arange(len(y))
    others = z.copy()
    others[n, y] = -np.inf
    confidence, hit = p.max(1), p.argmax(1) == y
    ece = 0.0
    for low in np.arange(15) / 15:  # Guo et al., equation 3
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            ece += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return {
        "p_t": p[n, y].mean(),
        "gap": (z[n, y] - others.max(1)).mean(),
        "top1": 100 * accuracy_score(y, p.argmax(1)),
        "ece": 100 * ece,
    }


def numpy_parts(s, t, y):
    """TCKD and NCKD at temperature 4, by their definition."""
    p, q = (np.exp(log_softmax(z / 4, axis=1)) for z in (t, s))
    tckd, nckd = [], []
    for a, b, c in zip(p, q, y, strict=True):
        tckd.append(a[c] * np.log(a[c] / b[c]) + (1 - a[c]) * np.log((1 - a[c]) / (1 - b[c])))
        a, b = np.delete(a, c) / (1 - a[c]), np.delete(b, c) / (1 - b[c])
        nckd.append((a * np.log(a / b)).sum())
    return 16 * np.mean(tckd), 16 * np.mean(nckd)


def test_figures_are_the_definitions():
    student, teacher = model(0), model(1, "resnet14")
    measure, splits = evaluator(teacher)
    found = measure(student, True)["diagnostics"]
    assert found.keys() == {"test", "train"}
    for name, images in (("test", splits.test), ("train", splits.train)):
        y = images.labels.numpy()
        s, t = logits_on(student, images, splits), logits_on(teacher, images, splits)
        expected = numpy_figures(s, y)
        expected |= {f"teacher_{key}": value for key, value in numpy_figures(t, y).items()}
        expected["agreement"] = 100 * (s.argmax(1) == t.argmax(1)).mean()
        expected["tckd"], expected["nckd"] = numpy_parts(s, t, y)
        assert found[name] == pytest.approx(expected, rel=2e-4, abs=1e-4)


def test_the_teacher_is_asked_once():
    asked = []

    class Counting(torch.nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return x.mean((2, 3)).repeat(1, 2)[:, :4]

    measure, splits = evaluator(Counting())
    first = measure(model(0), True)["diagnostics"]["test"]
    second = measure(model(2), True)["diagnostics"]["test"]
    assert sum(asked) == len(splits.test) + len(splits.train)
    assert first["teacher_p_t"] == second["teacher_p_t"]
    assert first["tckd"] != second["tckd"]


def test_without_a_teacher_there_are_the_student_s_alone():
    measure, splits = evaluator(None)
    found = measure(model(0), True)["diagnostics"]
    y = splits.test.labels.numpy()
    assert found["test"] == pytest.approx(
        numpy_figures(logits_on(model(0), splits.test, splits), y), rel=2e-4, abs=1e-4
    )


def test_at_most_a_thousand_training_images_from_all_over():
    config = DataConfig(kind="synthetic", synthetic_samples=2500, synthetic_classes=4, image_size=8)
    splits = load_data(config)
    plain = partial(PlainBatches, splits=splits, batch_size=100, device="cpu")
    many = Diagnostics(None, splits, plain, evaluate, CPU)
    labels = torch.cat([batch.label for batch in many.train])
    expected = splits.train.labels[torch.linspace(0, 2499, 1000).long()]
    assert torch.equal(labels, expected)


def test_lines_of_a_run_have_them_and_weights_don_t_depend_on_them(tmp_path):
    teacher = tmp_path / "teacher"
    base = {
        "data": DataConfig(kind="synthetic", synthetic_samples=48, synthetic_classes=4, image_size=16),
        "augment": AugmentConfig(padding=2),
        "epochs": 2,
        "batch_size": 16,
        "device": "cpu",
    }
    train(ClassificationConfig(student=ModelConfig(name="resnet8"), out=teacher, **base))
    base["teacher"] = ModelConfig(name="resnet8", checkpoint=teacher)
    base |= {"method": DKDConfig(), "student": ModelConfig(name="resnet8")}
    told, silent = tmp_path / "told", tmp_path / "silent"
    train(ClassificationConfig(**base, out=told))
    train(ClassificationConfig(**base, out=silent, diagnostics=False))
    lines = [line for line in read_metrics(told) if line["kind"] == "eval"]
    told_top1 = [line["diagnostics"]["test"]["top1"] for line in lines]
    assert told_top1 == pytest.approx([line["top1"] for line in lines])
    assert all("diagnostics" not in line for line in read_metrics(silent))
    weights = [(folder / "student.safetensors").read_bytes() for folder in (told, silent)]
    assert weights[0] == weights[1]


def test_a_teacher_that_changes_is_left_out(tmp_path):
    """The student's own average: what it said an epoch ago says nothing."""
    config = ClassificationConfig(
        data=DataConfig(kind="synthetic", synthetic_samples=32, synthetic_classes=4, image_size=16),
        augment=AugmentConfig(padding=2),
        student=ModelConfig(name="resnet8"),
        teacher=ModelConfig(name=SELF),
        ema=0.9,
        method=DKDConfig(),
        epochs=1,
        batch_size=16,
        device="cpu",
        out=tmp_path / "run",
    )
    train(config)
    (line,) = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert line["diagnostics"]["test"].keys() == set(OF_MODEL)
