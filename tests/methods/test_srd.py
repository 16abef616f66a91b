"""SRD against standardized embeddings by numpy, and its taps on transformers."""

import numpy as np
import pytest
import torch
from torch import nn

from mdistiller.errors import ConfigError
from mdistiller.functional import srd_loss
from mdistiller.methods import get_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()

DATA = DataInfo((3, 32, 32))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(size=(6, 5))), torch.tensor(2 + 3 * rng.normal(size=(6, 5)))


def formula(s, t, eps=1e-4):
    s, t = ((x - x.mean(0)) / np.sqrt(x.var(0) + eps) for x in (s, t))
    return np.log(np.sum((s - t) ** 4) + 1e-5)


def test_value_is_the_formula_s(embeddings):
    arrays = [x.numpy() for x in embeddings]
    assert srd_loss(*embeddings).item() == pytest.approx(formula(*arrays), rel=1e-12)
    assert srd_loss(*embeddings, eps=0.1).item() == pytest.approx(formula(*arrays, eps=0.1), rel=1e-12)
    s, t = embeddings
    torch.testing.assert_close(srd_loss(s, 7 * t + 2, eps=0.0), srd_loss(s, t, eps=0.0))
    norms = [nn.BatchNorm1d(5, eps=1e-4, affine=False, dtype=torch.float64) for _ in range(2)]
    difference = norms[0](s) - norms[1](t)
    torch.testing.assert_close(srd_loss(s, t), (difference.pow(4).sum() + 1e-5).log())


def test_equal_embeddings_and_one_sample_are_finite(embeddings):
    s, t = (x.float() for x in embeddings)
    for student, teacher in ((t, t), (s[:1], t[:1]), (torch.zeros(6, 5), t)):
        student = student.clone().requires_grad_()
        value = srd_loss(student, teacher)
        (grad,) = torch.autograd.grad(value, student)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()


def test_a_linear_projection_meets_the_pooled_features():
    method_class = get_method("srd")
    method = method_class(
        method_class.Config(weight=3.0), create_model("resnet8"), create_model("vgg8"), DATA
    )
    (projector,) = method.projectors
    assert (method.student_taps, method.teacher_taps) == (("pooled",), ("pooled",))
    assert sum(p.numel() for p in method.parameters()) == 64 * 512 + 512
    s, t = torch.randn(6, 64), torch.randn(6, 512)
    outputs = (Outputs(torch.zeros(6, 10), {"pooled": x}) for x in (s, t))
    batch = Batch(s, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    got = method(*outputs, batch, torch.tensor(1.0))["srd"].item()
    projected = (s @ projector.weight.T + projector.bias).detach().numpy()
    assert got == pytest.approx(3 * formula(projected, t.numpy()), rel=1e-4)


@pytest.mark.parametrize("name", ["srd", "vkd"])
def test_a_transformer_is_read_after_its_last_block_as_the_mean_of_its_patches(name):
    method_class = get_method(name)
    student = create_model("timm/vit_tiny_patch16_224", 10, **VIT)
    method = method_class(method_class.Config(), student, create_model("resnet20", 10), DATA)
    assert method.student_taps == ("stage4",)
    assert method.teacher_taps == ("pooled",)
    tokens = torch.randn(6, 17, 48)  # a class token before 4 x 4 patches
    t = Outputs(torch.zeros(6, 10), {"pooled": torch.randn(6, 64)})
    batch = Batch(tokens, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    changed = tokens.clone()
    changed[:, 0] += 5
    changed[:, 1:] = changed[:, 1:].flip(1)
    losses = [
        method(Outputs(torch.zeros(6, 10), {"stage4": x}), t, batch, torch.tensor(1.0))[name]
        for x in (tokens, changed, 2 * tokens + torch.randn(48))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    assert abs(losses[0] - losses[2]) > 1e-3 or name == "srd"


def test_bad_input(embeddings):
    with pytest.raises(ConfigError, match=r"one shape \[B, D\]; got \[6, 5\] and \[6, 4\]"):
        srd_loss(embeddings[0], embeddings[1][:, :4])
