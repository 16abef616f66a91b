"""Metrics of embeddings against numpy and scikit-learn, and the embedding in a model's result."""

import types

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from mdistiller.errors import TapError
from mdistiller.tasks.embed.evaluate import agreement, embedding_of, probe_accuracies


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensor(x):
    return torch.tensor(x, dtype=torch.float32)


def cosine(x, y):
    return (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T


def test_agreement_is_the_share_of_common_neighbors(rng):
    student, teacher = rng.normal(size=(30, 5)), rng.normal(size=(30, 7))
    shared = []
    nearest = []
    for x in (student, teacher):
        likeness = cosine(x, x)
        np.fill_diagonal(likeness, -np.inf)
        nearest.append(np.argsort(-likeness, 1)[:, :10])
    shared = [len({*a} & {*b}) / 10 for a, b in zip(*nearest, strict=True)]
    found = agreement(tensor(student), tensor(teacher))
    assert found == pytest.approx(100 * np.mean(shared))
    assert agreement(3 * tensor(student), tensor(student)) == 100


def test_few_images_have_fewer_neighbors_than_others(rng):
    found = [agreement(*(tensor(rng.normal(size=(5, 4))) for _ in range(2))) for _ in range(20)]
    assert 0 < np.mean(found) < 100


def test_votes_of_neighbors(rng):
    train, labels = rng.normal(size=(50, 4)), rng.integers(0, 3, 50)
    test, expected = rng.normal(size=(40, 4)), rng.integers(0, 3, 40)
    likeness = cosine(test, train)
    hits = []
    for row, wanted in zip(likeness, expected, strict=True):
        votes = np.zeros(3)
        for i in np.argsort(-row)[:20]:
            votes[labels[i]] += np.exp(row[i] / 0.07)
        hits.append(votes.argmax() == wanted)
    found = probe_accuracies(tensor(train), torch.tensor(labels), tensor(test), torch.tensor(expected))
    assert found["knn"] == pytest.approx(100 * np.mean(hits))


@pytest.mark.parametrize("classes", [2, 3])
def test_the_linear_probe_is_logistic_regression(rng, classes):
    labels, expected = rng.integers(0, classes, 90), rng.integers(0, classes, 600)
    centers = rng.normal(size=(classes, 6))
    train, test = (7 * (0.5 * centers[y] + rng.normal(size=(len(y), 6))) + 3 for y in (labels, expected))
    mean, std = train.mean(0), train.std(0)
    x, others = (train - mean) / std, (test - mean) / std

    def loss(flat):
        weight, bias = flat[classes:].reshape(6, classes), flat[:classes]
        return -log_softmax(x @ weight + bias, 1)[np.arange(90), labels].mean() + 5e-4 * (weight**2).sum()

    flat = minimize(loss, np.zeros(7 * classes), tol=1e-10).x
    score = ((others @ flat[classes:].reshape(6, classes) + flat[:classes]).argmax(1) == expected).mean()
    found = probe_accuracies(tensor(train), torch.tensor(labels), tensor(test), torch.tensor(expected))
    assert 40 < found["linear"] == pytest.approx(100 * score, abs=0.2)  # one image


def test_the_embedding_in_a_result():
    x, tokens = torch.randn(2, 8), torch.randn(2, 5, 8)
    assert embedding_of(x) is not None
    for result in (
        x,
        {"last_hidden_state": tokens, "pooler_output": x},
        types.SimpleNamespace(pooler_output=x[:, :, None, None]),
        types.SimpleNamespace(pooler_output=None, image_embeds=x),
    ):
        assert torch.equal(embedding_of(result), x)
    for result in (tokens, torch.randn(2, 8, 3, 3), {"last_hidden_state": tokens}, [x]):
        with pytest.raises(TapError, match=r"without an embedding; expected a tensor \[B, D\]"):
            embedding_of(result)
