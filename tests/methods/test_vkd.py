"""VkD against its formula by numpy, and the orthogonality of its projection."""

import copy

import numpy as np
import pytest
import torch

from mdistiller.errors import ConfigError
from mdistiller.functional import vkd_loss
from mdistiller.methods import get_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()

DATA = DataInfo((3, 32, 32))


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    return torch.tensor(2 * rng.normal(size=(6, 5))), torch.tensor(2 + 3 * rng.normal(size=(6, 5)))


def formula(s, t):
    target = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, keepdims=True) + 1e-5)
    x = np.abs(s - target)
    return np.where(x < 1, x**2 / 2, x - 0.5).mean()


def test_value_is_the_formula_s(embeddings):
    assert vkd_loss(*embeddings).item() == pytest.approx(formula(*(x.numpy() for x in embeddings)), rel=1e-12)
    t = embeddings[1]
    target = (t - t.mean(1, keepdim=True)) / (t.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert vkd_loss(target, 5 * t).item() == pytest.approx(0, abs=1e-9)


def build(student, teacher):
    torch.manual_seed(0)
    method = get_method("vkd")
    return method(method.Config(weight=3.0), create_model(student), create_model(teacher), DATA)


@pytest.mark.parametrize(
    ("student", "teacher"), [("resnet8", "vgg8"), ("vgg8", "resnet8"), ("resnet8", "resnet20")]
)
def test_the_projection_stays_orthogonal_while_it_learns(student, teacher):
    method = build(student, teacher)
    (projector,) = method.projectors
    (wide, narrow) = projector.weight.shape
    assert projector.bias is None
    before = projector.weight.detach().clone()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    s, t = torch.randn(8, narrow), torch.randn(8, wide)
    outputs = [Outputs(torch.zeros(8, 10), {"pooled": x}) for x in (s, t)]
    batch = Batch(s, torch.zeros(8, dtype=torch.int64), torch.arange(8))
    losses = []
    for _ in range(5):
        loss = method(*outputs, batch, torch.tensor(1.0))["vkd"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    w = projector.weight.detach()
    gram = w.T @ w if wide >= narrow else w @ w.T
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    assert not torch.allclose(w, before, atol=1e-4)
    assert losses[-1] < losses[0]
    if wide >= narrow:  # similarities between samples are the student's
        torch.testing.assert_close(projector(s) @ projector(s).T, s @ s.T, rtol=1e-4, atol=1e-4)
    expected = 3 * formula((s @ before.T).numpy(), t.numpy())
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_the_projection_goes_to_disk_and_is_copied():
    method = build("resnet8", "vgg8")
    other = build("resnet8", "vgg8")
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    assert not torch.equal(other.projectors[0].weight, method.projectors[0].weight)
    other.load_state_dict(copy.deepcopy(method).state_dict())
    assert torch.equal(other.projectors[0].weight, method.projectors[0].weight)


def test_bad_input(embeddings):
    with pytest.raises(ConfigError, match=r"one shape \[B, D\]; got \[6, 5\] and \[6, 4\]"):
        vkd_loss(embeddings[0], embeddings[1][:, :4])
