"""SKD, CIRKD and losses of pixels against formulas in numpy, and their gradients."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import dkd_loss, kd_loss
from mdistiller.tasks.segmentation.maps import cirkd_loss, skd_loss
from mdistiller.tasks.segmentation.methods import build_method, default_config
from mdistiller.tasks.segmentation.pixels import pixel_cross_entropy, pixel_rows, resized_label
from mdistiller.types import Batch, DataInfo, Outputs

RNG = np.random.default_rng(0)


def maps(*shape, scale=1.0):
    return RNG.normal(size=shape) * scale


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float64) for a in arrays]


def numpy_skd(s, t, scale):
    def similarities(x):
        b, c, h, w = x.shape
        tall, wide = max(1, int(h * scale)), max(1, int(w * scale))
        rows, columns = -(-h // tall), -(-w // wide)
        nodes = np.zeros((b, c, rows, columns))
        for i, j in itertools.product(range(rows), range(columns)):
            part = x[:, :, i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
            nodes[:, :, i, j] = part.max((2, 3))
        unit = (nodes / (np.linalg.norm(nodes, axis=1, keepdims=True) + 1e-8)).reshape(b, c, -1)
        return np.einsum("bcm,bcn->bmn", unit, unit)

    a, b = similarities(s), similarities(t)
    return ((a - b) ** 2).sum() / a.shape[1] ** 2 / a.shape[0]


def numpy_cirkd(s, t, temperature):
    def unit(x):
        x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
        return x / np.linalg.norm(x, axis=2, keepdims=True)

    s, t, total = unit(s), unit(t), 0.0
    for i, j in itertools.product(range(len(s)), repeat=2):
        p, q = (x[i] @ x[j].T / temperature for x in (t, s))
        total += (softmax(p, 1) * (log_softmax(p, 1) - log_softmax(q, 1))).sum(1).mean()
    return total / len(s) ** 2


@pytest.mark.parametrize(("size", "scale"), [((4, 6), 0.5), ((5, 7), 0.5), ((6, 6), 0.34), ((1, 3), 0.1)])
def test_skd(size, scale):
    s, t = maps(2, 3, *size), maps(2, 8, *size)
    found = skd_loss(*tensors(s, t), scale=scale)
    assert found.item() == pytest.approx(numpy_skd(s, t, scale), rel=1e-9)


def test_cirkd():
    s, t = maps(3, 4, 3, 2), maps(3, 7, 3, 2)
    assert cirkd_loss(*tensors(s, t)).item() == pytest.approx(numpy_cirkd(s, t, 0.1), rel=1e-9)
    pooled = [x.reshape(*x.shape[:2], 2, 2, 3, 2).mean((3, 5)) for x in (maps(2, 4, 4, 6),) * 2]
    whole = maps(2, 4, 4, 6)
    other = maps(2, 5, 4, 6)
    pooled = [x.reshape(2, -1, 2, 2, 3, 2).mean((3, 5)) for x in (whole, other)]
    found = cirkd_loss(*tensors(whole, other), temperature=1.0, pool=2)
    assert found.item() == pytest.approx(numpy_cirkd(*pooled, 1.0), rel=1e-9)


def test_gradients_are_those_of_finite_differences():
    s, t = tensors(maps(2, 3, 3, 2), maps(2, 3, 3, 2))
    assert torch.autograd.gradcheck(lambda x: cirkd_loss(x, t), s.requires_grad_())


@pytest.mark.parametrize("loss", [skd_loss, cirkd_loss])
def test_equal_maps_have_no_loss_and_large_ones_a_finite_one(loss):
    x = torch.tensor(maps(2, 3, 4, 4, scale=1e4), dtype=torch.float32, requires_grad=True)
    assert loss(x.detach(), x.detach()).item() == pytest.approx(0, abs=1e-6)
    value = loss(x, x.detach().flip(0))
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
    assert loss(x.detach().bfloat16(), x.detach().flip(0)).dtype == torch.float32


@pytest.mark.parametrize("loss", [skd_loss, cirkd_loss])
def test_maps_that_do_not_fit(loss):
    with pytest.raises(ConfigError, match=r"got \[2, 3, 4, 4\] and \[2, 3, 4, 5\]"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5))


# Logit methods on pixels


class Pair(torch.nn.Module):
    tap_points = {"logits": "0"}  # noqa: RUF012


def on_pixels(name, student, teacher, label, **settings):
    config = default_config(name).replace(**settings)
    method = build_method(config, Pair(), Pair(), DataInfo((3, 8, 8), torch.tensor([-100])))
    outputs = [Outputs(torch.zeros(0), {"logits": x}) for x in (student, teacher)]
    return method(*outputs, Batch(torch.zeros(0), label, torch.arange(len(label))), torch.ones(()))


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_logit_losses_are_means_over_the_pixels_with_a_class(name):
    student, teacher = (torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(2))
    label = torch.randint(5, (2, 3, 4))
    label[0, 0] = -100
    found = on_pixels(name, student, teacher.detach(), label)[name]
    keep = label.flatten() != -100
    s, t = (x.permute(0, 2, 3, 1).reshape(-1, 5)[keep] for x in (student, teacher.detach()))
    if name == "kd":
        expected = kd_loss(s, t, temperature=1.0)
    else:
        expected = dkd_loss(s, t, label.flatten()[keep], alpha=1.0, beta=2.0, temperature=1.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, student)
    (reference,) = torch.autograd.grad(expected, student)
    assert torch.allclose(gradient, reference, atol=1e-7)
    assert not gradient[0, :, 0].any()


def test_no_pixel_has_a_class():
    student = torch.randn(1, 3, 2, 2, requires_grad=True)
    label = torch.full((1, 2, 2), -100)
    for name in ("kd", "dkd"):
        assert on_pixels(name, student, torch.randn(1, 3, 2, 2), label)[name].item() == 0
    assert pixel_cross_entropy(student, label).item() == 0


def test_rows_are_pixels_and_labels_are_picked_at_their_centers():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10)
    label = torch.arange(2 * 8 * 10).reshape(2, 8, 10)
    s, t, y = pixel_rows(student, teacher, label)
    assert torch.equal(s[7], student[0, :, 1, 2])
    scaled = torch.nn.functional.interpolate(teacher, (4, 5), mode="bilinear", align_corners=False)
    assert torch.equal(t, scaled.permute(0, 2, 3, 1).reshape(-1, 3))
    assert y[7] == label[0, 3, 5]
    assert torch.equal(resized_label(label, (8, 10)), label)
    assert resized_label(torch.full((1, 9, 9), -100), (3, 3)).eq(-100).all()


def test_the_task_loss_is_torchs_at_the_labels_size():
    logits, label = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 10, 12))
    label[:, :3] = -100
    scaled = torch.nn.functional.interpolate(logits, (10, 12), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.cross_entropy(scaled, label)
    assert pixel_cross_entropy(logits, label).item() == pytest.approx(expected.item(), rel=1e-6)
