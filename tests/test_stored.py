"""A teacher whose outputs were computed elsewhere."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mdistiller
from mdistiller import Distiller, Outputs, StoredTeacher, functional
from mdistiller.data import DataConfig, load_data
from mdistiller.errors import CheckpointError, ConfigError, DataError
from mdistiller.stored import read_outputs, write_outputs
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.task import ClassificationTask

SMALL = {"epochs": 1, "device": "cpu", "layout": "contiguous", "batch_size": 20, "seed": 3}


def student(classes=5):
    torch.manual_seed(0)
    return mdistiller.create_model("resnet8", num_classes=classes)


def a_batch():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 5, generator=generator) * 3
    images = torch.randn(4, 3, 32, 32, generator=generator)
    return logits, images, torch.tensor([0, 1, 2, 3]), torch.tensor([6, 0, 3, 7])


def test_rows_are_looked_up_by_the_positions_of_the_samples():
    logits, images, labels, index = a_batch()
    distiller = Distiller(student(), StoredTeacher({"logits": logits}), "dkd", total_steps=10)
    out = distiller(images, labels, index, progress=1.0)
    expected = functional.dkd_loss(out.logits, logits[index], labels)
    assert sum(v for k, v in out.losses.items() if k != "task").item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_without_positions_it_is_an_error():
    logits, images, labels, _ = a_batch()
    distiller = Distiller(student(), StoredTeacher({"logits": logits}), "kd")
    with pytest.raises(ConfigError, match="stored by position in the training set"):
        distiller(images, labels)
    with pytest.raises(ConfigError, match="positions 0 to 8; the stored outputs have 8 rows"):
        distiller(images, labels, torch.tensor([0, 1, 2, 8]))


def test_a_loop_may_give_the_outputs_of_each_batch():
    logits, images, labels, index = a_batch()
    stored = Distiller(student(), StoredTeacher({"logits": logits}), "kd")(images, labels, index)
    given = Distiller(student(), None, "kd", classes=5)
    assert given(images, labels, outputs=Outputs(logits[index], {})).loss == stored.loss
    with pytest.raises(ConfigError, match="outputs=Outputs"):
        given(images, labels, index)


def test_features_are_taps():
    logits, images, labels, index = a_batch()
    feature = torch.randn(8, 48)
    teacher = StoredTeacher({"logits": logits, "embedding": feature})
    taps = {"student_taps": ("pooled",), "teacher_taps": ("embedding",)}
    distiller = Distiller(student(), teacher, "pkt", **taps)
    assert (
        distiller.asked(mdistiller.Batch(images, labels, index)).features["embedding"].equal(feature[index])
    )
    assert distiller(images, labels, index).loss.isfinite()


def test_what_the_most_likely_classes_leave_is_shared_by_the_others():
    probabilities = np.array([[0.6, 0.3, 0.02, 0.08, 0.0], [0.1, 0.2, 0.5, 0.1, 0.1]])
    ids = np.array([[0, 1], [2, 1]])
    top = np.log(np.take_along_axis(probabilities, ids, 1))
    teacher = StoredTeacher({"top_log_probs": top, "top_ids": ids}, classes=5)
    rows = teacher(mdistiller.Batch(torch.zeros(2, 1), torch.zeros(2), torch.arange(2))).logits
    expected = np.array([[0.6, 0.3, 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.1, 0.2, 0.5, 0.1, 0.1]])
    np.testing.assert_allclose(rows.softmax(1).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "without logits"),
        ({"logits": [1.0, 2.0]}, r"'logits' of shape \[2\]"),
        ({"logits": [[1.0, math.nan]]}, "not finite"),
        ({"logits": [[1.0], [1.0, 2.0]]}, "logits' is no array of numbers: .*needed: logits"),
        ({"logits": [[1.0, 2.0]], "pooled": [[1.0], [2.0]]}, "'logits': 1, 'pooled': 2"),
        ({"logits": [[1.0, 2.0]], "names": ["a", "b"]}, "'names': 2"),
        ({"logits": [[1.0, 2.0]] * 2, "names": ["a", "a"]}, "come twice: a"),
        ({"top_log_probs": [[-1.0]], "top_ids": [[3]]}, r"0 \.\.\. 2"),
        ({"top_log_probs": [[-1.0, -1.0]], "top_ids": [[1, 1]]}, "different classes"),
        ({"top_log_probs": [[2.0]], "top_ids": [[1]]}, "sum to 7.389"),
    ],
)
def test_wrong_entries_are_errors(outputs, message):
    with pytest.raises(ConfigError, match=message):
        StoredTeacher(outputs, classes=3)


@pytest.fixture
def folder(tmp_path):
    """Images of two colors in class folders, and a name and logits for each training image."""
    rng = np.random.default_rng(0)
    names, logits = [], []
    for split, count in (("train", 20), ("val", 5)):
        for label, name in enumerate(("blue", "red")):
            for i in range(count):
                file = tmp_path / "data" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 * (1 - label)] += 150
                Image.fromarray(pixels).save(file)
                if split == "train":
                    names.append(f"{name}/{i}.png")
                    logits.append([4.0, 0.0] if label == 0 else [0.0, 4.0])
    return tmp_path / "data", names, np.array(logits, np.float32)


def write(kind, path, names, logits):
    order = np.random.default_rng(1).permutation(len(names))
    names, logits = [names[i] for i in order], logits[order]
    if kind == "npz":
        np.savez(path, names=names, logits=logits)
    else:
        table = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(table.table({"path": names, "output": logits.tolist()}), path)


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_a_run_matches_rows_with_files_by_name(folder, tmp_path, kind):
    root, names, logits = folder
    path = tmp_path / f"outputs.{kind}"
    write(kind, path, names, logits)
    teacher = read_outputs(path).fit(
        mdistiller.data.load_data(mdistiller.data.DataConfig(kind="folder", root=root, image_size=32)).train
    )
    assert teacher.stored.row_logits.argmax(1).tolist() == [0] * 20 + [1] * 20


def test_python_takes_the_teacher_as_an_object(tmp_path):
    logits = torch.randn(100, 10)
    settings = SMALL | {"out": tmp_path / "run"}
    run = mdistiller.distill(
        "resnet8",
        StoredTeacher({"logits": logits}),
        {"kind": "digits", "train_limit": 100, "test_limit": 50},
        "kd",
        **settings,
    )
    assert len(run.metrics) == 3
    wrong = StoredTeacher({"logits": logits[:99]})
    with pytest.raises(ConfigError, match="99 rows without names; the data has 100"):
        mdistiller.distill(
            "resnet8",
            wrong,
            {"kind": "digits", "train_limit": 100},
            "kd",
            **SMALL | {"out": tmp_path / "other"},
        )


def test_images_that_depend_on_their_batch_are_refused(tmp_path):
    teacher = StoredTeacher({"logits": torch.randn(100, 10)})
    with pytest.raises(ConfigError, match=r"teacher_outputs: .*mixup_alpha"):
        mdistiller.distill(
            "resnet8",
            teacher,
            {"kind": "digits", "train_limit": 100},
            "kd",
            augment={"mixup_alpha": 0.2},
            **SMALL | {"out": tmp_path / "run"},
        )


def test_names_that_do_not_fit_are_errors(folder, tmp_path):
    root, names, logits = folder
    images = mdistiller.data.load_data(
        mdistiller.data.DataConfig(kind="folder", root=root, image_size=32)
    ).train
    with pytest.raises(ConfigError, match="1 of 40 training images have no name of their own"):
        StoredTeacher({"logits": logits[1:], "names": names[1:]}).fit(images)
    short = [name.rpartition("/")[2] for name in names[:20]]
    with pytest.raises(ConfigError, match=r"several images have the name '0\.png'"):
        StoredTeacher({"logits": logits[:20], "names": short}).fit(images)


def test_unreadable_files_are_errors(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"broken\.npz cannot be read"):
        read_outputs(tmp_path / "broken.npz")
    with pytest.raises(ConfigError, match=r"allowed are files \.npz, \.safetensors, \.parquet"):
        read_outputs(tmp_path / "outputs.csv")
    save_file({"logits": torch.eye(3)}, tmp_path / "good.safetensors")
    assert len(read_outputs(tmp_path / "good.safetensors")) == 3


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
def test_columns_follow_the_names_of_the_classes(tmp_path, suffix):
    for split in ("train", "val"):
        for name in "abc":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / split / name / "0.png")
    data = load_data(DataConfig(kind="folder", root=tmp_path / "data", image_size=32))
    logits = np.arange(9, dtype=np.float32).reshape(3, 3)
    file = tmp_path / f"outputs.{suffix}"

    def teacher(classes):
        write_outputs(file, {"logits": logits, **({} if classes is None else {"classes": classes})})
        config = {"student": "resnet8", "method": "kd", "teacher": {"name": "stored", "checkpoint": file}}
        return ClassificationTask().build_teacher(ClassificationConfig.model_validate(config), data)

    def rows(found):
        return found(mdistiller.Batch(torch.zeros(3, 1), torch.zeros(3), torch.arange(3))).logits.numpy()

    np.testing.assert_array_equal(rows(teacher(None)), logits)
    np.testing.assert_array_equal(rows(teacher(["a", "b", "c"])), logits)
    with pytest.warns(UserWarning, match="its classes were put into the data's order, by their names"):
        moved = rows(teacher(["c", "a", "b"]))
    np.testing.assert_array_equal(moved, logits[:, [1, 2, 0]])
    with pytest.raises(CheckpointError, match="only in the data: c; only in the model: d"):
        teacher(["a", "b", "d"])
    for wrong in (["a", "b"], ["a", "a", "b"]):
        with pytest.raises(ConfigError, match="a name of its own for each column"):
            teacher(wrong)
