"""RKD against its definition by loops, at its limits, and as a method."""

import numpy as np
import pytest
import torch

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import rkd_loss
from mdistiller.methods import RKDConfig

CONTRACT = {"zero at equal"}


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 4)), 2 * rng.normal(size=(5, 7))


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def distances(x):
    d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
    return d / np.mean([d[i, j] for i in range(len(x)) for j in range(len(x)) if i != j])


def cosine(x, i, j, k):
    if i in (j, k):
        return 0.0
    a, b = x[j] - x[i], x[k] - x[i]
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def numpy_parts(s, t):
    n = len(s)
    ds, dt = distances(s), distances(t)
    distance = sum(huber(ds[i, j] - dt[i, j]) for i in range(n) for j in range(n)) / n**2
    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    return distance, sum(huber(cosine(s, *c) - cosine(t, *c)) for c in triples) / n**3


@pytest.mark.parametrize(("distance_weight", "angle_weight"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_value_is_the_formula_s(embeddings, distance_weight, angle_weight):
    distance, angle = numpy_parts(*embeddings)
    weights = {"distance_weight": distance_weight, "angle_weight": angle_weight}
    got = rkd_loss(*map(torch.tensor, embeddings), **weights).item()
    assert got == pytest.approx(distance_weight * distance + angle_weight * angle, rel=1e-9)


def test_default_weights(embeddings):
    distance, angle = numpy_parts(*embeddings)
    got = rkd_loss(*map(torch.tensor, embeddings)).item()
    assert got == pytest.approx(25 * distance + 50 * angle, rel=1e-9)


def test_zero_for_similar_figures(embeddings):
    t = torch.tensor(embeddings[1])
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    assert rkd_loss(t, t).item() == 0
    assert rkd_loss(3 * t @ turn + 1, t).item() < 1e-20


def test_close_samples_keep_their_digits():
    # At distance 1e-2 between vectors of norm 1e3, float32 has nothing left of ‖a‖² + ‖b‖² − 2ab.
    offset = torch.zeros(3, 4)
    offset[:, 0] = 1000
    s = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]]) / 128
    assert rkd_loss(s + offset, s).item() < 1e-10


def test_a_single_sample_has_no_relations():
    s = torch.randn(1, 4, requires_grad=True)
    loss = rkd_loss(s, torch.randn(1, 3))
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.item() == 0
    assert grad.abs().sum() == 0


def test_bad_input():
    with pytest.raises(ConfigError, match=r"must be \[B, D\]; got \[4, 5\] and \[4, 6, 2\]"):
        rkd_loss(torch.randn(4, 5), torch.randn(4, 6, 2))
    with pytest.raises(ConfigError, match=r"student \[4, 5\], teacher \[3, 6\]"):
        rkd_loss(torch.randn(4, 5), torch.randn(3, 6))


def test_method_compares_what_the_classifiers_get():
    student, teacher = (mdistiller.create_model(name, num_classes=10) for name in ("resnet8", "vgg8"))
    config = RKDConfig(weight=0.5, distance_weight=2.0, angle_weight=3.0)
    distiller = mdistiller.Distiller(student, teacher, config).eval()
    image, label = torch.randn(4, 3, 32, 32), torch.arange(4)
    got = distiller(image, label).losses["rkd"]
    assert list(distiller.method.parameters()) == []
    s, t = (mdistiller.tap(m.eval(), ["pooled"])(image).features["pooled"] for m in (student, teacher))
    expected = 0.5 * rkd_loss(s, t, distance_weight=2.0, angle_weight=3.0).item()
    assert got.item() == pytest.approx(expected, rel=1e-5)
