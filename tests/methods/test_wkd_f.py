"""WKD-F against means and deviations by loops in numpy."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from mdistiller.errors import ConfigError
from mdistiller.functional import wkd_f_loss
from mdistiller.methods import get_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()

DATA = DataInfo((3, 32, 32))


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(size=(3, 4, 7, 6))), torch.tensor(2 + rng.normal(size=(3, 4, 5, 5)))


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_value_is_the_formula_s(maps, grid):
    def moments(x, b, c, row, column):
        h, w = x.shape[2:]
        rows = slice(math.floor(row * h / grid), math.ceil((row + 1) * h / grid))
        columns = slice(math.floor(column * w / grid), math.ceil((column + 1) * w / grid))
        cell = x[b, c, rows, columns]
        return cell.mean(), np.sqrt(cell.var(ddof=1) + 1e-5)

    total = 0.0
    for b in range(3):
        for c in range(4):
            for row in range(grid):
                for column in range(grid):
                    pairs = zip(*(moments(x.numpy(), b, c, row, column) for x in maps), strict=True)
                    mean, deviation = ((s - t) ** 2 for s, t in pairs)
                    total += 3 * mean + deviation
    got = wkd_f_loss(*maps, mean_weight=3.0, grid=grid)
    assert got.item() == pytest.approx(total / (3 * grid**2), rel=1e-12)


def test_it_is_the_wasserstein_distance_between_diagonal_gaussians(maps):
    distance = 0.0
    for s, t in zip(*(x.flatten(2).numpy() for x in maps), strict=True):
        first, second = (np.diag(x.var(1, ddof=1)) for x in (s, t))
        cross = sqrtm(sqrtm(second) @ first @ sqrtm(second))
        distance += ((s.mean(1) - t.mean(1)) ** 2).sum() + np.trace(first + second - 2 * cross).real
    assert wkd_f_loss(*maps, mean_weight=1.0, eps=0.0).item() == pytest.approx(distance / 3, rel=1e-9)


def test_cells_of_one_position_and_constant_maps_have_gradients(maps):
    s, t = maps
    value = wkd_f_loss(s[:, :, :2, :2].requires_grad_(), t[:, :, :1, :1], mean_weight=1.0, grid=2)
    assert value.item() == pytest.approx(((s[:, :, :2, :2] - t[:, :, :1, :1]) ** 2).sum().item() / (3 * 4))
    constant = torch.zeros(2, 3, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(wkd_f_loss(constant, torch.randn(2, 3, 4, 4)), constant)
    assert torch.isfinite(grad).all()
    assert grad.any()


def build(**settings):
    method = get_method("wkd_f")
    return method(method.Config(**settings), create_model("resnet8"), create_model("vgg8"), DATA)


@pytest.mark.parametrize("bottleneck", [0, 16])
def test_the_last_stages_are_compared_behind_a_projector(bottleneck):
    torch.manual_seed(0)
    method = build(bottleneck=bottleneck, grid=2, weight=0.5, decay_start=0.5)
    (s,), (t,) = method.student_taps, method.teacher_taps
    student, teacher = torch.randn(4, 64, 8, 8), torch.randn(method.teacher_shapes[0]).repeat(2, 1, 1, 1)
    outputs = Outputs(torch.zeros(4, 10), {s: student}), Outputs(torch.zeros(4, 10), {t: teacher})
    batch = Batch(student, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    got = [method(*outputs, batch, torch.tensor(p))["wkd_f"].item() for p in (0.5, 0.75, 1.0)]
    projected = method.projectors[0](student)
    assert projected.shape[1] == teacher.shape[1]
    assert (projected >= 0).all()
    if bottleneck:
        assert projected.shape[2:] == student.shape[2:]
        assert sum(isinstance(m, torch.nn.Conv2d) for m in method.modules()) == 3
    whole = 0.5 * wkd_f_loss(projected, teacher, grid=2).item()
    assert got == pytest.approx([whole, whole / 2, 0.0], rel=1e-5, abs=1e-7)
    assert method.needs.progress
    assert not build(decay_start=1.0).needs.progress


def test_bad_input(maps):
    s, t = maps
    with pytest.raises(ConfigError, match=r"with one B and C; got \[3, 4, 7, 6\] and \[3, 3, 5, 5\]"):
        wkd_f_loss(s, t[:, :3])
    with pytest.raises(ConfigError, match="grid must be at least 1; got 0"):
        wkd_f_loss(s, t, grid=0)
