"""Learning-rate schedules against torch's own, and the optimizers."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import lr_scheduler

from mdistiller.config import OptimConfig
from mdistiller.training.optim import build_optimizer, learning_rate


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


def test_cosine_schedule_equals_torch_s():
    config = OptimConfig(lr=0.05, schedule="cosine")
    expected = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 100), 100)
    assert [learning_rate(config, s, 100) for s in range(100)] == pytest.approx(expected)


def test_warmup_rises_to_the_full_rate_once():
    config = OptimConfig(lr=0.1, schedule="constant", lr_warmup=0.1)
    rates = [learning_rate(config, s, 100) for s in range(100)]
    assert rates[:11] == pytest.approx([0.1 * (i + 1) / 11 for i in range(11)])
    assert rates[10:] == [0.1] * 90


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
