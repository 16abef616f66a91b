"""Lists of images with several classes each."""

import numpy as np
import pytest
import torch
from test_layouts import config, fill, write, write_list

from mdistiller.data import Augment, AugmentConfig, ImageSet, load_data, make_loader
from mdistiller.data.draws import Draws
from mdistiller.errors import ConfigError, DataError
from mdistiller.types import Batch

NAMES = [
    ("a/a_0.png", "sky;red car"),
    ("a/a_1.png", ""),
    ("a/a_2.png", "sky"),
    ("a/a_3.png", " red car ; tree"),
]
COLUMNS = [("a/a_0.png", 1, 0, 1), ("a/a_1.png", 0, 0, 0), ("a/a_2.png", 0, 0, 1), ("a/a_3.png", 1, 1, 0)]
HEADER = ("path", "red car", "tree", "sky")
# By image, over the classes red car, sky, tree.
EXPECTED = [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]


def read(root, **settings):
    return load_data(config(root, multi_label=True, **settings))


@pytest.fixture
def root(tmp_path):
    fill(tmp_path, 4, ("a",))
    return tmp_path


def test_names_in_one_column(root):
    write_list(root / "train.csv", NAMES[::-1], ("path", "labels"))
    write_list(root / "val.csv", NAMES[:3], ("path", "tags"))
    with pytest.warns(UserWarning, match="1 of 3 classes have no test image: tree"):
        splits = read(root)
    assert splits.classes == ("red car", "sky", "tree")
    assert splits.multi_label
    assert splits.train.labels.tolist() == EXPECTED
    assert splits.test.labels.tolist() == EXPECTED[:3]
    assert splits.train.labels.dtype == torch.float32
    write_list(root / "val.csv", [("a/a_0.png", "sea")], ("path", "labels"))
    with pytest.raises(DataError, match=r"val.csv: no training image has the classes sea"):
        read(root)


def test_names_between_spaces_and_in_several_rows(root):
    rows = [("a/a_0.png", "sky  car"), ("a/a_1.png", "tree"), ("a/a_0.png", "tree sky")]
    splits = load_data(
        config(write_list(root / "l.csv", rows, ("path", "label")), multi_label=True, val_fraction=0.5)
    )
    assert splits.classes == ("car", "sky", "tree")
    both = torch.cat([splits.train.labels, splits.test.labels]).tolist()
    assert sorted(both) == [[0, 0, 1], [1, 1, 1]]


def test_a_column_for_each_class(root):
    write_list(root / "train.csv", COLUMNS, HEADER)
    swapped = [(file, sky, car, tree) for file, car, tree, sky in COLUMNS]
    write_list(root / "val.csv", swapped, ("path", "sky", "red car", "tree"))
    splits = read(root)
    assert splits.classes == HEADER[1:]
    assert splits.train.labels[:, [0, 2, 1]].tolist() == EXPECTED
    assert torch.equal(splits.train.labels, splits.test.labels)
    write_list(root / "val.csv", [row[:3] for row in COLUMNS], HEADER[:3])
    with pytest.raises(DataError, match="other classes than the training images; missing: sky; added: none"):
        read(root)


def test_unknown_classes_and_images_without_any(root):
    write_list(
        root / "train.csv", [*COLUMNS[:2], ("a/a_2.png", "", "", 1), ("a/a_3.png", "", "", "")], HEADER
    )
    write_list(root / "val.csv", COLUMNS, HEADER)
    write(root / "unlabeled" / "x.png")
    splits = read(root)
    assert splits.train.labels[2:].tolist() == [[-100, -100, 1], [-100] * 3, [-100] * 3]
    assert "5 training (2 of them without a class)" in splits.description
    known = load_data(config(root, multi_label=True), unlabeled=False)
    assert len(known.train) == 3


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            HEADER,
            [("a/a_0.png", 1, 0, 7)],
            r"line 2: got '7' in column 'sky'; the column of a class needs 0 or 1",
        ),
        (HEADER, [("a/a_0.png", 1, 0, 0.37)], "regression is not supported"),
        (("path", "sky"), [("a/a_0.png", 1)], "got the classes sky; need two or more"),
        (("path", "labels"), [("a/a_0.png", "sky")], "got the classes sky; need two or more"),
        (("labels", "x"), [("sky", "y")], "no column 'path'"),
    ],
)
def test_lists_that_are_wrong(root, header, rows, message):
    path = write_list(root / "l.csv", rows, header)
    with pytest.raises(DataError, match=message):
        load_data(config(path, multi_label=True, val_fraction=0.5))


def test_settings_for_one_class(root):
    write_list(root / "train.csv", NAMES, ("path", "labels"))
    write_list(root / "val.csv", NAMES, ("path", "labels"))
    with pytest.raises(
        ConfigError, match=r"label_noise: got 0.5; allowed for images of several classes is 0"
    ):
        read(root, label_noise=0.5)
    fill(root / "train", 2)
    fill(root / "val", 2)
    with pytest.raises(DataError, match=r"has no lists; images of several classes need ROOT/train.csv"):
        read(root)


def test_limits_and_resident_images(root):
    write_list(root / "train.csv", NAMES, ("path", "labels"))
    write_list(root / "val.csv", NAMES, ("path", "labels"))
    splits = read(root, train_limit=2, memory="resident")
    assert isinstance(splits.train, ImageSet)
    assert splits.train.labels.shape == (2, 3)
    (batch,) = make_loader(splits.train, 8, device="cpu").epoch(0)
    assert torch.equal(batch.label, splits.train.labels[batch.index])
    assert torch.equal(read(root, train_limit=2).train.labels, splits.train.labels)


def test_mixup_blends_the_labels():
    augment = Augment(AugmentConfig(mixup_alpha=1.0, padding=0), (0, 0, 0), (1, 1, 1), 3).train()
    image, label = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor(EXPECTED, dtype=torch.float32)
    draw = augment.draw(image, Draws(0, torch.arange(4)), torch.Generator().manual_seed(1))
    (mixed,) = augment.change([Batch(image, label, torch.arange(4))], [draw])
    w = draw.mix.weight.item()
    rows = np.array(EXPECTED)
    assert np.allclose(mixed.label.numpy(), w * rows + (1 - w) * rows[draw.mix.partner.numpy()])
