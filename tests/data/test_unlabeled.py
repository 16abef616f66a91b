"""Images without a class in folders and lists, and labels that are real numbers."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_layouts import CLASSES, config, fill, rows, write, write_list

from mdistiller.data import Augment, AugmentConfig, DataConfig, ImageSet, load_data, register_dataset
from mdistiller.data.draws import Draws
from mdistiller.data.labels import add_label_noise, balanced_subset, stratified_cut
from mdistiller.data.registry import _DATASETS
from mdistiller.errors import DataError
from mdistiller.types import Batch


def counts(images):
    return dict(Counter(images.labels.tolist()))


def set_of(root):
    fill(root / "train", 4)
    fill(root / "val", 2)
    for i in range(5):
        write(root / "unlabeled" / "any" / f"{i}.png")
    return root


def test_a_folder_of_images_without_a_class(tmp_path):
    splits = load_data(config(set_of(tmp_path)))
    assert splits.classes == CLASSES
    assert counts(splits.train) == {0: 4, 1: 4, 2: 4, -100: 5}
    assert counts(splits.test) == {0: 2, 1: 2, 2: 2}
    assert "17 training (5 of them without a class) and 6 test images" in splits.description
    for path, label in zip(splits.train.samples, splits.train.labels.tolist(), strict=True):
        assert ("unlabeled" in Path(path).parts) == (label == -100)
    assert counts(load_data(config(tmp_path), unlabeled=False).train) == {0: 4, 1: 4, 2: 4}
    (tmp_path / "unlabeled").rename(tmp_path / "Unlabelled")
    assert counts(load_data(config(tmp_path, memory="resident")).train)[-100] == 5


def test_class_folders_alone_with_images_without_a_class(tmp_path):
    fill(tmp_path, 10)
    for i in range(7):
        write(tmp_path / "unlabeled" / f"{i}.png")
    splits = load_data(config(tmp_path, val_fraction=0.2))
    assert splits.classes == CLASSES
    assert counts(splits.train) == {0: 8, 1: 8, 2: 8, -100: 7}
    assert counts(splits.test) == {0: 2, 1: 2, 2: 2}


def test_no_training_image_has_a_class(tmp_path):
    fill(tmp_path / "val", 2)
    for i in range(5):
        write(tmp_path / "unlabeled" / f"{i}.png")
    splits = load_data(config(tmp_path))
    assert splits.classes == CLASSES
    assert counts(splits.train) == {-100: 5}
    with pytest.raises(
        DataError, match=r"no training image in .* has a class, which a run without a teacher"
    ):
        load_data(config(tmp_path), unlabeled=False)
    fill(tmp_path, 1, ("ant",))  # a folder in the wrong place is not passed over
    with pytest.raises(DataError, match="no train/"):
        load_data(config(tmp_path))


def test_lists_with_empty_labels(tmp_path):
    lines = rows(tmp_path, "pictures", 4)
    lines[3] = (lines[3][0], "")
    write_list(tmp_path / "train.csv", lines)
    write_list(tmp_path / "val.csv", lines)
    with pytest.warns(UserWarning, match="left out: 1 test images without a class"):
        splits = load_data(config(tmp_path))
    assert counts(splits.train) == {0: 3, 1: 4, 2: 4, -100: 1}
    assert str(splits.train.samples[-1]) == str(tmp_path / lines[3][0])
    assert counts(splits.test) == {0: 3, 1: 4, 2: 4}
    write_list(tmp_path / "train.csv", [(path, "") for path, _ in lines])
    with pytest.warns(UserWarning, match="left out"):
        splits = load_data(config(tmp_path))
    assert (splits.classes, counts(splits.train)) == (CLASSES, {-100: 12})


@pytest.mark.parametrize("labels", [("0.5", "1", "-3.25"), ("1e-3", "2.5e1", "")])
def test_regression_is_not_supported(tmp_path, labels):
    fill(tmp_path, 3, ("a",))
    path = write_list(tmp_path / "l.csv", [(f"a/a_{i}.png", label) for i, label in enumerate(labels)])
    with pytest.raises(DataError, match=r"label: got real numbers such as .*; regression is not supported"):
        load_data(config(path, val_fraction=0.5))


@pytest.mark.parametrize("labels", [("1.0", "2.0"), ("0.5", "high"), ("nan", "0.5")])
def test_numbers_that_are_names(tmp_path, labels):
    fill(tmp_path, 4, ("a",))
    path = write_list(tmp_path / "l.csv", [(f"a/a_{i}.png", labels[i % 2]) for i in range(4)])
    assert set(load_data(config(path, val_fraction=0.5)).classes) == set(labels)


# Labels


def test_images_without_a_class_are_neither_cut_nor_changed():
    labels = torch.tensor([0] * 20 + [-100] * 30 + [1] * 20)
    train, validation = stratified_cut(labels, 0.5, 0)
    assert labels[validation].unique().tolist() == [0, 1]
    assert (labels[train] == -100).sum() == 30
    noisy = add_label_noise(labels, 0.5, 2, 0)
    assert (noisy != labels).sum() == 20
    assert torch.equal(noisy == -100, labels == -100)
    assert labels[balanced_subset(labels, 9, 0)].unique(return_counts=True)[1].tolist() == [3, 3, 3]


def test_noise_of_full_labels_is_as_before():
    """The draw before images without a class were known, in numpy."""
    labels = torch.arange(50) % 5
    rng = np.random.default_rng([3, 2])
    where = rng.permutation(50)[:20]
    expected = labels.numpy().copy()
    expected[where] = (expected[where] + rng.integers(1, 5, 20)) % 5
    assert add_label_noise(labels, 0.4, 5, 3).tolist() == expected.tolist()


def test_blends_with_images_without_a_class():
    augment = Augment(AugmentConfig(mixup_alpha=1.0, padding=0), (0, 0, 0), (1, 1, 1), 3).train()
    image = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    label = torch.tensor([0, -100, 2, -100])
    draw = augment.draw(image, Draws(0, torch.arange(4)), torch.Generator().manual_seed(1))
    (mixed,) = augment.change([Batch(image, label, torch.arange(4))], [draw])
    w, partner = draw.mix.weight.item(), draw.mix.partner.tolist()
    rows_of = np.zeros((4, 3))
    rows_of[0, 0] = rows_of[2, 2] = 1
    assert np.allclose(mixed.label.numpy(), w * rows_of + (1 - w) * rows_of[partner])


def partly_labeled(config):
    splits = load_data(DataConfig(kind="digits", image_size=8))
    part = ImageSet(images=splits.train.images[:20], labels=torch.arange(20) % 10)
    labels = torch.where(torch.arange(20) < 10, part.labels, -100)
    return replace(splits, train=replace(part, labels=labels), test=replace(part, labels=labels))


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_dataset("partly_labeled")(partly_labeled)
    yield
    del _DATASETS["partly_labeled"]


def test_a_registered_set():
    with pytest.warns(UserWarning, match="left out: 10 test images"):
        splits = load_data(DataConfig(kind="partly_labeled", image_size=8))
    assert (len(splits.train), len(splits.test)) == (20, 10)


def paint(root):
    """Gives each image below a folder noise of its own."""
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def test_extra_images_without_a_class(tmp_path):
    fill(tmp_path / "set" / "train", 4)
    fill(tmp_path / "set" / "val", 2)
    for i in range(5):
        write(tmp_path / "more" / "deep" / f"{i}.png")
    paint(tmp_path)
    plain = load_data(config(tmp_path / "set"))
    joined = load_data(config(tmp_path / "set", unlabeled=tmp_path / "more"))
    assert counts(joined.train) == {0: 4, 1: 4, 2: 4, -100: 5}
    assert counts(joined.test) == counts(plain.test)
    for memory in ("stream", "resident"):
        found = load_data(
            config(tmp_path / "set", unlabeled=tmp_path / "more", memory=memory, image_size=16)
        ).train
        read = [found.images[i] if memory == "resident" else found.read(i, 0) for i in range(17)]
        files = [
            *load_data(config(tmp_path / "set", memory="stream", image_size=16)).train.samples,
            *sorted((tmp_path / "more" / "deep").iterdir()),
        ]
        for pixels, file in zip(read, files, strict=True):
            expected = load_data(config(tmp_path / "set", memory="stream", image_size=16)).train
            expected = replace(expected, samples=np.array([file], dtype=object)).read(0, 0)
            assert torch.equal(pixels, expected)
        assert len({pixels.numpy().tobytes() for pixels in read}) == 17
    alone = load_data(config(tmp_path / "set", unlabeled=tmp_path / "more"), unlabeled=False)
    assert counts(alone.train) == counts(plain.train)


def test_extra_images_beside_arrays(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png")
    paint(tmp_path)
    found = load_data(DataConfig(kind="digits", unlabeled=tmp_path))
    plain = load_data(DataConfig(kind="digits"))
    assert len(found.train) == len(plain.train) + 5
    assert torch.equal(found.train.images[:-5], plain.train.images)
    assert found.train.labels[-5:].tolist() == [-100] * 5
    expected = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(5)]
    np.testing.assert_array_equal(found.train.images[-5:].numpy(), np.stack(expected))


def test_extra_images_that_are_not_there(tmp_path):
    fill(tmp_path / "train", 4)
    fill(tmp_path / "val", 2)
    with pytest.raises(DataError, match=r"data.unlabeled: .*none is no folder"):
        load_data(config(tmp_path, unlabeled=tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data.unlabeled: .*empty has no images, which end in"):
        load_data(config(tmp_path, unlabeled=tmp_path / "empty"))
