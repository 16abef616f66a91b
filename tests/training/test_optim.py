"""Learning-rate schedules against torch's own, and the optimizers."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import lr_scheduler

import mdistiller
from mdistiller.config import OptimConfig
from mdistiller.training.optim import build_optimizer
from mdistiller.training.update import learning_rate, set_learning_rate


def torch_rates(make, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler = make(optimizer)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_step_schedule_equals_torch_s():
    config = OptimConfig(lr=0.05)
    expected = torch_rates(lambda o: lr_scheduler.MultiStepLR(o, [150, 180, 210], 0.1), 240)
    assert [learning_rate(config, s, 240) for s in range(240)] == pytest.approx(expected)


def test_polynomial_schedule_equals_torch_s():
    config = OptimConfig(lr=0.05, schedule="poly")
    expected = torch_rates(lambda o: lr_scheduler.PolynomialLR(o, 100, 0.9), 100)
    assert [learning_rate(config, s, 100) for s in range(100)] == pytest.approx(expected)


def test_cosine_schedule_equals_torch_s():
    config = OptimConfig(lr=0.05, schedule="cosine")
    expected = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 100), 100)
    assert [learning_rate(config, s, 100) for s in range(100)] == pytest.approx(expected)


def test_warmup_rises_to_the_full_rate_once():
    config = OptimConfig(lr=0.1, schedule="constant", lr_warmup=0.1)
    rates = [learning_rate(config, s, 100) for s in range(100)]
    assert rates[:11] == pytest.approx([0.1 * (i + 1) / 11 for i in range(11)])
    assert rates[10:] == [0.1] * 90


def test_warmup_in_steps_whatever_the_length():
    config = OptimConfig(lr=0.1, schedule="constant", lr_warmup_steps=10, lr_warmup=0.5)
    for total in (100, 1000):
        rates = [learning_rate(config, s, total) for s in range(total)]
        assert rates[:11] == pytest.approx([0.1 * (i + 1) / 11 for i in range(11)])
        assert rates[10:] == [0.1] * (total - 10)
    assert [learning_rate(config, s, 4) for s in range(4)] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])


@pytest.mark.parametrize("milestones", [(0.9, 0.5), (0.0, 0.5), (0.5, 1.0), (150.0,)])
def test_milestones_are_rising_fractions(milestones):
    with pytest.raises(ValidationError, match="rising fractions"):
        OptimConfig(milestones=milestones)


def test_optimizers():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    sgd = build_optimizer(OptimConfig(momentum=0.8, weight_decay=1e-3), module)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.8
    assert sgd.param_groups[0]["weight_decay"] == 1e-3
    assert len(sgd.param_groups[0]["params"]) == 2
    assert isinstance(build_optimizer(OptimConfig(name="adamw"), module), torch.optim.AdamW)


def factors(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


FINE = OptimConfig(name="adamw", layer_decay=0.7, weight_decay=0.05, norm_decay=False)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224"])
def test_groups_equal_timm_s_layer_decay(name):
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name, num_classes=4)
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=listed, layer_decay=0.7)
    expected = factors(torch.optim.AdamW(groups), model)
    found = factors(build_optimizer(FINE, model), model)
    assert found.keys() == expected.keys()
    for key, pair in found.items():
        assert pair == pytest.approx(expected[key]), key


def test_groups_of_a_zoo_model_with_a_rate_for_new_layers():
    model = mdistiller.create_model("resnet8", 4)
    whole = nn.ModuleDict({"student": model, "method": nn.Linear(2, 2)})
    optim = FINE.replace(head_lr=5.0)
    optimizer = build_optimizer(optim, whole, student=model)
    found = {name.removeprefix("student."): f for name, f in factors(optimizer, whole).items()}
    assert found["conv1.weight"] == pytest.approx((0.7**4, 0.05))
    assert found["bn1.bias"] == pytest.approx((0.7**4, 0.0))
    assert found["layer1.0.conv2.weight"] == pytest.approx((0.7**3, 0.05))
    assert found["layer3.0.bn1.weight"] == pytest.approx((0.7, 0.0))
    assert found["fc.weight"] == found["method.weight"] == (5.0, 0.05)
    assert found["fc.bias"] == found["method.bias"] == (5.0, 0.0)
    set_learning_rate(optimizer, 0.1)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1 * g["lr_scale"] for g in optimizer.param_groups}


def test_default_settings_give_one_group_in_the_order_of_the_parameters():
    model = mdistiller.create_model("resnet8", 4)
    (group,) = build_optimizer(OptimConfig(), model).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 5e-4)


def test_rates_end_at_the_lowest_one():
    config = OptimConfig(lr=0.1, schedule="cosine", min_lr=0.2)
    expected = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.01), 50)  # of 0.05
    assert [learning_rate(config, s, 50) for s in range(50)] == pytest.approx([2 * r for r in expected])
    steps = OptimConfig(lr=0.1, min_lr=0.05)
    assert [learning_rate(steps, s, 240) for s in (0, 150, 180, 239)] == pytest.approx(
        [0.1, 0.01, 0.005, 0.005]
    )


def test_betas():
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(OptimConfig(name="adamw", betas=(0.8, 0.95)), model)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    with pytest.raises(ValidationError, match="betas"):
        OptimConfig(betas=(0.9, 1.0))
