"""IKL against double sums in numpy, the KL divergence's gradient, and its means of classes."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from mdistiller.errors import ConfigError
from mdistiller.functional import ikl_loss, kd_loss
from mdistiller.methods import IKLConfig, get_method
from mdistiller.models import create_model
from mdistiller.types import Batch, DataInfo, Outputs

CONTRACT = set()


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return torch.tensor(3 * rng.normal(size=(6, 7))), torch.tensor(3 * rng.normal(size=(6, 7)))


def formula(s, t, w, alpha, beta, temperature):
    total = 0.0
    for b in range(len(s)):
        squared = sum(
            w[b, i] * w[b, j] * ((t[b, i] - t[b, j]) - (s[b, i] - s[b, j])) ** 2
            for i in range(s.shape[1])
            for j in range(s.shape[1])
        )
        total -= alpha * np.sum(softmax(t[b] / temperature) * log_softmax(s[b] / temperature))
        total += beta / 4 * squared
    return total / len(s)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_is_the_formula_s(logits, temperature):
    s, t = (x.numpy() for x in logits)
    settings = {"alpha": 3.0, "beta": 12.0, "temperature": temperature}
    for given in (None, np.random.default_rng(1).random((6, 7))):
        w = softmax(t / 5, axis=1) if given is None else given
        got = ikl_loss(
            *logits, None if given is None else torch.tensor(w), weight_temperature=5.0, **settings
        )
        assert got.item() == pytest.approx(formula(s, t, w, *settings.values()), rel=1e-12)


def test_gradients_of_both_models_are_those_of_the_kl_divergence(logits):
    # The claim of the paper's theorem: the gradients of KL(p || q) for both logits.
    s, t = (x.requires_grad_() for x in logits)
    expected = torch.autograd.grad(kd_loss(s, t, temperature=1.0), (s, t))
    weights = t.detach().softmax(1)
    squared = ikl_loss(s.detach(), t, weights, alpha=0.0, beta=1.0)  # for the teacher
    entropy = ikl_loss(s, t.detach(), weights, alpha=1.0, beta=0.0, temperature=1.0)  # for the student
    torch.testing.assert_close(torch.autograd.grad(entropy, s)[0], expected[0])
    torch.testing.assert_close(torch.autograd.grad(squared, t)[0], expected[1])


def build(labels=None, **settings):
    method = get_method("ikl")
    config = IKLConfig(warmup=0.0, **settings)
    models = create_model("resnet8", 7), create_model("resnet8", 7)
    return method(config, *models, DataInfo((3, 32, 32), labels))


def test_class_weights_are_the_means_of_all_images_so_far(logits):
    method = build(weights="class", weight_temperature=2.0)
    assert method.needs.labels
    assert not build().needs.labels
    rng = np.random.default_rng(2)
    seen = []
    for labels in ([0, 0, 3, 5, 5, 5], [3, 0, 6, 5, 1, 1]):
        s, t = (3 * rng.normal(size=(6, 7)) for _ in range(2))
        seen += list(zip(labels, softmax(t / 2, axis=1), strict=True))
        weights = np.array([np.mean([p for y, p in seen if y == label], axis=0) for label in labels])
        expected = formula(s, t, weights, 1.0, 8.0, 4.0)
        label = torch.tensor(labels)
        outputs = (Outputs(torch.tensor(x), {}) for x in (s, t))
        got = method(*outputs, Batch(label, label, label), torch.tensor(1.0))["ikl"]
        assert got.item() == pytest.approx(expected, rel=1e-5)
    # Evaluation changes nothing; soft labels count in proportion.
    before = method.state_dict()["means.sums"].clone()
    label = torch.eye(7)[label] / 2 + torch.eye(7)[0] / 2
    batch = Batch(label, label.double(), label)
    method.eval()(Outputs(torch.tensor(s), {}), Outputs(torch.tensor(t), {}), batch, torch.tensor(1.0))
    assert torch.equal(method.state_dict()["means.sums"], before)
    method.train()(Outputs(torch.tensor(s), {}), Outputs(torch.tensor(t), {}), batch, torch.tensor(1.0))
    added = method.state_dict()["means.sums"] - before
    p = torch.tensor(softmax(t / 2, axis=1))
    torch.testing.assert_close(added, (label.T.double() @ p).float(), rtol=1e-4, atol=1e-5)


def test_compiled_training_has_the_eager_gradients():
    # The means change before the backward pass, which must not read the changed ones twice.
    results = []
    for compiled in (False, True):
        method = build(weights="class")
        call = torch.compile(method, fullgraph=True) if compiled else method
        for seed in (0, 1):
            torch.manual_seed(seed)
            s, t = torch.randn(8, 7, requires_grad=True), torch.randn(8, 7)
            label = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4])
            loss = call(Outputs(s, {}), Outputs(t, {}), Batch(s, label, label), torch.tensor(1.0))["ikl"]
            (grad,) = torch.autograd.grad(loss, s)
        results.append((loss.detach(), grad, method.means.sums))
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager)


def test_bad_input():
    x = torch.randn(4, 5)
    with pytest.raises(ConfigError, match=r"weights must have the logits' shape \[4, 5\]; got \[4, 6\]"):
        ikl_loss(x, x, torch.randn(4, 6))
    with pytest.raises(ConfigError, match="weight_temperature must be positive; got 0"):
        ikl_loss(x, x, weight_temperature=0)
    with pytest.raises(ConfigError, match="got 'class'; with training images without a class"):
        build(torch.tensor([0, -100]), weights="class")
    assert build(torch.tensor([0, -100])).has_unlabeled
