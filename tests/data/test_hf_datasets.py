"""Data sets of Hugging Face's `datasets`, saved by that package, held against the images that went in."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import mdistiller
from mdistiller.cli.main import run as command
from mdistiller.data import DataConfig, load_data, make_loader
from mdistiller.data.identity import identity
from mdistiller.errors import ConfigError, DataError, UnknownNameError
from mdistiller.report import runs

datasets = pytest.importorskip("datasets")
CLASSES = ["apple", "bee", "cat"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Parquet files are converted below the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (20, 20, 3), dtype=np.uint8) for _ in range(count)]


def table(count, seed=0, labels=None, kind=None, **more):
    labels = [i % 3 for i in range(count)] if labels is None else labels
    features = {"image": datasets.Image(), "label": kind or datasets.ClassLabel(names=CLASSES)}
    columns = {"image": [Image.fromarray(p) for p in pictures(count, seed)], "label": labels}
    for name, (values, feature) in more.items():
        columns[name], features[name] = values, feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def save(root, form, **splits):
    if form == "arrow":
        datasets.DatasetDict(splits).save_to_disk(root)
    else:
        root.mkdir()
        for name, rows in splits.items():
            rows.to_parquet(root / f"{name}-00000-of-00001.parquet")
    return root


def config(root, **changes):
    return DataConfig(kind="hf", root=root, image_size=20, workers=0, **changes)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_images_and_labels_are_those_that_were_saved(tmp_path, form):
    root = save(tmp_path / "set", form, train=table(7), test=table(5, seed=1))
    splits = load_data(config(root))
    assert splits.classes == tuple(CLASSES)
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    np.testing.assert_array_equal(splits.train.images.numpy(), np.stack(pictures(7)))
    np.testing.assert_array_equal(splits.test.images.numpy(), np.stack(pictures(5, seed=1)))


@pytest.mark.parametrize("name", ["{split}/{k:06}.tar", "set-{split}-{k:06}.tar"])
def test_tar_shards_have_the_images_and_labels_that_were_packed(tmp_path, name):
    found = {"train": pictures(8), "val": pictures(5, seed=1)}
    for split, images in found.items():
        for k in range(2):
            path = tmp_path / name.format(split=split, k=k)
            path.parent.mkdir(exist_ok=True)
            with tarfile.open(path, "w") as tar:
                for i in range(k, len(images), 2):
                    png = io.BytesIO()
                    Image.fromarray(images[i]).save(png, "PNG")
                    for end, blob in (("png", png.getvalue()), ("cls", str(i % 3).encode())):
                        info = tarfile.TarInfo(f"{i:04}.{end}")
                        info.size = len(blob)
                        tar.addfile(info, io.BytesIO(blob))
    splits = load_data(config(tmp_path))
    assert splits.classes == ("0", "1", "2")
    for split, images in found.items():
        order = [*range(0, len(images), 2), *range(1, len(images), 2)]
        ours = splits.train if split == "train" else splits.test
        assert ours.labels.tolist() == [i % 3 for i in order]
        np.testing.assert_array_equal(ours.images.numpy(), np.stack(images)[order])


def test_a_cut_shard_is_one_sentence(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"0" * 700)
    with pytest.raises(DataError, match="cannot be read"):
        load_data(config(tmp_path))


def test_larger_images_are_read_in_worker_processes(tmp_path):
    root = save(tmp_path / "set", "arrow", train=table(6), test=table(3))
    found = load_data(config(root, memory="stream", train_limit=3).replace(workers=2))
    loader = make_loader(found.test, 3, workers=2, device="cpu", shuffle=False)
    (batch,) = loader.epoch(0)
    np.testing.assert_array_equal(batch.image.numpy(), np.stack(pictures(3)))
    broken = found.train.select(torch.tensor([0]))
    object.__setattr__(broken, "encoded", lambda i: torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(DataError, match="set/train/row 0 cannot be read"):
        broken.read(0, 0)


def test_selected_rows_are_read_through_their_indices(tmp_path):
    order = [8, 4, 3, 2, 1, 0]
    rows = table(9).select(order)
    rows.save_to_disk(tmp_path / "one")
    splits = load_data(config(tmp_path / "one", val_fraction=0.5))
    assert len(splits.train) + len(splits.test) == 6
    kept = {p.tobytes() for p in np.stack(pictures(9))[order]}
    assert {p.numpy().tobytes() for part in (splits.train, splits.test) for p in part.images} == kept


LABELS = {
    "names": (["x", "y", "x", None], datasets.Value("string"), ("x", "y"), [0, 1, 0, -100]),
    "numbers": ([10, 2, 10, -1], datasets.Value("int64"), ("2", "10"), [1, 0, 1, -100]),
    "class names": ([2, 0, -1, 1], None, tuple(CLASSES), [2, 0, -100, 1]),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(tmp_path, case):
    labels, kind, classes, expected = LABELS[case]
    rows = table(4, labels=labels, kind=kind)
    known = [i for i, label in enumerate(expected) if label != -100]
    splits = load_data(config(save(tmp_path / "set", "arrow", train=rows, test=rows.select(known))))
    assert splits.classes == classes
    assert splits.train.labels.tolist() == expected


def test_each_split_names_its_own_classes(tmp_path):
    train = table(4, labels=[2, 0, 1, 0])
    test = table(3, labels=[2, 0, 1], kind=datasets.ClassLabel(names=["cat", "apple", "bee"]))
    splits = load_data(config(save(tmp_path / "set", "arrow", train=train, test=test)))
    assert splits.classes == tuple(CLASSES)
    assert splits.train.labels.tolist() == [2, 0, 1, 0]
    assert splits.test.labels.tolist() == [1, 2, 0], "bee, cat, apple"


def test_a_row_without_an_image_is_unreadable(tmp_path):
    rows = table(6).to_dict()
    rows["image"][4] = None
    train = datasets.Dataset.from_dict(rows, features=table(6).features)
    root = save(tmp_path / "set", "arrow", train=train, test=table(3))
    with pytest.raises(DataError, match=r"train/row 4 cannot be read: the row has no image"):
        load_data(config(root))
    with pytest.warns(UserWarning, match=r"left out: 1 of 6 images cannot be read: .*row 4"):
        splits = load_data(config(root, on_error="skip"))
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 2]


def test_columns_are_found_or_named(tmp_path):
    extra = {
        "coarse_label": ([0, 1, 0, 1], datasets.ClassLabel(names=["a", "b"])),
        "depth": ([Image.fromarray(p) for p in pictures(4, 5)], datasets.Image()),
    }
    rows = table(4, **extra)
    root = save(tmp_path / "set", "arrow", train=rows, test=rows)
    with pytest.raises(
        DataError, match=r"has 2 columns of images \(image, depth\), need one or --data.image-"
    ):
        load_data(config(root))
    found = load_data(config(root, image_column="depth", label_column="coarse_label"))
    assert found.classes == ("a", "b")
    np.testing.assert_array_equal(found.train.images.numpy(), np.stack(pictures(4, 5)))
    with pytest.raises(
        UnknownNameError, match=r"unknown column of images in data.image_column 'imagee'; nearest: image"
    ):
        load_data(config(root, image_column="imagee"))
    with pytest.raises(UnknownNameError, match=r"unknown column in data.label_column 'labl'; nearest: label"):
        load_data(config(root, image_column="image", label_column="labl"))


def test_wrong_sets_are_one_sentence(tmp_path, monkeypatch):
    rows = table(4)
    with pytest.raises(DataError, match=r"is no folder; kind hf reads"):
        load_data(config(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"has no data set of save_to_disk, no Parquet files and no tar shards"
    ):
        load_data(config(tmp_path / "empty"))
    with pytest.raises(
        DataError, match=r"has no split val, valid, validation, dev, test: --data.val-fraction"
    ):
        load_data(config(save(tmp_path / "alone", "arrow", train=rows)))
    with pytest.raises(DataError, match=r"has no split train; splits there: test"):
        load_data(config(save(tmp_path / "test", "arrow", test=rows)))
    lists = table(2, labels=[[0], [1]], kind=[datasets.Value("int64")])
    with pytest.raises(DataError, match=r"column 'label' has values of type list; allowed are class ids"):
        load_data(config(save(tmp_path / "lists", "arrow", train=lists, test=lists)))
    own = table(2, labels=["x", "y"], kind=datasets.Value("string"))
    other = table(2, labels=["x", "z"], kind=datasets.Value("string"))
    with pytest.raises(DataError, match=r"split validation has classes of its own: z"):
        load_data(config(save(tmp_path / "own", "arrow", train=own, test=other)))
    (tmp_path / "alone" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match="alone cannot be read"):
        load_data(config(tmp_path / "alone", val_fraction=0.5))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"data.kind: hf needs datasets: pip install datasets"):
        load_data(config(tmp_path / "alone"))


def test_the_identity_follows_from_the_images(tmp_path):
    first = load_data(config(save(tmp_path / "a", "arrow", train=table(6), test=table(3)), memory="stream"))
    moved = load_data(config((tmp_path / "a").rename(tmp_path / "b"), memory="stream"))
    other = load_data(
        config(save(tmp_path / "c", "arrow", train=table(6, 9), test=table(3)), memory="stream")
    )
    assert identity(first.train) == identity(moved.train) != identity(other.train)


def test_a_run_is_trained_resumed_evaluated_and_predicts(tmp_path, capsys):
    root = save(tmp_path / "set", "arrow", train=table(24), validation=table(6))
    words = ["train", "folder.student.resnet8", "--data.kind", "hf", "--data.root", str(root)]
    words += ["--data.image-size", "20", "--epochs", "1", "--batch-size", "8", "--out", str(tmp_path / "run")]
    words += ["--data.workers", "0", "--device", "cpu"]
    assert command(words) == 0
    assert command(["eval", str(tmp_path / "run"), "--json"]) == 0
    assert '"images": 6' in capsys.readouterr().out
    Image.fromarray(pictures(1)[0]).save(tmp_path / "x.png")
    assert command(["predict", str(tmp_path / "run"), str(tmp_path / "x.png"), "--json"]) == 0
    assert "apple" in capsys.readouterr().out
    assert mdistiller.Run(tmp_path / "run").config.data.kind == "hf"
    # Photographs are prepared as in evaluation, of which the card says how; a set has its folder's name.
    assert command(["export", str(tmp_path / "run"), "--no-eval", "--out", str(tmp_path / "out")]) == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["resize"], card["data"]["name"]) == (20, "set")
    assert runs.load_run(tmp_path / "run").test_set == "set"
