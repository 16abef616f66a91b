"""Neuron selectivity transfer: values against loops over channels, gradients, sizes that differ."""

import numpy as np
import pytest
import torch
from loss_checks import MAPS, check_shapes, check_signature
from torch.autograd import gradcheck

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


def test_gradients():
    student, teacher = maps((2, 3, 4, 4), (2, 2, 2, 2)), maps((2, 2, 3, 3), (2, 3, 2, 2), seed=1)
    inputs = [x.requires_grad_() for x in student + teacher]
    assert gradcheck(lambda *x: nst_loss(list(x[:2]), list(x[2:])), inputs)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extremes_stay_finite(scale):
    (s,) = maps((2, 3, 4, 4), dtype=torch.float32)
    (t,) = maps((2, 3, 4, 4), seed=1, dtype=torch.float32)
    s = (scale * s).requires_grad_()
    loss = nst_loss([s], [t])
    (grad,) = torch.autograd.grad(loss, s)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_a_dead_channel_gets_no_gradient_and_spoils_no_other():
    (s,) = maps((2, 3, 4, 4), dtype=torch.float32)
    (t,) = maps((2, 3, 4, 4), seed=1, dtype=torch.float32)
    s[:, 1] = 0
    s.requires_grad_()
    (grad,) = torch.autograd.grad(nst_loss([s], [t]), s)
    assert (grad[:, 1] == 0).all()
    assert 0 < grad.abs().max() < 1


def test_half_precision_is_promoted_under_autocast_too():
    s, t = maps((2, 3, 4, 4), (2, 3, 4, 4), dtype=torch.bfloat16)
    expected = nst_loss([s.float()], [t.float()])
    with torch.autocast("cpu", torch.bfloat16):
        loss = nst_loss([s], [t])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_compiles_whole():
    s, t = maps((2, 3, 4, 4), (2, 2, 2, 2)), maps((2, 5, 2, 2), (2, 2, 2, 2), seed=1)
    compiled = torch.compile(nst_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(s, t), nst_loss(s, t))


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


def test_signature_and_shapes():
    check_signature("nst_loss", "(student_features, teacher_features)")
    check_shapes("nst_loss", [MAPS[0]], [MAPS[1]])
