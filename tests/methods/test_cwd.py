"""The loss of CWD, whose methods belong to tasks: values against numpy, gradients, extremes."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import cwd_loss


def maps(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def numpy_cwd(s, t, temperature):
    p, q = (x.numpy().reshape(*x.shape[:2], -1) / temperature for x in (t, s))
    terms = softmax(p, 2) * (log_softmax(p, 2) - log_softmax(q, 2))
    return temperature**2 * terms.sum() / np.prod(s.shape[:2])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_is_the_formula_s(temperature):
    s, t = maps(2, 3, 4, 5, scale=3)
    found = cwd_loss(s, t, temperature=temperature)
    assert found.item() == pytest.approx(numpy_cwd(s, t, temperature), rel=1e-9)


def test_equal_maps_have_no_loss_and_large_ones_a_finite_one():
    x = maps(2, 3, 4, 4, scale=1e4)[0].float().requires_grad_()
    assert cwd_loss(x.detach(), x.detach()).item() == pytest.approx(0, abs=1e-6)
    value = cwd_loss(x, x.detach().flip(0))
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
    assert cwd_loss(x.detach().bfloat16(), x.detach().flip(0)).dtype == torch.float32


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"got \[2, 3, 4, 4\] and \[2, 3, 4, 5\]"):
        cwd_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5))
    with pytest.raises(ConfigError, match="temperature must be positive; got 0"):
        cwd_loss(*maps(2, 3, 4, 4), temperature=0)
