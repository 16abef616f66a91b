"""VID against its definition by loops, and its regressors and variances."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mdistiller
from mdistiller.errors import ConfigError
from mdistiller.functional import vid_loss
from mdistiller.methods import VIDConfig

CONTRACT = set()


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 4, 2, 2)), rng.uniform(0.1, 5, size=4), rng.normal(size=(3, 4, 2, 2))


def test_value_is_the_formula_s(features):
    mean, variance, target = features
    total = 0.0
    for b, c, h, w in np.ndindex(*mean.shape):
        error = target[b, c, h, w] - mean[b, c, h, w]
        total += 0.5 * (math.log(variance[c]) + error**2 / variance[c])
    got = vid_loss(*map(torch.tensor, features)).item()
    assert got == pytest.approx(total / mean.size, rel=1e-12)


def test_it_is_the_gaussian_likelihood_and_least_at_the_teacher_s_feature(features):
    mean, variance, target = map(torch.tensor, features)
    expected = F.gaussian_nll_loss(mean, target, variance[:, None, None].expand_as(mean), eps=0)
    torch.testing.assert_close(vid_loss(mean, variance, target), expected)
    assert vid_loss(target, torch.ones(4), target).item() == 0
    at_target = vid_loss(target.requires_grad_(), variance, target.detach())
    assert torch.autograd.grad(at_target, target)[0].abs().max() == 0


def test_bad_input():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"got \[2, 3, 4, 4\], \[2, 3, 4, 2\] and \[3\]"):
        vid_loss(x, torch.ones(3), torch.randn(2, 3, 4, 2))
    with pytest.raises(ConfigError, match=r"the variance \[C\]; got .* and \[4\]"):
        vid_loss(x, torch.ones(4), x)
    with pytest.raises(ConfigError, match=r"one shape \[B, C, H, W\]"):
        vid_loss(x[0], torch.ones(4), x[0])


def build(student="resnet8", teacher="vgg8", **settings):
    models = (mdistiller.create_model(name, num_classes=10) for name in (student, teacher))
    return mdistiller.Distiller(*models, VIDConfig(**settings))


@pytest.mark.parametrize("variance", [5.0, 0.5, 1000.0])
def test_variances_start_where_they_should_and_train(variance):
    method = build(initial_variance=variance).method
    for scale, (_, channels, *_) in zip(method.scales, method.teacher_shapes, strict=True):
        assert scale.requires_grad
        expected = torch.full((channels,), variance)
        torch.testing.assert_close(F.softplus(scale) + 1e-5, expected, rtol=1e-5, atol=0)


def test_an_initial_variance_below_the_least_one():
    with pytest.raises(ConfigError, match=r"initial_variance must be above method.eps \(0.5\); got 0.1"):
        build(initial_variance=0.1, eps=0.5)


def test_regressors_fit_the_stages():
    method = build("resnet8", "resnet8x4").method
    assert method.student_taps == method.teacher_taps == ("stage1", "stage2", "stage3")
    shapes = [[tuple(p.shape) for p in r.parameters()] for r in method.regressors]
    assert shapes == [[(t, s, 1, 1), (t, t, 1, 1), (t, t, 1, 1)] for s, t in [(16, 64), (32, 128), (64, 256)]]


@pytest.mark.parametrize(
    ("student_tap", "teacher_tap"), [("stage1", "stage2"), ("stage3", "stage1"), ("stage2", "pooled")]
)
def test_maps_meet_at_the_smaller_size(student_tap, teacher_tap):
    taps = {"student_taps": (student_tap,), "teacher_taps": (teacher_tap,)}
    distiller = build("resnet8", "resnet14", weight=3.0, **taps).eval()
    image, label = torch.randn(4, 3, 32, 32), torch.arange(4)
    got = distiller(image, label).losses["vid"].item()
    method, student, teacher = distiller.method, distiller.student, distiller.teacher
    s = mdistiller.tap(student, [student_tap])(image).features[student_tap]
    t = mdistiller.tap(teacher.eval(), [teacher_tap])(image).features[teacher_tap]
    if t.ndim == 2:
        t = t[:, :, None, None]
    side = min(s.shape[2], t.shape[2])
    s, t = (F.avg_pool2d(x, x.shape[2] // side) for x in (s, t))
    variance = torch.full((t.shape[1],), 5.0)
    expected = 3 * vid_loss(method.regressors[0](s), variance, t).item()
    assert got == pytest.approx(expected, rel=1e-4)
