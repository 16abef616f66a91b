"""`--teacher-outputs FILE`: a teacher whose outputs were computed elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mdistiller
from mdistiller.data import DataConfig, load_data
from mdistiller.errors import DataError
from mdistiller.stored import image_names, read_outputs


def test_the_command_trains_from_a_file(cli, tmp_path):
    rng, names, logits = np.random.default_rng(0), [], []
    for split, count in (("train", 20), ("val", 5)):
        for i in range(2 * count):
            label = i % 2
            file = tmp_path / "data" / split / "ab"[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(file)
            if split == "train":
                names.append(f"{'ab'[label]}/{i}.png")
                logits.append([4.0 * (label == 0), 4.0 * (label == 1)])
    np.savez(tmp_path / "outputs.npz", names=names[::-1], logits=logits[::-1])
    args = ["train", "folder.kd.resnet8", "--data.root", tmp_path / "data", "--data.image-size", "32"]
    args += ["--epochs", "4", "--batch-size", "10", "--device", "cpu", "--layout", "contiguous"]
    # The teacher alone tells the classes.
    args += ["--method.task-weight", "0", "--teacher-outputs", tmp_path / "outputs.npz"]
    done = cli(*args, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    run = mdistiller.Run(tmp_path / "run")
    assert run.summary["best"]["top1"] == 100.0
    assert run.config.teacher.name == "stored"
    assert cli("report", tmp_path / "run", "--out", tmp_path / "report.html").code == 0
    done = cli(*args, "--teacher", "resnet20")
    assert done.code == 2
    assert "in place of --teacher" in done.message


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A run with a teacher and a cache with one view of each image, and its folder of images."""
    folder = tmp_path_factory.mktemp("cached")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for i in range(3 * count):
            file = folder / "data" / split / "abc"[i % 3] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
    data = {"kind": "folder", "root": folder / "data", "image_size": 32}
    torch.manual_seed(0)
    settings = {"epochs": 2, "batch_size": 12, "device": "cpu", "layout": "contiguous", "seed": 3}
    settings |= {"augment": {"crop": "padded", "padding": 0, "flip": False}}
    cache = {
        "teacher_cache": folder / "cache",
        "teacher_cache_format": "fp16",
        "teacher_cache_taps": ["pooled"],
    }
    alone = mdistiller.distill("resnet8", None, data, "none", out=folder / "teacher", **settings)
    run = mdistiller.distill("resnet8", alone, data, "dkd", out=folder / "run", **settings, **cache)
    return run, data, settings


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
def test_a_run_from_exported_outputs_has_the_weights_of_the_cached_run(cli, cached, tmp_path, suffix):
    run, data, settings = cached
    file = tmp_path / f"outputs.{suffix}"
    done = cli("export", run.folder, "--teacher-outputs", file)
    assert done.code == 0, done.err
    assert "36 images" in done.out
    teacher = read_outputs(file)
    assert teacher.stored.names == ("pooled",)
    assert teacher.classes == ["a", "b", "c"]
    assert (teacher.names is None) == (suffix == "safetensors")
    again = mdistiller.distill("resnet8", teacher, data, "dkd", out=tmp_path / "run", **settings)
    ours, theirs = (load_file(each.folder / "student.safetensors") for each in (again, run))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert again.metrics[0]["loss"] == run.metrics[0]["loss"]


def test_the_most_likely_classes_alone_are_exported(cli, cached, tmp_path):
    run = cached[0]
    assert cli("export", run.folder, "--teacher-outputs", tmp_path / "all.npz").code == 0
    done = cli("export", run.folder, "--teacher-outputs", tmp_path / "top.npz", "--top", "2")
    assert done.code == 0, done.err
    whole, part = (np.load(tmp_path / f"{name}.npz") for name in ("all", "top"))
    logits = whole["logits"].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(part["top_log_probs"]), -np.sort(-probabilities, 1)[:, :2], rtol=1e-5)
    assert (part["top_ids"] == np.argsort(-probabilities, 1)[:, :2]).all()
    assert sorted(part["names"]) == sorted(f"{'abc'[i % 3]}/{i}.png" for i in range(36))
    assert "logits" not in part
    done = cli("export", run.folder, "--teacher-outputs", tmp_path / "x.npz", "--top", "4")
    assert (done.code, "top: got 4; allowed: 1 to 3" in done.message) == (2, True)


def test_what_a_cache_cannot_tell_is_an_error(cli, cached, tmp_path):
    run, data, settings = cached
    file = tmp_path / "outputs.npz"
    plain = settings | {"teacher_cache": None}
    without = mdistiller.distill("resnet8", run, data, "kd", out=tmp_path / "without", **plain)
    done = cli("export", without.folder, "--teacher-outputs", file)
    assert (done.code, "has no teacher cache" in done.message) == (2, True)
    views = settings | {"augment": {"crop": "padded", "padding": 0, "flip": True}, "epochs": 1}
    views["teacher_cache"] = tmp_path / "cache"
    flips = mdistiller.distill("resnet8", run, data, "kd", out=tmp_path / "flips", **views)
    done = cli("export", flips.folder, "--teacher-outputs", file)
    assert (done.code, "keeps 2 augmented views of each image" in done.message) == (2, True)
    done = cli("export", flips.folder, "--teacher-outputs", file, "--view", "2")
    assert (done.code, "view: got 2; allowed: 0 to 1" in done.message) == (2, True)
    done = cli("export", flips.folder, "--teacher-outputs", file, "--view", "1")
    assert (done.code, "lacks rows of view 1" in done.message) == (2, True)
    assert not file.exists()


def test_a_column_of_a_hugging_face_set_has_the_outputs(tmp_path):
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((12, 3)).astype(np.float32)
    columns = {
        "image": [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(12)],
        "label": [i % 3 for i in range(12)],
        "teacher": logits.tolist(),
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "set")
    data = DataConfig(kind="hf", root=tmp_path / "set", image_size=16, train_limit=6)
    splits = load_data(data)
    chosen = [int(name.rpartition(" ")[2]) for name in image_names(splits.train)]
    teacher = read_outputs(Path(f"{tmp_path / 'set'}:teacher"), 3).fit(splits.train)
    np.testing.assert_array_equal(teacher.stored.row_logits.numpy(), logits[chosen])
    with pytest.raises(DataError, match="no column 'techer'; columns there: image, label, teacher"):
        read_outputs(Path(f"{tmp_path / 'set'}:techer"), 3)
