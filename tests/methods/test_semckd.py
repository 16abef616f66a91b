"""SemCKD: loss and attention by loops, batches that are not full, and which layers it reads."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import semckd_loss
from mdistiller.methods import SemCKD, SemCKDConfig
from mdistiller.models import create_model
from mdistiller.types import DataInfo

CONTRACT = set()

BATCH = 8


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    distances = torch.rand(5, 2, 3, dtype=torch.float64)
    return distances, torch.randn(5, 2, 3, dtype=torch.float64).softmax(2)


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    student, teacher = create_model("vgg8", 10), create_model("resnet8", 10)
    return SemCKD(SemCKDConfig(), student, teacher, DataInfo((3, 32, 32), None, BATCH)).eval()


@pytest.fixture
def features():
    torch.manual_seed(1)
    students = [torch.randn(BATCH, c, h, h) for c, h in [(128, 4), (256, 4), (512, 2), (512, 1)]]
    return students, [torch.randn(BATCH, c, h, h) for c, h in [(16, 8), (32, 4), (64, 2)]]


def test_value_is_the_formula_s(inputs):
    d, a = (x.numpy() for x in inputs)
    expected = sum(d[i] * a[i] for i in np.ndindex(d.shape)) / (5 * 2)
    assert semckd_loss(*inputs).item() == pytest.approx(expected, rel=1e-12)
    # The attention sums to one: equal distances are their own mean.
    assert semckd_loss(torch.full_like(inputs[0], 3.0), inputs[1]).item() == pytest.approx(3.0)


def embed(module, x):
    """A layer's query or key, in numpy."""
    w1, b1, w2, b2 = (p.detach().numpy() for p in module.parameters())
    x = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("size", [BATCH, 5])
def test_attention_is_the_formula_s_and_missing_samples_are_zeros(method, features, size):
    students, teachers = ([f[:size] for f in maps] for maps in features)
    sims = []
    for maps in (students, teachers):
        flat = [f.flatten(1).numpy() for f in maps]
        sims.append([np.pad(f @ f.T, ((0, 0), (0, BATCH - size))) for f in flat])
    queries = [embed(m, x) for m, x in zip(method.queries, sims[0], strict=True)]
    keys = [embed(m, x) for m, x in zip(method.keys, sims[1], strict=True)]
    got = method.attention(students, teachers).detach().numpy()
    assert got.shape == (size, 4, 3)
    for b in range(size):
        for i in range(4):
            energy = np.exp([queries[i][b] @ keys[j][b] for j in range(3)])
            np.testing.assert_allclose(got[b, i], energy / energy.sum(), rtol=1e-4)


def test_distances_are_between_maps_of_the_smaller_size(method, features):
    students, teachers = features
    got = method.distances(students, teachers)
    assert got.shape == (BATCH, 4, 3)
    # Student 4x4 under teacher 8x8, and student 4x4 over teacher 2x2.
    with torch.no_grad():
        small = (method.aligners[0][0](students[0]) - F.avg_pool2d(teachers[0], 2)).square().mean((1, 2, 3))
        large = (method.aligners[1][2](F.avg_pool2d(students[1], 2)) - teachers[2]).square().mean((1, 2, 3))
    torch.testing.assert_close(got[:, 0, 0], small)
    torch.testing.assert_close(got[:, 1, 2], large)


def test_finite_for_equal_samples_and_zeros(method):
    for value in (0.0, 1e4):
        students = [torch.full((3, c, 4, 4), value, requires_grad=True) for c in (128, 256, 512, 512)]
        attention = method.attention(students, [torch.full((3, c, 4, 4), value) for c in (16, 32, 64)])
        assert torch.isfinite(attention).all()
        gradients = torch.autograd.grad(attention.square().sum(), students)
        assert all(torch.isfinite(g).all() for g in gradients)


def test_layers_read(method):
    assert method.student_taps == ("stage1", "stage2", "stage3", "stage4")
    assert method.teacher_taps == ("stage1", "stage2", "stage3")
    shapes = [[tuple(a[i].weight.shape) for i in (0, 3, 6)] for a in method.aligners[2]]
    assert shapes[1] == [(64, 512, 1, 1), (64, 64, 3, 3), (32, 64, 1, 1)]
    # One stage a block is too many: at most five.
    blocks = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(12)))
    deep = nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    deep.tap_points = {f"stage{i + 1}": f"0.{i}" for i in range(12)}
    built = SemCKD(SemCKDConfig(), create_model("resnet8", 3), deep, DataInfo((3, 32, 32), None, 4))
    assert built.teacher_taps == ("stage3", "stage5", "stage8", "stage10", "stage12")


def test_distils_kd_too():
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", 10), create_model("resnet8x4", 10)
    distiller = mdistiller.Distiller(student, teacher, SemCKDConfig(kd_weight=0.5), batch_size=4)
    image = torch.randn(4, 3, 32, 32)
    losses = distiller(image, torch.randint(0, 10, (4,))).losses
    assert set(losses) == {"task", "kd", "semckd"}
    s, t = student(image).log_softmax(1), teacher.eval()(image)
    assert distiller.teacher is teacher
    expected = 0.5 * 16 * F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")
    torch.testing.assert_close(losses["kd"], expected)


def test_bad_input(inputs, method, features):
    with pytest.raises(ConfigError, match=r"one shape \[B, S, T\]; got \[5, 2, 3\] and \[5, 2, 2\]"):
        semckd_loss(inputs[0], inputs[1][..., :2])
    model = create_model("resnet8", 10)
    with pytest.raises(ConfigError, match=r"Distiller\(…, batch_size=64\)"):
        mdistiller.Distiller(model, create_model("resnet8", 10), "semckd")
    students, teachers = ([torch.cat([f, f]) for f in maps] for maps in features)
    with pytest.raises(ConfigError, match="batches of 8; got 16"):
        method.attention(students, teachers)
    config = SemCKDConfig(student_taps=("pooled",))
    with pytest.raises(ConfigError, match=r"reads maps \[B, C, H, W\]; 'pooled' is \[2, 64\]"):
        SemCKD(config, model, model, DataInfo((3, 32, 32), None, 4))


def test_sequences_are_refused():
    models = [nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)) for _ in range(2)]
    for model in models:
        model.tap_points = {"stage1": "0@sequence"}
    data = DataInfo(torch.zeros(2, 5, dtype=torch.int64), batch_size=2)
    with pytest.raises(ConfigError, match=r"compares maps .*; tap 'stage1' is a sequence"):
        SemCKD(SemCKDConfig(), *models, data)
