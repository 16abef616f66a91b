"""ITRD: both losses by loops, and where samples or dimensions are alike."""

import numpy as np
import pytest
import torch

from mdistiller.errors import ConfigError
from mdistiller.functional import itrd_correlation_loss, itrd_mutual_information_loss
from mdistiller.methods import ITRD, ITRDConfig
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()

LOSSES = [itrd_correlation_loss, itrd_mutual_information_loss]
DATA = DataInfo((3, 32, 32))


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.01, 1.5])
def test_correlation_is_the_formula_s(inputs, alpha):
    s, t = (x.numpy() for x in inputs)
    total = 0.0
    for d in range(4):
        c = np.mean((s[:, d] - s[:, d].mean()) * (t[:, d] - t[:, d].mean()))
        c /= s[:, d].std(ddof=1) * t[:, d].std(ddof=1)
        total += abs(c - 1) ** (2 * alpha)
    assert itrd_correlation_loss(*inputs, alpha=alpha).item() == pytest.approx(np.log2(total), abs=1e-7)


def test_mutual_information_is_the_formula_s(inputs):
    s, t = inputs[0].numpy(), inputs[1].numpy()[:, :3]  # the widths may differ
    total = 0.0
    for i in range(6):
        for j in range(6):
            gs = s[i] @ s[j] / (np.linalg.norm(s[i]) * np.linalg.norm(s[j])) / 6
            gt = t[i] @ t[j] / (np.linalg.norm(t[i]) * np.linalg.norm(t[j]))
            total += gs**2 - (gs * gt) ** 2
    got = itrd_mutual_information_loss(inputs[0], inputs[1][:, :3])
    assert got.item() == pytest.approx(total, rel=1e-9)


def test_correlation_of_equal_embeddings_and_under_affine_maps(inputs):
    # c = (B − 1) / B in each of the four dimensions.
    expected = np.log2(4 * (1 / 6) ** 2.02)
    assert itrd_correlation_loss(inputs[0], inputs[0]).item() == pytest.approx(expected, abs=1e-6)
    moved = 3 * inputs[0] - 7
    assert itrd_correlation_loss(moved, inputs[0]).item() == pytest.approx(expected, abs=1e-6)


def test_mutual_information_is_zero_where_the_teacher_confirms_all():
    same = torch.ones(5, 3)
    assert abs(itrd_mutual_information_loss(torch.randn(5, 4), same).item()) < 1e-6
    assert itrd_mutual_information_loss(same, torch.eye(5)).item() == pytest.approx(1 - 1 / 5, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_finite_for_dead_dimensions_and_large_values(loss, dtype, scale):
    torch.manual_seed(0)
    s, t = (scale * torch.randn(2, 6, 4)).to(dtype)
    s[:, 0], t[:, 1], s[2], t[3] = 0, 0, 0, 0
    for a, b in [(s, t), (s, s), (torch.zeros_like(s), t)]:
        a = a.clone().requires_grad_()
        value = loss(a, b)
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, a)[0]).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(inputs, loss):
    s, t = (x.float() for x in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(s, t)
    assert torch.equal(got, loss(s, t))


def test_bad_input(inputs):
    s, t = inputs
    for loss in LOSSES:
        with pytest.raises(ConfigError, match=r"one B ≥ 2; got \[6, 4\] and \[5, 4\]"):
            loss(s, t[:5])
        with pytest.raises(ConfigError, match=r"got \[1, 4\] and \[1, 4\]"):
            loss(s[:1], t[:1])
    with pytest.raises(ConfigError, match=r"one D; got \[6, 4\] and \[6, 3\]"):
        itrd_correlation_loss(s, t[:, :3])
    with pytest.raises(ConfigError, match="alpha must be positive; got 0"):
        itrd_correlation_loss(s, t, alpha=0)
    model = create_model("resnet8", 10)
    two = ITRDConfig(student_taps=("stage1", "stage2"), teacher_taps=("stage1", "stage2"))
    with pytest.raises(ConfigError, match="reads one feature of each"):
        ITRD(two, model, model, DATA)


@pytest.mark.parametrize("teacher_dim", [64, 256])
def test_only_unequal_widths_share_the_embedding(teacher_dim):
    torch.manual_seed(0)
    teacher = create_model("resnet20" if teacher_dim == 64 else "resnet8x4", 10)
    method = ITRD(ITRDConfig(), create_model("resnet8", 10), teacher, DATA)
    assert method.embed.weight.shape == (teacher_dim, 64)
    s, t = torch.randn(4, 64), torch.randn(4, teacher_dim)
    batch = Batch(torch.zeros(4, 3, 32, 32), torch.randint(0, 10, (4,)), torch.arange(4))
    student, teacher = (Outputs(torch.randn(4, 10), {"pooled": x}) for x in (s, t))
    losses = method(student, teacher, batch, torch.tensor(1.0))
    embedded = s @ method.embed.weight.T + method.embed.bias
    torch.testing.assert_close(losses["itrd_correlation"], 2 * itrd_correlation_loss(embedded, t))
    information = itrd_mutual_information_loss(s if teacher_dim == 64 else embedded, t)
    torch.testing.assert_close(losses["itrd_mutual_information"], information)
