"""Features collected from a model and measured; against scikit-learn's own cross-validation."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import silhouette_samples
from sklearn.metrics.pairwise import cosine_distances
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import mdistiller
from mdistiller.data import DataConfig, load_data
from mdistiller.data.loader import PlainBatches
from mdistiller.errors import DataError, UnknownNameError
from mdistiller.tasks.classification.report.measures import separability
from mdistiller.tasks.classification.report.outputs import collect


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """150 digits of five classes, as pixels: [150, 64] and their class ids."""
    data, target = load_digits(n_class=5, return_X_y=True)
    return torch.from_numpy(data[:150]).float(), torch.from_numpy(target[:150]).long()


def test_collect_is_the_model_asked_by_hand():
    splits = load_data(DataConfig(kind="synthetic", image_size=16, synthetic_samples=40))
    torch.manual_seed(0)
    model = mdistiller.create_model("resnet8", num_classes=10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = PlainBatches(splits.test, splits, 8, device="cpu")
    found = collect(model, batches)

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    images = (splits.test.images.permute(0, 3, 1, 2) / 255 - torch.tensor(splits.mean)[:, None, None]) / (
        torch.tensor(splits.std)[:, None, None]
    )
    with torch.no_grad():
        logits = model.eval()(images)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.label, splits.test.labels)
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(head(found.features), found.logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnknownNameError):
        collect(model, batches, feature="poled")


def test_knn_is_leave_one_out(digits):
    x, y = digits
    x = x + 12 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    expected = cross_val_score(
        KNeighborsClassifier(10, metric="cosine"), x.numpy(), y.numpy(), cv=LeaveOneOut()
    ).mean()
    assert separability(x, y).knn == pytest.approx(100 * expected)
    assert 0.3 < expected < 0.95


def test_silhouette_is_the_formula(digits):
    """Of each sample (b - a) / max(a, b): a its mean distance to its class, b to the nearest other."""
    x, y = digits
    distance = torch.from_numpy(cosine_distances(x.numpy()))
    values = []
    for i in range(len(y)):
        means = [distance[i][y == k].mean() for k in range(5)]
        own = distance[i][y == y[i]].sum() / ((y == y[i]).sum() - 1)
        other = min(m for k, m in enumerate(means) if k != y[i])
        values.append((other - own) / max(own, other))
    found = separability(x, y).silhouette
    assert found == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)
    assert found == pytest.approx(silhouette_samples(x.numpy(), y.numpy(), metric="cosine").mean(), rel=1e-6)


def test_separability_knows_no_scale_and_falls_with_noise(digits):
    x, y = digits
    clear = separability(x, y)
    assert separability(100 * x, y) == pytest.approx(clear, rel=1e-4)
    noisy = separability(x + 20 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), y)
    assert noisy.silhouette < clear.silhouette / 2
    assert noisy.knn < clear.knn - 10


@pytest.mark.parametrize(
    ("label", "words"),
    [([0] * 20, "got 1 classes"), (list(range(20)), "got 20 classes"), ([0, 1] * 5, "10 samples")],
)
def test_too_little_to_measure(label, words):
    with pytest.raises(DataError, match=words):
        separability(torch.randn(len(label), 3), torch.tensor(label))
