"""CTKD: the base at the learned temperature, the gradient to it reversed, the curriculum."""

import math

import pytest
import torch

from mdistiller.errors import ConfigError
from mdistiller.functional import dkd_loss, kd_loss
from mdistiller.methods import DKDConfig, get_method, method_config
from mdistiller.methods.compose import build_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = {"zero at equal"}

CLASSES = 5
START = 1 + 20 / (1 + math.exp(-1))


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 4 * torch.randn(2, 6, CLASSES, dtype=torch.float64)


def build(name="ctkd", **settings):
    student = create_model("resnet8", num_classes=CLASSES)
    teacher = create_model("resnet8", num_classes=CLASSES)
    return build_method(method_config(name, **settings), student, teacher, DataInfo((3, 8, 8))).double()


def losses(method, logits, progress=1.0):
    s, t = logits
    batch = Batch(torch.empty(0), torch.arange(len(s)) % CLASSES, torch.empty(0))
    progress = torch.tensor(progress, dtype=torch.float64)
    return method(Outputs(s, {}), Outputs(t, {}), batch, progress)


def test_it_is_the_base_at_the_learned_temperature(logits):
    s, t = logits
    label = torch.arange(6) % CLASSES
    got = losses(build(), logits)["kd"]
    assert got.item() == pytest.approx(0.9 * kd_loss(s, t, temperature=START).item(), rel=1e-6)
    got = losses(build("ctkd-dkd"), logits)["dkd"]
    assert got.item() == pytest.approx(dkd_loss(s, t, label, temperature=START).item(), rel=1e-6)
    wide = build(temperature_min=2.0, temperature_range=4.0)
    wide.theta.theta.data.fill_(0.0)
    assert losses(wide, logits)["kd"].item() == pytest.approx(0.9 * kd_loss(s, t, temperature=4.0).item())


def test_the_base_s_temperature_has_no_effect_and_its_warm_up_applies(logits):
    base = DKDConfig(task_weight=0.0, temperature=1.5, warmup=0.5)
    full, plain = build("ctkd-dkd", base=base), build("ctkd-dkd")
    torch.testing.assert_close(losses(full, logits)["dkd"], losses(plain, logits)["dkd"])
    torch.testing.assert_close(losses(full, logits, 0.2)["dkd"], 0.4 * losses(full, logits)["dkd"])


@pytest.mark.parametrize(("epoch", "strength"), [(0, 0.0), (5, 0.5), (10, 1.0), (200, 1.0)])
def test_the_temperature_climbs_the_loss_along_a_cosine(logits, epoch, strength):
    method = build()
    (got,) = torch.autograd.grad(losses(method, logits, epoch / 240)["kd"], method.theta.theta)

    def loss(theta):
        temperature = 1 + 20 / (1 + math.exp(-theta))
        return 0.9 * kd_loss(*logits, temperature=temperature).item()

    slope = (loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4
    assert got.item() == pytest.approx(-strength * slope, rel=1e-5, abs=1e-12)


def test_the_curriculum_s_ends_are_settings(logits):
    method = build(lambda_min=0.25, lambda_max=0.75, curriculum=0.5)
    grads = [
        torch.autograd.grad(losses(method, logits, progress)["kd"], method.theta.theta)[0].item()
        for progress in (0.0, 0.25, 0.5, 1.0)
    ]
    assert [g / grads[-1] for g in grads] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_each_sample_has_its_own_temperature(logits):
    method = build(mode="instance", width=7)
    s, t = logits
    one = torch.tensor(1.0)
    torch.testing.assert_close(method.temperature(s, t, one), torch.full((6,), 11.0).double())
    torch.nn.init.normal_(method.theta.last.weight, std=3.0)
    temperature = method.temperature(s, t, one).detach()
    assert temperature.unique().numel() == 6
    assert ((temperature > 1) & (temperature < 21)).all()
    wanted = sum(
        kd_loss(s[i : i + 1], t[i : i + 1], temperature=temperature[i].item()).item() for i in range(6)
    )
    assert losses(method, logits)["kd"].item() == pytest.approx(0.9 * wanted / 6)
    # Classes have no names.
    order = torch.randperm(CLASSES)
    torch.testing.assert_close(method.temperature(s[:, order], t[:, order], one).detach(), temperature)


def test_the_student_does_not_learn_through_the_temperature(logits):
    s = logits[0].clone().requires_grad_()
    method = build(mode="instance")
    torch.nn.init.normal_(method.theta.last.weight)
    temperature = method.temperature(s, logits[1], torch.tensor(1.0))
    assert torch.autograd.grad(temperature.sum(), s, allow_unused=True) == (None,)


def test_extreme_logits_stay_finite():
    s = torch.tensor([[1e4, -1e4, 0.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    t = torch.tensor([[-1e4, 1e4, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    for mode in ("global", "instance"):
        method = build(mode=mode).float()
        value = losses(method, (s, t))["kd"]
        grads = torch.autograd.grad(value, [s, *method.parameters()])
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in grads)


def test_bases_that_cannot_be_wrapped():
    with pytest.raises(ConfigError, match=r"'ctkd' wraps methods of logits with a temperature.*'mlkd'"):
        get_method("ctkd-mlkd")
    with pytest.raises(ConfigError, match="wraps methods of logits with a temperature"):
        get_method("ctkd-ttm")
    # Its target's part has no temperature.
    with pytest.raises(ConfigError, match="temperature of 'nkd' does not divide all logits"):
        build("ctkd-nkd")
