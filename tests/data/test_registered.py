"""Data sets that a user registers."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mdistiller.data import DataConfig, ImageSet, Splits, StreamSet, load_data, make_loader
from mdistiller.data.dataset import TensorStream
from mdistiller.data.registry import _DATASETS, list_datasets, register_dataset
from mdistiller.errors import ConfigError

BUILT_IN = ("cifar10", "cifar100", "digits", "folder", "hf", "synthetic", "tiny-imagenet")


@pytest.fixture(autouse=True)
def _registry():
    """A registry that forgets the names of a test."""
    known = dict(_DATASETS)
    yield
    _DATASETS.clear()
    _DATASETS.update(known)


def splits(train, test, image_size=8):
    return Splits(
        train=train,
        test=test,
        classes=("a", "b", "c"),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=image_size,
        description="blobs",
    )


def images(count):
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(images=pixels, labels=torch.arange(count) % 3)


@pytest.fixture
def blobs():
    @register_dataset("my-blobs")
    def read(config):
        assert config.kind == "my-blobs"
        return splits(images(30), images(12))

    return read


def test_the_built_in_sets_are_registered():
    assert tuple(list_datasets()) == BUILT_IN


def test_a_registered_set_is_read_whole(blobs):
    config = DataConfig(kind="my-blobs")
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
    found = load_data(config)
    assert isinstance(found.train, ImageSet)
    assert torch.equal(found.train.images, images(30).images)
    assert torch.equal(found.test.labels, images(12).labels)
    assert found.description == "blobs: 30 training and 12 test images, 8x8, 3 classes"
    assert blobs(config).classes == found.classes  # the function is given back


def test_limits_noise_and_statistics(blobs):
    config = DataConfig(kind="my-blobs", train_limit=15, test_limit=6, label_noise=0.2, mean=(0, 0, 0))
    found = load_data(config)
    assert found.test.labels.bincount().tolist() == [2, 2, 2]
    assert "15 training and 6 test images" in found.description
    assert "3 training labels (20.0%) replaced" in found.description
    assert (found.mean, found.std) == ((0, 0, 0), (0.25, 0.25, 0.25))
    clean = load_data(config.replace(label_noise=0.0))
    assert clean.train.labels.bincount().tolist() == [5, 5, 5]
    assert (found.train.labels != clean.train.labels).sum() == 3


@pytest.mark.parametrize(
    "settings", [{"memory": "stream"}, {"memory": "auto", "memory_limit_gb": 42 * 8 * 8 * 3 / 1e9 * 0.99}]
)
def test_streamed_equals_resident(blobs, settings):
    resident = load_data(DataConfig(kind="my-blobs", image_size=6, train_limit=9))
    stream = load_data(DataConfig(kind="my-blobs", image_size=6, train_limit=9, **settings))
    if settings["memory"] == "auto":
        assert isinstance(load_data(DataConfig(kind="my-blobs", **settings)).train, StreamSet)
        return
    assert stream.description.endswith("streamed")
    ours, theirs = (
        next(make_loader(s.train, 9, device="cpu", seed=1, workers=0).epoch(0)) for s in (stream, resident)
    )
    assert ours.image.shape == (9, 6, 6, 3)
    assert torch.equal(ours.image, theirs.image)
    assert torch.equal(ours.label, theirs.label)


def test_a_registered_stream(monkeypatch):
    class Numbers(StreamSet):
        def read(self, index, seed):
            return torch.full((8, 8, 3), index, dtype=torch.uint8)

    @register_dataset("numbers")
    def read(config):
        return splits(Numbers(labels=torch.arange(6) % 3), images(3))

    found = load_data(DataConfig(kind="numbers", label_noise=0.5))
    assert isinstance(found.train, Numbers)
    assert isinstance(found.test, ImageSet)
    assert "3 training labels" in found.description
    assert isinstance(load_data(DataConfig(kind="numbers", memory="stream")).test, TensorStream)
    with pytest.raises(
        ConfigError, match=r"memory: data set 'numbers' is a stream; allowed are auto and str"
    ):
        load_data(DataConfig(kind="numbers", memory="resident"))
    with pytest.raises(ConfigError, match=r"train_limit.*Numbers has no method select"):
        load_data(DataConfig(kind="numbers", train_limit=3))


def test_unknown_names_list_the_nearest(blobs):
    with pytest.raises(ValidationError, match=r"kind\n.*unknown data set 'my-blob'; nearest: my-blobs"):
        DataConfig(kind="my-blob")
    with pytest.raises(ConfigError, match=r"kind: unknown data set 'cifar'; nearest: cifar10"):
        DataConfig().replace(kind="cifar")


def test_names_that_are_taken_or_not_allowed(blobs):
    def other(config):
        return splits(images(3), images(3))

    with pytest.raises(
        ConfigError, match=r"data set name 'digits' is taken by mdistiller\.data\.synthetic\.load"
    ):
        register_dataset("digits")(other)
    for name in ("", "my blobs", "a/b"):
        with pytest.raises(ConfigError, match=f"data set name '{name}': allowed are letters"):
            register_dataset(name)(other)
    register_dataset("my-blobs")(blobs)  # the same again, as in a plug-in that is imported twice


def test_a_function_that_returns_something_else():
    @register_dataset("pair")
    def read(config):
        return images(3), images(3)

    with pytest.raises(ConfigError, match="data: train is a ImageSet; allowed: a Dataset with a length"):
        load_data(DataConfig(kind="pair"))


def test_a_function_may_return_datasets_or_tensors():
    class Items(torch.utils.data.Dataset):
        classes = ("a", "b", "c")

        def __len__(self):
            return 6

        def __getitem__(self, index):
            if index >= 6:
                raise IndexError(index)
            pixels = torch.full((3, 8, 8), index * 40, dtype=torch.uint8)
            return (pixels, index % 3) if index < 4 else (pixels, None) if index == 4 else pixels

    @register_dataset("pairs")
    def pairs(config):
        return Items(), (images(6).images, images(6).labels)

    found = load_data(DataConfig(kind="pairs"))
    assert found.classes == ("a", "b", "c")
    assert found.train.images[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]
    assert found.train.labels.tolist() == [0, 1, 2, 0, -100, -100]
    assert torch.equal(found.test.images, images(6).images)
    assert found.description.startswith("images of pairs: 6 training (2 of them without a class) and 6 test")

    @register_dataset("unknown")
    def unknown(config):
        return (images(6).images, None), (images(6).images, images(6).labels)

    found = load_data(DataConfig(kind="unknown"))
    assert found.train.labels.tolist() == [-100] * 6
    assert found.num_classes == 3

    @register_dataset("wrong")
    def wrong(config):
        return [1, 2, 3]

    with pytest.raises(ConfigError, match=r"got a list, need Splits or \(train, test\)"):
        load_data(DataConfig(kind="wrong"))


def test_deep_images_of_a_dataset_are_converted_as_files_are():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)

    def load(image):
        name = f"deep-{image.mode.replace(';', '-')}"
        register_dataset(name)(lambda config: ([(image, 0), (image, 1)],) * 2)
        return load_data(DataConfig(kind=name)).train.images[0, ..., 0].numpy()

    assert np.array_equal(load(Image.fromarray(values)), values >> 8)
    for wrong in (values.astype(np.int32), np.float32(values / 65535)):
        with pytest.raises(ConfigError, match=r"train\[0\]: it has values from 0 to "):
            load(Image.fromarray(wrong))
