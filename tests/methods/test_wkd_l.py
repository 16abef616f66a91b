"""WKD-L against Sinkhorn's iterations in numpy and a linear program, and its distances between classes."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.special import log_softmax, softmax
from small_runs import make_trainer, step_on
from torch import nn

import mdistiller
from mdistiller.data import load_data
from mdistiller.errors import ConfigError
from mdistiller.functional import wkd_l_loss
from mdistiller.methods import get_method
from mdistiller.methods.wkd import cka_distances, cosine_distances
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()

DATA = DataInfo((3, 32, 32))


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    s, t = (torch.tensor(3 * rng.normal(size=(5, 6))) for _ in range(2))
    distances = np.abs(rng.normal(size=(6, 6)))
    distances = torch.tensor((distances + distances.T) * (1 - np.eye(6)))
    return s, t, torch.tensor([0, 5, 2, 2, 1]), distances


def sinkhorn(s, t, target, distances, temperature, eta, iterations):
    """The transport costs of samples, each with its own matrix without the target."""
    costs = []
    for b, y in enumerate(target):
        p, q = (softmax(np.delete(z[b], y) / temperature) for z in (s, t))
        c = np.delete(np.delete(distances, y, 0), y, 1) + 1e-8
        kernel, u = np.exp(-c / eta), np.full(len(p), 1 / len(p))
        for _ in range(iterations):
            v = q / (kernel.T @ u + 1e-8)
            u = p / (kernel @ v + 1e-8)
        costs.append(sum(c[i, j] * u[i] * kernel[i, j] * v[j] for i in range(len(p)) for j in range(len(q))))
    return np.array(costs)


def target_loss(s, t, target):
    p, log_q, rows = softmax(t, 1), log_softmax(s, 1), np.arange(len(target))
    return -(p[rows, target] * log_q[rows, target]).mean()


@pytest.mark.parametrize(
    ("temperature", "eta", "iterations"), [(8.0, 0.05, 10), (1.0, 0.3, 1), (2.0, 1.0, 40)]
)
def test_value_is_the_formula_s(inputs, temperature, eta, iterations):
    arrays = [x.numpy() for x in inputs]
    transport = sinkhorn(*arrays, temperature, eta, iterations).mean()
    expected = target_loss(*arrays[:3]) + 7 * transport
    settings = {"temperature": temperature, "regularization": eta, "iterations": iterations}
    assert wkd_l_loss(*inputs, weight=7.0, **settings).item() == pytest.approx(expected, rel=1e-12)


def test_little_entropy_and_many_iterations_give_the_optimal_transport(inputs):
    *logits, distances = inputs
    distances = distances / 10  # as between classes of real images
    s, t, target = (x.numpy() for x in logits)
    optima = []
    for b, y in enumerate(target):
        p, q = (softmax(np.delete(z[b], y) / 4) for z in (s, t))
        c = np.delete(np.delete(distances.numpy(), y, 0), y, 1)
        rows, columns = np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))
        found = linprog(c.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([p, q]))
        optima.append(found.fun)
    settings = {"temperature": 4.0, "regularization": 0.01, "iterations": 1000}
    whole, alone = (wkd_l_loss(*logits, distances, weight=w, **settings) for w in (1.0, 0.0))
    assert (whole - alone).item() == pytest.approx(np.mean(optima), rel=4e-3)


def test_negative_distances_count_as_zero(inputs):
    s, t, target, distances = inputs
    changed = torch.where(distances < 1, -1.0, distances)
    torch.testing.assert_close(
        wkd_l_loss(s, t, target, changed), wkd_l_loss(s, t, target, changed.clamp(min=0)), rtol=0, atol=0
    )


def test_soft_labels(inputs):
    s, t, target, distances = inputs
    rows = torch.eye(6, dtype=torch.float64)
    hard = wkd_l_loss(s, t, target, distances)
    torch.testing.assert_close(wkd_l_loss(s, t, rows[target], distances), hard)
    # The target's part is an expectation, the transport leaves out the likeliest class.
    mixed = 0.7 * rows[target] + 0.3 * rows[(target + 1) % 6]
    other = wkd_l_loss(s, t, (target + 1) % 6, distances, weight=0.0)
    expected = hard + 0.3 * (other - wkd_l_loss(s, t, target, distances, weight=0.0))
    torch.testing.assert_close(wkd_l_loss(s, t, mixed, distances), expected)


def test_cosine_distances():
    rows = np.random.default_rng(0).normal(size=(4, 7))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    torch.testing.assert_close(cosine_distances(torch.tensor(rows)), torch.tensor(1 - unit @ unit.T))


def test_cka_distances():
    x = np.random.default_rng(0).normal(size=(3, 8, 5))
    center = np.eye(8) - 1 / 8
    grams = [center @ f @ f.T @ center for f in x]
    expected = [[1 - np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)) for b in grams] for a in grams]
    torch.testing.assert_close(cka_distances(torch.tensor(x)), torch.tensor(expected))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    same = cka_distances(torch.tensor(np.stack([x[0], 3 * x[0] @ rotation + 2])))
    assert same.abs().max() < 1e-12


def test_cka_distances_of_more_images_than_channels():
    """Each position of a map is an image: the products are then D × D."""
    x = np.random.default_rng(1).normal(size=(3, 9, 4))
    centered = x - x.mean(1, keepdims=True)
    grams = [(rows @ rows.T).ravel() for rows in centered]
    expected = [[1 - a @ b / np.sqrt(a @ a * (b @ b)) for b in grams] for a in grams]
    torch.testing.assert_close(cka_distances(torch.tensor(x)), torch.tensor(expected))


@pytest.mark.parametrize(("distances", "tap"), [("cka-maps", "stage3"), ("cka-logits", None)])
def test_distances_over_the_training_images(tmp_path, distances, tap):
    """A run computes them once, from the teacher's features of all images without augmentation."""
    data = {"kind": "digits", "train_limit": 60, "test_limit": 10}
    changes = {"data": data, "max_steps": 2, "batch_size": 20, "diagnostics": False, "device": "cpu"}
    teacher = mdistiller.create_model("resnet8", num_classes=10).eval()
    config = mdistiller.get_recipe("digits.wkd_l.resnet8_resnet8").replace(
        method={"distances": distances}, **changes
    )
    splits = load_data(config.data)
    trainer = make_trainer(config, splits, mdistiller.create_model("resnet8", num_classes=10), teacher)
    assert not trainer.distiller.method.distances.any()
    step_on(trainer, next(iter(trainer.source.loader.epoch(0))))
    got = trainer.distiller.method.distances
    mean, std = (torch.tensor(x)[:, None, None] for x in (splits.mean, splits.std))
    images = (splits.train.images.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        logits, features = mdistiller.tap(copy.deepcopy(teacher), [tap] if tap else [])(images)
    values = (features[tap] if tap else logits).double().numpy()
    rows = [values[splits.train.labels == c] for c in range(10)]
    rows = [x[: min(map(len, rows))] for x in rows]
    if tap:
        rows = [x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in rows]
    centered = [x - x.mean(0) for x in rows]
    norms = [np.linalg.norm(x.T @ x) for x in centered]
    expected = [
        [1 - np.linalg.norm(a.T @ b) ** 2 / (n * m) for b, m in zip(centered, norms, strict=True)]
        for a, n in zip(centered, norms, strict=True)
    ]
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)
    # A resumed run has them from its state.
    again = make_trainer(config, splits, mdistiller.create_model("resnet8", num_classes=10), teacher)
    again.distiller.method.load_state_dict({"distances": got + 1})
    step_on(again, next(iter(again.source.loader.epoch(0))))
    assert torch.equal(again.distiller.method.distances, got + 1)


def test_distances_over_the_training_images_need_them():
    models = [mdistiller.create_model("resnet8", num_classes=10) for _ in range(2)]
    with pytest.raises(ConfigError, match=r"'cka-maps', which reads the training images .* a file, or None"):
        mdistiller.Distiller(*models, "wkd_l", distances="cka-maps")


def losses(teacher, s, t, target, progress, **settings):
    method = get_method("wkd_l")
    made = method(method.Config(**settings), create_model("resnet8", 6), teacher, DATA)
    return made, made(Outputs(s, {}), Outputs(t, {}), Batch(s, target, target), torch.tensor(progress))


def test_the_cost_follows_the_teacher_s_classifier(inputs):
    s, t, target, _ = inputs
    teacher = create_model("resnet8", 6).double()
    with torch.no_grad():
        teacher.fc.weight.normal_()
    w = teacher.fc.weight.detach().double().numpy()
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    for sharpness in (0.0, 2.0):
        distances = 1 - w @ w.T
        cost = 1 - np.exp(-sharpness * distances) if sharpness else distances
        transport = sinkhorn(s.numpy(), t.numpy(), target.numpy(), cost.clip(0), 8.0, 0.05, 10).mean()
        method, got = losses(teacher, s, t, target, 0.0, sharpness=sharpness, weight=3.0)
        assert got["wkd_transport"].item() == pytest.approx(3 * transport, rel=1e-9)
        assert got["wkd_target"].item() == pytest.approx(target_loss(s.numpy(), t.numpy(), target.numpy()))
        assert not method.state_dict()


def test_distances_from_a_file(inputs, tmp_path):
    s, t, target, distances = inputs
    file = tmp_path / "distances.pth"
    torch.save(distances, file)
    teacher = nn.Conv2d(3, 8, 3)  # no linear classifier
    method, got = losses(teacher, s, t, target, 0.0, distances=file, sharpness=0.0)
    expected = sinkhorn(*(x.numpy() for x in inputs), 8.0, 0.05, 10).mean()
    assert got["wkd_transport"].item() == pytest.approx(600 * expected, rel=1e-5)
    assert not method.state_dict()
    torch.save({"a": distances}, file)
    with pytest.raises(ConfigError, match=r"method.distances: got .*: it has dict"):
        losses(teacher, s, t, target, 0.0, distances=file)
    torch.save(distances[:5], file)
    with pytest.raises(ConfigError, match=r"a tensor \[C, C\] of torch.save: it has \[5, 6\]"):
        losses(teacher, s, t, target, 0.0, distances=file)
    with pytest.raises(ConfigError, match="no such file"):
        losses(teacher, s, t, target, 0.0, distances=tmp_path / "nothing")
    file.write_text("no tensor")
    with pytest.raises(ConfigError, match="allowed is a tensor"):
        losses(teacher, s, t, target, 0.0, distances=file)
    with pytest.raises(ConfigError, match="no linear classifier"):
        losses(teacher, s, t, target, 0.0)


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)])
def test_the_transport_fades_along_a_cosine(inputs, progress, weight):
    s, t, target, _ = inputs
    teacher = create_model("resnet8", 6)
    method, got = losses(teacher, s, t, target, progress, decay_start=0.5)
    _, whole = losses(teacher, s, t, target, 1.0, decay_start=1.0)
    assert method.needs.progress
    torch.testing.assert_close(got["wkd_transport"], weight * whole["wkd_transport"])
    torch.testing.assert_close(got["wkd_target"], whole["wkd_target"])


def test_bad_input(inputs):
    s, t, target, distances = inputs
    with pytest.raises(ConfigError, match=r"must have the shape \[6, 6\]; got \[6, 5\]"):
        wkd_l_loss(s, t, target, distances[:, :5])
    with pytest.raises(ConfigError, match=r"target must be class ids int64 \[5\]"):
        wkd_l_loss(s, t, target[:3], distances)
