"""The norm and direction loss by loops, and its wrapper around logit methods."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from mdistiller.errors import ConfigError
from mdistiller.functional import dkd_loss, kd_loss, nd_loss
from mdistiller.methods import get_method, method_config
from mdistiller.methods.compose import build_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()

DATA = DataInfo((3, 32, 32))


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    s, t, m = (torch.tensor(rng.normal(size=shape)) for shape in [(6, 5), (6, 5), (4, 5)])
    return s * torch.tensor([3.0, 0.1, 1, 1, 9, 1])[:, None], t, m, torch.tensor([0, 3, 1, 1, 2, 0])


def formula(s, t, m, labels):
    norm = np.linalg.norm
    losses = [1 - s[b] @ m[y] / norm(m[y]) / max(norm(s[b]), norm(t[b])) for b, y in enumerate(labels)]
    return np.mean(losses)


def test_value_is_the_formula_s(inputs):
    assert nd_loss(*inputs).item() == pytest.approx(formula(*(x.numpy() for x in inputs)), rel=1e-10)
    _, t, m, label = inputs
    longer = 100 * m[label] / m[label].norm(dim=1, keepdim=True)
    assert nd_loss(longer, t, m, label).item() == pytest.approx(0, abs=1e-10)
    assert nd_loss(-longer, t, m, label).item() == pytest.approx(2)


def test_images_without_a_class_and_soft_labels(inputs):
    s, t, m, label = inputs
    some = torch.where(torch.arange(6) < 2, -100, label)
    torch.testing.assert_close(nd_loss(s, t, m, some), nd_loss(s[2:], t[2:], m, label[2:]))
    assert nd_loss(s, t, m, torch.full_like(label, -100)).item() == 0
    rows = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(nd_loss(s, t, m, rows[label]), nd_loss(s, t, m, label))
    mixed = 0.7 * rows[label] + 0.3 * rows[(label + 1) % 4]
    expected = 0.7 * nd_loss(s, t, m, label) + 0.3 * nd_loss(s, t, m, (label + 1) % 4)
    torch.testing.assert_close(nd_loss(s, t, m, mixed), expected)


def test_gradient_limits_and_precision(inputs):
    s, t, m, label = inputs
    assert gradcheck(lambda s, t: nd_loss(s, t, m, label), (s.requires_grad_(), t.requires_grad_()))
    zeros = torch.zeros(6, 5, requires_grad=True)
    for teacher in (torch.zeros(6, 5), t.detach().float()):
        (grad,) = torch.autograd.grad(nd_loss(zeros, teacher, 0 * m.float(), label), zeros)
        assert torch.isfinite(grad).all()
    halves = [x.detach().half() for x in (s, t, m)]
    with torch.autocast("cpu", torch.bfloat16):
        got = nd_loss(*halves, label)
    torch.testing.assert_close(got, nd_loss(*(x.float() for x in halves), label), rtol=0, atol=0)
    compiled = torch.compile(nd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t, m, label), nd_loss(s, t, m, label))


def build(name="nd", teacher="resnet20", **settings):
    torch.manual_seed(0)
    models = create_model("resnet8", 10), create_model(teacher, 10)
    return build_method(method_config(name, **settings), *models, DATA)


def outputs(seed, width=64):
    torch.manual_seed(seed)
    return [Outputs(torch.randn(6, 10), {"pooled": torch.rand(6, w)}) for w in (64, width)]


def test_the_directions_are_the_class_means_of_all_images_so_far():
    method = build(weight=3.0)
    seen = []
    for seed, labels in enumerate(([0, 0, 3, 5, 5, 5], [3, 0, 6, 5, -100, 1])):
        s, t = outputs(seed)
        embeddings = [x.features["pooled"].double().numpy() for x in (s, t)]
        seen += list(zip(labels, embeddings[1], strict=True))
        known = [y for y in labels if y >= 0]
        means = {y: np.mean([v for label, v in seen if label == y], axis=0) for y in known}
        rows = np.array(labels) >= 0
        expected = 3 * formula(*(x[rows] for x in embeddings), means, known)
        label = torch.tensor(labels)
        got = method(s, t, Batch(label, label, label), torch.tensor(1.0))
        assert got["nd"].item() == pytest.approx(expected, rel=1e-5)
    before = method.state_dict()["means.sums"].clone()
    method.eval()(s, t, Batch(label, label, label), torch.tensor(1.0))
    assert torch.equal(method.state_dict()["means.sums"], before)


def test_the_base_s_losses_warm_up_and_the_other_does_not():
    label = torch.arange(6)
    s, t = outputs(0)
    batch = Batch(label, label, label)
    method = build(warmup=0.5)
    first, last = (method(s, t, batch, torch.tensor(p)) for p in (0.25, 1.0))
    torch.testing.assert_close(last["kd"], kd_loss(s.logits, t.logits))
    torch.testing.assert_close(first["kd"], 0.5 * last["kd"])
    torch.testing.assert_close(first["nd"], last["nd"], rtol=1e-5, atol=0)
    dkd = build("nd-dkd", base={"beta": 2.0, "task_weight": 0.0, "warmup": 0.0})(
        s, t, batch, torch.tensor(1.0)
    )["dkd"]
    torch.testing.assert_close(dkd, dkd_loss(s.logits, t.logits, label, beta=2.0))
    assert build("nd-dkd").needs.progress  # the wrapper's own; the base has none
    assert not build("nd-dkd", warmup=0.0).needs.progress
    alone = build("nd-none")
    assert alone(s, t, batch, torch.tensor(0.0)).keys() == {"nd"}
    assert not alone.needs.progress


def test_the_authors_weights_are_the_defaults():
    config = method_config("nd")
    assert (config.task_weight, config.base.weight, config.weight) == (1.0, 1.0, 2.0)
    assert method_config("lskd").task_weight == 0.1  # other wrappers take the base's


def test_another_width_is_projected():
    assert not list(build().parameters())
    method = build(teacher="vgg8", dropout=0.5)
    norm, dropout, layer = method.projector
    assert (norm.num_features, dropout.p, layer.weight.shape) == (64, 0.5, (512, 64))
    assert not layer.bias.any()
    s, t = outputs(0, 512)
    label = torch.arange(6)
    method.projector.eval()
    got = method(s, t, Batch(label, label, label), torch.tensor(1.0))["nd"]
    embedding = s.features["pooled"] / np.sqrt(1 + 1e-5) @ layer.weight.T
    expected = 2 * nd_loss(embedding, t.features["pooled"], t.features["pooled"], label)
    torch.testing.assert_close(got, expected)


def test_bad_input(inputs):
    s, t, m, label = inputs
    with pytest.raises(ConfigError, match=r"got \[6, 5\], \[6, 4\], \[4, 5\] and torch.int64 \[6\]"):
        nd_loss(s, t[:, :4], m, label)
    with pytest.raises(ConfigError, match=r"and torch.float64 \[6, 5\]"):
        nd_loss(s, t, m, s)
    with pytest.raises(ConfigError, match="wraps methods that read only logits"):
        get_method("nd-at")
    assert isinstance(build("nd-lskd-kd").base, nn.Module)


def test_an_embedding_of_each_word_is_refused():
    models = [nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)) for _ in range(2)]
    for model in models:
        model.tap_points = {"pooled": "1:input@sequence"}
    data = DataInfo(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(
        ConfigError, match=r"'pooled' of Sequential must be a vector \[B, D\]; it is a sequence"
    ):
        build_method(method_config("nd-kd"), *models, data)
