"""Attention transfer: values against numpy, gradients, sizes that differ."""

import numpy as np
import pytest
import torch

from mdistiller import Distiller, create_model
from mdistiller.errors import ConfigError
from mdistiller.functional import at_loss
from mdistiller.methods import ATConfig

CONTRACT = {"zero at equal"}


def maps(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def numpy_term(student, teacher, p):
    """One stage of equal sizes, sample by sample."""
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        q_s, q_t = ((np.abs(x) ** p).sum(0).ravel() for x in (s, t))
        total += ((q_s / np.linalg.norm(q_s) - q_t / np.linalg.norm(q_t)) ** 2).mean()
    return total / len(student)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_value_is_the_formula_s(p):
    student = maps((3, 2, 4, 5), (3, 6, 2, 2))
    teacher = maps((3, 4, 4, 5), (3, 1, 2, 2), seed=1)
    expected = sum(numpy_term(s, t, p) for s, t in zip(student, teacher, strict=True))
    assert at_loss(student, teacher, p=p).item() == pytest.approx(expected, rel=1e-12)


def test_the_larger_map_is_averaged_to_the_smaller_one():
    (large,), (small,) = maps((2, 3, 4, 6)), maps((2, 5, 2, 2), seed=1)
    means = large.unflatten(2, (2, 2)).unflatten(4, (2, 3)).mean((3, 5))
    expected = numpy_term(means, small, 2)
    assert at_loss([large], [small]).item() == pytest.approx(expected, rel=1e-12)
    assert at_loss([small], [large]).item() == pytest.approx(expected, rel=1e-12)
    tall, wide = maps((2, 3, 4, 2), (2, 3, 2, 4))  # each is the smaller in one direction
    halves = tall.unflatten(2, (2, 2)).mean(3), wide.unflatten(3, (2, 2)).mean(4)
    assert at_loss([tall], [wide]).item() == pytest.approx(numpy_term(*halves, 2), rel=1e-12)


def test_zero_where_the_student_attends_as_the_teacher_does():
    (x,) = maps((2, 3, 4, 4))
    more_channels = -7 * torch.cat([x, x], 1)  # neither scale, sign nor copies of channels matter
    assert at_loss([x], [more_channels]).item() < 1e-28


def test_bad_input():
    x, y = maps((2, 3, 4, 4), (3, 3, 4, 4))
    with pytest.raises(ConfigError, match="one length, at least 1; got 1 and 2"):
        at_loss([x], [x, x])
    with pytest.raises(ConfigError, match="different batch sizes"):
        at_loss([x], [y])
    with pytest.raises(ConfigError, match=r"maps \[B, C, H, W\]; got student \[2, 3\]"):
        at_loss([x.mean((2, 3))], [x])
    with pytest.raises(ConfigError, match="p must be at least 1; got 0"):
        at_loss([x], [x], p=0)


def test_the_method_weighs_all_stages():
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", num_classes=5), create_model("resnet8x4", num_classes=5)
    distiller = Distiller(student, teacher, ATConfig(weight=10.0, p=1)).eval()
    method = distiller.method
    assert method.student_taps == method.teacher_taps == ("stage1", "stage2", "stage3")
    image = torch.randn(2, 3, 32, 32)
    features = []
    for model in (student, teacher.eval()):
        x = model.relu(model.bn1(model.conv1(image)))
        features.append([x := stage(x) for stage in (model.layer1, model.layer2, model.layer3)])
    losses = distiller(image, torch.tensor([0, 1])).losses
    torch.testing.assert_close(losses["at"], 10 * at_loss(*features, p=1))
