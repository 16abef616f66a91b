"""DeepKD's losses against loops in numpy, and its curriculum."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import deepkd_loss, dkd_loss
from mdistiller.methods import get_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = {"zero at equal"}


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    s, t = (torch.tensor(3 * rng.normal(size=(6, 7))) for _ in range(2))
    return s, t, torch.tensor([0, 6, 3, 3, 1, 5])


def nckd(s, t, target, k, temperature):
    losses = []
    for b, y in enumerate(target):
        others = [c for c in range(s.shape[1]) if c != y]
        best = sorted(others, key=lambda c: -t[b, c])[:k]
        p, q = (softmax(z[b, best] / temperature) for z in (t, s))
        losses.append(temperature**2 * np.sum(p * np.log(p / q)))
    return np.mean(losses)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_is_the_formula_s(inputs, k, temperature):
    target_part = dkd_loss(*inputs, beta=0, temperature=temperature).item()
    expected = 2 * target_part + 3 * nckd(*(x.numpy() for x in inputs), k, temperature)
    got = deepkd_loss(*inputs, k=k, alpha=2.0, beta=3.0, temperature=temperature)
    assert got.item() == pytest.approx(expected, rel=1e-10)


def test_all_other_classes_give_dkd(inputs):
    for k in (6, 100):
        torch.testing.assert_close(deepkd_loss(*inputs, k=k, beta=5.0), dkd_loss(*inputs, beta=5.0))


@pytest.mark.parametrize(("progress", "k"), [(0.0, 2), (0.2, 4), (0.25, 4), (0.5, 6), (1.0, 6)])
def test_the_classes_of_the_curriculum(inputs, progress, k):
    s, t, target = inputs
    method_class = get_method("deepkd")
    models = create_model("resnet8", 7), create_model("resnet8", 7)

    def build(**settings):
        return method_class(method_class.Config(**settings), *models, DataInfo((3, 32, 32)))

    settings = {"warmup": 0.4, "first_share": 0.3, "curriculum": 0.5, "alpha": 2.0, "beta": 3.0}
    batch = Batch(s, target, target)
    got = build(**settings)(Outputs(s, {}), Outputs(t, {}), batch, torch.tensor(progress))
    weight = min(progress / 0.4, 1)
    expected = weight * 3 * nckd(*(x.numpy() for x in inputs), k, 4.0)
    assert got["nckd"].item() == pytest.approx(expected, rel=1e-6)
    assert got["tckd"].item() == pytest.approx(weight * 2 * dkd_loss(*inputs, beta=0).item(), rel=1e-6)
    assert build(warmup=0.0, first_share=0.3).needs.progress
    assert not build(warmup=0.0).needs.progress  # all classes from the start


def test_bad_input(inputs):
    s, t, target = inputs
    with pytest.raises(ConfigError, match="takes no soft labels"):
        deepkd_loss(s, t, t.softmax(1), k=2)
    with pytest.raises(ConfigError, match=r"target must be class ids int64 \[6\]"):
        deepkd_loss(s, t, target[:3], k=2)
