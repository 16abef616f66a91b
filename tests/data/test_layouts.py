"""Layouts of image files: names of splits, class folders alone, lists, and classes absent from a split."""

import csv
from collections import Counter

import pytest
import torch
from PIL import Image

from mdistiller.data import DataConfig, load_data
from mdistiller.data.labels import stratified_cut
from mdistiller.errors import ConfigError, DataError

CLASSES = ("ant", "bird", "cat")


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8)).save(path)


def fill(folder, count, classes=CLASSES):
    for name in classes:
        for i in range(count):
            write(folder / name / f"{name}_{i}.png")


def config(root, **settings):
    return DataConfig(**{"kind": "folder", "root": root, "image_size": 8, "memory": "stream", **settings})


def files(images):
    return {str(path) for path in images.samples}


# Names of splits


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "test", "Val", "VALID", "Test"])
@pytest.mark.parametrize("train", ["train", "Train", "TRAIN"])
def test_names_of_splits_in_any_case(tmp_path, train, name):
    fill(tmp_path / train, 3)
    fill(tmp_path / name, 1)
    splits = load_data(config(tmp_path))
    assert (len(splits.train), len(splits.test)) == (9, 3)
    assert all(f"/{name}/" in path for path in files(splits.test))


def test_the_test_split_is_kept_for_afterwards(tmp_path):
    for name, count in (("train", 3), ("validation", 1), ("Test", 2)):
        fill(tmp_path / name, count)
    assert all("/validation/" in path for path in files(load_data(config(tmp_path)).test))
    after = load_data(config(tmp_path, eval_split="test"))
    assert len(after.test) == 6
    assert all("/Test/" in path for path in files(after.test))
    fill(tmp_path / "val", 1)
    assert all("/val/" in path for path in files(load_data(config(tmp_path)).test))


def test_no_test_split(tmp_path):
    for name in ("train", "val"):
        fill(tmp_path / name, 2)
    with pytest.raises(DataError, match=r"eval_split: got 'test', but .* has no test split"):
        load_data(config(tmp_path, eval_split="test"))


# A cut


def test_class_folders_alone_are_cut(tmp_path):
    fill(tmp_path, 10)
    with pytest.raises(DataError, match=r"no train/: --data.val-fraction 0.1 takes a tenth"):
        load_data(config(tmp_path))
    splits = load_data(config(tmp_path, val_fraction=0.2))
    assert splits.classes == CLASSES
    assert splits.train.labels.bincount().tolist() == [8, 8, 8]
    assert splits.test.labels.bincount().tolist() == [2, 2, 2]
    assert not files(splits.train) & files(splits.test)
    assert len(files(splits.train) | files(splits.test)) == 30
    again, other = (load_data(config(tmp_path, val_fraction=0.2, seed=seed)) for seed in (0, 1))
    assert files(again.test) == files(splits.test) != files(other.test)
    # Limits and the evaluation of a run, which reads one training image, leave the cut as it is.
    limited = load_data(config(tmp_path, val_fraction=0.2, train_limit=1))
    assert files(limited.test) == files(splits.test)


def test_a_cut_beside_a_test_split(tmp_path):
    fill(tmp_path / "train", 10)
    fill(tmp_path / "test", 4)
    splits = load_data(config(tmp_path, val_fraction=0.1))
    assert (len(splits.train), len(splits.test)) == (27, 3)
    assert all("/train/" in path for path in files(splits.test))
    after = load_data(config(tmp_path, val_fraction=0.1, eval_split="test"))
    assert (len(after.train), len(after.test)) == (27, 12)
    fill(tmp_path / "valid", 1)
    with pytest.raises(ConfigError, match=r"val_fraction: got 0.1; .* has a validation split"):
        load_data(config(tmp_path, val_fraction=0.1))


def test_arrays_are_cut_too():
    whole = load_data(DataConfig(kind="digits"))
    splits = load_data(DataConfig(kind="digits", val_fraction=0.25))
    assert len(splits.train) + len(splits.test) == len(whole.train)
    after = load_data(DataConfig(kind="digits", val_fraction=0.25, eval_split="test"))
    assert torch.equal(after.test.images, whole.test.images)
    assert torch.equal(after.train.images, splits.train.images)


def test_a_cut_has_the_classes_in_proportion():
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [3])[torch.randperm(53)]
    for seed in range(20):
        train, validation = stratified_cut(labels, 0.1, seed)
        assert torch.cat([train, validation]).sort().values.tolist() == list(range(53))
        assert labels[validation].bincount().tolist() == [4, 1, 1]
    assert labels[stratified_cut(labels, 0.99, 0)[0]].bincount().tolist() == [1, 1, 1, 1]


# Classes absent from a split


def test_classes_without_a_test_image_are_named(tmp_path):
    fill(tmp_path / "train", 3)
    fill(tmp_path / "val", 1, ("bird",))
    (tmp_path / "val" / "cat").mkdir()
    with pytest.warns(UserWarning, match="2 of 3 classes have no test image: ant, cat$"):
        splits = load_data(config(tmp_path))
    assert splits.classes == CLASSES
    assert splits.test.labels.tolist() == [1]
    fill(tmp_path / "val", 1, ("dog",))
    with pytest.raises(DataError, match=r"only in .*train: ant, cat; only in .*val: dog"):
        load_data(config(tmp_path))


# Lists


def write_list(path, rows, header=("path", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows(root, folder, count, classes=CLASSES):
    fill(root / folder, count, classes)
    return [(f"{folder}/{name}/{name}_{i}.png", name) for i in range(count) for name in classes]


@pytest.mark.parametrize(
    "header", [("path", "label"), ("Image", "CLASS"), (" file ", "label"), ("filename", "class")]
)
def test_lists_for_each_split(tmp_path, header):
    write_list(tmp_path / "Train.csv", rows(tmp_path, "pictures", 4), header)
    write_list(tmp_path / "valid.csv", rows(tmp_path, "others", 1), header)
    write_list(tmp_path / "test.CSV", rows(tmp_path, "last", 2), header)
    splits = load_data(config(tmp_path))
    assert splits.classes == CLASSES
    for images, folder, count in ((splits.train, "pictures", 12), (splits.test, "others", 3)):
        assert len(images) == count
        for path, label in zip(images.samples, images.labels.tolist(), strict=True):
            assert path.is_relative_to(tmp_path / folder / CLASSES[label])
    assert len(load_data(config(tmp_path, eval_split="test")).test) == 6


def test_one_list_is_cut(tmp_path):
    lines = [(str(tmp_path / name), label) for name, label in rows(tmp_path, "pictures", 5)]
    path = write_list(
        tmp_path / "lists" / "all.csv", [("7", *line) for line in lines], ("id", "path", "label")
    )
    with pytest.raises(DataError, match=r"all.csv is a list without a validation split: --data.val-fraction"):
        load_data(config(path))
    splits = load_data(config(path, val_fraction=0.2))
    assert splits.train.labels.bincount().tolist() == [4, 4, 4]
    assert splits.test.labels.bincount().tolist() == [1, 1, 1]


def test_the_order_of_lines_changes_nothing(tmp_path):
    lines = rows(tmp_path, "pictures", 5)
    one = write_list(tmp_path / "one.csv", lines)
    other = write_list(tmp_path / "other.csv", lines[::-1])
    ours, theirs = (load_data(config(path, val_fraction=0.2)) for path in (one, other))
    assert list(map(str, ours.train.samples)) == list(map(str, theirs.train.samples))


def test_numbers_are_sorted_as_numbers(tmp_path):
    fill(tmp_path, 2, ("a",))
    lines = [(f"a/a_{i}.png", str(label)) for label in (10, 9, 0) for i in range(2)]
    splits = load_data(config(write_list(tmp_path / "l.csv", lines), val_fraction=0.5))
    assert splits.classes == ("0", "9", "10")
    lines += [("a/a_0.png", "x")]
    with pytest.warns(UserWarning, match="1 of 4 classes have no test image: x"):
        assert load_data(config(write_list(tmp_path / "l.csv", lines), val_fraction=0.5)).classes[1:3] == (
            "10",
            "9",
        )


def test_class_folders_come_before_lists(tmp_path):
    """Many sets have lists as metadata beside their class folders."""
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 1)
    write_list(tmp_path / "train.csv", [("nowhere", "x")])
    assert load_data(config(tmp_path)).classes == CLASSES


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        (("path", "label"), [], "lists no image"),
        (
            ("a", "label"),
            [],
            r"no column 'path'; allowed: path, image, file, filename \(columns there: a, label",
        ),
        (("path", "b"), [], "no column 'label'; allowed: label, class"),
        (("path", "label"), [("a/a_0.png", "")], r"no image in .*l\.csv has a class"),
        (
            ("path", "label"),
            [("a/a_0.png", "x"), (), ("", "y")],
            "line 4: got path '' and label 'y'; need a path",
        ),
        (("path", "label"), [("no.png", "x"), ("a/a_0.png", "x")], "1 of 2 images are missing: .*no.png"),
        (("path", "label"), [("a/a_0.png", "x"), ("a/a_1.png", "x")], "got one class, 'x'"),
    ],
)
def test_lists_that_are_wrong(tmp_path, header, lines, message):
    fill(tmp_path, 2, ("a",))
    path = write_list(tmp_path / "l.csv", lines, header)
    with pytest.raises(DataError, match=message):
        load_data(config(path, val_fraction=0.5))


def test_missing_files_are_left_out_on_request(tmp_path):
    lines = [*rows(tmp_path, "pictures", 4), ("no.png", "ant")]
    path = write_list(tmp_path / "l.csv", lines)
    with pytest.warns(UserWarning, match="left out: 1 of 13 images are missing: .*no.png"):
        splits = load_data(config(path, val_fraction=0.25, on_error="skip"))
    assert Counter(splits.train.labels.tolist()) == {0: 3, 1: 3, 2: 3}
    with pytest.raises(DataError, match="1 of 1 images are missing"):
        load_data(config(write_list(path, [("no.png", "ant")]), val_fraction=0.25, on_error="skip"))


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match=r"l\.csv cannot be read"):
        load_data(config(tmp_path / "l.csv", val_fraction=0.5))
