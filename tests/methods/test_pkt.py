"""PKT against its definition by loops, at its limits, and as a method."""

import math

import numpy as np
import pytest
import torch

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import pkt_loss
from mdistiller.methods import PKTConfig

CONTRACT = {"zero at equal"}


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 4)), rng.normal(size=(5, 7))


def neighbors(x):
    kernel = np.empty((len(x), len(x)))
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            kernel[i, j] = (a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) + 1) / 2
    return kernel / kernel.sum(1, keepdims=True)


def test_value_is_the_formula_s(embeddings):
    s, t = embeddings
    p, q = neighbors(t), neighbors(s)
    expected = sum(
        p[i, j] * math.log((p[i, j] + 1e-7) / (q[i, j] + 1e-7)) for i in range(5) for j in range(5)
    )
    got = pkt_loss(torch.tensor(s), torch.tensor(t)).item()
    assert got == pytest.approx(expected / 25, rel=1e-10)


def test_zero_where_the_cosines_are_equal(embeddings):
    t = torch.tensor(embeddings[1])
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    assert abs(pkt_loss(t, t).item()) < 1e-15
    assert abs(pkt_loss(3 * t @ turn, t).item()) < 1e-12


def test_bad_input():
    with pytest.raises(ConfigError, match=r"must be \[B, D\]; got \[4, 5, 1\] and \[4, 6\]"):
        pkt_loss(torch.randn(4, 5, 1), torch.randn(4, 6))
    with pytest.raises(ConfigError, match=r"student \[4, 5\], teacher \[3, 6\]"):
        pkt_loss(torch.randn(4, 5), torch.randn(3, 6))


@pytest.mark.parametrize("taps", [("pooled",), ("stage1", "pooled")])
def test_method_compares_what_the_classifiers_get_or_what_it_is_told(taps):
    student, teacher = (mdistiller.create_model(name, num_classes=10) for name in ("resnet8", "vgg8"))
    config = PKTConfig(weight=2.0, student_taps=taps, teacher_taps=taps)
    if taps == ("pooled",):
        config = PKTConfig(weight=2.0)
    distiller = mdistiller.Distiller(student, teacher, config).eval()
    image, label = torch.randn(4, 3, 32, 32), torch.arange(4)
    got = distiller(image, label).losses["pkt"]
    assert list(distiller.method.parameters()) == []
    s, t = (mdistiller.tap(m.eval(), taps)(image).features for m in (student, teacher))
    expected = 0.0
    for name in taps:
        a, b = (f[name].mean((2, 3)) if f[name].ndim == 4 else f[name] for f in (s, t))
        expected += 2 * pkt_loss(a, b).item()
    assert got.item() == pytest.approx(expected, rel=1e-4)
