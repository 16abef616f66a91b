"""The balanced sampler: shares of the classes, turns of the images, ranks, resuming, crops."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight
from test_loader import numbered, stream

from mdistiller.data import DataConfig, ImageSet, load_data, make_loader
from mdistiller.data.labels import balanced_order, balanced_weights, earlier_turns

LABELS = torch.tensor([0] * 40 + [1] * 8 + [2] * 3 + [-100] * 6 + [3] * 6)[torch.randperm(63)]


def draw(labels, seed):
    return balanced_order(labels, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_each_class_comes_equally_often(seed):
    order = draw(LABELS, seed)
    assert len(order) == len(LABELS)
    drawn = Counter(LABELS[order].tolist())
    assert drawn.pop(-100) == 6
    assert sorted(drawn.values()) == [14, 14, 14, 15]
    # The images of a class come in turn: numbers of times differ by one at most.
    for label in range(4):
        own = torch.bincount(order, minlength=63)[label == LABELS]
        assert own.max() - own.min() <= 1


def test_every_image_and_class_has_its_turn():
    """Over many epochs, images of a class and the classes with one image more are equally likely."""
    orders = [draw(LABELS, seed) for seed in range(400)]
    seen = torch.stack([torch.bincount(order, minlength=63) for order in orders]).double().mean(0)
    for label, size in ((0, 40), (1, 8), (2, 3), (3, 6)):
        own = seen[label == LABELS]
        torch.testing.assert_close(own, torch.full_like(own, 57 / 4 / size), atol=0.12, rtol=0.12)
    # Classes do not come in blocks.
    first = torch.stack([LABELS[order[:31]] == 0 for order in orders]).double().mean()
    assert abs(first - 57 / 4 / 63) < 0.02


def test_more_classes_than_images_of_them():
    assert sorted(draw(torch.tensor([5, 9, 7]), 0).tolist()) == [0, 1, 2]
    assert sorted(draw(torch.tensor([-100, -100]), 0).tolist()) == [0, 1]


def test_turns():
    order = torch.tensor([4, 1, 4, 4, 0, 1])
    assert earlier_turns(order).tolist() == [0, 0, 1, 2, 0, 1]


def loader(images, batch_size=4, **order):
    return make_loader(images, batch_size, device="cpu", seed=5, balance=images.labels, **order)


def skewed(count=23):
    images = numbered(count)
    return ImageSet(images=images.images, labels=(torch.arange(count) > 17).long() + 2)


def test_an_epoch_goes_on_where_it_was_left():
    images = skewed()
    for epoch in (0, 3):
        whole = list(loader(images).epoch(epoch))
        rest = list(loader(images).epoch(epoch, 2))
        assert len(rest) == len(whole) - 2
        for one, other in zip(whole[2:], rest, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert not torch.equal(loader(images).order(0), loader(images).order(1))
    assert Counter(images.labels[loader(images).order(0)].tolist()).most_common()[0][1] == 12


def test_ranks_share_the_draw():
    images = skewed(24)
    alone = loader(images).order(1)
    for rank in range(3):
        assert torch.equal(loader(images, rank=rank, world_size=3).order(1), alone[rank::3])
        assert torch.equal(loader(images, rank=rank, world_size=3).turns(1), earlier_turns(alone)[rank::3])


def test_evaluation_keeps_its_order():
    assert loader(skewed(), shuffle=False).order(0).tolist() == list(range(23))


def test_an_image_that_comes_again_has_another_crop(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name, count in (("a", 12), ("b", 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (40, 60, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{i}.png")
    splits = load_data(DataConfig(kind="folder", root=tmp_path, image_size=16, memory="stream"))
    runs = []
    for workers in (0, 2):
        batches = list(loader(splits.train, workers=workers).epoch(0))
        image, label = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("image", "label"))
        runs.append(image)
        again = image[label == 1].flatten(1)
        assert len(again) in (6, 7)
        assert len(again.unique(dim=0)) == len(again)
    assert torch.equal(*runs)


def test_the_ordinary_order_is_unchanged():
    """Orders and crops of runs of before, whose images come once."""
    plain = make_loader(stream(9), 4, device="cpu", seed=5, workers=0)
    assert plain.turns(2).tolist() == [0] * 9
    assert sorted(plain.order(2).tolist()) == list(range(9))


def test_weights_as_scikit_learn():
    labels = LABELS[LABELS >= 0]
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels.numpy())
    torch.testing.assert_close(balanced_weights(LABELS, 4), torch.tensor(expected).float())
    weights = balanced_weights(LABELS, 6)
    assert weights[4:].tolist() == [0, 0]
    by_image = torch.tensor(compute_sample_weight("balanced", labels.numpy())).float()
    torch.testing.assert_close(weights[labels], by_image)
    assert weights[labels].mean().item() == pytest.approx(1)
