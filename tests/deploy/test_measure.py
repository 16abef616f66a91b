"""Costs of a model against a count by hand and against models of a known time."""

import pytest
import torch
from torch import nn

from mdistiller.deploy.measure import Machine, Speed, count_macs, milliseconds
from mdistiller.models import create_model


def by_hand(model, image):
    """Sums output positions times weights of a filter, over convolutions and linear layers."""
    total = 0

    def add(module, args, out):
        nonlocal total
        positions = out.numel() // out.shape[1]
        total += positions * module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(image)
    return total


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "ShuffleV1"])
def test_macs(name):
    model, image = create_model(name, 10).eval(), torch.zeros(1, 3, 32, 32)
    assert count_macs(model, image) == by_hand(model, image)
    # The first convolution of the ResNets, by arithmetic.
    assert count_macs(nn.Conv2d(3, 16, 3, padding=1), image) == 32 * 32 * 16 * 3 * 9
    assert not model.training


def test_times_are_medians_of_an_image(monkeypatch):
    calls, clock = {"slow": 0, "fast": 0}, [0.0]
    monkeypatch.setattr("mdistiller.deploy.measure.time.perf_counter", lambda: clock[0])

    def model(name, seconds):
        def run(images):
            calls[name] += 1
            clock[0] += 0.2 if calls[name] == 1 else seconds  # the first call warms up
            return (images,)

        return run

    images = torch.zeros(4, 3)
    pairs = [(model("slow", 0.02), images), (model("fast", 0.004), images)]
    slow, fast = milliseconds(pairs, 4, seconds=0.1)
    assert slow == pytest.approx(5)
    assert fast == pytest.approx(1)
    assert calls["fast"] > calls["slow"] >= 6  # three turns of a warm-up and one timed call


def test_words():
    one = Machine(cpu="A CPU", threads=1)
    assert str(one) == "A CPU, 1 thread"
    assert str(Machine(cpu="A CPU", threads=2)) == "A CPU, 2 threads"
    assert str(Speed(machine=one, ms={1: 0.5, 32: 12.345})) == "0.5 at batch 1, 12.3 at batch 32"
