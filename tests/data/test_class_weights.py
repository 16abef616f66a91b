"""Weights of classes by their numbers of images."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight

from mdistiller.data.labels import balanced_weights

LABELS = torch.tensor([0] * 40 + [1] * 8 + [2] * 3 + [-100] * 6 + [3] * 6)[torch.randperm(63)]


def test_weights_as_scikit_learn():
    labels = LABELS[LABELS >= 0]
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels.numpy())
    torch.testing.assert_close(balanced_weights(LABELS, 4), torch.tensor(expected).float())
    weights = balanced_weights(LABELS, 6)
    assert weights[4:].tolist() == [0, 0]
    by_image = torch.tensor(compute_sample_weight("balanced", labels.numpy())).float()
    torch.testing.assert_close(weights[labels], by_image)
    assert weights[labels].mean().item() == pytest.approx(1)
