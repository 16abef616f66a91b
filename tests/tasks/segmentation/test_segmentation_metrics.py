"""Confusion matrix and mIoU against scikit-learn, and evaluation of models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from mdistiller.tasks.segmentation.evaluate import classify, confusion, evaluate_segmenter, metrics_of
from mdistiller.training.distributed import World
from mdistiller.types import Batch

NAMES = ("a", "b", "c", "d", "e")


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 4, (3, 20, 30)), rng.integers(0, 4, (3, 20, 30))
    label[rng.random(label.shape) < 0.2] = -100
    keep = label != -100
    matrix = confusion(torch.tensor(predicted), torch.tensor(label), 5)
    assert np.array_equal(matrix.numpy(), confusion_matrix(label[keep], predicted[keep], labels=range(5)))
    found = metrics_of(matrix, NAMES)
    each = jaccard_score(label[keep], predicted[keep], labels=range(4), average=None)
    assert [found["classes"][n] for n in NAMES[:4]] == pytest.approx(100 * each)
    assert found["classes"]["e"] is None  # neither there nor predicted
    assert found["mIoU"] == pytest.approx(100 * each.mean())
    assert found["pixel_accuracy"] == pytest.approx(100 * accuracy_score(label[keep], predicted[keep]))
    rows = confusion_matrix(label[keep], predicted[keep])
    assert found["mean_accuracy"] == pytest.approx(100 * (rows.diagonal() / rows.sum(1)).mean())


def test_a_class_that_is_only_predicted_counts_as_zero():
    found = metrics_of(torch.tensor([[3, 1], [0, 0]]), ("a", "b"))
    assert found["classes"] == {"a": 75.0, "b": 0.0}
    assert found["mIoU"] == 37.5
    assert found["mean_accuracy"] == 75.0


class Thirds(torch.nn.Module):
    """The class of a pixel is a third of its image's first channel."""

    def forward(self, image):
        return torch.stack([-(image[:, 0] - i).abs() for i in range(3)], 1)


def test_predictions_are_scaled_to_the_masks():
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0, :, 2:] = 1
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    label[:, :, 4:] = 1
    label[0, 0] = -100
    model = Thirds().train()
    found = evaluate_segmenter(
        model,
        [Batch(image, label, torch.zeros(1))],
        SimpleNamespace(classes=("a", "b", "c")),
        World(torch.device("cpu")),
    )
    assert found["pixel_accuracy"] == 100.0
    assert found["mIoU"] == 100.0
    assert found["classes"] == {"a": 100.0, "b": 100.0, "c": None}
    assert model.training
    assert classify(model(image), (8, 8)).shape == (1, 8, 8)
