from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from scipy.stats import chisquare

from mdistiller.data import AugmentConfig, DataConfig, load_data
from mdistiller.data.labels import add_label_noise, balanced_subset


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    limit=st.integers(1, 50),
    seed=st.integers(0, 3),
)
def test_subset_is_as_even_as_the_classes_allow(labels, limit, seed):
    labels = torch.tensor(labels)
    chosen = balanced_subset(labels, limit, seed)
    assert len(chosen) == min(limit, len(labels))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    counts = labels[chosen].bincount(minlength=5)
    had = labels.bincount(minlength=5)
    # No class could give one more to another that has fewer: a class below the largest is used up.
    assert all(c >= counts.max() - 1 or c == h for c, h in zip(counts, had, strict=True))
    assert torch.equal(chosen, balanced_subset(labels, limit, seed))


def test_subset_follows_the_seed_and_none_keeps_all():
    labels = torch.arange(10).repeat(20)
    assert not torch.equal(balanced_subset(labels, 50, 0), balanced_subset(labels, 50, 1))
    assert torch.equal(balanced_subset(labels, None, 0), torch.arange(200))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.333, 1.0])
def test_noise_rate_is_exact_and_symmetric(rate):
    labels = torch.arange(5).repeat(2000)
    noisy = add_label_noise(labels, rate, 5, seed=3)
    changed = noisy != labels
    assert changed.sum() == round(rate * 10_000)
    assert torch.equal(noisy, add_label_noise(labels, rate, 5, seed=3))
    assert labels.equal(torch.arange(5).repeat(2000)), "the caller's labels stay"
    if rate:
        assert not torch.equal(noisy, add_label_noise(labels, rate, 5, seed=4))
        shift = (noisy - labels)[changed] % 5
        assert chisquare(shift.bincount(minlength=5)[1:].numpy()).pvalue > 1e-4


def test_limits_and_noise_of_a_data_set():
    settings = {
        "kind": "synthetic",
        "synthetic_samples": 100,
        "label_noise": 0.25,
        "train_limit": 40,
        "test_limit": 20,
    }
    noisy, clean = (
        load_data(DataConfig(**settings)),
        load_data(DataConfig(**{**settings, "label_noise": 0.0})),
    )
    assert (len(noisy.train), len(noisy.test)) == (40, 20)
    assert (noisy.train.labels != clean.train.labels).sum() == 10
    assert torch.equal(noisy.train.images, clean.train.images)
    assert torch.equal(noisy.test.labels, clean.test.labels)
    assert clean.train.labels.bincount().tolist() == [4] * 10
    assert "10 training labels (25.0%) replaced" in noisy.description
    assert "replaced" not in clean.description


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "mnist"},
        {"label_noise": 1.1},
        {"label_noise": -0.1},
        {"seed": -1},
        {"train_limit": 0},
        {"image_size": 0},
        {"color": 1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DataConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"padding": -1}, {"mixup_alpha": -0.1}, {"cutmix_alpha": -1.0}])
def test_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        AugmentConfig(**wrong)
