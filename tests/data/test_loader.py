from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mdistiller.data import ImageSet, make_loader
from mdistiller.data.dataset import Splits, StreamSet, TensorStream
from mdistiller.data.loader import PlainBatches, ResidentLoader, StreamLoader, evaluation_size
from mdistiller.errors import ConfigError, DataError
from mdistiller.seeding import derive_seed
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import training_images

# Python 3.12 and later say so whenever a process with threads (torch's) forks a DataLoader's workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def numbered(count):
    """Images filled with their own number."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 4, 4, 3)
    return ImageSet(images=images, labels=torch.arange(count) % 3)


def stream(count):
    images = numbered(count)
    return TensorStream(images=images.images, labels=images.labels, image_size=4)


def indices(loader, epoch):
    return torch.cat([batch.index for batch in loader.epoch(epoch)]).tolist()


@pytest.mark.parametrize("make", [numbered, stream])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_hold_what_their_index_says(make, shuffle):
    data = make(25)
    loader = make_loader(data, 8, device="cpu", seed=1, shuffle=shuffle, workers=0)
    batches = list(loader.epoch(0))
    assert [len(batch.label) for batch in batches] == [8, 8, 8, 1]
    assert len(loader) == 4
    for image, label, index, _ in batches:
        assert image.dtype == torch.uint8
        assert image.shape[1:] == (4, 4, 3)
        assert label.dtype == index.dtype == torch.int64
        assert torch.equal(image[:, 0, 0, 0], index.to(torch.uint8))
        assert torch.equal(label, data.labels[index])
    found = torch.cat([batch.index for batch in batches]).tolist()
    assert sorted(found) == list(range(25))
    assert (found == list(range(25))) is not shuffle


def test_order_depends_on_seed_and_epoch_alone():
    def fresh(seed=3, data=None, **settings):
        return make_loader(data or numbered(50), 7, device="cpu", seed=seed, **settings)

    loader = fresh()
    orders = [indices(loader, epoch) for epoch in range(3)]
    torch.manual_seed(123)
    assert indices(fresh(), 2) == orders[2], "no need to walk through the epochs before"
    assert indices(fresh(data=stream(50), workers=0), 1) == orders[1]
    assert indices(fresh(seed=4), 0) != orders[0]
    assert orders[0] != orders[1]
    # (seed, epoch) pairs with equal sums or swapped are unrelated too.
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_global_random_numbers_are_left_alone():
    for data in (numbered(10), stream(10)):
        before = torch.get_rng_state()
        indices(make_loader(data, 4, device="cpu", workers=0), 0)
        assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), world=st.integers(1, 6), per_rank=st.integers(1, 5), epoch=st.integers(0, 3))
def test_ranks_share_an_epoch(size, world, per_rank, epoch):
    def ranks(shuffle):
        return [
            ResidentLoader(
                numbered(size), per_rank, device="cpu", seed=9, shuffle=shuffle, rank=rank, world_size=world
            )
            for rank in range(world)
        ]

    training = ranks(shuffle=True)
    assert len({len(loader) for loader in training}) == 1
    orders = [indices(loader, epoch) for loader in training]
    assert len({len(order) for order in orders}) == 1
    assert {i for order in orders for i in order} == set(range(size))
    assert sum(map(len, orders)) < size + world
    # Dealt out in turn: together the ranks' i-th batches are one process's large batch.
    dealt = [orders[k % world][k // world] for k in range(size)]
    alone = ResidentLoader(numbered(size), 1, device="cpu", seed=9)
    assert dealt == indices(alone, epoch)

    evaluation = [loader.order(epoch).tolist() for loader in ranks(shuffle=False) if loader.samples]
    assert sorted(i for order in evaluation for i in order) == list(range(size))


def test_a_rank_without_test_images_has_no_batches():
    loader = make_loader(numbered(2), 4, device="cpu", shuffle=False, rank=2, world_size=3)
    assert len(loader) == 0
    assert list(loader.epoch(0)) == []


def test_drop_last():
    loader = make_loader(numbered(10), 4, device="cpu", drop_last=True)
    assert len(loader) == 2
    assert [len(batch.label) for batch in loader.epoch(0)] == [4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 11, "drop_last": True}, "batch_size: got 11, but there are 10 images"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank: got 2, allowed are 0 to world_size - 1 = 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_loader(numbered(10), device="cpu", **settings)


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="empty"):
        make_loader(numbered(0), 4, device="cpu")


def test_workers_change_nothing():
    alone = StreamLoader(stream(20), 6, device="cpu", seed=2, workers=0)
    two = StreamLoader(stream(20), 6, device="cpu", seed=2, workers=2)
    for epoch in (0, 1, 0):
        for one, other in zip(alone.epoch(epoch), two.epoch(epoch), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def test_an_epoch_may_be_left_early():
    loader = StreamLoader(stream(20), 6, device="cpu", seed=2, workers=2)
    next(loader.epoch(0))
    assert indices(loader, 1) == indices(make_loader(numbered(20), 6, device="cpu", seed=2), 1)


class Failing(StreamSet):
    """Every third image cannot be read."""

    def read(self, index, seed):
        if index % 3 == 0:
            raise DataError(f"image {index} is broken")
        return torch.full((2, 2, 3), index, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_raise_or_are_left_out(workers):
    labels = torch.arange(9)
    loader = make_loader(Failing(labels=labels), 4, device="cpu", shuffle=False, workers=workers)
    with pytest.raises(DataError, match=r"^image 0 is broken$"):
        list(loader.epoch(0))
    loader = make_loader(
        Failing(labels=labels, on_error="skip"), 4, device="cpu", shuffle=False, workers=workers
    )
    with pytest.warns(UserWarning, match="left out 3 images that"):
        batches = list(loader.epoch(0))
    assert [batch.index.tolist() for batch in batches] == [[1, 2], [4, 5, 7], [8]]
    assert all(torch.equal(batch.label, batch.index) for batch in batches)
    loader = make_loader(
        Failing(labels=labels, on_error="skip"), 1, device="cpu", shuffle=False, workers=workers
    )
    with pytest.warns(UserWarning, match="left out 3 images that"):
        assert [batch.index.tolist() for batch in loader.epoch(0)] == [[1], [2], [4], [5], [7], [8]]
    loader = make_loader(
        Failing(labels=labels[:1], on_error="skip"), 1, device="cpu", shuffle=False, workers=workers
    )
    with pytest.raises(DataError, match="image 0 is broken"):
        list(loader.epoch(0))
    loader = make_loader(Failing(labels=labels, on_error="skip"), 1, device="cpu", workers=workers)
    with pytest.raises(DataError, match="is broken"):  # a step cannot be left out
        list(loader.epoch(0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(2).long()},
        {"images": torch.zeros(2, 4, 4, 3), "labels": torch.zeros(2).long()},
        {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "labels": torch.zeros(3).long()},
        {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "labels": torch.zeros(2)},
    ],
)
def test_image_set_checks_itself(wrong):
    with pytest.raises(ValueError, match="need"):
        ImageSet(**wrong)


@pytest.mark.parametrize(
    ("side", "size", "wanted"), [(32, None, 500), (64, None, 500), (224, None, 41), (224, 7, 7)]
)
def test_an_evaluation_batch_has_a_number_of_pixels(side, size, wanted):
    images = ImageSet(
        images=torch.zeros(510, side, side, 3, dtype=torch.uint8), labels=torch.zeros(510, dtype=torch.int64)
    )
    triple = (0.5, 0.5, 0.5)
    about = {"classes": ("a", "b"), "mean": triple, "std": triple, "image_size": side}
    splits = Splits(train=images, test=images, description="zeros", **about)
    config = ClassificationConfig(student="resnet8", eval_batch_size=size)
    assert PlainBatches(splits.test, splits, size, device="cpu").loader.batch_size == wanted
    assert next(iter(training_images(config, splits))).image.shape[0] == wanted


def test_an_image_of_any_size_is_evaluated():
    assert evaluation_size(None, 4096) == 1
