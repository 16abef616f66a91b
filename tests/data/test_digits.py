from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch import nn
from torch.nn import functional as F

from mdistiller.data import Augment, AugmentConfig, DataConfig, load_data, make_loader


def test_digits_split():
    splits = load_data(DataConfig(kind="digits"))
    assert splits.train.images.shape == (1297, 16, 16, 3)
    assert splits.test.images.shape == (500, 16, 16, 3)
    assert splits.classes == tuple("0123456789")
    whole = torch.from_numpy(sklearn_digits().target).bincount()
    assert torch.equal(splits.train.labels.bincount() + splits.test.labels.bincount(), whole)
    assert ((splits.test.labels.bincount() - whole * 500 / 1797).abs() < 1).all()
    again, other = load_data(DataConfig(kind="digits")), load_data(DataConfig(kind="digits", seed=1))
    assert torch.equal(again.train.images, splits.train.images)
    assert not torch.equal(other.test.labels, splits.test.labels)


def test_digits_at_their_own_size_are_scikit_learns():
    splits = load_data(DataConfig(kind="digits", image_size=8))
    seen = torch.cat([splits.train.images, splits.test.images])
    assert torch.equal(seen[..., 0], seen[..., 2])
    theirs = sklearn_digits().images
    assert sorted(map(tuple, (seen[..., 0].flatten(1).numpy() * (16 / 255)).round().tolist())) == sorted(
        map(tuple, theirs.reshape(len(theirs), -1).tolist())
    )


def test_digits_are_scaled_as_pillow_does():
    small, large = (load_data(DataConfig(kind="digits", image_size=size)) for size in (8, 16))
    for i in range(20):
        theirs = Image.fromarray(small.train.images[i].numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        assert np.abs(large.train.images[i].numpy().astype(int) - np.asarray(theirs)).max() <= 1


def test_digits_are_normalized():
    splits = load_data(DataConfig(kind="digits"))
    pixels = torch.cat([splits.train.images, splits.test.images]).float() / 255
    assert pixels.mean() == pytest.approx(splits.mean[0], abs=1e-3)
    assert pixels.std() == pytest.approx(splits.std[0], abs=1e-3)


def test_synthetic_is_deterministic_and_balanced():
    config = DataConfig(kind="synthetic", synthetic_classes=7, synthetic_samples=100, image_size=12)
    one, two = load_data(config), load_data(config)
    assert one.train.images.shape == (100, 12, 12, 3)
    assert len(one.test) == 50
    assert torch.equal(one.train.images, two.train.images)
    assert set(one.train.labels.bincount().tolist()) == {14, 15}
    other = load_data(config.model_copy(update={"seed": 1}))
    assert not torch.equal(other.train.images, one.train.images)


def test_synthetic_is_learnt_in_a_few_steps():
    torch.manual_seed(0)
    splits = load_data(DataConfig(kind="synthetic", image_size=16))
    augment = Augment(AugmentConfig(padding=1), splits.mean, splits.std, splits.num_classes)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(10):
        for batch in make_loader(splits.train, 32, device="cpu").epoch(epoch):
            image, label, _ = augment(batch)[:3]
            loss = F.cross_entropy(model(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    augment.eval()
    image, label, _ = augment(next(make_loader(splits.test, 128, device="cpu", shuffle=False).epoch(0)))[:3]
    assert (model(image).argmax(1) == label).float().mean() > 0.9
