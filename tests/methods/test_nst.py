"""Neuron selectivity transfer: values against loops over channels, gradients, sizes that differ."""

import numpy as np
import pytest
import torch

from mdistiller import create_model
from mdistiller.errors import ConfigError
from mdistiller.functional import nst_loss
from mdistiller.methods import NST, NSTConfig
from mdistiller.types import DataInfo

CONTRACT = {"zero at equal"}


def maps(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def numpy_term(student, teacher):
    """One stage of equal sizes: the squared distance of the means of x xᵀ, the kernel's feature map."""
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        means = []
        for channels in (s, t):
            vectors = [c.ravel() / np.linalg.norm(c) for c in channels]
            means.append(np.mean([np.outer(v, v) for v in vectors], axis=0))
        total += ((means[0] - means[1]) ** 2).sum()
    return total / len(student)


def test_value_is_the_formula_s():
    student = maps((3, 2, 4, 5), (3, 6, 2, 2))
    teacher = maps((3, 4, 4, 5), (3, 1, 2, 2), seed=1)
    expected = sum(numpy_term(s, t) for s, t in zip(student, teacher, strict=True))
    assert nst_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_the_larger_map_is_averaged_to_the_smaller_one():
    (large,), (small,) = maps((2, 3, 4, 6)), maps((2, 5, 2, 2), seed=1)
    means = large.unflatten(2, (2, 2)).unflatten(4, (2, 3)).mean((3, 5))
    expected = numpy_term(means, small)
    assert nst_loss([large], [small]).item() == pytest.approx(expected, rel=1e-12)
    assert nst_loss([small], [large]).item() == pytest.approx(expected, rel=1e-12)


def test_zero_where_the_distributions_are_equal():
    (x,) = maps((2, 3, 4, 4))
    same = torch.cat([5 * x.flip(1), -x], 1)  # order, scale and copies of channels do not matter
    assert abs(nst_loss([x], [same]).item()) < 1e-14
    (other,) = maps((2, 3, 4, 4), seed=1)
    assert nst_loss([x], [other]).item() > 1e-3


def test_a_dead_channel_gets_no_gradient_and_spoils_no_other():
    (s,) = maps((2, 3, 4, 4), dtype=torch.float32)
    (t,) = maps((2, 3, 4, 4), seed=1, dtype=torch.float32)
    s[:, 1] = 0
    s.requires_grad_()
    (grad,) = torch.autograd.grad(nst_loss([s], [t]), s)
    assert (grad[:, 1] == 0).all()
    assert 0 < grad.abs().max() < 1


def test_bad_input():
    x, y = maps((2, 3, 4, 4), (3, 3, 4, 4))
    with pytest.raises(ConfigError, match="one length, at least 1; got 0 and 0"):
        nst_loss([], [])
    with pytest.raises(ConfigError, match="different batch sizes"):
        nst_loss([x], [y])
    with pytest.raises(ConfigError, match=r"maps \[B, C, H, W\]; got student \[2, 3, 4\]"):
        nst_loss([x[..., 0]], [x])


def test_the_method_matches_the_stages_of_a_deeper_teacher():
    student, teacher = create_model("resnet8", num_classes=5), create_model("vgg8", num_classes=5)
    method = NST(NSTConfig(), student, teacher, DataInfo((3, 32, 32)))
    assert method.student_taps == ("stage1", "stage2", "stage3")
    assert method.teacher_taps == ("stage2", "stage3", "stage4")
    assert (method.config.weight, method.config.task_weight) == (50.0, 1.0)
