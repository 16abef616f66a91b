"""Logit standardization against z-scores by numpy, around each kind of base."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.errors import ConfigError
from mdistiller.functional import crld_loss, kd_loss, mlkd_loss
from mdistiller.methods import get_method, method_config
from mdistiller.methods.compose import build_method
from mdistiller.methods.lskd import standardize
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = {"zero at equal"}


def z_score(logits):
    z = logits.numpy()
    return torch.tensor((z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7))


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 5 * torch.randn(2, 8, 6, dtype=torch.float64) + 3


def losses(name, student_logits, teacher_logits, label, **settings):
    config = method_config(name, **settings)
    student, teacher = create_model("resnet8", num_classes=6), create_model("resnet8", num_classes=6)
    method = build_method(config, student, teacher, DataInfo((3, 8, 8)))
    batch = Batch(torch.empty(0), label, torch.empty(0))
    return method(Outputs(student_logits, {}), Outputs(teacher_logits, {}), batch, torch.tensor(1.0))


def test_rows_get_mean_zero_and_deviation_one(logits):
    z = standardize(logits[0])
    torch.testing.assert_close(z, z_score(logits[0]), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(z.std(1), 1, rtol=1e-6)


def test_the_scale_of_logits_does_not_matter(logits):
    label = torch.arange(8) % 6
    one = losses("lskd", logits[0], logits[1], label)["kd"]
    other = losses("lskd", 7 * logits[0] - 2, 0.3 * logits[1] + 5, label)["kd"]
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert abs(losses("lskd", 3 * logits[1], logits[1], label)["kd"]) < 1e-9


def test_the_base_reads_z_scores(logits):
    s, t = logits
    label = torch.arange(8) % 6
    got = losses("lskd", s, t, label)
    assert got["kd"].item() == pytest.approx(9 * kd_loss(z_score(s), z_score(t), temperature=2.0).item())


def test_correlations_and_confidences_see_the_logits(logits):
    s, t = logits
    label = torch.arange(8) % 6
    base = method_config("mlkd", task_weight=0.0, num_views=1, temperatures=(2.0,), weight=1.0)
    got = losses("lskd-mlkd", s, t, label, base=base)
    plain = mlkd_loss(s, t, temperatures=(2.0,)) - kd_loss(s, t, temperature=2.0)
    assert (got["batch"] + got["class"]).item() == pytest.approx(plain.item())
    wanted = kd_loss(z_score(s), z_score(t), temperature=2.0).item()
    assert got["instance"].item() == pytest.approx(wanted, rel=1e-6)

    got = losses("lskd-crld", s, t, label)
    certain = t.softmax(1).amax(1)
    assert (certain[:4] >= 0.9).any()
    assert not (z_score(t).softmax(1).amax(1) >= 0.9).any()
    assert got["within"] > 0
    wanted = crld_loss(z_score(s), z_score(t), weak_threshold=0.0, strong_threshold=0.0, cross_weight=0.0)
    assert got["within"] < wanted  # only some images are confident


def test_the_authors_settings_are_the_bases_defaults():
    def base(name):
        return method_config(name).base

    assert (base("lskd").temperature, base("lskd").weight) == (2.0, 9.0)
    assert (base("lskd-dkd").temperature, base("lskd-dkd").alpha, base("lskd-dkd").beta) == (2.0, 9.0, 72.0)
    assert base("lskd-mlkd").temperatures == (2.0, 3.0, 5.0, 2.0, 6.0)
    assert base("lskd-ctkd").base.weight == 9.0
    assert [method_config(f"lskd-{n}").task_weight for n in ("kd", "dkd", "mlkd")] == [0.1, 1.0, 0.2]
    assert method_config("lskd-mlkd").base.num_views == 2


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_rows_give_zeros_and_no_gradient(value):
    x = torch.full((2, 5), value)
    x[1] = torch.arange(5.0)
    x.requires_grad_()
    z = standardize(x)
    assert (z[0] == 0).all()
    (grad,) = torch.autograd.grad((z * torch.randn(2, 5)).sum(), x)
    assert torch.isfinite(grad).all()
    assert (grad[0] == 0).all()
    assert (grad[1] != 0).any()


def test_gradient_precision_and_compilation(logits):
    x = logits[0].requires_grad_()
    assert gradcheck(standardize, (x,))
    half = torch.tensor([[1e4, -1e4, 3.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(standardize(half), standardize(half.float()), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.compile(standardize, fullgraph=True, backend="aot_eager")(x), standardize(x)
    )


def test_bad_input():
    with pytest.raises(ConfigError, match=r"\[B, C\], C ≥ 2; got \[4, 1\]"):
        standardize(torch.randn(4, 1))
    with pytest.raises(ConfigError, match="wraps methods that read only logits; 'sdd' taps features"):
        get_method("lskd-sdd")
